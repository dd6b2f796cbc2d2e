"""Pins, and what retention takes back: whoever writes first wins, whichever way the two meet."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sm_tiered import graves, layout, retention
from sm_tiered.errors import CheckpointNotFoundError
from sm_tiered.inventory import read_holding
from sm_tiered.pins import Pin, is_pinned, pin, put_pin, read_pins, unpin
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.policies.keep import Latest
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.local import LocalTier
from tests.unit.cli_checkpoints import NAMESPACE, attempt, checkpoint, local_tier, write_attempt, write_checkpoint


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    made = local_tier(tmp_path / "local")
    write_attempt(made, 1)
    for step in (10, 20, 30):
        write_checkpoint(made, checkpoint(step), durable=True)
    return made


def planned(tier: LocalTier, ordinal: int = 1) -> retention.Plan:
    return retention.plan(tier, Latest(1), attempt=attempt(ordinal), in_flight_secs=3600.0)


def prune(tier: LocalTier) -> list[int]:
    return [c.step for c in retention.apply(tier, NAMESPACE, planned(tier))]


def put(tier: LocalTier, which: CheckpointId) -> None:
    put_pin(tier, NAMESPACE, which, reason=None, now=1.0)


class Meeting(LocalTier):
    """A tier on which somebody else does something as soon as a tombstone stands."""

    def __init__(self, tier: LocalTier, meanwhile: object) -> None:
        super().__init__(tier.settings, tier.namespace)
        self._meanwhile = meanwhile

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        super().replace(key, data, version=version)
        if b'"tombstone"' in data and self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()  # type: ignore[operator]


def whole(tier: LocalTier, step: int) -> bool:
    return read_holding(tier, checkpoint(step), durable=True).problem is None


def test_a_pin_tells_why_and_a_damaged_one_pins_all_the_same(tier: LocalTier) -> None:
    assert pin(tier, NAMESPACE, checkpoint(10), reason="paper", now=5.0)
    assert not pin(tier, NAMESPACE, checkpoint(10), reason=None, now=6.0)
    assert read_pins(tier) == [Pin(checkpoint=checkpoint(10), reason="paper", pinned_at=5.0)]
    tier.put(layout.pin_key(checkpoint(10)), b"\xff")
    tier.put("pins/notes.txt", b"")
    assert read_pins(tier) == [Pin(checkpoint=checkpoint(10), reason=None, pinned_at=None)]
    assert prune(tier) == [20]
    assert unpin(tier, checkpoint(10))
    assert not unpin(tier, checkpoint(10))
    assert prune(tier) == [10]


def test_only_what_is_committed_can_be_pinned(tier: LocalTier) -> None:
    write_checkpoint(tier, checkpoint(40), durable=True, commit=False)
    for step in (40, 50):
        with pytest.raises(CheckpointNotFoundError, match="not committed"):
            pin(tier, NAMESPACE, checkpoint(step), reason=None, now=0.0)
        assert not is_pinned(tier, checkpoint(step))


def test_a_pin_that_comes_after_the_plan_counts(tier: LocalTier) -> None:
    plan = planned(tier)
    put(tier, checkpoint(10))
    assert retention.apply(tier, NAMESPACE, plan) == [checkpoint(20)]
    assert whole(tier, 10)


def test_a_pin_that_comes_when_the_tombstone_stands_brings_the_manifest_back(tier: LocalTier) -> None:
    before = tier.get(layout.in_dir(checkpoint(10), layout.MANIFEST)).data
    meeting = Meeting(tier, lambda: put(tier, checkpoint(10)))
    assert retention.apply(meeting, NAMESPACE, planned(tier)) == [checkpoint(20)]
    assert tier.get(layout.in_dir(checkpoint(10), layout.MANIFEST)).data == before
    assert whole(tier, 10)


def test_who_pins_what_is_just_given_up_is_told_and_leaves_no_pin(tier: LocalTier) -> None:
    told: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(CheckpointNotFoundError, match="given up") as error:
            pin(tier, NAMESPACE, checkpoint(10), reason=None, now=0.0)
        told.append(str(error.value))

    retention.apply(Meeting(tier, meanwhile), NAMESPACE, planned(tier))
    assert told
    assert not is_pinned(tier, checkpoint(10))
    assert not whole(tier, 10)


def test_a_deletion_that_died_behind_its_tombstone_is_taken_back_for_a_pin(tier: LocalTier) -> None:
    assert graves.entomb(tier, NAMESPACE, checkpoint(10)) is not None
    put(tier, checkpoint(10))
    plan = planned(tier)
    assert list(plan.revive) == [checkpoint(10)]
    assert retention.apply(tier, NAMESPACE, plan) == [checkpoint(20)]
    assert whole(tier, 10)


def test_what_is_partly_deleted_is_deleted_to_the_end_whatever_is_pinned(tier: LocalTier) -> None:
    assert graves.entomb(tier, NAMESPACE, checkpoint(10)) is not None
    tier.delete([layout.in_dir(checkpoint(10), layout.part_name(1, 0))])
    put(tier, checkpoint(10))
    assert prune(tier) == [20, 10]
    assert len(tier.list(layout.checkpoint_dir(checkpoint(10)))) == 1


def test_a_newer_attempt_that_begins_meanwhile_keeps_what_is_next(tier: LocalTier) -> None:
    meeting = Meeting(tier, lambda: write_attempt(tier, 2, checkpoint(10)))
    assert retention.apply(meeting, NAMESPACE, planned(tier)) == []
    assert whole(tier, 10)
    assert whole(tier, 20)


def test_a_plan_says_why_everything_stays(tier: LocalTier) -> None:
    write_attempt(tier, 2, checkpoint(20))
    write_checkpoint(tier, checkpoint(40, 2), durable=True)
    write_checkpoint(tier, checkpoint(35, 2), durable=True, commit=False)
    put(tier, checkpoint(20))
    plan = planned(tier, 2)
    kept = retention.Kept
    assert plan.kept == {
        checkpoint(20): {kept.PINNED, kept.PARENT},
        checkpoint(35, 2): {kept.IN_FLIGHT},
        checkpoint(40, 2): {kept.NEWEST},
    }
    assert plan.delete == (checkpoint(10), checkpoint(30))


def test_would_keep_asks_the_policy_with_the_newcomer_among_the_rest(tier: LocalTier) -> None:
    def asked(step: int, n: int) -> bool:
        newcomer = CommittedCheckpoint(checkpoint=checkpoint(step), saved_at=0.0)
        return retention.would_keep(tier, Latest(n), newcomer)

    assert (asked(25, 1), asked(25, 2), asked(35, 1), asked(5, 3)) == (False, True, True, False)


def test_of_pinning_and_pruning_at_once_one_wins_and_both_know(tmp_path: Path) -> None:
    """Thirty real races: what was pinned with success is whole, what was refused is gone and not pinned."""
    tier = local_tier(tmp_path / "local")
    write_attempt(tier, 1)
    write_checkpoint(tier, checkpoint(1000), durable=True, world=1)
    won: list[bool] = []
    for step in range(30):
        write_checkpoint(tier, checkpoint(step), durable=True, world=1)
        plan = planned(tier)
        start = threading.Barrier(2)
        pruner = threading.Thread(target=lambda s=start, p=plan: (s.wait(), retention.apply(tier, NAMESPACE, p)))
        pruner.start()
        start.wait()
        try:
            pin(tier, NAMESPACE, checkpoint(step), reason=None, now=0.0)
            won.append(True)
        except CheckpointNotFoundError:
            won.append(False)
        pruner.join()
        assert is_pinned(tier, checkpoint(step)) == won[-1]
        assert whole(tier, step) or not won[-1]
