"""Where the HyperPod tier writes: namespaces large enough, steps in the order of attempts, and nothing of others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sm_tiered import layout
from sm_tiered.errors import TierFullError, TierRefusedError, TierUnavailableError
from sm_tiered.inventory import list_checkpoints, read_attempts, read_holding
from sm_tiered.manifest import attempt_record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon, StoredNamespace, shard_meta
from sm_tiered.testing.daemon_memory import StoredBlob
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_sharing import (
    FIRST,
    SECOND,
    THIRD,
    at,
    attempt_record,
    bare,
    data_of,
    read,
    save,
    share,
)

WIRE = 10**10
KEPT = 5
"""`Latest(2)` and three more."""


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as daemon:
        yield daemon


@pytest.fixture
def tier(daemon: StandInDaemon) -> Iterator[HyperPodTier]:
    tier = bare(daemon.url)
    yield tier
    tier.close()


def whole(tier: HyperPodTier, checkpoint: CheckpointId) -> bool:
    return read_holding(tier, checkpoint, durable=True).problem is None


def foreign(data: bytes = b"\x80\x04another program's") -> StoredBlob:
    return StoredBlob(data=bytearray(data), size=len(data), meta=shard_meta(data))


# ---- namespaces


def test_a_namespace_has_a_slot_more_than_ranks_and_three_steps_more_than_are_kept(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 3, 100)
    found = daemon.namespaces["run"]
    assert (list(daemon.namespaces), found.num_ranks, found.steps_retained) == (["run"], 4, KEPT)


@pytest.mark.parametrize(
    ("before", "after", "namespaces"),
    [(2, 1, ["run"]), (4, 2, ["run"]), (2, 3, ["run", "run__2"]), (1, 4, ["run", "run__2"])],
)
def test_a_job_of_another_size_reads_what_was_and_finds_room(
    daemon: StandInDaemon, tier: HyperPodTier, before: int, after: int, namespaces: list[str]
) -> None:
    save(tier, at(FIRST, 10), before, 100, 7)
    other = bare(daemon.url)
    save(other, at(SECOND, 20), after, 100, 9)
    assert list(daemon.namespaces) == namespaces
    third = bare(daemon.url)
    assert list_checkpoints(third) == [at(FIRST, 10), at(SECOND, 20)]
    assert whole(third, at(FIRST, 10))
    assert whole(third, at(SECOND, 20))
    assert read(third, at(FIRST, 10), f"__{before - 1}_1.distcp", 7) == data_of(10, before - 1, 1, 7)
    assert read(third, at(SECOND, 20), f"__{after - 1}_1.distcp", 9) == data_of(20, after - 1, 1, 9)
    for one in (other, third):
        one.close()


def test_the_predecessors_namespace_is_left_as_it_is(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    blobs = {rank: {step: foreign(b"%d %d" % (rank, step)) for step in (100, 200, 300)} for rank in (0, 1, 2)}
    daemon.memory.namespaces["run"] = StoredNamespace(num_ranks=3, steps_retained=3, blobs=blobs)
    for step in range(10, 400, 50):
        save(tier, at(FIRST, step), 2, 100)
        tier.drop(at(FIRST, step - 100))
    assert list(daemon.namespaces) == ["run", "run__2"]
    assert daemon.namespaces["run"].steps == {rank: [100, 200, 300] for rank in (0, 1, 2)}
    assert all(blobs[r][s].data == b"%d %d" % (r, s) for r in (0, 1, 2) for s in (100, 200, 300))
    assert list_checkpoints(tier) == [at(FIRST, 310), at(FIRST, 360)]
    assert daemon.dropped == []
    touched = [r for r in daemon.requests if r.method != "GET" and "/run/" in r.path]
    assert touched == []


def test_a_large_namespace_that_somebody_else_uses_is_left_alone(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Its room is not ours: the service would drop what is lowest, and that is theirs."""
    theirs = StoredNamespace(num_ranks=9, steps_retained=50, blobs={0: {7: foreign()}})
    daemon.memory.namespaces["run"] = theirs
    save(tier, at(FIRST, 10), 2, 100)
    assert theirs.steps == {0: [7]}
    assert daemon.namespaces["run__2"].steps == {0: [WIRE + 10], 1: [WIRE + 10]}


