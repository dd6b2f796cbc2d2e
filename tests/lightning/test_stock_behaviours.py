"""What Lightning documents about checkpoints holds with the plugin alone, and with the callback beside a stock one.

* Files of `ModelCheckpoint`: top-k by min and max, last ones and links, triggers, versions, a trial that saves nothing.
* Resuming, by path, ``last`` or ``trainer.ckpt_path``: epoch, step, optimizers (several, too), schedulers, callbacks.
* Files saved by hand: for stock trainers, and `load_from_checkpoint` with hyper-parameters; ``storage_options``.
* Evaluating: weights and callbacks of the checkpoint in validate, test and predict; the trainer's own counters.
* ``strict_loading``, ``weights_only``, exceptions, and what hooks of module, callbacks and datamodule put in.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch import callbacks as stock
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from sm_tiered.errors import ConfigError
from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO
from tests.distributed.dcp_jobs import bits, recipe, steps
from tests.lightning.test_plugin import trainer


class Model(LightningModule):
    """Has hyper-parameters, one optimizer or *two*, hooks, and a score for each epoch."""

    def __init__(self, width: int = 4, *, fails_at: int = -1, two: bool = False, scores: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters("width")
        torch.manual_seed(0)
        self.layer, self.scores, self.fails_at = nn.Linear(width, 1), scores or (3.0, 1.0, 2.0, 0.5), fails_at
        self.automatic_optimization = not two
        self.began: tuple[Any, ...] = ()
        self.found: dict[str, Any] = {}

    def on_train_start(self) -> None:
        owners: list[Any] = [*self.trainer.optimizers, *(one.scheduler for one in self.trainer.lr_scheduler_configs)]
        self.began = (self.global_step, self.current_epoch, bits([one.state_dict() for one in (self, *owners)]))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("the training failed")
        if self.automatic_optimization:
            return self.layer(batch).square().mean()
        for optimizer in self.trainer.strategy._lightning_optimizers:
            optimizer.zero_grad()
            self.manual_backward(self.layer(batch).square().mean())
            optimizer.step()
        return None

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("score", self.scores[self.current_epoch % len(self.scores)])

    test_step = validation_step

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.layer(batch)

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.AdamW(self.parameters(), lr=0.1) for _ in range(2 - self.automatic_optimization)]
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], step_size=1, gamma=0.9)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = {"at": self.global_step, 5: [torch.arange(3).bfloat16()], "pair": (None, {"a"})}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint

    def train_dataloader(self) -> Any:
        samples: Any = torch.linspace(0, 1, 16).reshape(4, 4)
        return StatefulDataLoader(samples, batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Make:
    """Makes trainers with the plugin alone, or with our callback *beside* those of a test."""

    def __init__(self, recipe: dict[str, Any], root: Path, *, beside: bool) -> None:
        self.recipe, self.root, self.beside = recipe, root, beside

    def __call__(self, *callbacks: Any, plain: bool = False, **options: Any) -> Trainer:
        """Return one of two epochs; *plain*: without us."""
        every = [*callbacks, *([TieredCheckpoint(self.recipe)] if self.beside and not plain else [])]
        plugins = [] if plain else [TieredCheckpointIO(self.recipe)]
        ours = {"plugins": plugins, "callbacks": every, "enable_checkpointing": bool(every), "max_epochs": 2}
        return trainer(self.root, **{**ours, **options})

    def saved(self, *callbacks: Callback) -> Trainer:
        """Return one that has trained and saved, to the tiers and to ``by hand``."""
        one = self(*callbacks, enable_checkpointing=self.beside)
        one.fit(Model())
        for path in ("tiered://step/4", self.root / "by hand"):
            one.save_checkpoint(path)
        one.strategy.checkpoint_io.teardown()
        return one


@pytest.fixture(params=["alone", "beside"])
def make(request: pytest.FixtureRequest, tmp_path: Path, memory_dir: Path) -> Make:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk=None)
    return Make(which, tmp_path, beside=request.param == "beside")


def names(folder: Path) -> set[str]:
    return {path.name.removesuffix(".ckpt") for path in folder.glob("*")}


MONITOR: dict[str, Any] = {"monitor": "score", "filename": "{epoch}"}
EVERY: dict[str, Any] = {"save_top_k": -1, "filename": "{step}"}
FILES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "the lowest two": ({**MONITOR, "save_top_k": 2}, {"epoch=1", "epoch=3"}),
    "the highest two": ({**MONITOR, "save_top_k": 2, "mode": "max"}, {"epoch=0", "epoch=2"}),
    "the last beside the best": ({**MONITOR, "mode": "max", "save_last": True}, {"epoch=0", "last"}),
    "the last alone": ({"save_top_k": 0, "save_last": True}, {"last"}),
    "a link to the last": ({**MONITOR, "save_last": "link"}, {"epoch=3", "last"}),
    "each second epoch": ({**EVERY, "every_n_epochs": 2}, {"step=4", "step=8"}),
    "each third step": ({**EVERY, "every_n_train_steps": 3}, {"step=3", "step=6"}),
    "by time": ({**EVERY, "train_time_interval": timedelta(microseconds=1)}, {f"step={at}" for at in range(1, 9)}),
    "one name": ({"monitor": "step", "save_top_k": -1, "filename": "x"}, {"x", "x-v1", "x-v2", "x-v3"}),
    "weights alone": ({"save_weights_only": True}, {"epoch=3-step=8"}),
}


@pytest.mark.parametrize("case", FILES)
def test_a_stock_callback_has_the_files_that_it_documents(make: Make, tmp_path: Path, case: str) -> None:
    options, wanted = FILES[case]
    folder, weights_alone = tmp_path / "stock", case == "weights alone"
    make(ModelCheckpoint(folder, **options), max_epochs=4).fit(Model())
    assert names(folder) == wanted
    assert (folder / "last.ckpt").is_symlink() == (case == "a link to the last")
    assert ("optimizer_states" in torch.load(max(folder.iterdir()), weights_only=True)) != weights_alone


def test_a_trial_saves_nothing_and_another_training_a_version(make: Make, tmp_path: Path, memory_dir: Path) -> None:
    folder = tmp_path / "stock"
    for trial, wanted in ((True, set[str]()), (False, {"x", "last"}), (False, {"x", "x-v1", "last", "last-v1"})):
        # Lightning writes the last one even in a trial.
        make(ModelCheckpoint(folder, "x", save_last=not trial), max_epochs=1, fast_dev_run=trial).fit(Model())
        assert names(folder) == wanted
        assert bool(steps(memory_dir)) != trial


@pytest.mark.parametrize("way", ["last", "file", "tiered://latest", "attribute"])
def test_what_is_restored_is_what_a_stock_trainer_restores(make: Make, tmp_path: Path, way: str) -> None:
    one, found = (ModelCheckpoint(tmp_path / "stock", save_last=True, **MONITOR) for _ in range(2))
    make(one).fit(Model())
    file, plain, ours = tmp_path / "stock" / "epoch=1.ckpt", Model(), Model()
    make(plain=True, max_epochs=3).fit(plain, ckpt_path=file)
    again = make(found, max_epochs=3)
    again.ckpt_path = "tiered://latest" if way == "attribute" else None
    again.fit(ours, ckpt_path={"attribute": None, "file": file}.get(way, way))
    assert ours.began == plain.began == (4, 2, plain.began[2])
    assert bits(ours.state_dict()) == bits(plain.state_dict())
    assert (found.best_model_path, found.best_model_score, again.global_step) == (str(file), 1, 6)


STATEFUL: dict[str, tuple[Callable[[], Any], dict[str, Any], int, int]] = {
    "two optimizers": (Callback, {"two": True}, 10, 24),
    "early stopping": (lambda: stock.EarlyStopping("score", patience=2), {}, 5, 8),
    "averaged weights": (lambda: stock.EMAWeightAveraging(decay=0.5), {}, 5, 12),
    # Lightning's own state is lost where it is cut within an epoch.
    "averaged late": (lambda: stock.StochasticWeightAveraging(0.01, 2, annealing_epochs=2), {}, 6, 12),
}


# Alone, the stock callback would say what is saved: before the epoch has ended.
@pytest.mark.parametrize("make", ["beside"], indirect=True)
@pytest.mark.parametrize("case", STATEFUL)
def test_a_training_with_a_stock_callback_goes_on_from_its_state(make: Make, case: str) -> None:
    callback, options, cut, end = STATEFUL[case]
    models = [Model(scores=(3.0, 1.0, 2.0, 2.0, 2.0, 2.0), fails_at=at, **options) for at in (-1, cut, -1)]
    make(callback(), plain=True, max_epochs=6).fit(models[0])
    with pytest.raises(ZeroDivisionError):
        make(callback(), max_epochs=6).fit(models[1])
    again = make(callback(), max_epochs=6)
    again.fit(models[2], ckpt_path="tiered://latest")
    assert (models[2].began[0], again.global_step) == (cut, end)
    assert bits(models[2].state_dict()) == bits(models[0].state_dict())


@pytest.mark.parametrize("kind", [stock.ModelCheckpoint, stock.OnExceptionCheckpoint])
def test_what_is_saved_on_an_exception_is_resumed(make: Make, tmp_path: Path, kind: Any) -> None:
    options = {"save_on_exception": True, "every_n_epochs": 7} if kind is ModelCheckpoint else {}
    with pytest.raises(ZeroDivisionError):
        make(kind(tmp_path / "stock", "x", **options)).fit(Model(fails_at=3))
    for path in ("tiered://latest", tmp_path / "stock" / "x.ckpt"):
        model = Model()
        make(kind(tmp_path / "other", "x", **options)).fit(model, ckpt_path=path)
        assert model.began[0] == 3


def test_what_is_saved_by_hand_is_for_everybody(make: Make, tmp_path: Path, memory_dir: Path) -> None:
    one = make.saved()
    with pytest.raises(ConfigError, match="storage_options 'any' can't be used"):
        one.save_checkpoint(tmp_path / "none", storage_options="any")
    assert not (tmp_path / "none").exists()
    for path in (tmp_path / "by hand", max(memory_dir.rglob("*.ckpt"))):
        loaded, plain = Model.load_from_checkpoint(path), make(plain=True, max_epochs=3)
        assert loaded.hparams["width"] == 4
        assert bits(loaded.state_dict()) == bits(one.lightning_module.state_dict())
        plain.fit(Model(), ckpt_path=path)
        assert (plain.global_step, plain.current_epoch) == (6, 3)


class Noting(Callback):
    """Has a state, puts a value into checkpoints, and notes what comes back."""

    def __init__(self, name: str = "new", value: Any = None) -> None:
        self.name, self.value, self.found, self.began = name, value, (), ()

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.name = state_dict["name"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["value"] = (trainer.global_step, self.value)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.found = checkpoint["value"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = (trainer.global_step, self.name, bits(pl_module.state_dict()))

    on_test_start = on_predict_start = on_validation_start


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluating_takes_weights_and_callbacks_and_no_counters(make: Make, verb: str) -> None:
    one, noting = make.saved(Noting("saved")), Noting()
    getattr(make(noting), verb)(Model(), ckpt_path="tiered://latest")
    assert noting.began == (0, "saved", bits(one.lightning_module.state_dict()))
    getattr(one, verb)(Model(), ckpt_path="tiered://step/4")
    assert one.global_step == 4, "a trainer that has trained keeps its own"


def test_a_module_says_whether_keys_may_be_missing(make: Make) -> None:
    one, model = make.saved(), Model()
    weights, model.more = bits(one.lightning_module.state_dict()), nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="Missing key"):
        one.validate(model, ckpt_path="tiered://latest")
    nn.init.zeros_(model.layer.weight)
    model.strict_loading = False
    one.validate(model, ckpt_path="tiered://latest")
    assert bits(model.layer.weight) == weights["layer.weight"]


@pytest.mark.parametrize("value", [7, Path("needs a pickle")])
def test_weights_only_says_whether_anything_is_unpickled(make: Make, tmp_path: Path, value: Any) -> None:
    make.recipe["allow_pickle"] = True  # so the tiers load all, unless told otherwise
    make.saved(Noting(value=value))
    one, files = make(noting := Noting()), [(tmp_path / "by hand", only) for only in (None, True, False)]
    for path, only in [*files, ("tiered://latest", None), ("tiered://latest", False)]:
        noting.found = ()
        refused = isinstance(value, Path) and only is not False and path != "tiered://latest"
        with pytest.raises(pickle.UnpicklingError) if refused else nullcontext():
            one.validate(Model(), ckpt_path=path, weights_only=only)
        assert list(map(type, noting.found)) == ([] if refused else [int, type(value)])


class Data(LightningDataModule):
    """Has hyper-parameters and a state."""

    train_dataloader = Model.train_dataloader

    def __init__(self, size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.size = size

    def state_dict(self) -> dict[str, Any]:
        return {"size": self.size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.size = state_dict["size"]


def test_what_hooks_put_in_comes_back(make: Make, tmp_path: Path) -> None:
    one, other = (ModelCheckpoint(tmp_path / "stock", every_n_train_steps=1) for _ in range(2))
    with pytest.raises(ZeroDivisionError):
        make(one, Noting("saved", [1])).fit(Model(fails_at=3), datamodule=Data(9))
    noting, model, data = Noting(), Model(), Data(1)
    make(other, noting).fit(model, datamodule=data, ckpt_path="tiered://latest")
    assert bits(model.found["mine"]) == bits({"at": 3, 5: [torch.arange(3).bfloat16()], "pair": (None, {"a"})})
    assert type(model.found["mine"]["pair"]) is tuple
    assert model.found["datamodule_hyper_parameters"] == {"size": 9}
    assert (noting.name, noting.found, data.size) == ("saved", (3, [1]), 9)
