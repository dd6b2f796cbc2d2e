"""Runs of one job some of which are killed, in a rank or in the drainer, each judged by what a restore gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from sm_tiered import crashpoints, layout
from sm_tiered.group import Group
from sm_tiered.inventory import read_manifest
from sm_tiered.records import CheckpointId
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import SIZE, History, Job, agreed, judged_restore, killed, script

_EVENTS = frozenset({"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"})
_WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC


def kill_at_call(number: int, pids: Sequence[int]) -> None:
    """Have all *pids* killed when this process makes its *number*-th call that changes files, or at a crash point."""
    calls = count(1)

    def reached(name: str, last_words: Callable[[], object] = lambda: None) -> None:
        if next(calls) == number:
            last_words()
            for pid in (*(pid for pid in pids if pid != os.getpid()), os.getpid()):
                os.kill(pid, signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES):
            reached(event)

    def write(fd: int, data: bytes, real: Callable[..., int] = os.write) -> int:
        reached("os.write", lambda: real(fd, memoryview(data)[: len(data) // 2]))
        return real(fd, data)

    def fallocate(*arguments: int, real: Callable[..., None] = os.posix_fallocate) -> None:
        reached("os.posix_fallocate")
        real(*arguments)

    os.write, os.posix_fallocate = write, fallocate
    crashpoints._armed, crashpoints._reached = True, reached
    sys.addaudithook(audit)


class CrashLoop:
    """Runs of one job, some of which are killed; *size* is that of one rank's state."""

    def __init__(self, job: Job, *, size: int = SIZE) -> None:
        self.job, self.size, self.runs = job, size, count()
        self.near, self.far = History(job.root / "near"), History(job.root / "far")
        self.last, self.promoted = (0, 0), 0

    def run(self, *, crash_at: str | None = None, victim: int = 0, promotes: int = 0) -> bool:
        """Restore, judge that, save three times, the last *promotes* to all tiers; return whether ranks were killed."""
        run = next(self.runs)

        def work(group: Group) -> object:
            if group.rank == victim:
                crashpoints.arm(crash_at)
            engine = self.job.open(group)
            start = script(self.near, run, saves=3, promotes=promotes, size=self.size)(engine)
            if group.rank == 0:
                for step in range(start + 4 - promotes, start + 4):
                    self.far.note("begun", (run, step))
            engine.close()
            return start

        with self.job.no_drainer():
            results = self.job.run(work)
        if not killed(results):
            self.last, self.promoted = (run, agreed(results) + 3), promotes
            return False
        return True

    def until_clean(self, point: str, *, victim: int = 0, promotes: int = 0, limit: int = 99) -> int:
        """Kill *victim* at *point*, the first, second … time, until a run sees none; return how many kills it took."""
        for number in range(1, limit + 1):
            if not self.run(crash_at=f"{point}:{number}", victim=victim, promotes=promotes):
                return number - 1
        return limit

    def told(self) -> list[CheckpointId]:
        """Return which of the last run's promoted saves the trainers were told to be safe, oldest first."""
        newest = layout.parse_checkpoint_dir(self.job.step_dirs()[self.last[1]].name)
        assert newest is not None
        found: list[CheckpointId] = []
        for step in range(newest.step - self.promoted + 1, newest.step + 1):
            checkpoint = replace(newest, step=step)
            name = f"result-{layout.checkpoint_dir(checkpoint)}-durable.json"
            path = self.job.store_dir() / layout.QUEUE / name
            if path.exists():
                assert json.loads(path.read_text()) == {"error": None}
                found.append(checkpoint)
        return found

    def judge_durable(self) -> None:
        """Restore on a fresh node: nothing but the durable tier is left of what was saved."""
        scratch, told = self.job.root / "scratch", self.told()
        if told:
            self.far.note("acked", (self.last[0], told[-1].step))

        def work(group: Group) -> int:
            engine = self.job.open(group, memory=scratch)
            # Before the restore, which itself finishes a commit that lacks nothing but the manifest.
            if group.rank == 0:
                tier = engine.store.tiers.durable["durable"]
                assert not [c for c in told if read_manifest(tier, c) is None], "told to be safe, and not committed"
            step = judged_restore(engine, self.far)
            assert not (broken := _broken(engine)), f"what is visible is not complete: {broken}"
            engine.close()
            return step

        agreed(self.job.run(work))
        shutil.rmtree(scratch, ignore_errors=True)

    def drain(self) -> None:
        """Drain what is queued: all that was promoted is then safe there."""
        assert self.job.drain() == 0
        assert self.job.queued() == []
        assert len(self.told()) == self.promoted, "nobody was told how a promotion ended"
        self.far.note("acked", self.last)

    def finishes(self, status: int) -> bool:
        """Judge what a drainer that ended with *status* left, and what the next one makes of it.

        Return whether the first one was killed.
        """
        assert status in (0, signal.SIGKILL), f"the drainer ended with {status}"
        self.judge_durable()
        self.drain()
        self.judge_durable()
        return status != 0

    def drains_until_clean(self, arm: Callable[[int], None], *, limit: int = 999, stride: int = 1) -> int:
        """Save, drain and kill the drainer, for *arm* is called in it, until it ends well; return how many were killed.

        Each time a second one must finish its work.
        """
        for kills, number in enumerate(range(1, limit + 1, stride)):
            assert not self.run(promotes=2)
            if not self.finishes(self.job.drain(prepare=lambda number=number: arm(number))):
                return kills
        return limit


def _broken(engine: PlainEngine) -> list[str]:
    """Why a restore of a fresh node refused checkpoints, but for those not committed, or deleted since."""
    reasons = engine.store.restored.reasons if engine.store.restored is not None else ()
    return [reason for reason in reasons if not reason.endswith((": no manifest", ": deleted", ": not on this node"))]
