"""The queue's small files: what stays in the memory tier stays small."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sm_tiered.errors import TierError
from sm_tiered.policies.keep import Latest
from sm_tiered.queue import RESULTS_KEPT, Entry, Queue
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import MemorySettings
from sm_tiered.tiers.memory import MemoryTier

ATTEMPT = Attempt(ordinal=1, utc_secs=1700000000, nonce="0123abcd")


def _checkpoint(step: int) -> CheckpointId:
    return CheckpointId(step=step, attempt=ATTEMPT)


@pytest.fixture
def tier(memory_dir: Path) -> MemoryTier:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=1), path=str(memory_dir), budget_bytes=None, allow_disk=True
    )
    return MemoryTier(settings, "run-1")


def test_what_was_taken_out_stays_out(tier: MemoryTier) -> None:
    queue = Queue(tier)
    entry = Entry(
        checkpoint=_checkpoint(1), rank=0, tier="disk", world=1, recipe="0" * 32, finisher="", deadline_at=2e9
    )
    queue.put(entry)
    assert queue.entries() == [entry]
    queue.remove(entry)
    queue.mark_sent(entry)
    assert queue.entries() == []


def test_the_newest_results_are_kept(tier: MemoryTier) -> None:
    queue, total = Queue(tier), RESULTS_KEPT + 30
    for step in range(total):
        queue.put_result(_checkpoint(step), "disk", TierError("full", tier="disk") if step % 2 else None)
        [written] = (tier.root / ".queue").glob(f"result-step_{step:010d}-*")
        os.utime(written, (1000 + step, 1000 + step))  # the clock of a file system may not tell two writes apart
    told = [queue.result(_checkpoint(step), "disk") for step in range(total)]
    assert told[:-RESULTS_KEPT] == [None] * 30
    assert all(result is not None for result in told[-RESULTS_KEPT:])
    assert len(list(tier.list(".queue/"))) == RESULTS_KEPT
