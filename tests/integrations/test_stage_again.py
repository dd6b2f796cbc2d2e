"""A ``dcp.async_save`` whose `TieredStorageWriter.stage` raised leaves nothing, and the same writer saves the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from sm_tiered.errors import ConfigError, UnsafeValueError
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter, state_saver
from tests.distributed.dcp_jobs import async_save, bits, raised, recipe, run, steps

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def state(value: float = -1.0, **more: Any) -> dict[str, Any]:
    return {"w": torch.full((300,), value), "epoch": int(value), **more}


def load(which: dict[str, Any]) -> tuple[int | None, Any]:
    target = state()
    with closing(TieredStorageReader(which)) as reader:
        dcp.load(target, storage_reader=reader)
        return reader.step, bits(target)


def unsafe(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Refused before the ranks agree."""
    return state(2.0, fn=object())


def too_large(_patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Refused by the recipe's budget, when the ranks have agreed and planned."""
    return state(2.0, more=torch.zeros(1 << 20))


def unplanned(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Fails between the agreement and the copy."""

    def fail(*_arguments: object) -> None:
        raise MemoryError("no memory to plan in")

    patch.setattr(state_saver, "plan_tensors", fail)
    return state(2.0, more=torch.zeros(9))


FAILURES = {unsafe: UnsafeValueError, too_large: ConfigError, unplanned: MemoryError}
CASES = [
    *product([unsafe, unplanned], ["first of all", "after a save"], ["dcp.save", "dcp.async_save"]),
    (too_large, "first of all", "dcp.async_save"),  # a later one goes to the disk alone, and says so
]


@pytest.mark.parametrize(("fail", "when", "then"), CASES)
def test_after_a_stage_that_raised_the_same_writer_saves(
    fail: Callable[[pytest.MonkeyPatch], dict[str, Any]], when: str, then: str, tmp_path: Path, memory_dir: Path
) -> None:
    first = when == "first of all"
    which = recipe(tmp_path, memory_dir, memory={"budget": "1MiB"})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        if not first:
            checkpointer.save(1, state(1.0)).wait("disk")
        with closing(TieredStorageWriter(which, step=2)) as writer:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(FAILURES[fail]):
                async_save(fail(patch), writer)
            assert writer.handle is None
            for root in (memory_dir, tmp_path / "disk"):
                assert set(steps(root)) == (set() if first else {1}), "something of what failed is there"
            assert checkpointer.latest() == (None if first else 1)
            if then == "dcp.save":
                dcp.save(state(3.0), storage_writer=writer)
            else:
                async_save(state(3.0), writer).result()
            assert writer.handle is not None
            writer.handle.wait("memory")
            writer.handle.wait("disk")
        assert load(which) == (2, bits(state(3.0)))
    with TieredCheckpointer.from_recipe(recipe(tmp_path, None)):
        assert load(recipe(tmp_path, None)) == (2, bits(state(3.0))), "the disk has another"


class Failing(dcp.DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        raise ValueError("no plan today")


class Unread(dcp.DefaultSavePlanner):
    def resolve_data(self, write_item: Any) -> Any:
        raise AssertionError("the state was read again")


def test_what_was_staged_is_not_read_again(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which), closing(TieredStorageWriter(which, step=1)) as writer:
        for _ in range(2):
            async_save(state(1.0), writer, planner=Unread()).result()
        with pytest.raises(BaseException, match="the state was read again"):
            dcp.save(state(2.0), storage_writer=writer, planner=Unread())


def test_what_was_staged_for_a_step_that_its_path_contradicts_is_lent_to_no_other(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("disk")
        with closing(TieredStorageWriter(which, step=2)) as writer:
            with pytest.raises(BaseException, match="step"):
                async_save(state(2.0), writer, checkpoint_id="step_9").result()
            target = state()
            assert checkpointer.restore(target, step=1) == 1
            dcp.save(state(3.0), storage_writer=writer)
            assert writer.handle is not None
            writer.handle.wait("memory")
        assert load(which) == (2, bits(state(3.0)))


def test_a_stage_that_raises_is_not_taken_for_one_whose_save_never_ended(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which), closing(TieredStorageWriter(which, step=1)) as writer:
        staged = async_save(state(1.0), writer, planner=Failing())
        with pytest.raises(BaseException, match="no plan today"):
            staged.result()
        with pytest.raises(UnsafeValueError):
            async_save(state(2.0, fn=object()), writer)
        assert writer.handle is None
        async_save(state(3.0), writer).result()
        assert load(which) == (1, bits(state(1.0))), "a step is written once in an attempt"


@pytest.mark.parametrize("ends", [True, False])
def test_what_was_staged_before_a_rollback_is_not_taken_for_what_is_saved_after_it(
    ends: bool, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, memory={"keep": {"latest": 3}})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("memory")
        with closing(TieredStorageWriter(which, step=2)) as writer:
            staged = async_save(state(2.0), writer, planner=None if ends else Failing())
            if ends:
                staged.result()
            else:
                with pytest.raises(BaseException, match="no plan today"):
                    staged.result()
            assert checkpointer.restore(state(), step=1) == 1
            dcp.save(state(3.0), storage_writer=writer)
            assert load(which) == (2, bits(state(3.0)))


# ---- on two ranks


def _differing(rank: int) -> dict[str, tuple[dict[str, Any], str]]:
    """States that only together are wrong, and what the rank raises that has nothing wrong in its own."""
    return {
        "unsafe": (state(0.0, **({"fn": object()} if rank == 1 else {})), "RankFailedError"),
        "values": (state(0.0, lr=float(rank)), "StructureError"),
        "shapes": (state(0.0, more=torch.zeros(3 + rank)), "StructureError"),
    }


def _stage_again(rank: int, which: dict[str, Any], folders: list[str]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("disk")
        for step, (what, (bad, kind)) in enumerate(_differing(rank).items(), start=2):
            writer = TieredStorageWriter(which, step=step)
            found, text = raised(lambda bad=bad, writer=writer: async_save(bad, writer))
            assert found == ("UnsafeValueError" if what == "unsafe" and rank == 1 else kind), text
            assert writer.handle is None
            assert checkpointer.latest() == step - 1
            assert not [folder for folder in folders if step in steps(Path(folder))]
            torch.distributed.barrier()
            async_save(state(float(step)), writer).result()
            assert writer.handle is not None
            writer.handle.wait("disk")
            assert load(which) == (step, bits(state(float(step)))), what
            writer.close()


def test_where_the_stage_of_one_rank_raises_all_do_and_all_save_the_next(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    run(2, _stage_again, which, [str(memory_dir), str(tmp_path / "disk")])
