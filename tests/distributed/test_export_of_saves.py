"""What real ranks saved, shards and all, exported and compared by the command line, which knows nothing of torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from sm_tiered.cli.app import app
from tests.distributed.dcp_jobs import bits, recipe, run


def _numbers(*shape: int, dtype: str = "float32") -> Any:
    import torch

    made = torch.Generator().manual_seed(sum(shape) + len(dtype))
    return torch.randn(shape, generator=made, dtype=torch.float64).to(getattr(torch, dtype))


def _whole() -> dict[str, Any]:
    import torch

    return {
        "rows": _numbers(7, 5),
        "columns": _numbers(3, 7, dtype="float64"),
        "deep": _numbers(4, 3, 6, dtype="bfloat16"),
        "fewer rows than ranks": _numbers(1, 6, dtype="complex64"),
        "small": _numbers(5, 12, dtype="float8_e4m3fn"),
        "tiles": _numbers(6, 8),
        "copies": _numbers(4, 3, dtype="float16"),
        "plain": torch.arange(8),
        "scalar": torch.tensor(True),
        "empty": torch.empty(0, 4),
    }


_DIMS = {"rows": 0, "columns": 1, "deep": 2, "fewer rows than ranks": 0, "small": 1}


def _laid_out(world: int) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    whole = _whole()
    if not dist.is_initialized():
        return whole
    line = init_device_mesh("cpu", (world,))
    plane = init_device_mesh("cpu", (2, 2)) if world == 4 else line

    def cut(tensor: Any, mesh: Any, placements: list[Any]) -> Any:
        from torch.distributed.tensor import distribute_tensor

        if tensor.dtype.itemsize > 1:
            return distribute_tensor(tensor, mesh, placements)
        # gloo sends no 8 bit floats
        pieces = tensor.tensor_split(world, placements[0].dim)
        local = pieces[dist.get_rank()].contiguous()
        return DTensor.from_local(local, mesh, placements, shape=tensor.shape, stride=tensor.stride())

    for name, dim in _DIMS.items():
        whole[name] = cut(whole[name], line, [Shard(dim)])
    whole["tiles"] = cut(whole["tiles"], plane, [Shard(0), Shard(1)] if world == 4 else [Shard(1)])
    whole["copies"] = cut(whole["copies"], line, [Replicate()])
    return whole


def _save(rank: int, which: dict[str, Any], step: int, world: int) -> None:
    from sm_tiered_dcp.checkpointer import TieredCheckpointer

    model = _laid_out(world)
    model["tied"] = model["plain"]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        state = {"model": model, "optimizer": {"state": {"w": {"exp_avg": _numbers(3)}}}, "epoch": step}
        handle = checkpointer.save(step, state)
        handle.wait("disk")


def command(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("world", [0, 2, 4])
def test_an_export_is_what_the_ranks_had(tmp_path: Path, memory_dir: Path, world: int) -> None:
    which = recipe(tmp_path, memory_dir)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(which))
    run(world, _save, which, 5, world)
    for tier in ("memory", "disk"):
        out = tmp_path / tier
        told = command("export", path, "--step", 5, "--tier", tier, "-o", out, "--strip", "model.")
        assert told["tied"] == {"tied": "plain"}
        assert told["checkpoint"]["world"] == max(1, world)
        found = load_file(out / "model.safetensors")
        assert bits(found) == bits(_whole())
        assert "torch.float8_e4m3fn" in str(found["small"].dtype)


def test_saves_of_other_numbers_of_ranks_are_the_same(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(which))
    for step, world in ((5, 2), (6, 3)):
        run(world, _save, which, step, world)
    told = command("diff", path, "disk:5", "memory:6")
    assert [told[side]["world"] for side in "ab"] == [2, 3]
    assert len(told["identical"]) == len(_whole()) + 2
    assert told["different"] == told["unlike"] == told["only_a"] == told["only_b"] == []
    assert told["values"]["different"] == ["epoch"]
    assert [each["kind"] for each in told["warnings"]] == ["stale_optimizer", "all_identical"]
