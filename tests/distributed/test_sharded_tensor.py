"""ShardedTensors: every shard stands in the file of the rank that holds it, and comes back into any other sharding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor import Shard as ShardOf

from sm_tiered.manifest import record_from_json
from sm_tiered_dcp import TieredCheckpointer
from sm_tiered_dcp.state_saver import StateSaver
from tests.distributed.dcp_jobs import bits, raised, recipe, run, step_dir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

WORLD = 2
SHAPE = (7, 5)
Box = tuple[int, tuple[int, int], tuple[int, int]]
"""A shard: the rank that holds it, where it begins, its shape."""

SHARDINGS: dict[str, dict[int, list[Box]]] = {
    "rows": {
        1: [(0, (0, 0), (7, 5))],
        2: [(0, (0, 0), (4, 5)), (1, (4, 0), (3, 5))],
        3: [(0, (0, 0), (3, 5)), (1, (3, 0), (3, 5)), (2, (6, 0), (1, 5))],
    },
    "several on a rank": {
        1: [(0, (0, 0), (7, 1)), (0, (0, 1), (7, 4))],
        2: [(0, (0, 0), (3, 2)), (1, (0, 2), (3, 3)), (1, (3, 0), (4, 2)), (0, (3, 2), (4, 3))],
        3: [(2, (0, 0), (7, 2)), (0, (0, 2), (1, 3)), (2, (1, 2), (6, 3))],
    },
    "none on a rank": {
        1: [(0, (0, 0), (2, 5)), (0, (2, 0), (5, 5))],
        2: [(1, (0, 0), (7, 5))],
        3: [(2, (0, 0), (7, 3)), (1, (0, 3), (7, 2))],
    },
}
SWAPPED: list[Box] = [(1, (0, 0), (4, 5)), (0, (4, 0), (3, 5))]
"""The rows as above, each at the other rank."""
DTYPES = {"rows": torch.float32, "several on a rank": torch.bfloat16, "none on a rank": torch.complex64}


def _whole(name: str, value: float) -> torch.Tensor:
    return (torch.arange(float(torch.Size(SHAPE).numel())).view(SHAPE) + value).to(DTYPES[name])


def _cut(whole: torch.Tensor, box: Box) -> torch.Tensor:
    _, (row, column), (rows, columns) = box
    return whole[row : row + rows, column : column + columns]


def _sharded(rank: int, whole: torch.Tensor, boxes: list[Box], fill: float | None = None) -> ShardedTensor:
    """Cut *whole*, or a tensor full of *fill*, into *boxes*."""
    whole = whole if fill is None else torch.full_like(whole, fill)
    return init_from_local_shards(
        [Shard.from_tensor_and_offsets(_cut(whole, b).clone(), list(b[1]), rank) for b in boxes if b[0] == rank],
        *whole.shape,
    )


def _state(rank: int, world: int, value: float, fill: float | None = None) -> dict[str, Any]:
    return {name: _sharded(rank, _whole(name, value), boxes[world], fill) for name, boxes in SHARDINGS.items()}


def _shards(state: dict[str, Any]) -> dict[str, Any]:
    """What of *state* is on this rank, with where it begins."""
    return {
        name: [(shard.metadata.shard_offsets, bits(shard.tensor)) for shard in value.local_shards()]
        for name, value in state.items()
    }


def _save(rank: int, which: dict[str, Any]) -> list[int]:
    state = _state(rank, WORLD, 1.0)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        handle = checkpointer.save(1, state)
        handle.wait("memory")
        handle.wait("disk")
    return [len(value.local_shards()) for value in state.values()]


def _load(rank: int, which: dict[str, Any], world: int) -> None:
    """From memory, from the disk, and by a reader that knows nothing of us."""
    wanted = _shards(_state(rank, world, 1.0))
    for tiers in (which["tiers"], {"disk": which["tiers"]["disk"]}):
        state = _state(rank, world, 1.0, fill=0.0)
        assert _shards(state) != wanted
        with TieredCheckpointer.from_recipe({**which, "tiers": tiers}) as checkpointer:
            assert checkpointer.restore(state) == 1
            assert checkpointer.restored is not None
            assert checkpointer.restored.tier == next(iter(tiers))
        assert _shards(state) == wanted, (tiers.keys(), world)
    stock = _state(rank, world, 1.0, fill=0.0)
    dcp.load(stock, storage_reader=dcp.FileSystemReader(step_dir(Path(which["tiers"]["disk"]["path"]), 1)))
    assert _shards(stock) == wanted


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The recipe of a job of two ranks that saved all shardings as step 1."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "memory").mkdir(mode=0o700)
    which = recipe(folder, folder / "memory")
    assert run(WORLD, _save, which) == [[1, 2, 0], [1, 2, 1]]
    return which


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_come_back_bit_for_bit_in_any_world(world: int, saved: dict[str, Any]) -> None:
    run(world, _load, saved, world)


def test_each_shard_stands_once_where_its_rank_writes_and_stock_dcp_puts_them_together(saved: dict[str, Any]) -> None:
    directory = step_dir(Path(saved["tiers"]["disk"]["path"]), 1)
    found: dict[str, list[Box]] = {name: [] for name in SHARDINGS}
    for path in directory.glob("record-*.json"):
        record = record_from_json(path.read_bytes())
        for item in record.items:
            (row, column), (rows, columns) = item.offsets, item.sizes
            box = (record.rank, (row, column), (rows, columns))
            found[item.fqn].append(box)
            whole = _cut(_whole(item.fqn, 1.0), box).contiguous()
            assert item.payload is not None
            data = (directory / item.part).read_bytes()[item.payload :][: whole.nbytes]
            assert (item.part, item.shape) == (f"__{record.rank}_0.distcp", SHAPE)
            assert data == bits(whole)[2], box
    assert {name: sorted(boxes) for name, boxes in found.items()} == {
        name: sorted(boxes[WORLD]) for name, boxes in SHARDINGS.items()
    }
    plain = {name: torch.zeros(SHAPE, dtype=dtype) for name, dtype in DTYPES.items()}
    dcp.load(plain, storage_reader=dcp.FileSystemReader(directory), no_dist=True)
    assert bits(plain) == bits({name: _whole(name, 1.0) for name in plain})


def _into_others(rank: int, which: dict[str, Any]) -> None:
    """A ShardedTensor's numbers are wanted by other kinds of tensors, and the other way round."""
    mesh = init_device_mesh("cpu", (WORLD,))

    def state(value: float) -> dict[str, Any]:
        columns = distribute_tensor(_whole("rows", value), mesh, [ShardOf(1)])
        return {"a": columns, "b": _whole("rows", value), "c": {"d": columns.clone(), "e": columns.clone()}}

    def sharded(fill: float | None) -> dict[str, Any]:
        whole, boxes = _whole("rows", 5.0), SHARDINGS["several on a rank"][WORLD]
        made = [_sharded(rank, whole, boxes, fill) for _ in range(2)]
        return {"a": made[0], "b": made[1], "c": {"d": _sharded(rank, whole, SWAPPED, fill), "e": made[0]}}

    def known(found: dict[str, Any]) -> Any:
        return _shards({**found, **found["c"], "c": found["a"]})

    others = state(-1.0)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, sharded(None), ["memory"]).wait("memory")
        assert checkpointer.restore(others) == 1
        assert bits(others) == bits(state(5.0))
        assert all(isinstance(value, DTensor) for value in others["c"].values())
        checkpointer.save(2, others, ["memory"]).wait("memory")
        back = sharded(0.0)
        assert checkpointer.restore(back) == 2
        assert known(back) == known(sharded(None))


