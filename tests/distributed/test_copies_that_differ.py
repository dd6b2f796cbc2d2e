"""Replicated tensors that differ by rank, as running statistics do: what belongs together comes from one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sm_tiered_dcp import TieredCheckpointer, TrainState
from tests.distributed.dcp_jobs import bits, recipe, run

WORLD = 3
SMALL = 1024 * 1024 // 4
"""The most float32 numbers that are left to one rank."""


def _state(rank: int) -> dict[str, Any]:
    """Statistics of each rank's own batches, and tensors that are full of its number."""
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    model(torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)))
    own = [torch.full((SMALL + extra,), float(rank)) for extra in (0, 1, 1, 1)]
    late = {name: torch.full((3,), float(rank)) for name in ("mean", "var")}
    return {"train": TrainState(model), "limit": own[0], "large": own[1:], **({"late": late} if rank else {})}


def _small(state: dict[str, Any]) -> Any:
    return bits([state["train"].state_dict(), state["limit"][::1000]])


def _copies(rank: int, which: dict[str, Any], nodes: tuple[int, ...]) -> tuple[Any, Any, set[float], set[float]]:
    """Return this rank's small tensors as they were, and what came back of these, the large and the late ones."""
    memory = {**which["tiers"]["memory"], "path": f"{which['tiers']['memory']['path']}-{nodes[rank]}"}
    state, other = _state(rank), _state(rank + 7)
    if not rank:
        del other["late"]
    with TieredCheckpointer.from_recipe({**which, "tiers": {"memory": memory}}) as checkpointer:
        checkpointer.save(1, state).wait("memory")
        assert checkpointer.restore(other) == 1
    large, late = (
        {number for tensor in tensors for number in tensor.unique().tolist()}
        for tensors in (other["large"], other.get("late", {}).values())
    )
    return _small(state), _small(other), large, late


@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 1)], ids=["one node", "two nodes"])
def test_small_copies_come_from_the_lowest_rank_on_the_node_and_never_from_several(
    nodes: tuple[int, ...], tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir / "node", disk=None, allow_partial=True)
    ranks = run(WORLD, _copies, which, nodes)
    saved = [own for own, *_ in ranks]
    for name in (f"{layer}.running_{what}" for layer in (0, 1) for what in ("mean", "var")):
        assert len({own[0]["model"][name] for own in saved}) == WORLD, "they don't differ"
    for rank, (_, small, large, late) in enumerate(ranks):
        assert small == saved[nodes.index(nodes[rank])], rank
        assert late == ({1.0} if rank else set()), "rank 0 has none"
        assert (len(large) > 1) == (nodes.count(nodes[rank]) > 1), "the work is shared"
