"""Trainings that are cut anywhere and resumed in this process: losses, rates and weights are those of an uncut one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sm_tiered_lightning import tiered
from tests.distributed.dcp_jobs import bits


class Stream(IterableDataset[torch.Tensor]):
    """Twenty samples without a length; goes on where it was saved."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 20:
            self.at += 1
            yield torch.full((4,), self.at / 20) + torch.rand(4) / 10
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Model(LightningModule):
    """Ten batches an epoch, dropout, and what a test asks for besides."""

    def __init__(
        self, *, loader: str = "shuffled", workers: int = 0, plateau: str = "", skips: bool = False, fails_at: int = -99
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loader, self.workers, self.plateau, self.skips, self.fails_at = loader, workers, plateau, skips, fails_at
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.losses: dict[tuple[int, int, int], tuple[float, float]] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("cut")
        batch = batch[0] + batch[1] if isinstance(batch, list) else batch
        loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.losses[self.global_step, self.current_epoch, batch_idx] = (loss.item(), rate)
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> int | None:
        return -1 if self.skips and (self.current_epoch, batch_idx) == (0, 5) else None

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.global_step == -self.fails_at:
            raise ZeroDivisionError("cut")
        self.log("val_loss", self.layers(batch).square().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        if not self.plateau:
            return optimizer
        worse: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e6, factor=0.7)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": worse, "interval": self.plateau, "monitor": "loss", "strict": False},
        }

    def train_dataloader(self) -> Any:
        samples: Any = torch.linspace(0, 1, 80).reshape(20, 4)
        options: dict[str, Any] = {
            "stream": {},
            "shuffled": {"shuffle": True},
            "generator": {"shuffle": True, "generator": torch.Generator().manual_seed(7)},
            "by epoch": {"sampler": StatefulDistributedSampler(samples, num_replicas=1, rank=0)},
        }[self.loader.removesuffix(" and stream")]
        stream = StatefulDataLoader(Stream(), batch_size=2, num_workers=self.workers)
        if self.loader == "stream":
            return stream
        loader = StatefulDataLoader(samples, batch_size=2, num_workers=self.workers, **options)
        return CombinedLoader([loader, stream]) if self.loader.endswith("stream") else loader

    def val_dataloader(self) -> Any:
        samples: Any = torch.rand(4, 4)
        return torch.utils.data.DataLoader(samples, batch_size=2)


def trainer_of(which: dict[str, Any] | None, root: Path, *callbacks: Callback, **options: Any) -> Trainer:
    ours: dict[str, Any] = tiered(which) if which is not None else {"enable_checkpointing": False}
    ours["callbacks"] = [*ours.get("callbacks", []), *callbacks]
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "default_root_dir": root, **quiet, **ours, "max_steps": 14, **options}
    )


def fit(which: dict[str, Any] | None, model: Model, root: Path, *callbacks: Callback, **options: Any) -> Trainer:
    torch.manual_seed(0)
    trainer = trainer_of(which, root, *callbacks, **options)
    trainer.fit(model, ckpt_path="tiered://latest" if which is not None else None)
    return trainer


EPOCHS = {"max_steps": -1, "max_epochs": 2}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"limit_val_batches": 0}),
    "by epochs": ({}, {"limit_val_batches": 0, **EPOCHS}),
    "accumulating": ({}, {"accumulate_grad_batches": 3}),
    "validating inside the epoch": ({}, {"val_check_interval": 3}),
    "validating by steps": ({}, {"val_check_interval": 4, "check_val_every_n_epoch": None}),
    "plateau after the epoch": ({"plateau": "epoch"}, {}),
    "plateau after steps": ({"plateau": "step"}, {"limit_val_batches": 0}),
    "no length": ({"loader": "stream"}, {"limit_val_batches": 0}),
    "no length, accumulating": ({"loader": "stream"}, {"accumulate_grad_batches": 2}),
    "a stream that spans epochs": ({"loader": "stream"}, {"limit_train_batches": 4}),
    "a stream that spans epochs, by epochs": (
        {"loader": "stream"},
        {"limit_train_batches": 5, "max_steps": -1, "max_epochs": 5},
    ),
    "a stream beside a loader with a length": ({"loader": "shuffled and stream"}, {"limit_val_batches": 0}),
    "a generator of the loader's own": ({"loader": "generator"}, {"max_steps": 34}),
    "order by epoch": ({"loader": "by epoch"}, {}),
    "order by epoch, a part of it": ({"loader": "by epoch"}, {"limit_train_batches": 5}),
    "order by epoch, by epochs": ({"loader": "by epoch"}, EPOCHS),
    "order by epoch, with a worker": ({"loader": "by epoch", "workers": 1}, {}),
    "an epoch's rest skipped": ({"skips": True}, {"accumulate_grad_batches": 2}),
    "validation every second epoch": ({}, {"check_val_every_n_epoch": 2, "max_steps": 24}),
    "validation every second epoch, unseen": (
        {},
        {"check_val_every_n_epoch": 2, "max_steps": 24, "num_sanity_val_steps": 0},
    ),
    "loaders made again": ({}, {"reload_dataloaders_every_n_epochs": 2, "max_steps": 34}),
}


class Drawing(Model):
    """Draws random numbers in the hooks around its epochs, which count as well."""

    def on_train_epoch_start(self) -> None:
        torch.rand(1)

    def on_train_epoch_end(self) -> None:
        torch.rand(1)


@pytest.mark.parametrize("cut", [10, 13, *(pytest.param(cut, marks=pytest.mark.long) for cut in (4, 6, 11))])
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_was_cut_goes_on_as_if_it_never_was(
    each_step: dict[str, Any], tmp_path: Path, case: str, cut: int
) -> None:
    made, options = CASES[case][0], {"max_steps": 16, **CASES[case][1]}
    plain, first, second = Drawing(**made), Drawing(**made, fails_at=cut), Drawing(**made)
    fit(None, plain, tmp_path, **options)
    with pytest.raises(ZeroDivisionError):
        fit(each_step, first, tmp_path, **options)
    fit(each_step, second, tmp_path, **options)
    assert min(step for step, *_ in second.losses) == cut
    assert first.losses | second.losses == plain.losses
    assert bits(second.state_dict()) == bits(plain.state_dict())
