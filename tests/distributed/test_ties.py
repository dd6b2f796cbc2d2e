"""One tensor under two names, on ranks of which some have nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sm_tiered.manifest import record_from_json
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import bits, recipe, run, step_dir


def _sharded(rows: int, value: float) -> Any:
    """A DTensor of *rows* rows over all ranks: with one row, rank 1 has an empty shard."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = value * (1 + torch.arange(rows * 8, dtype=torch.float32).reshape(rows, 8))
    return distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])


def _tied(value: float) -> dict[str, Any]:
    """Rows of all kinds under two or three names, tied by object and by storage, and two that only look tied."""
    from torch.distributed.tensor import DTensor

    one, two = _sharded(1, value), _sharded(4, 2 * value)
    again = DTensor.from_local(
        one.to_local(), one.device_mesh, one.placements, run_check=False, shape=one.shape, stride=one.stride()
    )
    return {
        "embedding": one,
        "head": {"weight": one, "again": again},
        "full": two,
        "full too": two,
        "other": _sharded(1, 5 * value),
        "one more": _sharded(1, 7 * value),
    }


def _saved_and_restored(rank: int, which: dict[str, Any]) -> tuple[int | None, bool, int]:
    state, target = _tied(1.0), _tied(-1.0)
    assert state["embedding"].to_local().numel() == (8 if rank == 0 else 0)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state).wait("disk")
        near = checkpointer.restore(target)
        same = bits(target) == bits(state)
    with TieredCheckpointer.from_recipe({**which, "tiers": {"disk": which["tiers"]["disk"]}}) as checkpointer:
        far = _tied(-1.0)
        assert checkpointer.restore(far) == near
        assert checkpointer.restored is not None
        same &= bits(far) == bits(state) and checkpointer.restored.tier == "disk"
    return near, same, state["embedding"].to_local().numel()


def test_tied_tensors_of_which_a_rank_has_nothing_are_stored_once_and_restored(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    assert run(2, _saved_and_restored, which) == [(1, True, 8), (1, True, 0)]
    places: dict[str, set[tuple[str, int]]] = {}
    for path in step_dir(tmp_path / "disk", 1).glob("record-*.json"):
        for item in record_from_json(path.read_bytes()).items:
            places.setdefault(item.fqn, set()).add((item.part, item.offset))
    assert places["embedding"] == places["head.weight"] == places["head.again"]
    assert places["full"] == places["full too"]
    apart = ("embedding", "full", "other", "one more")
    assert all(len(places[name]) == 2 for name in apart), "one of each rank, empty or not"
    assert len(set().union(*(places[name] for name in apart))) == 8, "what is not tied is stored apart"


def _tied_on_one_rank(rank: int, which: dict[str, Any]) -> Any:
    import torch

    first, second = torch.full((6,), 3.0), torch.full((6,), 4.0)
    target = {"a": torch.zeros(6), "b": torch.zeros(6)}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"a": first, "b": first if rank == 1 else second}, ["memory"]).wait("memory")
        assert checkpointer.restore(target) == 1
    return {name: found.tolist() for name, found in target.items()}


def test_tensors_that_are_one_on_one_rank_and_two_on_another_are_both_stored(tmp_path: Path, memory_dir: Path) -> None:
    as_on_rank_0 = {"a": [3.0] * 6, "b": [4.0] * 6}
    assert run(2, _tied_on_one_rank, recipe(tmp_path, memory_dir)) == [as_on_rank_0] * 2