def test_a_sharded_tensor_is_restored_into_other_kinds_and_back(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _into_others, recipe(tmp_path, memory_dir, disk=None))


def _moved(rank: int, which: dict[str, Any]) -> list[tuple[int, bool, bool]]:
    """Return for each save its step, whether it was planned anew, and whether what it stored came back."""
    whole, found = _whole("rows", 3.0), list[tuple[int, bool, bool]]()
    first = _sharded(rank, whole, SHARDINGS["rows"][WORLD])
    again = _sharded(rank, whole + 1, SHARDINGS["rows"][WORLD])
    swapped, one = (_sharded(rank, whole + 2, boxes) for boxes in (SWAPPED, SHARDINGS["none on a rank"][WORLD]))
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer._engine is not None
        saver = StateSaver.of(checkpointer._engine)
        for step, value in enumerate((first, first, again, swapped, one), start=1):
            for shard in value.local_shards():
                shard.tensor += 10 * step
            wanted, plan = _shards({"x": value}), saver.plan
            checkpointer.save(step, {"x": value}, ["memory"]).wait("memory")
            planned = saver.plan is not plan
            for shard in value.local_shards():
                shard.tensor.zero_()
            assert checkpointer.restore({"x": value}) == step
            found.append((step, planned, _shards({"x": value}) == wanted))
    return found


def test_shards_that_move_are_planned_anew_and_others_not(tmp_path: Path, memory_dir: Path) -> None:
    wanted = [(step, step in (1, 4, 5), True) for step in range(1, 6)]
    assert run(WORLD, _moved, recipe(tmp_path, memory_dir, disk=None)) == [wanted] * WORLD


def _refused(rank: int, which: dict[str, Any]) -> None:
    """Rank 1's shard is one number in many places, or of another shape than was saved: no rank changes a byte."""
    boxes = SHARDINGS["rows"][WORLD]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"a": torch.ones(3), "x": _sharded(rank, _whole("rows", 1.0), boxes)}).wait("memory")
        expanded = _sharded(rank, torch.zeros(SHAPE), boxes)
        if rank == 1:
            shard = expanded.local_shards()[0]
            shard.tensor = torch.zeros(1).expand(shard.tensor.shape)
        wider = init_from_local_shards([Shard.from_tensor_and_offsets(torch.zeros(7, 3), [0, 3 * rank], rank)], 7, 6)
        for value, words in (
            (expanded, "x: its numbers share places"),
            (wider, "x: saved (7, 5) float32, state has (7, 6)"),
        ):
            state = {"a": torch.zeros(3), "x": value}
            kind, text = raised(lambda state=state: checkpointer.restore(state))
            assert kind == "MismatchError", (kind, text)
            assert words in text
            assert not any(part.any() for part in (state["a"], *(shard.tensor for shard in value.local_shards())))


def test_shards_that_can_not_be_filled_are_refused_on_all_ranks(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _refused, recipe(tmp_path, memory_dir, disk=None))
