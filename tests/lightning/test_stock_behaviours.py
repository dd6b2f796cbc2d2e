"""What Lightning documents about checkpoints holds with the plugin, and with the callback beside a stock one.

* Files of `ModelCheckpoint`: top-k by min and max, NaN, last ones and links, triggers, versions, what is removed.
* Names: ``best`` and ``last``, ``trainer.ckpt_path``, file systems of fsspec, a plugin that the strategy brings.
* Resuming: epoch, step, optimizers, schedulers, callbacks, hyper-parameters; `load_from_checkpoint`; stock trainers.
* Evaluating: weights and callbacks of the checkpoint in validate, test and predict, and no counters.
* Loading: ``strict_loading``, ``weights_only``; ``storage_options`` of a save.
* Hooks of module, callbacks and datamodule; stock callbacks that have a state; exceptions; several optimizers.
"""

from __future__ import annotations

import math
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from sm_tiered.errors import ConfigError
from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO, tiered
from tests.distributed.dcp_jobs import bits, recipe, steps
from tests.lightning.test_plugin import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SCORES = [3.0, 1.0, 2.0, 0.5]
"""Of the epochs."""


class Model(LightningModule):
    """Two batches an epoch, hyper-parameters, and a score for each epoch."""

    def __init__(self, width: int = 4, scores: Any = None, fails_at: int = -1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["scores"])
        torch.manual_seed(0)
        self.layer, self.scores, self.fails_at = nn.Linear(width, 1), scores or SCORES, fails_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("the training failed")
        return self.layer(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch % len(self.scores)])

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("out", self.layer(batch).sum())

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]

    def train_dataloader(self) -> Any:
        samples: Any = torch.linspace(0, 1, 16).reshape(4, 4)
        return torch.utils.data.DataLoader(samples, batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    return recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk=None)


def made(which: dict[str, Any] | None, root: Path, *callbacks: Any, beside: bool = True, **options: Any) -> Trainer:
    """Return a trainer without us (None), with the plugin alone, or with the callback *beside* those of a test."""
    ours = [] if which is None or not beside else [TieredCheckpoint(which)]
    if which is not None and "strategy" not in options:
        options["plugins"] = [TieredCheckpointIO(which)]
    return trainer(root, **{"callbacks": [*callbacks, *ours], "max_epochs": 2, **options})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.ckpt")}


# ---- files of a stock callback

MONITOR = {"monitor": "score", "filename": "{epoch}"}
EVERY = {"save_top_k": -1, "filename": "{step}"}
FILES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the lowest two": ({**MONITOR, "save_top_k": 2}, {"epoch=1", "epoch=3"}),
    "the highest two": ({**MONITOR, "save_top_k": 2, "mode": "max"}, {"epoch=0", "epoch=2"}),
    "all": (MONITOR | {"save_top_k": -1}, {"epoch=0", "epoch=1", "epoch=2", "epoch=3"}),
    "the newest": ({}, {"epoch=3-step=8"}),
    "the last beside the best": ({**MONITOR, "mode": "max", "save_last": True}, {"epoch=0", "last"}),
    "the last alone": ({"save_top_k": 0, "save_last": True}, {"last"}),
    "a link to the last": ({**MONITOR, "save_last": "link"}, {"epoch=3", "last"}),
    "each second epoch": ({**EVERY, "every_n_epochs": 2}, {"step=4", "step=8"}),
    "each third step": ({**EVERY, "every_n_train_steps": 3}, {"step=3", "step=6"}),
    "by time": ({**EVERY, "train_time_interval": timedelta(microseconds=1)}, {f"step={at}" for at in range(1, 9)}),
    "under one name": ({"save_top_k": -1, "filename": "x"}, {"x", "x-v1", "x-v2", "x-v3"}),
    "in one file": ({"filename": "x", "enable_version_counter": False}, {"x"}),
    "weights alone": ({"save_weights_only": True}, {"epoch=3-step=8"}),
}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("case", FILES)
def test_a_stock_callback_has_the_files_that_it_documents(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path, case: str, beside: bool
) -> None:
    options, wanted = FILES[case]
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", **options)
    made(which, tmp_path, stock, beside=beside, max_epochs=4).fit(Model())
    assert names(tmp_path / "stock") == {f"{name}.ckpt" for name in wanted}
    assert (tmp_path / "stock" / "last.ckpt").is_symlink() == (case == "a link to the last")
    alone = options.get("save_weights_only", False)
    found = torch.load(max((tmp_path / "stock").iterdir()), weights_only=True)
    assert ("optimizer_states" in found) != alone
    assert bool(steps(memory_dir)) == (beside or not alone)


