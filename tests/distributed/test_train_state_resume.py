"""A training that is killed goes on as if nothing had happened: weights, Adam's moments, losses and random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sm_tiered_dcp import RngState, TieredCheckpointer, TrainState
from tests.distributed.dcp_jobs import bits, pause, recipe, run, start, tell

LAST = 12


class Model(nn.Module):
    """Tied weights, dropout, a buffer, and rows that do not divide by the number of ranks."""

    def __init__(self) -> None:
        import torch

        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 7), nn.Dropout(0.2), nn.Linear(7, 8)) for _ in range(2))
        self.register_buffer("scale", torch.ones(1))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Any) -> Any:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden) * self.scale
        return self.head(hidden)


class Training:
    """What one rank trains, from a seed of its own: only a restore can make it the same again."""

    def __init__(self, rank: int, seed: int) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.fsdp import fully_shard

        torch.manual_seed(seed)
        self.model: Any = Model()
        if dist.is_initialized():
            for block in self.model.blocks:
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.5)
        torch.manual_seed(seed + rank)
        self.state: dict[str, Any] = {
            "train": TrainState(self.model, self.optimizer, self.scheduler),
            "progress": {"steps": []},
            "per_rank": {"rng": RngState(), "losses": []},
        }

    def step(self, step: int) -> None:
        import torch

        tokens = torch.randint(0, 11, (5,))
        loss = nn.functional.cross_entropy(self.model(tokens), tokens.flip(0))
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.state["per_rank"]["losses"].append(loss.item())
        self.state["progress"]["steps"].append(step)

    def everything(self) -> Any:
        """Return all that must be the same at the end, to the bit."""
        import torch

        return bits([self.state["train"].state_dict(), self.state["progress"], self.state["per_rank"]["losses"]]) + [
            torch.get_rng_state().tolist()
        ]


def _uninterrupted(rank: int) -> Any:
    training = Training(rank, 1)
    for step in range(1, LAST + 1):
        training.step(step)
    return training.everything()


def _until_killed(rank: int, which: dict[str, Any], seed: int, end: int, durable: int | None) -> Any:
    """Train up to *end*, tell where it began, and wait there to be killed; at `LAST`, return everything."""
    training = Training(rank, seed)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        begun = checkpointer.restore(training.state)
        tier = checkpointer.restored.tier if checkpointer.restored else None
        newest = None
        for step in range((begun or 0) + 1, end + 1):
            training.step(step)
            handle = checkpointer.maybe_save(step, training.state)
            if handle is not None:
                handle.wait("memory")
                newest = step
                if step == durable:
                    handle.wait("disk")
        tell((begun, tier, newest))
        if end < LAST:
            pause()
    return training.everything()


@pytest.mark.parametrize("world", [0, 2])
def test_a_job_that_is_killed_twice_ends_as_one_that_never_was(world: int, tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(
        tmp_path, memory_dir / "m", memory={"save": {"every_n_steps": 2}}, disk={"save": {"every_n_steps": 5}}
    )
    wanted = run(world, _uninterrupted)
    began = []
    for seed, end, durable in ((1, 7, 5), (20, 9, None), (300, LAST, None)):
        job = start(world, _until_killed, which, seed, end, durable)
        began.append({job.heard(rank) for rank in range(max(1, world))})
        if end < LAST:
            job.kill()
        ended = job.wait()
        if began[-1] == {(6, "memory", 8)}:
            shutil.rmtree(memory_dir / "m")  # the node is lost
    assert began == [{(None, None, 6)}, {(6, "memory", 8)}, {(5, "disk", 12)}]
    assert [end.trace for end in ended] == [None] * max(1, world)
    assert [end.value for end in ended] == wanted
