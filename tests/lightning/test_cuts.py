"""Trainings that are cut anywhere and resumed in this process: losses, rates and weights are those of an uncut one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sm_tiered_lightning import tiered
from tests.distributed.dcp_jobs import bits, recipe, steps
from tests.unit.children import in_child

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


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
        self, *, loader: str = "shuffled", workers: int = 0, plateau: str = "", skips: bool = False, fails_at: int = -1
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loader, self.workers, self.plateau, self.skips, self.fails_at = loader, workers, plateau, skips, fails_at
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.losses: dict[tuple[int, int], tuple[float, float]] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("cut")
        loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.losses[self.global_step, batch_idx] = (loss.item(), rate)
        self.log("loss", loss)
        return loss

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> int | None:
        return -1 if self.skips and (self.current_epoch, batch_idx) == (0, 5) else None

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
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
        samples: Any = Stream() if self.loader == "stream" else torch.linspace(0, 1, 80).reshape(20, 4)
        options: dict[str, Any] = {"shuffle": True} if self.loader == "shuffled" else {}
        if self.loader == "by epoch":
            options["sampler"] = StatefulDistributedSampler(samples, num_replicas=1, rank=0)
        return StatefulDataLoader(samples, batch_size=2, num_workers=self.workers, **options)

    def val_dataloader(self) -> Any:
        samples: Any = torch.rand(4, 4)
        return torch.utils.data.DataLoader(samples, batch_size=2)


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    return recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": None})


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
    "a stream that spans epochs": ({"loader": "stream"}, {"limit_train_batches": 4, **EPOCHS}),
    "order by epoch": ({"loader": "by epoch"}, {}),
    "order by epoch, a part of it": ({"loader": "by epoch"}, {"limit_train_batches": 5}),
    "order by epoch, by epochs": ({"loader": "by epoch"}, EPOCHS),
    "order by epoch, with a worker": ({"loader": "by epoch", "workers": 1}, {}),
    "an epoch's rest skipped": ({"skips": True}, {"accumulate_grad_batches": 2}),
    "loaders made again": ({}, {"reload_dataloaders_every_n_epochs": 2, "max_steps": 34}),
}


@pytest.mark.parametrize("cut", [4, 10, 13, *(pytest.param(cut, marks=pytest.mark.long) for cut in (6, 11))])
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_was_cut_goes_on_as_if_it_never_was(
    which: dict[str, Any], tmp_path: Path, case: str, cut: int
) -> None:
    made, options = CASES[case]
    plain, first, second = Model(**made), Model(**made, fails_at=cut), Model(**made)
    fit(None, plain, tmp_path, **options)
    if max(step for step, _ in plain.losses) <= cut:
        return  # accumulation makes few steps of the epochs
    with pytest.raises(ZeroDivisionError):
        fit(which, first, tmp_path, **options)
    fit(which, second, tmp_path, **options)
    assert min(step for step, _ in second.losses) == cut
    assert first.losses | second.losses == plain.losses
    assert bits(second.state_dict()) == bits(plain.state_dict())


class StopAt(Callback):
    """Ends the training early, at the end of a batch."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop |= trainer.global_step == self.step


@pytest.mark.parametrize("end", [6, 10, 13])
def test_what_is_saved_at_the_end_goes_on_within_the_epoch(tmp_path: Path, memory_dir: Path, end: int) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": "on_end"}, disk={"save": None})
    plain, first, second = Model(), Model(), Model()
    fit(None, plain, tmp_path, limit_val_batches=0)
    fit(which, first, tmp_path, StopAt(end), limit_val_batches=0)
    assert set(steps(memory_dir)) == {end}
    fit(which, second, tmp_path, limit_val_batches=0)
    assert first.losses | second.losses == plain.losses
    assert bits(second.state_dict()) == bits(plain.state_dict())


class TermAt(Callback):
    """Sends this process a SIGTERM in the first batch of an accumulation."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2 and batch_idx % 3 == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_sigterm_saves_at_the_end_of_the_step_and_ends_the_training(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": "on_preemption"}, disk={"save": "on_preemption"})
    plain, first, second = Model(), Model(), Model()
    fit(None, plain, tmp_path, accumulate_grad_batches=3, max_steps=6)
    with pytest.raises(SystemExit):
        fit(which, first, tmp_path, TermAt(), accumulate_grad_batches=3, max_steps=6)
    assert set(steps(tmp_path / "disk")) == {3}
    fit(which, second, tmp_path, accumulate_grad_batches=3, max_steps=6)
    assert first.losses | second.losses == plain.losses
    assert bits(second.state_dict()) == bits(plain.state_dict())


def test_nothing_of_ours_hides_what_the_training_raised(
    which: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sm_tiered_dcp.checkpointer.TieredCheckpointer.promote_newest", full)
    with (
        pytest.warns(UserWarning, match="not brought to the durable tiers: no space left"),
        pytest.raises(ZeroDivisionError),
    ):
        fit(which, Model(fails_at=3), tmp_path)


def test_after_a_training_a_sigterm_is_what_it_was_before(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": "on_preemption"}, disk={"save": None})
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        trainer = fit(which, Model(), tmp_path, max_steps=2)
        assert "_sigterm_notifier_fn" not in vars(vars(trainer)["_signal_connector"])
        assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_a_trainer_whose_training_has_failed_trains_again(which: dict[str, Any], tmp_path: Path, loader: str) -> None:
    plain, model = Model(loader=loader), Model(loader=loader, fails_at=7)
    fit(None, plain, tmp_path)
    torch.manual_seed(0)
    trainer = trainer_of(which, tmp_path)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, ckpt_path="tiered://latest")
    model.fails_at = -1
    trainer.fit(model, ckpt_path="tiered://latest")
    assert trainer.global_step == 14
    assert model.losses == plain.losses
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_a_validation_that_can_rank_nothing_is_warned_of(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"best": {"metric": "val_loss", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": None, "keep": keep})
    with pytest.warns(UserWarning, match=r"within an accumulation ranks no checkpoint by \['val_loss'\]"):
        fit(which, Model(), tmp_path, accumulate_grad_batches=3, val_check_interval=4, max_steps=2)


def test_after_an_exception_the_newest_step_in_memory_is_brought_to_safety(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path
) -> None:
    from tests.waiting import wait_until

    with pytest.raises(ZeroDivisionError):
        fit(which, Model(fails_at=7), tmp_path)
    assert max(steps(memory_dir)) == 7
    wait_until(lambda: list((tmp_path / "disk").rglob("manifest.json")), "step 7 is not brought to the disk")
    assert set(steps(tmp_path / "disk")) == {7}
