"""A rank that fails in any phase of a load, or on the storage's side of a save: all ranks raise, the next one works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from tests.distributed.dcp_jobs import Job, bits, recipe, run, start

WORLD = 2
Phases = dict[str, tuple[int, ...]]
"""Phases of DCP and the ranks that fail in them, one at a time; what DCP calls on the first rank only fails there."""
PLANNER: Phases = {
    **{"set_up_planner": (1,), "create_local_plan": (0,), "create_global_plan": (0,), "finish_plan": (0, 1)},
    **{"load_bytes": (1,), "resolve_tensor": (0,), "commit_tensor": (1,)},
}
READER: Phases = {
    **{"read_metadata": (0, 1), "set_up_storage_reader": (1,), "prepare_local_plan": (0,)},
    **{"prepare_global_plan": (0,), "read_data": (0, 1)},
}
NOTHING_WRITTEN: Phases = {"set_up_storage_writer": (0,), "prepare_local_plan": (1,), "prepare_global_plan": (0,)}
"""Phases of a save in which no rank has begun to write."""


def _state(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "shards": distribute_tensor(torch.arange(28.0).view(7, 4) + value, mesh, [Shard(0)]),
        "plain": torch.full((5,), value),
        "epoch": int(value),
    }


def _failing(kind: type, phase: str, here: bool, *, ends: bool = False) -> Any:
    """Return a class like *kind* that fails in *phase* if *here*; *ends*: only once that has done its work."""

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if ends:
            getattr(kind, phase)(self, *arguments, **options)
        raise OSError(f"{phase} failed on purpose")

    return type("Failing", (kind,), {phase: fail} if here else {})


def _failures(call: Callable[[], object]) -> dict[int, str]:
    """Return what DCP says of each rank that failed, and nothing else may be raised."""
    try:
        value = call()
    except CheckpointException as error:
        return {rank: str(failure) for rank, (failure, _) in error.failures.items()}
    pytest.fail(f"nothing was raised; returned {value!r}")


def _load(reader: TieredStorageReader, planner: Any = None) -> dict[str, Any]:
    state = _state(-1.0)
    try:
        dcp.load(state, storage_reader=reader, planner=planner)
    finally:
        reader.close()
    return state


def _check_load(which: dict[str, Any], step: int) -> None:
    reader = TieredStorageReader(which)
    assert bits(_load(reader)) == bits(_state(float(step)))
    assert reader.step == step


def _save(writer: TieredStorageWriter, value: float) -> None:
    try:
        dcp.save(_state(value), storage_writer=writer)
        assert writer.handle is not None
        for tier in writer.handle.tiers:
            writer.handle.wait(tier)
    finally:
        writer.close()


def _failing_loads(rank: int, which: dict[str, Any]) -> None:
    keeper = TieredCheckpointer.from_recipe(which)  # one engine for all: what a failed load leaves would be found
    _save(TieredStorageWriter(which, step=3), 3.0)
    for kind, phases in ((DefaultLoadPlanner, PLANNER), (TieredStorageReader, READER)):
        for phase, victims in phases.items():
            for victim in victims:
                # What read_metadata does together with the others is voted on; here it fails with what it has found.
                failing = _failing(kind, phase, rank == victim, ends=phase == "read_metadata")
                if kind is TieredStorageReader:
                    failures = _failures(lambda made=failing: _load(made(which)))
                else:
                    failures = _failures(lambda made=failing: _load(TieredStorageReader(which), made()))
                assert list(failures) == [victim], (phase, victim, failures)
                assert f"{phase} failed on purpose" in failures[victim], (phase, victim, failures)
                _check_load(which, 3)
    _save(TieredStorageWriter(which, step=4), 4.0)
    _check_load(which, 4)
    keeper.close()


def test_a_rank_that_fails_in_any_phase_fails_the_load_on_all_and_the_next_one_works(
    tmp_path: Path, memory_dir: Path
) -> None:
    run(WORLD, _failing_loads, recipe(tmp_path, memory_dir))


def _absent_load(rank: int, which: dict[str, Any], victim: int) -> None:
    _save(TieredStorageWriter(which, step=3), 3.0)
    failing = _failing(TieredStorageReader, "read_metadata", rank == victim)
    failures = _failures(lambda: _load(failing(which)))
    assert sorted(failures) == [0, 1], "the other one does not know why nobody came"
    assert "read_metadata failed on purpose" in failures[victim]
    assert "a collective of 2 ranks did not end" in failures[1 - victim]
    _check_load(which, 3)


@pytest.mark.long
def test_a_rank_that_never_comes_to_choose_the_checkpoint_fails_the_load_in_time(
    tmp_path: Path, memory_dir: Path
) -> None:
    jobs: list[Job] = []
    for victim in range(WORLD):  # both at once: they do little but wait
        memory = memory_dir / f"memory-{victim}"
        memory.mkdir(mode=0o700)
        which = recipe(tmp_path / f"folder-{victim}", memory, group_timeout_secs=2)
        jobs.append(start(WORLD, _absent_load, which, victim))
    for job in jobs:
        for ended in job.wait():
            assert ended.status == 0, ended.trace


def _failing_saves(rank: int, which: dict[str, Any]) -> None:
    def fails(phase: str, victim: int, step: int, *, ends: bool = False) -> None:
        made = _failing(TieredStorageWriter, phase, rank == victim, ends=ends)
        # Named tiers are queued even behind a step that failed, which the drainers give up in a moment.
        failures = _failures(lambda: _save(made(which, step=step, tiers=tiers), 99.0))
        assert list(failures) == [victim], (phase, victim, failures)
        assert f"{phase} failed on purpose" in failures[victim], (phase, victim, failures)

    def works(step: int) -> None:
        _save(TieredStorageWriter(which, step=step, tiers=tiers), float(step))
        _check_load(which, step)

    keeper, tiers, step = TieredCheckpointer.from_recipe(which), tuple(which["tiers"]), 1
    works(step)
    for phase, victims in NOTHING_WRITTEN.items():
        for victim in victims:
            fails(phase, victim, step + 1)
            _check_load(which, step)
            works(step + 1)  # the step is free again
            step += 1
    for victim in (1,):  # without the first rank the others wait a while before they take over its commit
        fails("write_data", victim, step + 1)
        _check_load(which, step)
        dist.barrier()
        works(step + 2)
        step += 2
    # All have written when these two fail: the step is there, whole, whatever DCP says of it.
    for phase, victim in (("write_data", 1), ("write_data", 0), ("finish", 0)):
        fails(phase, victim, step + 1, ends=True)
        reader = TieredStorageReader(which)
        assert bits(_load(reader)) == bits(_state(99.0)), phase
        assert reader.step == step + 1
        works(step + 2)
        step += 2
    keeper.close()


@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "disk only"])
def test_a_rank_whose_storage_fails_in_any_phase_fails_the_save_on_all_and_the_next_one_works(
    in_memory: bool, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir if in_memory else None, disk={"keep": {"latest": 30}}, stream_timeout_secs=10)
    run(WORLD, _failing_saves, which)
