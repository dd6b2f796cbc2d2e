"""SIGKILL at the named crash points in real ranks that save tensors: a new job restores the old or the new state.

All its ranks get the same step, bit for bit, and the ranks that were left behind end in time.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sm_tiered import crashpoints
from sm_tiered.crashpoints import POINTS
from sm_tiered.errors import TieredError
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from tests.distributed.dcp_jobs import Ended, bits, raised, recipe, run, start
from tests.faults.core_jobs import History

WORLD = 2
OLD = ("stage.before_copy", "stage.after_copy", "record.before_write")
"""Points before the record: the step that is being saved is not there."""
NEW = ("record.after_write", "ack.before")
"""Points after it: the step is whole, though nobody was told."""
IN_SAVES = [point for point in POINTS if point.split(".")[0] in ("stage", "publish", "record", "ack", "recycle")]
IN_LAUNCHES = [point for point in POINTS if point.split(".")[0] in ("restore", "attempt")]
IN_QUEUE = [point for point in POINTS if point.startswith("enqueue")]
IN_COMMITS = [point for point in POINTS if point.startswith("commit")]


def _state(rank: int, origin: int) -> dict[str, Any]:
    """Return a state that tells which save it is of."""
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "rows": distribute_tensor(torch.arange(28.0).view(7, 4) + origin, mesh, [Shard(0)]),
        "copies": distribute_tensor(torch.arange(12.0) * (origin + 2), mesh, [Replicate()]),
        "plain": torch.full((5,), float(origin)),
        "origin": origin,
    }


def _own(rank: int, origin: int) -> dict[str, Any]:
    return {"per_rank": {"rank": rank, "drawn": torch.full((3,), origin * 10.0 + rank)}}


def _is_killed(end: Ended) -> bool:
    assert "AssertionError" not in (end.trace or ""), end.trace
    return end.status == -signal.SIGKILL


# ---- the second save, at a few points


def _saves_twice(rank: int, which: dict[str, Any], point: str, victim: int) -> tuple[str, str]:
    """Return what the second save and the next one raise where another rank has died in the second."""
    first, second, third = ({**_state(rank, step), **_own(rank, step)} for step in (1, 2, 3))
    checkpointer = TieredCheckpointer.from_recipe(which)
    assert checkpointer._engine is not None
    checkpointer.save(1, first).wait("memory")
    if rank == victim:
        crashpoints.arm(point)
    handle = checkpointer.save(2, second)
    checkpointer._engine.saver.settle()
    waited, _ = raised(lambda: handle.wait("memory", 0.2))
    assert rank != victim, f"{point} is never reached"
    saved, _ = raised(lambda: checkpointer.save(3, third))
    with suppress(TieredError):
        checkpointer.close()
    return waited, saved


def _restores_and_goes_on(rank: int, which: dict[str, Any]) -> int | None:
    state = {**_state(rank, -1), **_own(rank, -1)}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        step = checkpointer.restore(state)
        assert step is not None
        assert bits(state) == bits({**_state(rank, step), **_own(rank, step)}), f"step {step}: other bits than saved"
        checkpointer.save(step + 1, state).wait("memory")
    return step


@pytest.mark.parametrize(
    ("point", "victim"), [*((point, 1) for point in (*OLD, *NEW)), ("stage.after_copy", 0), ("record.after_write", 0)]
)
def test_a_rank_killed_at_a_crash_point_of_a_save_leaves_the_old_or_the_new_step(
    memory_dir: Path, point: str, victim: int
) -> None:
    which = recipe(memory_dir, memory_dir / "m", disk=None, group_timeout_secs=10, drain_timeout_secs=0.2)
    ends = start(WORLD, _saves_twice, which, point, victim).wait()
    assert _is_killed(ends[victim])
    waited, saved = ends[1 - victim].value
    assert waited in ("RankFailedError", "DeadlineExceededError"), "nobody can say that the step is safe"
    assert saved == "RankFailedError"
    assert run(WORLD, _restores_and_goes_on, which) == [1 if point in OLD else 2] * WORLD


# ---- every point, each time that it is reached


def _judged(rank: int, history: History, step: int | None, state: dict[str, Any], wanted: Any) -> int:
    """Fail unless *state* is, bit for bit, a save that a restore may give; return the step, 0 for none."""
    allowed = history.allowed()
    save = None if step is None else (int(state["origin"]) // 1000, step)
    if save is not None:
        assert bits(state) == bits(wanted(save[0] * 1000 + save[1])), f"{save}: other bits than were saved"
    assert save in allowed, f"restored {save}, allowed are {allowed}"
    if rank == 0:
        history.note("restored", save)
    return step or 0


def _begun(rank: int, history: History, run_number: int, step: int) -> int:
    if rank == 0:
        history.note("begun", (run_number, step))
    return run_number * 1000 + step


def _trains(rank: int, which: dict[str, Any], noted: str, run_number: int, crash: str | None, victim: int) -> int:
    """Restore, judge that, and save three times to the tiers of the recipe."""
    if rank == victim:
        crashpoints.arm(crash)

    def whole(origin: int) -> dict[str, Any]:
        return {**_state(rank, origin), **_own(rank, origin)}

    history, tiers, state = History(Path(noted)), list(which["tiers"]), whole(-1)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        begin = _judged(rank, history, checkpointer.restore(state), state, whole)
        for step in range(begin + 1, begin + 4):
            handle = checkpointer.save(step, whole(_begun(rank, history, run_number, step)), tiers)
            handle.wait(tiers[0], 2.0)
            history.note("acked", (run_number, step))
    return begin


def _trains_with_dcp(
    rank: int, which: dict[str, Any], noted: str, run_number: int, crash: str | None, victim: int
) -> int:
    """Do the same by `dcp.load` and `dcp.save`; the first run has nothing to load."""
    if rank == victim:
        crashpoints.arm(crash)
    history, begin = History(Path(noted)), 0
    keeper = TieredCheckpointer.from_recipe(which)
    if run_number:
        reader, state = TieredStorageReader(which), _state(rank, -1)
        dcp.load(state, storage_reader=reader)
        begin = _judged(rank, history, reader.step, state, lambda origin: _state(rank, origin))
        dist.barrier()
        reader.close()
    for step in range(begin + 1, begin + 4):
        writer = TieredStorageWriter(which, step=step)
        dcp.save(_state(rank, _begun(rank, history, run_number, step)), storage_writer=writer)
        assert writer.handle is not None
        writer.handle.wait("memory", 2.0)
        history.note("acked", (run_number, step))
        writer.close()
    keeper.close()
    return begin


class Runs:
    """Runs of one job, in some of which a rank is killed."""

    def __init__(self, work: Any, which: dict[str, Any], noted: Path) -> None:
        self._work, self._which, self._noted, self._numbers = work, which, str(noted), count()

    def killed(self, crash: str | None = None, victim: int = 0) -> bool:
        """Run once, with *victim* killed at *crash* if it comes there; return whether it was."""
        ends = start(WORLD, self._work, self._which, self._noted, next(self._numbers), crash, victim).wait()
        killed = [_is_killed(end) for end in ends]
        assert killed[victim] == any(killed), ends
        assert any(killed) or ([end.trace for end in ends] == [None] * WORLD and ends[0].value == ends[1].value), ends
        return killed[victim]

    def each(self, points: list[str], victim: int) -> None:
        """Kill *victim* at each of *points*, the first, second … time, until a run sees none; the last run is clean."""
        for point in points:
            number = next(number for number in count(1) if not self.killed(f"{point}:{number}", victim))
            assert number > 1, f"{point} is never reached"
        assert not self.killed()


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", range(WORLD))
@pytest.mark.parametrize("work", [_trains, _trains_with_dcp], ids=["checkpointer", "dcp"])
def test_a_rank_killed_each_time_that_it_reaches_a_crash_point(
    memory_dir: Path, tmp_path: Path, work: Any, victim: int
) -> None:
    limits = {"group_timeout_secs": 10, "drain_timeout_secs": 1, "in_use_wait_secs": 10}
    which = recipe(memory_dir, memory_dir / "m", disk=None, memory={"keep": {"latest": 1}}, **limits)
    runs = Runs(work, which, tmp_path / "noted")
    assert not runs.killed()
    runs.each([*IN_SAVES, *IN_LAUNCHES], victim)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", range(WORLD))
def test_a_rank_killed_while_it_enqueues_leaves_the_old_or_the_new_step(
    memory_dir: Path, tmp_path: Path, victim: int
) -> None:
    which = recipe(memory_dir, memory_dir / "m", in_use_wait_secs=10, commit_deadline_secs=1)
    runs = Runs(_trains, which, tmp_path / "noted")
    assert not runs.killed()
    runs.each(IN_QUEUE, victim)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_rank_killed_while_it_commits_what_it_streamed_leaves_the_old_or_the_new_step(
    memory_dir: Path, tmp_path: Path
) -> None:
    runs = Runs(_trains, recipe(memory_dir, None), tmp_path / "noted")
    assert not runs.killed()
    runs.each(IN_COMMITS, 0)
