"""A TrainState over FullyShardedDataParallel: its shards are ShardedTensors, and some ranks may have none."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from sm_tiered_dcp import TieredCheckpointer, TrainState
from tests.distributed.dcp_jobs import bits, recipe, run, step_dir

WORLD = 2


class Model(nn.Module):
    """Two layers of which the first may be frozen: in a flat parameter over two ranks the whole first half."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False).requires_grad_(not frozen)
        self.second = nn.Linear(8, 8, bias=False)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(given))


class Training:
    """One rank's, from a seed of its own: only a restore can make two alike."""

    def __init__(self, seed: int, *, frozen: bool = False) -> None:
        torch.manual_seed(seed)
        # Should a rank leave the others alone in a collective, these are not to wait for the whole test's limit.
        group: Any = dist.new_group(timeout=timedelta(seconds=10))
        self.model = FullyShardedDataParallel(
            Model(frozen), process_group=group, device_id=torch.device("cpu"), use_orig_params=True
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.train_state = TrainState(self.model, self.optimizer)
        self.state: dict[str, Any] = {"train": self.train_state, "losses": []}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.model(torch.arange(16.0).view(2, 8) / 16).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def whole(self) -> Any:
        """Return model and optimizer put together from all ranks, as bytes."""
        return bits(get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True)))


def _save(rank: int, which: dict[str, Any]) -> tuple[Any, Any]:
    training = Training(1)
    training.train(2)
    kinds = {type(value) for value in training.train_state.state_dict()["model"].values()}
    assert kinds == {ShardedTensor}, "this is about ShardedTensors"
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(2, training.state).wait("disk")
    saved = training.whole()
    training.train(2)
    return saved, training.whole()


def _load(rank: int, which: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Return what was restored and what training made of it: from memory, from the disk, and by a stock reader."""
    found: list[tuple[Any, Any]] = []
    disk = which["tiers"]["disk"]
    for seed, tiers in ((7, which["tiers"]), (8, {"disk": disk}), (9, None)):
        training = Training(seed)
        if tiers is None:
            reader = dcp.FileSystemReader(step_dir(Path(disk["path"]), 2))
            dcp.load({"train": training.train_state.loading()}, storage_reader=reader)
        else:
            with TieredCheckpointer.from_recipe({**which, "tiers": tiers}) as checkpointer:
                assert checkpointer.restore(training.state) == 2
        restored = training.whole()
        training.train(2)
        found.append((restored, training.whole()))
    return found


def test_shards_of_fsdp_come_back_bit_for_bit_in_another_world_too(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    (saved, later), other = run(WORLD, _save, which)
    assert other == (saved, later)
    assert run(WORLD, _load, which) == [[(saved, later)] * 3] * WORLD
    for found in run(3, _load, which):  # it sums gradients in another order from there on
        assert [restored for restored, _ in found] == [saved] * 3


def _with_frozen_rank(rank: int, which: dict[str, Any]) -> list[Any]:
    """Return where training got to without a break, after going back, and after starting anew."""
    training = Training(1, frozen=True)
    training.train(2)
    has = [len(training.optimizer.state)]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(2, training.state).wait("memory")
        has.append(len(training.optimizer.state))
        assert has == [rank, rank], "rank 0 has frozen weights alone, and no state, not by a save either"
        training.train(2)
        ends = [training.whole()]
        for other in (training, Training(7, frozen=True)):
            assert checkpointer.restore(other.state, step=2) == 2
            other.train(2)
            ends.append(other.whole())
    return ends


def test_a_rank_without_optimizer_state_saves_and_restores_with_the_others(tmp_path: Path, memory_dir: Path) -> None:
    (ends, other) = run(WORLD, _with_frozen_rank, recipe(tmp_path, memory_dir, disk=None))
    assert ends == other == [ends[0]] * 3
    assert ends[0][1]["state"].keys() == {"second.weight"}
