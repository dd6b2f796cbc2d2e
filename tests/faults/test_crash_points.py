"""SIGKILL at every named crash point, each time that it is reached, in a rank or in the drainer.

Afterwards new processes must restore the old or the new state, alike on all ranks, and the job must go on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sm_tiered import crashpoints
from sm_tiered.crashpoints import POINTS
from sm_tiered.settings import S3Settings
from tests.faults.core_jobs import Job, s3_fields
from tests.faults.crash_loop import CrashLoop

IN_DRAINER = [point for point in POINTS if point.split(".")[0] in ("promote", "commit", "retention")]
IN_RANKS = [point for point in POINTS if point not in IN_DRAINER]
COMMITS = [point for point in IN_DRAINER if point.startswith("commit")]


def at(point: str) -> Callable[[int], None]:
    """Return what makes a process die the k-th time that it reaches *point*."""
    return lambda number: crashpoints.arm(f"{point}:{number}")


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("point", [point for point in IN_RANKS if not point.startswith("enqueue")])
def test_a_rank_killed_at_a_crash_point_leaves_the_old_or_the_new_state(
    memory_dir: Path, point: str, world: int, victim: int
) -> None:
    loop = CrashLoop(Job(memory_dir, world=world))
    assert not loop.run()
    assert loop.until_clean(point, victim=victim, limit=3) >= 1, f"{point} is never reached"
    assert not loop.run()


@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 1)])
def test_a_rank_killed_while_it_enqueues_never_holds_up_the_next_launch(
    memory_dir: Path, world: int, victim: int
) -> None:
    loop = CrashLoop(Job(memory_dir, world=world, options={"commit_deadline_secs": 1}))
    for point in ("enqueue.before", "enqueue.after"):
        assert loop.until_clean(point, victim=victim, promotes=1) >= 1
        loop.drain()
        loop.judge_durable()


@pytest.mark.parametrize("point", IN_DRAINER)
def test_a_drainer_killed_at_a_crash_point_is_finished_by_the_next(memory_dir: Path, point: str) -> None:
    loop = CrashLoop(Job(memory_dir, world=2, durable_keep=1))
    assert not loop.run(promotes=1)
    loop.drain()
    assert loop.drains_until_clean(at(point), limit=2) >= 1, f"{point} is never reached"
    for directory in loop.job.step_dirs("durable").values():
        names = [path.name for path in directory.iterdir()]
        assert len(names) == 5 or names == ["manifest.json"], f"{names}: neither whole nor a tombstone"


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("point", COMMITS)
def test_a_trainer_killed_while_it_commits_what_it_streamed_leaves_the_old_or_the_new_state(
    memory_dir: Path, point: str, world: int
) -> None:
    loop = CrashLoop(Job(memory_dir, world=world, in_memory=False, durable_keep=1))
    assert not loop.run()
    assert loop.until_clean(point, limit=2) >= 1
    assert not loop.run()


def test_a_drainer_killed_on_its_way_to_s3_is_finished_by_the_next(memory_dir: Path, s3_settings: S3Settings) -> None:
    loop = CrashLoop(Job(memory_dir, world=2, durable_keep=1, s3=s3_fields(s3_settings)))
    assert not loop.run(promotes=1)
    loop.drain()
    for point in ("promote.after_part", "commit.before_manifest", "retention.after_tombstone"):
        assert loop.drains_until_clean(at(point), limit=1) == 1, f"{point} is never reached"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("on_s3", [False, True])
def test_a_drainer_killed_each_time_that_it_reaches_a_crash_point(
    memory_dir: Path, make_s3_settings: Callable[..., S3Settings], world: int, on_s3: bool
) -> None:
    s3 = s3_fields(make_s3_settings()) if on_s3 else None
    loop = CrashLoop(Job(memory_dir, world=world, durable_keep=1, s3=s3))
    assert not loop.run(promotes=1)
    loop.drain()
    for point in IN_DRAINER:
        assert loop.drains_until_clean(at(point)) >= 1, f"{point} is never reached"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "victim"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_a_rank_killed_each_time_that_it_reaches_a_crash_point(memory_dir: Path, world: int, victim: int) -> None:
    loop = CrashLoop(Job(memory_dir, world=world))
    assert not loop.run()
    for point in [point for point in IN_RANKS if not point.startswith("enqueue")]:
        assert loop.until_clean(point, victim=victim) >= 1, f"{point} is never reached"
    assert not loop.run()
