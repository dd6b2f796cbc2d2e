"""What the HyperPod tier tells of what stands there: at step 0 too, and without asking for the same thing again."""

from __future__ import annotations

import pytest

from sm_tiered import layout
from sm_tiered.errors import KeyNotFoundError
from sm_tiered.inventory import (
    list_attempts,
    list_checkpoints,
    read_attempts,
    read_holding,
    read_manifest,
    read_records,
)
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_sharing import FIRST, SECOND, WIRE, at, attempt_record, save, share


def looks(daemon: StandInDaemon) -> list[tuple[int, int]]:
    """Return the ranks and steps that were looked at, in order."""
    paths = [request.path for request in daemon.requests if request.method == "GET"]
    found = [path.split("/")[-2:] for path in paths if "/checkpoints/" in path and "latest" not in path]
    return [(int(rank), int(wire)) for rank, wire in found]


# ---- step 0, where records of attempts stand too


def test_step_0_of_a_job_that_grew_is_not_damaged(tier: HyperPodTier, other: HyperPodTier) -> None:
    """The record of its attempt stands in the namespace of the smaller job, where a rank of the larger one might."""
    save(tier, at(FIRST, 5), 2, 100)
    other.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 5)))
    for rank in (0, 1):
        other.put_share(share(at(SECOND, 0), rank, 3, 100))
    for one in (tier, other):
        assert one.confirm(at(SECOND, 0)) is False
        assert read_manifest(one, at(SECOND, 0)) is None
        assert set(read_records(one, at(SECOND, 0))) == {0, 1}
    other.put_share(share(at(SECOND, 0), 2, 3, 100))
    assert tier.confirm(at(SECOND, 0))
    assert set(read_attempts(tier)[0]) == {SECOND}


@pytest.mark.parametrize("lost", [0, 1])
def test_step_0_is_told_of_whichever_share_was_lost(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, lost: int
) -> None:
    """That nothing was ever saved would be another answer."""
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    save(tier, at(FIRST, 0), 2, 100)
    daemon.namespaces["run"].blobs[lost].clear()
    assert list_checkpoints(other) == [at(FIRST, 0)]
    assert read_holding(other, at(FIRST, 0), durable=True).problem == "no manifest"


def test_records_of_attempts_without_shares_are_not_looked_through_each_time(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for step in (10, 20):
        save(tier, at(FIRST, step), 20, 10)
    list_checkpoints(other)
    daemon.restart()
    for _ in range(3):
        assert list_checkpoints(other) == [at(FIRST, 10), at(FIRST, 20)]
    assert looks(daemon) == [(0, WIRE)] * 3


# ---- what is asked for


def test_a_listing_asks_for_what_is_not_there_once(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for rank in range(3):
        tier.put_share(share(at(FIRST, 10), rank, 20, 10))
    for prefix in ("", f"{layout.checkpoint_dir(at(FIRST, 10))}/record-"):
        daemon.restart()
        tier.list(prefix)
        asked = [rank for rank, wire in looks(daemon) if wire == WIRE + 10]
        assert len(asked) == len(set(asked)), prefix


def test_a_listing_of_one_checkpoint_looks_at_no_other(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    for step in (10, 20):
        save(tier, at(FIRST, step), 2, 10)
    daemon.restart()
    assert len(other.list(f"{layout.checkpoint_dir(at(FIRST, 10))}/")) == 5
    assert {wire for _, wire in looks(daemon)} == {WIRE + 10}


@pytest.mark.parametrize(("name", "rank"), [("rank_00007/loader.bin", 7), ("model.safetensors", 0)])
def test_a_part_that_another_program_named_is_looked_for_where_it_most_likely_is(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, name: str, rank: int
) -> None:
    from dataclasses import replace

    from sm_tiered.manifest import record_from_json, record_to_json

    for number in range(20):
        made = share(at(FIRST, 10), number, 20, 500)
        if number == rank:
            part = replace(made.parts[0][0], name=name)
            record = record_to_json(replace(record_from_json(made.record), parts=(part,)))
            made = replace(made, record=record, parts=((part, made.parts[0][1]),))
        tier.put_share(made)
    daemon.restart()
    buffer = bytearray(500)
    other.read_into(layout.in_dir(at(FIRST, 10), name), 0, memoryview(buffer))
    assert {asked for asked, _ in looks(daemon)} == {rank}
    with pytest.raises(KeyNotFoundError):
        other.read_into(layout.in_dir(at(FIRST, 10), "nothing.bin"), 0, memoryview(buffer))


def test_what_is_gone_is_forgotten(tier: HyperPodTier) -> None:
    for step in range(1, 30):
        save(tier, at(FIRST, step), 2, 10)
        list_checkpoints(tier)
        assert read_manifest(tier, at(FIRST, step)) is not None
        if step > 2:
            tier.drop(at(FIRST, step - 2))
    list_checkpoints(tier)
    assert list_attempts(tier) == []
    kept = (tier._whole._manifests, tier._index._lowest, tier._index.slots._found, tier._index._vacant)
    assert all(len(known) <= 6 for known in kept)
