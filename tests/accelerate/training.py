"""A small training with Accelerate: accumulation, a scheduler, dropout, a custom object, a loader that has a state."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sm_tiered_accelerate import attach
from tests.distributed.dcp_jobs import bits

BEGINS = "a launch begins"


class Numbers(Dataset[torch.Tensor]):
    """Forty samples, each of its own."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 40) + torch.rand(4) / 100  # what loading draws counts as well


class Average:
    """Registered for checkpointing: what is neither model nor optimizer."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])


def join(rank: int, world: int) -> None:
    """Let Accelerate find that the ranks are connected already."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in place.items()} if world > 1 else {})


def accelerator_for(**options: Any) -> Accelerator:
    """Return an Accelerator on the CPU, as if it were this process's first."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    given = {
        "cpu": True,
        "gradient_accumulation_steps": 2,
        "dataloader_config": DataLoaderConfiguration(use_stateful_dataloader=True),
        "project_config": ProjectConfiguration(),
    }
    return Accelerator(**{**given, **options})


class Training:
    """What is trained, prepared."""

    def __init__(self, accelerator: Accelerator, width: int = 16) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Linear(width, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        loader: Any = DataLoader(Numbers(), batch_size=4, shuffle=True)
        self.accelerator, self.average = accelerator, Average()
        self.model, self.optimizer, self.scheduler, self.loader = accelerator.prepare(
            model, optimizer, scheduler, loader
        )
        accelerator.register_for_checkpointing(self.average)

    def batches(self) -> Any:
        """Yield (loss, whether the optimizer stepped) for ever."""
        while True:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = (self.model(batch) - batch.sum(1, keepdim=True)).square().mean()
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()
                mean: Any = self.accelerator.gather(loss.detach())
                self.average.values.append(mean.mean().item())
                yield loss.item(), self.accelerator.sync_gradients

    def weights(self) -> Any:
        """Return all that was trained, to the bit."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        return bits([unwrapped.state_dict(), self.optimizer.state_dict()["state"], self.average.values])


def train(
    rank: int, world: int, which: Any, out: str, steps: int, cut_at: int | None = None, lost: bool = False
) -> tuple[Any, Any]:
    """Train to *steps*, or be killed in the middle of step *cut_at*; return where it began and what came of it.

    *lost*: not before what was saved is durable, for the memory will be gone.
    """
    join(rank, world)
    accelerator = accelerator_for()
    training = Training(accelerator)
    with attach(accelerator, which) as tiered:
        began = tiered.restore()
        restored = tiered.restored
        step = began or 0
        with Path(f"{out}.{rank}").open("a") as file:
            file.write(f"{BEGINS}\n")
        for loss, stepped in training.batches():
            with Path(f"{out}.{rank}").open("a") as file:
                file.write(f"{step} {loss.hex()}\n")
            if cut_at == step:
                if lost:
                    tiered.wait()
                accelerator.wait_for_everyone()
                os.kill(os.getpid(), signal.SIGKILL)
            if stepped:
                step += 1
                tiered.maybe_save(step)
            if step == steps:
                break
    return (began, restored.tier if restored is not None else None), training.weights()


def losses(path: Path) -> dict[int, list[str]]:
    """Return the losses of each step that *path* tells of, as they were computed last."""
    found: dict[int, list[str]] = {}
    previous = -1
    for line in path.read_text().splitlines():
        if line == BEGINS:
            previous = -1
            continue
        step, loss = line.split()
        if int(step) != previous:
            found[int(step)] = []
        found[int(step)].append(loss)
        previous = int(step)
    return found
