"""Two nodes, each with a memory of its own: a rank takes what its node holds, and the rest from the durable tier.

Step 1 is in both memories and on the disk, step 2 in the memories alone; every restore is that of a new job.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import bits, recipe, run, step_dir, steps

WORLD = 2
LARGE = 300_000
"""So many numbers that DCP spreads the tensor's copies over the ranks: each node then keeps what the other stores."""
STEPS = (1, 2)


class Found(NamedTuple):
    """What one rank heard of its restore, which gave every bit that was saved, or raised and left the state alone."""

    step: int | None
    tier: str
    """Or the class of what was raised."""
    why: str


def _numbers(value: float, *shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape) + value


def _state(rank: int, value: float, common: bool) -> dict[str, Any]:
    """Return tensors of every kind and values of this rank; with *common* also values that all ranks have alike."""
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        "rows": distribute_tensor(_numbers(value, 7, 4), mesh, [Shard(0)]),
        "copies": distribute_tensor(_numbers(value, 4, 3), mesh, [Replicate()]),
        "large": distribute_tensor(_numbers(value, LARGE), mesh, [Replicate()]),
        "plain": _numbers(value, 9),
        "per_rank": {"rank": rank, "drawn": [rank, value], "seed": _numbers(value, 3) * (rank + 1)},
        **({"epoch": value, "log": {"lines": ["begun", value], "flag": True}} if common else {}),
    }


def _on_node(which: dict[str, Any], root: str, node: int) -> dict[str, Any]:
    memory = {**which["tiers"]["memory"], "path": f"{root}/node-{node}"}
    return {**which, "tiers": {**which["tiers"], "memory": memory}}


def _recipe(root: Path, **changes: Any) -> dict[str, Any]:
    return recipe(root, root / "node", **changes)


def _save(rank: int, roots: dict[bool, Path]) -> None:
    for common, root in roots.items():
        with TieredCheckpointer.from_recipe(_on_node(_recipe(root), str(root), rank)) as checkpointer:
            first = checkpointer.save(1, _state(rank, 1.0, common), None if common else ["memory"])
            first.wait("disk" if common else "memory")
            checkpointer.save(2, _state(rank, 2.0, common), ["memory"]).wait("memory")


def _load(rank: int, which: dict[str, Any], root: str, nodes: tuple[int, ...], common: bool) -> Found:
    state = _state(rank, -1.0, common)
    before = bits(state)
    with TieredCheckpointer.from_recipe(_on_node(which, root, nodes[rank])) as checkpointer:
        try:
            step = checkpointer.restore(state)
        except Exception as error:
            assert bits(state) == before, "what is not restored is left alone"
            return Found(None, type(error).__name__, str(error))
        assert step is not None
        assert bits(state) == bits(_state(rank, float(step), common)), f"rank {rank}: other bits than were saved"
        assert checkpointer.restored is not None
        return Found(step, checkpointer.restored.tier, "; ".join(checkpointer.restored.reasons))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Path]]:
    """For states without and with common values a directory with the nodes' memories; of the latter also the disk."""
    shm = Path("/dev/shm")
    root = (shm if os.access(shm, os.W_OK) else tmp_path_factory.mktemp("x")) / f"sm_tiered-two-nodes-{os.getpid()}"
    roots = {common: root / f"common-{common}" for common in (False, True)}
    for path in (root, *roots.values()):
        path.mkdir(mode=0o700)
    try:
        run(WORLD, _save, roots)
        yield roots
    finally:
        shutil.rmtree(root, ignore_errors=True)


Nodes = Callable[[bool], Path]


@pytest.fixture
def nodes(saved: dict[bool, Path], memory_dir: Path) -> Nodes:
    """Return what gives a copy of what was saved, to be damaged and restored."""

    def copied(common: bool) -> Path:
        return shutil.copytree(saved[common], memory_dir / "copy")

    return copied


def _restored(root: Path, *, common: bool = True, nodes: tuple[int, ...] = (0, 1), durable: bool = True) -> list[Found]:
    which = _recipe(root) if durable else _recipe(root, disk=None)
    return run(WORLD, _load, which, str(root), nodes, common)


def _flip(path: Path, amid: bytes) -> None:
    """Flip a bit amid bytes that stand in the file as they are."""
    data = bytearray(path.read_bytes())
    data[data.index(amid) + 2] ^= 1
    path.write_bytes(data)