def test_a_score_that_is_not_a_number_is_beaten_by_any(which: dict[str, Any], tmp_path: Path) -> None:
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", **MONITOR)
    made(which, tmp_path, stock, beside=False, max_epochs=3).fit(Model(scores=[math.nan, 2.0, 5.0]))
    assert names(tmp_path / "stock") == {"epoch=1.ckpt"}
    assert stock.best_model_score == 2


@pytest.mark.parametrize("same", [True, False])
def test_files_of_an_earlier_training_stay(which: dict[str, Any], tmp_path: Path, same: bool) -> None:
    first, second = tmp_path / "first", tmp_path / ("first" if same else "second")
    options: dict[str, Any] = {"monitor": "step", "mode": "max", "save_top_k": 1, "filename": "{step}"}
    for folder, epochs, path in ((first, 2, None), (second, 4, first / "step=4.ckpt")):
        stock = ModelCheckpoint(dirpath=folder, **options)
        made(which, tmp_path, stock, beside=False, max_epochs=epochs).fit(Model(), ckpt_path=path)
    assert names(first) | names(second) == {"step=4.ckpt", "step=8.ckpt"}
    assert "step=4.ckpt" in names(first), "the file that was resumed from"


@pytest.mark.parametrize("beside", [True, False])
def test_a_second_trainer_gives_its_files_another_version(which: dict[str, Any], tmp_path: Path, beside: bool) -> None:
    for version in ("", "-v1"):
        stock = ModelCheckpoint(dirpath=tmp_path / "stock", filename="x", save_last=True)
        made(which, tmp_path, stock, beside=beside, max_epochs=1).fit(Model())
        assert stock.last_model_path == str(tmp_path / "stock" / f"last{version}.ckpt")
    assert names(tmp_path / "stock") == {"x.ckpt", "x-v1.ckpt", "last.ckpt", "last-v1.ckpt"}


# ---- which checkpoint a name means


@pytest.mark.parametrize("first", [True, False])
def test_the_best_is_that_of_the_first_checkpoint_callback(
    tmp_path: Path, memory_dir: Path, first: bool
) -> None:
    best = {"best": {"metric": "score", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_epochs": 1}, "keep": best}, disk=None)
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", mode="max", **MONITOR)
    ours = TieredCheckpoint(which)
    one = made(None, tmp_path, *((stock, ours) if first else (ours, stock)))
    one.fit(Model())
    one.validate(Model(), ckpt_path="best")
    assert str(one.ckpt_path) == (stock.best_model_path if first else "tiered://step/4")


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("path", ["last", "best", "tiered://latest", "tiered://step/4", "attribute", "strategy"])
def test_what_is_restored_is_what_a_stock_trainer_restores(
    which: dict[str, Any], tmp_path: Path, beside: bool, path: str
) -> None:
    class Began(Callback):
        """Notes what a training begins with."""

        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
            self.at = trainer.current_epoch, trainer.global_step, trainer.fit_loop.epoch_loop._batches_that_stepped
            self.states = bits([pl_module.state_dict(), trainer.optimizers[0].state_dict(), scheduler.state_dict()])
            self.model = (stock := trainer.checkpoint_callbacks[0]).state_dict()
            assert isinstance(stock, ModelCheckpoint)

    def stock() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / "stock", save_last=True, **MONITOR)

    made(which, tmp_path, stock(), beside=beside).fit(Model())
    plain, ours = Began(), Began()
    made(None, tmp_path, stock(), plain, max_epochs=3).fit(Model(), ckpt_path=tmp_path / "stock" / "last.ckpt")
    given = {"strategy": SingleDeviceStrategy("cpu", checkpoint_io=TieredCheckpointIO(which))}
    again = made(which, tmp_path, stock(), ours, beside=beside, max_epochs=3, **(given if path == "strategy" else {}))
    if path == "attribute":
        again.ckpt_path = "tiered://latest"
    if path == "best":
        path = str(tmp_path / "stock" / "epoch=1.ckpt")
    again.fit(Model(), ckpt_path={"attribute": None, "strategy": "tiered://latest"}.get(path, path))
    assert ours.at == plain.at == (2, 4, 4)
    assert ours.states == plain.states
    for name in ("best_model_path", "best_model_score", "best_k_models"):
        assert ours.model[name] == plain.model[name]
    assert again.global_step == 6