def test_a_run_whose_name_looks_like_a_namespace_of_ours_is_another(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Neither sees the other's, and neither takes the other's room, or writes over it."""
    other = bare(daemon.url, "run__2")
    record = AttemptRecord(namespace="run__2", attempt=FIRST, parent=None, chosen=False)
    other.put_if_absent(layout.attempt_key(FIRST), attempt_record_to_json(record))
    for rank in range(3):
        other.put_share(share(at(FIRST, 10), rank, 3, 100, namespace="run__2"))
    save(tier, at(FIRST, 10), 1, 200)
    save(tier, at(FIRST, 20), 3, 200)
    assert list(daemon.namespaces) == ["run__2", "run", "run__3"]
    assert list_checkpoints(tier) == [at(FIRST, 10), at(FIRST, 20)]
    assert list_checkpoints(other) == [at(FIRST, 10)]
    assert read_attempts(tier)[0] == {}
    assert whole(other, at(FIRST, 10))
    other.close()


def test_whoever_is_faster_makes_the_namespace(daemon: StandInDaemon) -> None:
    tiers = [bare(daemon.url) for _ in range(3)]
    daemon.restart(DaemonFault(kind="status", method="POST", path=r"/namespaces/run\?", status=409, times=1))
    daemon.memory.namespaces["run__2"] = StoredNamespace(num_ranks=9, steps_retained=KEPT)
    with pytest.raises(TierUnavailableError, match="was made and is not there"):
        tiers[0].put_share(share(at(FIRST, 10), 0, 3, 100))
    for rank, tier in enumerate(tiers):
        tier.put_share(share(at(FIRST, 10), rank, 3, 100))
    assert whole(tiers[0], at(FIRST, 10))
    for tier in tiers:
        tier.close()


def test_a_service_that_gives_less_than_was_asked_for_is_refused(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    text = '{"num_ranks": 2, "steps_to_retain_per_rank": 3}'
    daemon.restart(
        DaemonFault(kind="status", method="GET", path="/namespaces/run$", first=3, status=200, text=text),
    )
    with pytest.raises(TierRefusedError, match="2 slots of 3"):
        tier.put_share(share(at(FIRST, 10), 0, 1, 100))


def test_a_service_that_was_started_again_gets_its_namespaces_again(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    daemon.namespaces.clear()
    with pytest.raises(TierUnavailableError):
        tier.put_share(share(at(FIRST, 20), 0, 2, 100))
    save(tier, at(FIRST, 20), 2, 100)
    assert list_checkpoints(tier) == [at(FIRST, 20)]


# ---- steps


def test_a_lower_step_of_a_newer_attempt_is_the_newest_and_stays(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tier, at(FIRST, step), 2, 100)
    for step in (100, 200):
        tier.drop(at(FIRST, step))
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 300), chosen=True))
    save(tier, at(SECOND, 310), 2, 100)
    other = bare(daemon.url)
    assert list_checkpoints(other)[-1] == at(SECOND, 310)
    assert whole(other, at(SECOND, 310))
    assert whole(other, at(FIRST, 500))
    assert read_attempts(other)[0][SECOND].chosen
    assert daemon.dropped == []
    other.close()


def test_shares_of_dead_attempts_make_room_and_whole_checkpoints_stay(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    save(tier, at(FIRST, 20), 2, 100)
    for ordinal in range(2, 30):
        attempt = Attempt(ordinal=ordinal, utc_secs=ordinal, nonce=f"{ordinal:08x}")
        tier.put_share(share(at(attempt, 5), 0, 2, 100))  # rank 1 never comes
    assert daemon.dropped == []
    assert whole(tier, at(FIRST, 10))
    assert whole(tier, at(FIRST, 20))
    assert len(daemon.namespaces["run"].steps[0]) == KEPT
    newest = Attempt(ordinal=30, utc_secs=30, nonce="00000030")
    save(tier, at(newest, 30), 2, 100)
    assert whole(tier, at(newest, 30))
    assert daemon.dropped == []


def test_when_all_steps_are_taken_by_whole_checkpoints_it_is_full(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in range(10, 60, 10):
        save(tier, at(FIRST, step), 2, 100)
    with pytest.raises(TierFullError, match="all its 5 steps") as caught:
        tier.put_share(share(at(SECOND, 1), 1, 2, 100))
    assert (caught.value.rank, caught.value.tier) == (1, "cluster")
    assert all(whole(tier, at(FIRST, step)) for step in range(10, 60, 10))
    tier.drop(at(FIRST, 10))
    save(tier, at(SECOND, 1), 2, 100)
    assert daemon.dropped == []
    assert whole(tier, at(SECOND, 1))


def test_writing_a_share_again_needs_no_more_room(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in range(10, 60, 10):
        save(tier, at(FIRST, step), 2, 100)
    save(tier, at(FIRST, 30), 2, 100)
    assert daemon.dropped == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("newer", [at(SECOND, 1), at(FIRST, 60)])
def test_damage_gives_way_only_when_nothing_else_does(
    daemon: StandInDaemon, tier: HyperPodTier, newer: CheckpointId, rank: int
) -> None:
    """Else a tier that holds something damaged would refuse every save once."""
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 2, 100)
    tier.put_share(share(at(FIRST, 50), 0, 2, 100))
    tier.put_share(share(at(FIRST, 50), 1, 2, 100))
    daemon.flip("run", rank, WIRE + 30, 8 * 60)
    other = bare(daemon.url)
    other.put_share(share(newer, 0, 2, 100))
    left = [wire - WIRE for wire in daemon.namespaces["run"].steps[0]]
    assert left[:4] == [10, 20, 40, 50]
    other.close()


def test_what_was_never_whole_gives_way_before_what_is_damaged(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 2, 100)
    tier.put_share(share(at(FIRST, 50), 0, 2, 100))
    daemon.flip("run", 0, WIRE + 30, 8 * 60)
    other = bare(daemon.url)
    other.put_share(share(at(SECOND, 1), 0, 2, 100))
    assert [wire - WIRE for wire in daemon.namespaces["run"].steps[0]][:4] == [10, 20, 30, 40]
    other.close()


def test_drop_deletes_rank_0_first_and_nothing_else(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 3, 100)
    save(tier, at(FIRST, 20), 3, 100)
    daemon.restart()
    tier.drop(at(FIRST, 10))
    tier.drop(at(FIRST, 10))
    tier.drop(at(THIRD, 99))
    deleted = [request.path for request in daemon.requests if request.method == "DELETE"]
    assert deleted == [f"/v1/cp/checkpoints/run/{rank}/{WIRE + 10}" for rank in range(3)]
    assert whole(tier, at(FIRST, 20))


def test_drop_leaves_a_twins_shares(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Another attempt of the same ordinal may stand in the same place."""
    twin = Attempt(ordinal=1, utc_secs=9, nonce="99999999")
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url)
    other.put_share(share(at(twin, 10), 1, 2, 100))
    tier.drop(at(FIRST, 10))
    assert daemon.namespaces["run"].steps == {1: [WIRE + 10]}
    third = bare(daemon.url)
    assert list_checkpoints(third) == [at(twin, 10)]
    for one in (other, third):
        one.close()


