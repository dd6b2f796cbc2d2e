"""A job comes back with more or fewer ranks: every saved world into every other, bit for bit, from memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import bits, raised, recipe, run

WORLDS = (0, 1, 2, 3, 4)
"""0: one process without torch.distributed."""


def _numbers(*shape: int, dtype: str = "float32") -> Any:
    import torch

    made = torch.Generator().manual_seed(sum(shape) + len(dtype))
    return torch.randn(shape, generator=made, dtype=torch.float64).to(getattr(torch, dtype))


def _state(rank: int, turned: bool = False) -> dict[str, Any]:
    """The same tensors for any world, laid out over its ranks in one of two ways."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if dist.is_initialized():
        world = dist.get_world_size()
        line = init_device_mesh("cpu", (world,))
        plane = init_device_mesh("cpu", (2, 2)) if world == 4 else None

        def by(dim: int, tensor: Any) -> Any:
            return distribute_tensor(tensor, line, [Shard((dim + turned) % tensor.dim())])

        def copied(tensor: Any) -> Any:
            return distribute_tensor(tensor, line, [Shard(0) if turned else Replicate()])

        def tiled(tensor: Any) -> Any:
            if plane is None:
                return by(0, tensor)
            return distribute_tensor(tensor, plane, [Replicate() if turned else Shard(0), Shard(1)])
    else:

        def by(dim: int, tensor: Any) -> Any:
            return tensor.clone()

        def copied(tensor: Any) -> Any:
            return tensor.clone()

        tiled = copied
    return {
        "rows": by(0, _numbers(7, 5)),
        "columns": by(1, _numbers(3, 7, dtype="float64")),
        "fewer rows than ranks": by(0, _numbers(2, 6, dtype="complex64")),
        "copies": copied(_numbers(4, 3, dtype="bfloat16")),
        "tiles": tiled(_numbers(6, 9)),
        "plain": _numbers(8),
        "nested": {"list": [by(0, _numbers(5, 2, dtype="float16")), {"flag": torch.tensor(True)}], "epoch": 3},
        "per_rank": _own(rank),
    }


def _own(rank: int) -> dict[str, Any]:
    import torch

    return {"rank": rank, "seed": torch.tensor([rank, 7])}


def _blank(state: dict[str, Any]) -> dict[str, Any]:
    """Spoil everything that a restore should fill."""
    for name in ("rows", "columns", "fewer rows than ranks", "copies", "tiles", "plain"):
        state[name].detach().fill_(-1)
    state["nested"]["list"][0].detach().fill_(-1)
    state["nested"]["list"][1]["flag"].fill_(False)
    state["nested"]["epoch"] = -1
    state["per_rank"] = {"rank": -1, "seed": state["per_rank"]["seed"] * 0 - 1}
    return state


def _save(rank: int, which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        handle = checkpointer.save(4, _state(rank), metrics={"loss": 1.0})
        handle.wait("memory")
        handle.wait("disk")


def _by_turns(rank: int, world: int, saved_world: int) -> int:
    return rank % saved_world


def _keep_own(rank: int, world: int, saved_world: int) -> None:
    return None


def _refused(checkpointer: TieredCheckpointer, state: dict[str, Any], saved_world: int, world: int) -> None:
    before = bits(state)
    kind, text = raised(lambda: checkpointer.restore(state))
    assert kind == "MismatchError", (kind, text)
    for word in (f"of {saved_world} ranks", f"has {world}", "per_rank=rule"):
        assert word in text
    assert bits(state) == before


def _load(rank: int, recipes: dict[int, dict[str, Any]], world: int) -> int:
    """Load each checkpoint, from memory in the layout it was saved in, from the disk in the other one."""
    states = {turned: _state(rank, turned) for turned in (False, True)}
    common = {turned: {**bits(state), "per_rank": None} for turned, state in states.items()}
    loads = 0
    for saved_as, which in recipes.items():
        saved_world = max(1, saved_as)
        resized = saved_world != world
        for turned, tiers in ((False, which["tiers"]), (True, {"disk": which["tiers"]["disk"]})):
            state = states[turned]
            with TieredCheckpointer.from_recipe({**which, "tiers": tiers}) as checkpointer:
                if resized and not turned:
                    _refused(checkpointer, _blank(state), saved_world, world)
                for rule in (_by_turns, _keep_own) if resized else (None,):
                    own = bits(_blank(state)["per_rank"])
                    assert checkpointer.restore(state, per_rank=rule) == 4
                    assert checkpointer.restored is not None
                    assert checkpointer.restored.tier == ("disk" if turned else "memory")
                    theirs = own if rule is _keep_own else bits(_own(rank % saved_world))
                    wanted = {**common[turned], "per_rank": theirs}
                    assert bits(state) == wanted, (saved_as, world, turned)
                    loads += 1
    return loads


@pytest.mark.timeout(180)
@pytest.mark.parametrize("worlds", [(0, 3, 4), pytest.param(WORLDS, marks=pytest.mark.long)], ids=["some", "all"])
def test_every_world_loads_what_every_world_saved(tmp_path: Path, memory_dir: Path, worlds: tuple[int, ...]) -> None:
    recipes: dict[int, dict[str, Any]] = {}
    for world in worlds:
        here, memory = tmp_path / str(world), memory_dir / str(world)
        here.mkdir()
        recipes[world] = recipe(here, memory)
        run(world, _save, recipes[world])
    for world in worlds:
        ranks = max(1, world)
        alike = sum(max(1, saved) == ranks for saved in worlds)
        assert run(world, _load, recipes, ranks) == [2 * (2 * len(worlds) - alike)] * ranks


def _continue(rank: int, which: dict[str, Any], expected: int | None, add: int) -> list[Any]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, Any] = {"sum": distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)]), "log": [], "per_rank": {}}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        start = checkpointer.restore(state, per_rank=_keep_own)
        assert start == expected
        step = (start or 0) + 1
        state["sum"] += add
        state["log"].append(add)
        state["per_rank"] = {"rank": rank}
        checkpointer.save(step, state).wait("memory")
        return [state["sum"].full_tensor().tolist(), state["log"], start]


def test_a_job_that_is_resized_again_and_again_goes_on_from_where_it_was(tmp_path: Path, memory_dir: Path) -> None:
    which, expected, total = recipe(tmp_path, memory_dir, disk=None), None, 0
    for turn, world in enumerate((2, 4, 1, 3, 2), start=1):
        total += turn
        for value, log, start in run(world, _continue, which, expected, turn):
            assert value == [[float(total)] * 3] * 5
            assert log == list(range(1, turn + 1))
            assert start == expected
        expected = turn
