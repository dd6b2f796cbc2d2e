"""A small Lightning training: accumulation, a scheduler, dropout and a loader whose position can be saved.

``python job.py OUT RECIPE STEPS DEVICES STRATEGY [CUT_AT HOW]`` trains to STEPS: where it begins is a line in
OUT.began, each loss one in OUT.<rank>, and the final weights go to OUT.pt. It is cut in the middle of step CUT_AT: by
SIGKILL once what was saved is durable (``kill``), by an exception on the last rank (``raise``), or by a SIGTERM to it
(``term``).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO


class Numbers(Dataset[torch.Tensor]):
    """Forty samples, each of its own."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / 40) + torch.rand(4) / 100  # what loading draws counts as well


class Model(LightningModule):
    """Writes each loss down, and may end its own process."""

    def __init__(self, out: str, cut_at: int | None, how: str) -> None:
        super().__init__()
        self.out, self.cut_at, self.how = out, cut_at, how
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.Linear(16, 1))

    def configure_model(self) -> None:
        if self.trainer.strategy.__class__ is ModelParallelStrategy and not isinstance(self.layers, FSDPModule):
            mesh: Any = self.device_mesh
            fully_shard(self.layers, mesh=mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.cut_at:
            self.cut()
        loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
        with Path(f"{self.out}.{self.global_rank}").open("a") as file:
            file.write(f"{self.global_step} {batch_idx} {loss.item().hex()}\n")
        return loss

    def on_train_start(self) -> None:
        if self.trainer.is_global_zero:
            with Path(f"{self.out}.began").open("a") as file:
                file.write(f"{self.global_step}\n")

    def cut(self) -> None:
        last = self.global_rank == self.trainer.world_size - 1
        if self.how == "kill":
            tiered: Any = self.trainer.checkpoint_callback
            tiered._io.session.checkpointer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        elif last and self.how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif last and self.how == "raise":
            raise ZeroDivisionError("cut")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        alone = isinstance(self.trainer.strategy, SingleDeviceStrategy)
        sampler = None if alone else StatefulDistributedSampler(Numbers())
        return StatefulDataLoader(Numbers(), batch_size=4, shuffle=sampler is None, sampler=sampler)

    def on_train_epoch_start(self) -> None:
        loader: Any = self.trainer.train_dataloader
        if isinstance(loader.sampler, StatefulDistributedSampler):
            loader.sampler.set_epoch(self.current_epoch)


def main(out: str, recipe: str, steps: str, devices: str, strategy: str, cut_at: str = "", how: str = "") -> None:
    """Train."""
    sharded = strategy == "fsdp2"
    torch.manual_seed(0)
    model = Model(out, int(cut_at) if cut_at else None, how)
    trainer = Trainer(
        max_steps=int(steps),
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=int(devices),
        strategy=ModelParallelStrategy(int(devices), 1) if sharded else strategy,
        plugins=[TieredCheckpointIO(recipe)],
        callbacks=[TieredCheckpoint(recipe)],
        use_distributed_sampler=False,  # Lightning's draws anew when it is made, and has no state
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, ckpt_path="tiered://latest")
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) if sharded else {}
    if trainer.is_global_zero:
        torch.save(weights or model.state_dict(), f"{out}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
