"""Plugin and callback in this process: what `ckpt_path` may say, what is saved when, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from sm_tiered.errors import CheckpointNotFoundError, ConfigError, RecipeError, TierUnavailableError
from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO
from sm_tiered_lightning.uri import parse_uri, step_uri
from tests.distributed.dcp_jobs import recipe, steps


def loader(count: int) -> Any:
    samples: Any = torch.rand(count, 3)
    return torch.utils.data.DataLoader(samples, batch_size=2)


class Model(LightningModule):
    """Sixteen batches an epoch; with *fails_at* it raises in that step."""

    def __init__(self, width: int = 3, fails_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.fails_at = nn.Linear(width, 1), fails_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("the training failed")
        return self.layer(batch[:, : self.layer.in_features]).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[:, : self.layer.in_features]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return loader(32)

    def val_dataloader(self) -> Any:
        return loader(4)


def trainer(root: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {"accelerator": "cpu", "devices": 1, "default_root_dir": root, "num_sanity_val_steps": 0, **quiet}
    return Trainer(**{**given, **options})


def fit(
    which: dict[str, Any], root: Path, *, plugin: bool = True, path: Any = "tiered://latest", **more: Any
) -> Trainer:
    plugins = [TieredCheckpointIO(which)] if plugin else []
    made = trainer(root, plugins=plugins, callbacks=[TieredCheckpoint(which)], **more)
    made.fit(Model(), ckpt_path=path)
    return made


# ---- what a path may say


@pytest.mark.parametrize(
    ("text", "step"), [("tiered://latest", None), ("tiered://step/500", 500), ("tiered:/step/0", 0), (step_uri(7), 7)]
)
def test_a_uri_names_a_step_or_the_newest(text: str, step: int | None) -> None:
    found = parse_uri(text)
    assert found is not None
    assert found.step == step
    assert parse_uri(Path(text)) == found


@pytest.mark.parametrize(
    "text", ["tiered://", "tiered://best", "tiered://step/", "tiered://step/x", "tiered://step/-1"]
)
def test_another_form_is_refused_with_those_that_there_are(text: str) -> None:
    with pytest.raises(ConfigError, match=r"names no checkpoint.*'tiered://latest' or 'tiered://step/<n>'"):
        parse_uri(text)
    assert parse_uri("checkpoints/last.ckpt") is None


# ---- saving and resuming


@pytest.mark.parametrize("plugin", [True, False])
def test_it_saves_by_the_policies_once_a_step_and_goes_on_from_there(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path, plugin: bool
) -> None:
    first = fit(which, tmp_path, plugin=plugin, max_steps=5, accumulate_grad_batches=2)
    assert not any(isinstance(callback, ModelCheckpoint) for callback in vars(first)["callbacks"])
    assert isinstance(first.checkpoint_callback, TieredCheckpoint)
    assert first.checkpoint_callback.last_model_path == "tiered://step/4"
    assert steps(memory_dir, "*.ckpt") == {2: ["__0_0.ckpt"], 4: ["__0_0.ckpt"]}
    assert steps(tmp_path / "disk", "*.ckpt") == {4: ["__0_0.ckpt"]}
    again = fit(which, tmp_path, plugin=plugin, max_steps=7, accumulate_grad_batches=2)
    assert again.global_step == 7
    assert max(steps(memory_dir)) == 6
    third = fit(which, tmp_path, plugin=plugin, path="tiered://step/4", max_steps=5, accumulate_grad_batches=2)
    assert third.global_step == 5


def test_what_is_saved_is_a_stock_checkpoint_for_a_trainer_without_us(which: dict[str, Any], tmp_path: Path) -> None:
    fit(which, tmp_path, max_steps=4)
    (path,) = (tmp_path / "disk").rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 4
    stock = trainer(tmp_path, max_steps=6, enable_checkpointing=False)
    stock.fit(Model(), ckpt_path=path)
    assert stock.global_step == 6


def test_where_validation_follows_a_step_it_is_saved_after_it_with_its_metrics(
    tmp_path: Path, memory_dir: Path
) -> None:
    keep = {"best": {"metric": "val_loss", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 4}}, disk={"save": None, "keep": keep})
    fit(which, tmp_path, max_steps=8, val_check_interval=4, check_val_every_n_epoch=None)
    records = sorted(memory_dir.rglob("record-00000.json"))
    assert sorted(steps(memory_dir)) == [4, 8]
    assert all("val_loss" in path.read_text() for path in records)


def test_it_saves_where_epochs_end(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_epochs": 1}}, disk={"save": {"every_n_epochs": 2}})
    fit(which, tmp_path, max_steps=40, limit_train_batches=8)
    assert {32, 40} <= set(steps(memory_dir)) <= {8, 16, 24, 32, 40}
    assert set(steps(tmp_path / "disk")) <= {16, 32, 40}, "what a busy drain left out the next one makes up for"
    fit(which, tmp_path, max_steps=44, limit_train_batches=8)
    assert max(steps(memory_dir)) == 40, "an epoch that is cut short is not over"


def test_fit_validate_and_fit_on_one_trainer(which: dict[str, Any], tmp_path: Path, memory_dir: Path) -> None:
    made = fit(which, tmp_path, max_steps=2)
    assert made.validate(Model(), ckpt_path="tiered://latest")
    made.fit_loop.epoch_loop.max_steps = 6
    made.fit(Model(), ckpt_path="tiered://latest")
    assert made.global_step == 6
    assert max(steps(memory_dir)) == 6


def test_a_file_is_written_where_a_stock_callback_wants_it_and_the_tiers_have_it_too(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path
) -> None:
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", every_n_train_steps=3, save_top_k=1, save_last=True)
    made = trainer(tmp_path, plugins=[TieredCheckpointIO(which)], callbacks=[stock], max_steps=7)
    made.fit(Model())
    assert sorted(path.name for path in (tmp_path / "stock").iterdir()) == ["epoch=0-step=6.ckpt", "last.ckpt"]
    assert max(steps(memory_dir)) == 6
    for path in ("last", "tiered://latest", stock.best_model_path):
        again = trainer(tmp_path, plugins=[TieredCheckpointIO(which)], callbacks=[stock], max_steps=8)
        again.fit(Model(), ckpt_path=path)
        assert again.global_step == 8


# ---- what goes wrong


def test_an_empty_tier_is_a_fresh_start_and_a_silent_one_is_not(
    which: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(which, tmp_path, max_steps=1).global_step == 1
    with pytest.raises(CheckpointNotFoundError, match="step 500 is on no tier"):
        fit(which, tmp_path, max_steps=2, path="tiered://step/500")

    def silent(*args: Any, **options: Any) -> None:
        raise TierUnavailableError("no answer", tier="disk")

    monkeypatch.setattr("sm_tiered.tiers.local.LocalTier.list", silent)
    with pytest.raises(TierUnavailableError, match="no answer"):
        fit(which, tmp_path, max_steps=2)


def test_nothing_is_evaluated_where_nothing_was_saved(which: dict[str, Any], tmp_path: Path) -> None:
    for callbacks in ([TieredCheckpoint(which)], None):
        made = trainer(tmp_path, plugins=[TieredCheckpointIO(which)], callbacks=callbacks)
        with pytest.raises(CheckpointNotFoundError, match="nothing was ever saved in namespace 'run-1'"):
            made.validate(Model(), ckpt_path="tiered://latest")


def test_what_the_training_raised_is_what_is_heard_and_it_goes_on_from_memory(
    which: dict[str, Any], tmp_path: Path
) -> None:
    made = trainer(tmp_path, callbacks=[TieredCheckpoint(which)], max_steps=9)
    with pytest.raises(ZeroDivisionError, match="the training failed"):
        made.fit(Model(fails_at=5), ckpt_path="tiered://latest")
    assert fit(which, tmp_path, max_steps=6).global_step == 6


def test_what_can_be_known_before_the_training_is_refused_before_it(which: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml"):
        TieredCheckpoint(tmp_path / "none.yaml")
    other = {**which, "namespace": "other"}
    made = trainer(tmp_path, plugins=[TieredCheckpointIO(other)], callbacks=[TieredCheckpoint(which)])
    with pytest.raises(ConfigError, match="TieredCheckpoint and TieredCheckpointIO have different recipes"):
        made.fit(Model())

    class Odd(DDPStrategy):
        """Stores its state in a way of its own."""

        def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
            """Save nothing."""

    made = trainer(tmp_path, strategy=Odd(), callbacks=[TieredCheckpoint(which)])
    with pytest.raises(ConfigError, match="the strategy Odd can't be served: it stores its state in a way of its own"):
        TieredCheckpoint(which).setup(made, Model(), "fit")
    fit(which, tmp_path, max_steps=2)
    made = trainer(tmp_path, callbacks=[TieredCheckpoint(which)])
    with pytest.raises(RuntimeError, match="size mismatch"):
        made.fit(Model(width=2), ckpt_path="tiered://latest")


def test_removing_what_is_not_there_is_no_error(which: dict[str, Any], tmp_path: Path) -> None:
    plugin = TieredCheckpointIO(which)
    plugin.remove_checkpoint(tmp_path / "none.ckpt")
    plugin.remove_checkpoint("tiered://step/5")
    plugin.teardown()
    plugin.teardown()
