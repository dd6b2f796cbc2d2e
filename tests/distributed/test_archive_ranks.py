"""Archives in a job of two ranks: rank 0's is everybody's, one copy a node, and what one rank can't pack stops all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sm_tiered_dcp import Archive, TieredCheckpointer
from tests.distributed.dcp_jobs import bits, raised, recipe, run, step_dir

WORLD = 2


def _value(step: int, rank: int = 0) -> dict[str, Any]:
    return {"w": torch.arange(1000.0) + step, "log": ["x"] * step, "rank": rank}


def _recipe(root: Path, rank: int, *, nodes: int) -> dict[str, Any]:
    return recipe(root, root / f"node-{rank % nodes}")


def _save(rank: int, root: Path, nodes: int) -> list[str]:
    with TieredCheckpointer.from_recipe(_recipe(root, rank, nodes=nodes)) as checkpointer:
        for step in (1, 2, 3):
            value = _value(step, rank)
            state = {"checkpoint": Archive(value), "per_rank": {"own": (rank, step)}}
            handle = checkpointer.save(step, state, ["memory", "disk"] if step == 2 else ["memory"])
            handle.wait("memory")
            if step == 2:
                handle.wait("disk")
    return sorted(path.name for path in step_dir(root / f"node-{rank % nodes}", 3).glob("*.ckpt"))


def _restore(rank: int, root: Path, nodes: int) -> tuple[int | None, str, bool, Any]:
    target: dict[str, Any] = {"checkpoint": Archive(), "per_rank": {"own": None}}
    with TieredCheckpointer.from_recipe(_recipe(root, rank, nodes=nodes)) as checkpointer:
        step = checkpointer.restore(target)
        assert step is not None
        assert checkpointer.restored is not None
        same = bits(target["checkpoint"].value) == bits(_value(step, rank % nodes))
        return step, checkpointer.restored.tier, same, target["per_rank"]["own"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_rank_0_s_is_stored_once_and_kept_on_each_node(tmp_path: Path, nodes: int) -> None:
    names = run(WORLD, _save, tmp_path, nodes)
    assert names == ([["__0_0.ckpt"]] * 2 if nodes == 1 else [["__0_0.ckpt"], ["__1_0.ckpt"]])
    assert [path.name for path in step_dir(tmp_path / "disk", 2).glob("*.ckpt")] == ["__0_0.ckpt"]
    assert run(WORLD, _restore, tmp_path, nodes) == [(3, "memory", True, (0, 3)), (3, "memory", True, (1, 3))]


def test_a_lost_node_takes_its_copy_from_the_durable_tier(tmp_path: Path) -> None:
    run(WORLD, _save, tmp_path, 2)
    for path in (tmp_path / "node-0").rglob("*"):
        if path.is_file():
            path.unlink()
    found = run(WORLD, _restore, tmp_path, 2)
    assert found == [(2, "memory+disk", True, (0, 2)), (2, "memory+disk", True, (1, 2))]


def _disagreeing(rank: int, root: Path) -> list[tuple[str, str]]:
    mesh = init_device_mesh("cpu", (WORLD,))
    shard = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])
    found: list[tuple[str, str]] = []
    with TieredCheckpointer.from_recipe(_recipe(root, rank, nodes=1)) as checkpointer:
        one, other = {"w": torch.zeros(3), "c": Archive({})}, {"w": torch.zeros(3)}
        for mine in (one if rank else other, {**other, "c": 1} if rank else one, {"c": Archive({"w": shard})}):
            found.append(raised(lambda mine=mine: checkpointer.save(1, mine)))
        checkpointer.save(2, {"checkpoint": Archive(_value(2))}, ["memory"]).wait("memory")
    return found


def test_ranks_that_hold_other_archives_or_parts_of_one_tensor_are_told(tmp_path: Path) -> None:
    for found in run(WORLD, _disagreeing, tmp_path):
        words = (
            "c is an Archive on rank 1 and not on rank 0 (rank 1). Hold the same archives on every rank.",
            "c is an Archive on rank 0 and not on rank 1",
            "c: holds a DTensor, of which this rank has only a part",
        )
        for (kind, text), expected in zip(found, words, strict=True):
            assert kind == "StructureError"
            assert expected in text


def _refused(rank: int, root: Path) -> tuple[str, str]:
    with TieredCheckpointer.from_recipe(_recipe(root, rank, nodes=1)) as checkpointer:
        value = _value(1) if rank == 1 else {"f": lambda: 1}
        found = raised(lambda: checkpointer.save(1, {"checkpoint": Archive(value)}))
        checkpointer.save(2, {"checkpoint": Archive(_value(2))}, ["memory"]).wait("memory")
    return found


def test_what_rank_0_can_not_pack_stops_the_save_on_all_and_the_next_one_works(tmp_path: Path) -> None:
    (kind, text), (other, _) = run(WORLD, _refused, tmp_path)
    assert (kind, other) == ("UnsafeValueError", "RankFailedError")
    assert "checkpoint['f']: function" in text
