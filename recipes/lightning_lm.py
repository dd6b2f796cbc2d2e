"""The byte transformer of `byte_lm.py` as a `LightningModule`, with a dataloader whose position can be saved."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from byte_lm import ByteLM, Size, Windows

__all__ = ["LightningLM"]


class LightningLM(LightningModule):
    """Predicts the next byte. Nothing in it is about checkpoints, but that its loader has a state."""

    def __init__(self, size: Size, *, sharded: bool = False) -> None:
        super().__init__()
        self.size, self.sharded = size, sharded
        self.model = ByteLM(size)

    def configure_model(self) -> None:
        """Shard the model, once, where the strategy has ranks to shard it over."""
        if self.sharded and not isinstance(self.model, FSDPModule):
            mesh: Any = self.device_mesh
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh["data_parallel"])
            fully_shard(self.model, mesh=mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        text, following = batch
        loss = F.cross_entropy(self.model(text).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, with a rate that changes at every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        """A loader with a state, over a sampler that has one: then a run goes on inside an epoch, and bit for bit."""
        windows = Windows(self.size.context)
        sampler = StatefulDistributedSampler(
            windows, num_replicas=self.trainer.world_size, rank=self.trainer.global_rank, seed=1729
        )
        return StatefulDataLoader(windows, batch_size=1, sampler=sampler)
