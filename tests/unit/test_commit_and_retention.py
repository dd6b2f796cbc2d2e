"""The commit on a durable tier, and the deletion that races with it, on a real directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from sm_tiered import commit, layout, retention
from sm_tiered.checksum import digest_chunks
from sm_tiered.commit import Outcome
from sm_tiered.errors import KeyExistsError, KeyNotFoundError, RankFailedError
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.manifest import attempt_record_to_json, manifest_to_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Manifest, Part, Record
from sm_tiered.settings import LocalSettings
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier
from sm_tiered.tiers.local import LocalTier

FIRST = Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="00000001")
SECOND = Attempt(ordinal=2, utc_secs=1_700_000_001, nonce="00000002")
HOUR = 3600.0


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    return LocalTier(LocalSettings(name="disk", save=None, keep=Latest(n=1), path=str(tmp_path), fsync=False), "run")


def at(step: int, attempt: Attempt = FIRST) -> CheckpointId:
    return CheckpointId(attempt=attempt, step=step)


def no_files(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
    return {}


def upload(tier: LocalTier, checkpoint: CheckpointId, ranks: range = range(2), world: int = 2) -> None:
    for rank in ranks:
        data = f"{checkpoint} {rank}".encode()
        part = Part(name=layout.part_name(rank, 0), size=len(data), chunks=digest_chunks(memoryview(data)))
        tier.put_part(layout.in_dir(checkpoint, part.name), lambda data=data: iter([memoryview(data)]), len(data))
        record = Record(
            namespace="run",
            checkpoint=checkpoint,
            rank=rank,
            world=world,
            saved_at=float(checkpoint.step),
            parts=(part,),
        )
        tier.put(layout.in_dir(checkpoint, layout.record_name(rank)), record_to_json(record))


def committed(tier: LocalTier, *checkpoints: CheckpointId) -> None:
    for checkpoint in checkpoints:
        upload(tier, checkpoint)
        assert commit.try_commit(tier, checkpoint, world=2, compose=no_files) is Outcome.COMMITTED


def names(tier: LocalTier, checkpoint: CheckpointId) -> list[str]:
    directory = layout.checkpoint_dir(checkpoint)
    return [entry.key.removeprefix(f"{directory}/") for entry in tier.list(f"{directory}/")]


def prune(tier: LocalTier, n: int, attempt: Attempt = FIRST, secs: float = HOUR) -> list[CheckpointId]:
    planned = retention.plan(tier, Latest(n=n), attempt=attempt, in_flight_secs=secs)
    return retention.apply(tier, "run", planned)


# ---- commit


def test_a_checkpoint_is_not_committed_before_all_records_are_there(tier: LocalTier) -> None:
    upload(tier, at(5), ranks=range(1))
    assert commit.try_commit(tier, at(5), world=2, compose=no_files) is Outcome.WAITING
    assert read_manifest(tier, at(5)) is None


def test_two_committers_commit_once_and_both_hear_of_success(tier: LocalTier) -> None:
    upload(tier, at(5))

    def meanwhile(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        assert commit.try_commit(tier, at(5), world=2, compose=no_files) is Outcome.COMMITTED
        return {}

    assert commit.try_commit(tier, at(5), world=2, compose=meanwhile) is Outcome.COMMITTED


def test_the_files_for_other_readers_stand_before_the_manifest(tier: LocalTier) -> None:
    upload(tier, at(5))

    def compose(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        assert read_manifest(tier, at(5)) is None
        return {layout.INDEX: b"{}"}

    commit.try_commit(tier, at(5), world=2, compose=compose)
    assert layout.INDEX in names(tier, at(5))


@pytest.mark.parametrize(("buried", "outcome"), [(True, Outcome.DELETED), (False, Outcome.WAITING)])
def test_a_file_that_is_deleted_while_a_late_committer_compares_it_is_no_failure(
    tier: LocalTier, buried: bool, outcome: Outcome
) -> None:
    upload(tier, at(5))
    gone = Fault(operations=frozenset({"get"}), key=layout.INDEX, error=lambda: KeyNotFoundError("deleted"))

    def meanwhile(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        tier.put(layout.in_dir(at(5), layout.INDEX), b"{}")
        if buried:
            tomb = Manifest(namespace="run", checkpoint=at(5), world=2, saved_at=0.0, tombstone=True)
            tier.put(layout.in_dir(at(5), layout.MANIFEST), manifest_to_json(tomb))
        return {layout.INDEX: b"{}"}

    late = FaultyTier(tier, FaultPlan(faults=(gone,)))
    assert commit.try_commit(late, at(5), world=2, compose=meanwhile) is outcome
    assert late.plan.fired


def test_another_manifest_in_its_place_is_no_success(tier: LocalTier) -> None:
    upload(tier, at(5))

    def meanwhile(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        other = Manifest(namespace="run", checkpoint=at(5), world=1, saved_at=1.0, records={0: "0" * 32})
        tier.put_if_absent(layout.in_dir(at(5), layout.MANIFEST), manifest_to_json(other))
        return {}

    with pytest.raises(KeyExistsError):
        commit.try_commit(tier, at(5), world=2, compose=meanwhile)


def test_a_failed_rank_ends_the_wait(tier: LocalTier) -> None:
    upload(tier, at(5), ranks=range(1))
    failed = Record(namespace="run", checkpoint=at(5), rank=1, world=2, saved_at=0.0, failed="no space")
    tier.put(layout.in_dir(at(5), layout.record_name(1)), record_to_json(failed))
    with pytest.raises(RankFailedError, match="no space"):
        commit.try_commit(tier, at(5), world=2, compose=no_files)


# ---- retention


def test_old_checkpoints_go_and_the_newest_stay(tier: LocalTier) -> None:
    committed(tier, at(5), at(10), at(15))
    assert prune(tier, 2) == [at(5)]
    assert names(tier, at(5)) == [layout.MANIFEST]
    assert len(names(tier, at(10))) == 5


def test_a_late_committer_finds_the_tombstone_and_gives_up(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    assert prune(tier, 1) == [at(5)]
    upload(tier, at(5))
    assert commit.try_commit(tier, at(5), world=2, compose=no_files) is Outcome.DELETED


def test_a_tombstone_that_comes_in_between_stops_the_commit(tier: LocalTier) -> None:
    upload(tier, at(5))

    def meanwhile(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        grave = Manifest(namespace="run", checkpoint=at(5), world=1, saved_at=0.0, tombstone=True)
        tier.put_if_absent(layout.in_dir(at(5), layout.MANIFEST), manifest_to_json(grave))
        return {}

    assert commit.try_commit(tier, at(5), world=2, compose=meanwhile) is Outcome.DELETED


def test_a_deletion_that_was_cut_short_is_finished(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    grave = Manifest(namespace="run", checkpoint=at(5), world=2, saved_at=5.0, parts={"weights.bin": 3}, tombstone=True)
    tier.put(layout.in_dir(at(5), "weights.bin"), b"abc")
    tier.put(layout.in_dir(at(5), layout.MANIFEST), manifest_to_json(grave))
    prune(tier, 3)
    assert names(tier, at(5)) == [layout.MANIFEST]


def test_a_drainer_of_an_older_attempt_deletes_nothing(tier: LocalTier) -> None:
    committed(tier, at(5), at(10), at(1, SECOND))
    planned = retention.plan(tier, Latest(n=1), attempt=FIRST, in_flight_secs=HOUR)
    assert planned == retention.Plan(newer=SECOND)


def test_a_newer_attempt_is_known_by_its_record_alone(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    record = AttemptRecord(namespace="run", attempt=SECOND, parent=None, chosen=False)
    tier.put(layout.attempt_key(SECOND), attempt_record_to_json(record))
    assert prune(tier, 1) == []


def test_the_abandoned_timeline_stays_until_the_newest_attempt_is_durable(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    upload(tier, at(6, SECOND))
    assert prune(tier, 1, SECOND) == []
    commit.try_commit(tier, at(6, SECOND), world=2, compose=no_files)
    assert prune(tier, 1, SECOND) == [at(5), at(10)]


def test_the_checkpoint_that_an_attempt_began_from_is_never_deleted(tier: LocalTier) -> None:
    committed(tier, at(5), at(10), at(6, SECOND), at(7, SECOND))
    record = AttemptRecord(namespace="run", attempt=SECOND, parent=at(5), chosen=True)
    tier.put(layout.attempt_key(SECOND), attempt_record_to_json(record))
    assert prune(tier, 1, SECOND) == [at(10), at(6, SECOND)]
    assert at(5) in list_checkpoints(tier)


def test_a_pinned_checkpoint_is_never_deleted(tier: LocalTier) -> None:
    committed(tier, at(5), at(10), at(15))
    tier.put(f"pins/{layout.checkpoint_dir(at(5))}.json", b"{}")
    assert prune(tier, 1) == [at(10)]


def test_a_file_that_nobody_recorded_is_left_alone(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    tier.put(layout.in_dir(at(5), "notes.txt"), b"mine")
    prune(tier, 1)
    assert "notes.txt" in names(tier, at(5))


def test_what_is_in_flight_is_left_alone_and_what_never_ended_goes_in_time(tier: LocalTier) -> None:
    upload(tier, at(5), ranks=range(1))
    committed(tier, at(10))
    assert prune(tier, 1, secs=HOUR) == []
    assert prune(tier, 1, secs=-1.0) == [at(5)]
    assert names(tier, at(5)) == [layout.MANIFEST]


def test_a_manifest_that_can_t_be_read_is_not_ours_to_delete(tier: LocalTier) -> None:
    committed(tier, at(5), at(10))
    tier.put(layout.in_dir(at(5), layout.MANIFEST), b"{")
    assert prune(tier, 1, secs=-1.0) == []
    assert len(names(tier, at(5))) == 5


def test_the_last_durable_checkpoint_is_never_deleted(tier: LocalTier) -> None:
    committed(tier, at(5))
    assert prune(tier, 1) == []
