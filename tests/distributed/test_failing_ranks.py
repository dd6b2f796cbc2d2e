"""A rank that fails, or brings something else than the others: all ranks raise, nothing is there, the next works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from tests.distributed.dcp_jobs import bits, recipe, run

WORLD = 3
PLANNING = {"set_up_planner": (2, 0), "create_local_plan": (2, 0), "create_global_plan": (0,)}
WRITING = {"finish_plan": (2,), "resolve_data": (1,)}
WRITING_OF_THE_FIRST = {"finish_plan": (0,), "resolve_data": (0,)}
"""Phases of DCP in which the other ranks have not, and have, begun to write; the ranks that fail in them."""


def _all_raise(call: Callable[[], object]) -> tuple[str, str]:
    try:
        value = call()
    except BaseException as error:  # DCP's own derives from it
        return type(error).__name__, str(error)
    pytest.fail(f"nothing was raised; returned {value!r}")


def _sharded(rank: int, value: float, rows: int = 7) -> dict[str, Any]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "shards": distribute_tensor(torch.arange(rows * 4.0).view(rows, 4) + value, mesh, [Shard(0)]),
        "plain": torch.full((5,), value),
        "epoch": int(value),
    }


def _complete(which: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The steps that are complete in memory and on the disk, by what stands there alone."""
    from sm_tiered.inventory import list_checkpoints, read_holding
    from sm_tiered.recipe import Recipe
    from sm_tiered.tiers import open_tier
    from sm_tiered.tiers.memory import MemoryTier

    settings = Recipe.parse(which).settings()
    near = MemoryTier(settings.memory, settings.namespace) if settings.memory else None
    disk = open_tier(settings.durable[0], settings.namespace)

    def whole(tier: Any, durable: bool) -> list[int]:
        found = list_checkpoints(tier)
        return [c.step for c in found if read_holding(tier, c, durable=durable).problem is None]

    return whole(near, False) if near else [], whole(disk, True)


def _failing_planner(phase: str, here: bool) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class Failing(DefaultSavePlanner):
        pass

    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(f"{phase} failed on purpose")

    if here:
        setattr(Failing, phase, fail)
    return Failing()


def _dcp_phases(rank: int, which: dict[str, Any], phases: dict[str, tuple[int, ...]]) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    from sm_tiered import streaming

    # So long the others leave a commit to the first rank, and wait for it when they close.
    streaming.TAKEOVER_SECS = 3.0

    def save(step: int, value: float, planner: Any = None) -> None:
        # Named tiers are queued even behind the step that failed, which the drainers give up in a moment.
        writer = TieredStorageWriter(which, step=step, tiers=tuple(which["tiers"]))
        try:
            dcp.save(_sharded(rank, value), storage_writer=writer, planner=planner)
            assert writer.handle is not None
            for tier in which["tiers"]:
                writer.handle.wait(tier)
        finally:
            writer.close()

    def fails(phase: str, victim: int, step: int) -> None:
        kind, text = _all_raise(lambda: save(step, 99.0, _failing_planner(phase, rank == victim)))
        assert kind == "CheckpointException", (phase, victim, kind, text)
        assert f"{phase} failed on purpose" in text

    def check(step: int) -> None:
        state = _sharded(rank, -1.0)
        reader = TieredStorageReader(which)
        dcp.load(state, storage_reader=reader)
        reader.close()
        assert reader.step == step, (reader.step, step, which["namespace"])
        assert bits(state) == bits(_sharded(rank, float(step)))

    keeper = TieredCheckpointer.from_recipe(which)  # one engine for all of these writers
    step = 1
    save(step, 1.0)
    for phase, victims in phases.items():
        for victim in victims:
            fails(phase, victim, step + 1)
            check(step)
            dist.barrier()
            near, far = _complete(which)
            assert step in (near or far)
            assert step + 1 not in near + far, (phase, victim, near, far)
            dist.barrier()
            save(step + 2, float(step + 2))  # another step works …
            step += 2
            check(step)
            fails(phase, victim, step + 1)
            if phase in PLANNING:  # … and the same one does, with other values
                save(step + 1, float(step + 1))
                step += 1
            else:  # … but what other ranks have written of the same one is never mixed with anything
                kind, text = _all_raise(lambda s=step + 1: save(s, float(s)))
                assert kind in ("CheckpointException", "RankFailedError"), (kind, text)
            check(step)
    keeper.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(PLANNING, id="planning"),
        pytest.param(WRITING, id="writing"),
        # Without the first rank the others wait a while before they take over its commit.
        pytest.param(WRITING_OF_THE_FIRST, id="writing of the first", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False], ids=["memory", "disk only"])
