"""A rank that hangs, neither dead nor alive: the others are told within the group's timeout, and can end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from sm_tiered.acks import Acks
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import LIMIT_SECS, Job, pause, raised, recipe, start, tell

WORLD = 2
GROUP_SECS = 2.0
SLACK_SECS = 5.0
"""What being told may take besides: the machine has other work."""


def _state(value: float) -> dict[str, Any]:
    return {"w": torch.full((50,), value), "epoch": int(value)}


def _beside_a_hanging_rank(rank: int, which: dict[str, Any], call: str) -> None:
    def due() -> object:
        if call == "save":
            return checkpointer.save(2, _state(2.0))
        return checkpointer.restore(_state(-1.0))

    checkpointer = TieredCheckpointer.from_recipe(which)
    for tier in which["tiers"]:
        checkpointer.save(1, _state(1.0)).wait(tier)
    tell("ready")
    pause()
    for limit in (GROUP_SECS + SLACK_SECS, 1.0):  # the second time nobody waits for it any more
        begun = time.monotonic()
        kind, text = raised(due)
        secs = time.monotonic() - begun
        assert kind == "RankFailedError", (kind, text)
        assert f"a collective of {WORLD} ranks did not end" in text
        assert "Look at the other ranks' logs: one of them has ended or hangs" in text
        assert secs < limit, f"told after {secs:.1f} s"
    begun = time.monotonic()
    checkpointer.close()
    assert time.monotonic() - begun < SLACK_SECS
    tell("closed")


@contextmanager
def _killed_at_the_end(job: Job) -> Iterator[Job]:
    """Leave no rank behind, stopped or not."""
    try:
        yield job
    finally:
        for process in job.processes:
            process.kill()


def test_a_stopped_rank_fails_the_others_saves_and_restores_in_time(tmp_path: Path, memory_dir: Path) -> None:
    jobs: list[tuple[Job, int]] = []
    with ExitStack() as stack:
        for call in ("save", "restore"):
            for stopped in range(WORLD):  # the first one holds the job's store besides
                place = f"{call}-{stopped}"
                (tmp_path / place).mkdir()
                (memory_dir / place).mkdir(mode=0o700)
                which = recipe(tmp_path / place, memory_dir / place, group_timeout_secs=GROUP_SECS)
                job = start(WORLD, _beside_a_hanging_rank, which, call)
                jobs.append((stack.enter_context(_killed_at_the_end(job)), stopped))
        for job, stopped in jobs:  # all at once: they do little but wait
            assert [job.heard(rank) for rank in range(WORLD)] == ["ready"] * WORLD
            os.kill(job.pid(stopped), signal.SIGSTOP)
            job.go(1 - stopped)
        for job, stopped in jobs:
            assert job.heard(1 - stopped) == "closed"
            job.kill(stopped)
        for job, stopped in jobs:
            ends = job.wait()
            assert ends[stopped].status == -signal.SIGKILL
            assert ends[1 - stopped].status == 0, ends[1 - stopped].trace


def _withhold_acknowledgements(rank: int) -> None:
    """Let rank 0 acknowledge no save any more: it might be faster than the signal that stops it."""
    if rank == 0:
        Acks.give = lambda *_: threading.Event().wait()  # type: ignore[assignment]


def _waiting_beside_the_hanging_store(rank: int, which: dict[str, Any]) -> None:
    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(1, _state(1.0), ["memory"]).wait("memory")
    _withhold_acknowledgements(rank)
    handle = checkpointer.save(2, _state(2.0), ["memory"])
    tell("ready")
    pause()
    for timeout, limit, kind, expected in (
        (0.2, 0.2 + SLACK_SECS, "DeadlineExceededError", "not complete after 0.2 s"),
        (LIMIT_SECS, GROUP_SECS + SLACK_SECS, "RankFailedError", "the job's store can't be asked: no answer for 2.0 s"),
        (LIMIT_SECS, 1.0, "RankFailedError", "the job's store can't be asked: no answer for 2.0 s"),
    ):
        begun = time.monotonic()
        found, text = raised(lambda timeout=timeout: handle.wait("memory", timeout=timeout))
        secs = time.monotonic() - begun
        assert (found, expected in text) == (kind, True), text
        assert secs < limit, f"told after {secs:.1f} s"
    begun = time.monotonic()
    checkpointer.close()
    assert time.monotonic() - begun < SLACK_SECS
    tell("done")


def _beside_the_stopped_store(work: Callable[..., None], which: dict[str, Any]) -> None:
    """Let rank 1 do *work* while rank 0, which hosts the job's store, is stopped."""
    with _killed_at_the_end(start(WORLD, work, which)) as job:
        assert [job.heard(rank) for rank in range(WORLD)] == ["ready"] * WORLD
        os.kill(job.pid(0), signal.SIGSTOP)
        job.go(1)
        assert job.heard(1) == "done"
        job.kill(0)
        ends = job.wait()
    assert ends[1].status == 0, ends[1].trace


def test_a_wait_for_a_save_ends_in_time_while_the_rank_that_counts_acknowledgements_is_stopped(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, group_timeout_secs=GROUP_SECS)
    _beside_the_stopped_store(_waiting_beside_the_hanging_store, which)


def _waiting_for_all_beside_the_hanging_store(rank: int, which: dict[str, Any]) -> None:
    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(1, _state(1.0), ["memory"]).wait("memory")
    _withhold_acknowledgements(rank)
    checkpointer.save(2, _state(2.0), ["memory"])
    tell("ready")
    pause()
    for _ in range(2):
        begun = time.monotonic()
        assert raised(lambda: checkpointer.wait(0.5))[0] == "DeadlineExceededError"
        assert time.monotonic() - begun < SLACK_SECS
    tell("done")
    os._exit(0)


def test_a_wait_for_all_saves_ends_in_its_own_time_however_long_the_group_waits(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, group_timeout_secs=LIMIT_SECS)
    _beside_the_stopped_store(_waiting_for_all_beside_the_hanging_store, which)