def test_the_probe_is_cleaned_up_and_not_repeated(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url)
    save(other, at(FIRST, 20), 2, 100)
    probes = [request.method for request in daemon.requests if "/9000" in request.path]
    assert probes == ["POST", "GET", "DELETE"]
    assert daemon.namespaces["run"].steps == {rank: [WIRE + 10, WIRE + 20] for rank in (0, 1)}
    other.close()


def test_a_probe_that_was_left_behind_is_no_checkpoint(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    daemon.namespaces["run"].blobs[0][900_000 * WIRE + 5] = foreign(b"9000000000000005")
    assert list_checkpoints(tier) == [at(FIRST, 10)]
    save(tier, at(FIRST, 20), 2, 100)
    assert list_checkpoints(tier) == [at(FIRST, 10), at(FIRST, 20)]


def test_more_checkpoints_kept_later_find_room(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url, keep=Latest(10))
    save(other, at(SECOND, 20), 2, 100)
    assert daemon.namespaces["run__2"].steps_retained == 13
    assert list_checkpoints(other) == [at(FIRST, 10), at(SECOND, 20)]
    other.close()


def test_an_ordinal_that_does_not_fit_is_refused(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    far = Attempt(ordinal=900_000, utc_secs=1, nonce="00000000")
    with pytest.raises(TierRefusedError, match="beyond what the service can count"):
        tier.put_share(share(at(far, 1), 0, 1, 10))
    assert not any(found.steps for found in daemon.namespaces.values())
