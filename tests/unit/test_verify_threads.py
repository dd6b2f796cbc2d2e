"""Verifying with several threads: the same report, in the same order, and an end without them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sm_tiered import deadline, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import TierUnavailableError
from sm_tiered.tiers.local import LocalTier
from sm_tiered.verify import State, verify_checkpoint
from tests.unit.cli_checkpoints import checkpoint, file_of, flip, local_tier, write_checkpoint

STEP = checkpoint(20)
CHUNKS = 6


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A tier with a checkpoint of two ranks and three chunks each, the last ones short."""
    tier = local_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=True, world=2, size=2 * CHUNK_BYTES + 1000)
    return tier


def test_several_threads_find_what_one_finds_and_tell_it_in_order(tier: LocalTier, tmp_path: Path) -> None:
    assert verify_checkpoint(tier, STEP, durable=True, threads=3).state is State.WHOLE
    for rank, at in ((0, 5), (0, 2 * CHUNK_BYTES + 7), (1, CHUNK_BYTES + 3)):
        flip(file_of(tmp_path, STEP, layout.part_name(rank, 0)), at)
    told: list[int] = []
    alone = verify_checkpoint(tier, STEP, durable=True)
    report = verify_checkpoint(tier, STEP, durable=True, threads=3, progress=lambda done, total: told.append(done))
    assert report == alone
    assert [(problem.rank, problem.chunk) for problem in report.problems] == [(0, 0), (0, 2), (1, 1)]
    assert (told, len(told)) == (sorted(told), CHUNKS + 1)


def test_they_work_at_the_same_time_and_no_more_of_them_than_asked_for(tier: LocalTier) -> None:
    busy, most, lock, both = 0, 0, threading.Lock(), threading.Barrier(2)
    read_into = tier.read_into

    def watched(key: str, offset: int, buffer: memoryview) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        both.wait(10)  # six chunks, two by two: alone, nobody gets past
        read_into(key, offset, buffer)
        with lock:
            busy -= 1

    tier.read_into = watched
    assert verify_checkpoint(tier, STEP, durable=True, threads=2).state is State.WHOLE
    assert most == 2


def test_what_a_tier_refuses_in_a_thread_is_raised_at_once_and_no_thread_goes_on(tier: LocalTier) -> None:
    reads: list[tuple[str, int]] = []
    held = threading.Event()

    def fail(key: str, offset: int, buffer: memoryview) -> None:
        reads.append((key, offset))
        if offset == 0 and "__0_0" in key:
            raise TierUnavailableError("no answer", tier="local")
        held.wait(10)

    tier.read_into = fail
    begun = time.monotonic()
    with pytest.raises(TierUnavailableError, match="no answer"):
        verify_checkpoint(tier, STEP, durable=True, threads=2)
    assert time.monotonic() - begun < 5
    held.set()
    for thread in threading.enumerate():
        if thread.name == "sm_tiered-verify":
            thread.join(10)
    assert len(reads) < CHUNKS


def test_the_deadline_of_the_caller_holds_in_the_threads(tier: LocalTier) -> None:
    left: list[float] = []
    read_into = tier.read_into

    def watched(key: str, offset: int, buffer: memoryview) -> None:
        left.append(deadline.remaining(1000.0))
        read_into(key, offset, buffer)

    tier.read_into = watched
    with deadline.within(50.0):
        verify_checkpoint(tier, STEP, durable=True, threads=2)
    assert len(left) == CHUNKS
    assert all(secs <= 50.0 for secs in left)
