"""SIGKILL at the first, second, third … call by which a save changes the file system, until a run sees no kill.

After each, new processes must restore what was acknowledged or what was begun after it, bit for bit, and save on.
"""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path

import pytest

from sm_tiered.group import Group
from tests.faults.core_jobs import History, Job, agreed, killed, script
from tests.faults.crash_loop import CrashLoop, kill_at_call


def crash_every_save(root: Path, world: int, victim: int, *, stride: int, restores: bool = True) -> int:
    """Loop over the calls of one rank; return how many kills there were.

    Without *restores* the job that is killed begins anew, over what an earlier one left.
    """
    job, history = Job(root, world=world), History(root / "history")

    def attempt(run: int, number: int | None) -> bool:
        def work(group: Group) -> int:
            pids = group.gather(os.getpid())
            if number is not None and group.rank == victim:
                kill_at_call(number, pids)
            engine = job.open(group)
            done = script(history, run, restores=restores or number is None)(engine)
            engine.close()
            return done

        results = job.run(work)
        if killed(results):
            return True
        agreed(results)
        return False

    assert not attempt(0, None)
    kills = 0
    for kills, number in enumerate(count(1, stride)):
        if not attempt(2 * kills + 1, number):
            break
        if not restores:
            assert not attempt(2 * kills + 2, None)
    assert not attempt(2 * kills + 2, None), "the job does not go on"
    assert len(job.step_dirs()) <= job.keep + 2, "what was recycled is still there"
    return kills


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1)])
def test_a_kill_at_any_call_of_a_save_leaves_the_old_or_the_new_state(
    memory_dir: Path, world: int, victim: int
) -> None:
    assert crash_every_save(memory_dir, world, victim, stride=3) >= 10


def test_a_kill_in_a_job_that_does_not_restore_loses_nothing_of_the_one_before(memory_dir: Path) -> None:
    assert crash_every_save(memory_dir, 1, 0, stride=6, restores=False) >= 8


def drained_under_kills(root: Path, world: int, *, stride: int) -> int:
    loop = CrashLoop(Job(root, world=world, durable_keep=1))
    assert not loop.run(promotes=1)
    loop.drain()
    return loop.drains_until_clean(lambda number: kill_at_call(number, [os.getpid()]), stride=stride)


def test_a_kill_at_any_call_of_a_drainer_leaves_what_the_next_one_finishes(memory_dir: Path) -> None:
    assert drained_under_kills(memory_dir, 2, stride=17) >= 5


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_at_each_and_every_call_of_a_drainer_leaves_what_the_next_one_finishes(
    memory_dir: Path, world: int
) -> None:
    assert drained_under_kills(memory_dir, world, stride=1) >= 50


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_a_kill_at_each_and_every_call_of_a_save_leaves_the_old_or_the_new_state(
    memory_dir: Path, world: int, victim: int
) -> None:
    assert crash_every_save(memory_dir, world, victim, stride=1) >= 30