def test_each_node_keeps_what_it_needs_and_the_durable_tier_gets_everything_once(saved: dict[bool, Path]) -> None:
    for node in range(WORLD):
        parts = steps(saved[True] / f"node-{node}", "*.distcp")
        assert parts == dict.fromkeys(STEPS, [f"__{node}_{number}.distcp" for number in range(3 + node)])
    disk = steps(saved[True] / "disk", "*.distcp")
    assert disk == {1: [f"__{rank}_{number}.distcp" for rank in range(WORLD) for number in range(2)]}


def test_two_nodes_restore_the_newest_step_from_their_memories(nodes: Nodes) -> None:
    assert _restored(nodes(False), common=False) == [Found(2, "memory", "")] * WORLD


def test_two_nodes_restore_also_common_values_from_their_memories(nodes: Nodes) -> None:
    assert _restored(nodes(True)) == [Found(2, "memory", "")] * WORLD


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_takes_what_is_durable_and_the_other_what_it_holds(nodes: Nodes, lost: int) -> None:
    root = nodes(True)
    shutil.rmtree(root / f"node-{lost}")
    found = _restored(root)
    for step, tier, why in found:
        assert (step, tier) == (1, "memory+disk")
        assert "step 2" in why
        assert f"records of ranks [{lost}] of 2 are missing" in why
    assert f"part __{lost}_0.distcp: memory: not on this node" in found[lost].why
    assert f"part __{1 - lost}_0.distcp" not in found[1 - lost].why


def test_two_lost_nodes_take_all_from_the_durable_tier(nodes: Nodes) -> None:
    root = nodes(True)
    for node in range(WORLD):
        shutil.rmtree(root / f"node-{node}")
    assert [found[:2] for found in _restored(root)] == [(1, "disk")] * WORLD


def test_ranks_that_changed_their_nodes_take_what_is_durable_and_say_why(nodes: Nodes) -> None:
    for rank, (step, tier, why) in enumerate(_restored(nodes(True), nodes=(1, 0))):
        assert step == 1
        assert "disk" in tier.split("+")
        assert "step 2" in why
        assert f"part __{rank}_0.distcp: memory: not on this node" in why
        assert f"part __{rank}_1.distcp: memory: not on this node" in why


def test_ranks_that_changed_their_nodes_and_have_no_durable_tier_all_raise(nodes: Nodes) -> None:
    for step, raised, why in _restored(nodes(False), common=False, nodes=(1, 0), durable=False):
        assert (step, raised) == (None, "NothingRestorableError")
        for word in ("step 2", "step 1", "not on this node"):
            assert word in why


COPIES = pytest.mark.parametrize("number", [2, 3], ids=["tensors", "values"])
"""What a node keeps of another's: numbers of parts."""


def _with_damaged_copies(root: Path, number: int, *damaged: int) -> Path:
    for step in damaged:
        amid = _numbers(step, 9).numpy().tobytes() if number == 2 else b"begun"
        _flip(step_dir(root / "node-1", step) / f"__1_{number}.distcp", amid)
    return root


@COPIES
def test_a_damaged_copy_that_a_node_keeps_is_read_from_the_durable_tier_and_told(nodes: Nodes, number: int) -> None:
    found = _restored(_with_damaged_copies(nodes(True), number, *STEPS))
    assert [found[:2] for found in found] == [(1, "memory+disk")] * WORLD
    of_step_1 = found[1].why[found[1].why.index("committed on no durable tier") :]
    assert f"part __1_{number}.distcp" in of_step_1
    assert "chunk 0 has XXH3-128" in of_step_1


@COPIES
@pytest.mark.parametrize("damaged", [(2,), (1, 2)], ids=["newest", "all"])
def test_a_damaged_copy_that_a_node_keeps_means_an_older_step_or_an_error_where_nothing_is_durable(
    nodes: Nodes, number: int, damaged: tuple[int, ...]
) -> None:
    expected = (1, "memory") if damaged == (2,) else (None, "NothingRestorableError")
    for step, tier, why in _restored(_with_damaged_copies(nodes(True), number, *damaged), durable=False):
        assert (step, tier) == expected
        assert f"rank 1: part __1_{number}.distcp can't be had: memory: chunk 0 has XXH3-128" in why