def test_a_rank_that_fails_in_any_phase_of_dcp_fails_the_save_on_all_and_the_next_one_works(
    phases: dict[str, tuple[int, ...]], in_memory: bool, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir if in_memory else None, disk={"keep": {"latest": 30}}, stream_timeout_secs=10)
    run(WORLD, _dcp_phases, which, phases)


class Boom:
    """A Stateful object whose state can't be read on one rank."""

    def __init__(self, here: bool) -> None:
        self.here = here

    def state_dict(self) -> dict[str, Any]:
        if self.here:
            raise LookupError("no state today")
        return {"x": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _function() -> None: ...


def _checkpointer_phases(rank: int, which: dict[str, Any]) -> None:
    import torch.distributed as dist

    def expect(wanted: dict[int, str] | str, words: tuple[str, ...], step: int, state: dict[str, Any]) -> None:
        kind, text = _all_raise(lambda: checkpointer.save(step, state))
        assert kind == (wanted if isinstance(wanted, str) else wanted.get(rank, "RankFailedError")), (kind, text)
        for word in words if isinstance(wanted, str) or rank in wanted else ("another rank", *map(str, wanted)):
            assert word in text, text
        dist.barrier()
        near, far = _complete(which)
        assert step not in near + far
        dist.barrier()

    def good(step: int, **more: Any) -> None:
        state = {**_sharded(rank, float(step)), **more}
        handle = checkpointer.save(step, state)
        handle.wait("memory")
        handle.wait("disk")
        target = {**_sharded(rank, -1.0), **dict.fromkeys(more)}
        assert checkpointer.restore(target) == step
        assert bits(target) == bits(state)

    def state(value: float = 2.0, **more: Any) -> dict[str, Any]:
        return {**_sharded(rank, value), **more}

    with TieredCheckpointer.from_recipe(which) as checkpointer:
        good(1)
        for victim in range(WORLD):
            mine, step = rank == victim, 10 * victim + 2
            expect({victim: "LookupError"}, ("no state today",), step, state(train=Boom(mine)))
            hooks = {"hooks": [1, _function if mine else 2]}
            named = f"per_rank.{victim:05d}.hooks[1]"
            expect({victim: "UnsafeValueError"}, (named, "function", "allow_pickle"), step, state(per_rank=hooks))
            twice = {"a": {"b": 1}, **({"a.b": 2} if mine else {})}
            expect({victim: "StructureError"}, ("a.b", "two values"), step, state(**twice))
            expect("StructureError", ("lr: ranks", "different values", "'per_rank'"), step, state(lr=0.1 + mine))
            expect("StructureError", ("different steps",), step + mine, state())
            good(step)  # what failed is not in its way
            good(step + 1, epoch_log=[1, 2])
        expect("StructureError", ("step 3 is below step 23", "restore(state, step=…)"), 3, state())


@pytest.mark.timeout(120)
def test_a_rank_that_fails_or_differs_fails_the_save_on_all_and_the_next_one_works(
    tmp_path: Path, memory_dir: Path
) -> None:
    run(WORLD, _checkpointer_phases, recipe(tmp_path, memory_dir))
