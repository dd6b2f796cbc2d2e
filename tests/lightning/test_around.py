"""Files beside tiers, the best by a metric, what loggers hear, and the other things around a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from sm_tiered.errors import ConfigError
from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO, tiered
from sm_tiered_lightning.uri import step_uri
from tests.distributed.dcp_jobs import recipe, steps
from tests.lightning.test_plugin import Model, fit, trainer
from tests.waiting import wait_until


def test_beside_the_callback_files_are_files_and_the_policies_decide_about_tiers(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 4}}, disk={"save": None})
    stock = ModelCheckpoint(dirpath=tmp_path / "stock", every_n_train_steps=3, save_top_k=-1)
    made = trainer(tmp_path, callbacks=[TieredCheckpoint(which), stock], max_steps=7)
    made.fit(Model(), ckpt_path="tiered://latest")
    assert sorted(path.name for path in (tmp_path / "stock").iterdir()) == [
        "epoch=0-step=3.ckpt",
        "epoch=0-step=6.ckpt",
    ]
    assert set(steps(memory_dir)) == {4}


@pytest.mark.parametrize("callback", [True, False])
def test_weights_alone_never_enter_the_tiers(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path, callback: bool
) -> None:
    ours = [TieredCheckpoint(which)] if callback else []
    made = trainer(tmp_path, plugins=[TieredCheckpointIO(which)], callbacks=[*ours], max_steps=3, logger=False)
    made.fit(Model())
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert torch.load(tmp_path / "weights.ckpt", weights_only=True)["global_step"] == 3
    with pytest.raises(ConfigError, match="weights alone can't be saved as tiered://step/3"):
        made.save_checkpoint("tiered://step/3", weights_only=True)
    assert 3 not in steps(memory_dir) or not callback
    made.save_checkpoint("tiered://step/3")
    made.strategy.checkpoint_io.teardown()
    assert 3 in steps(memory_dir)


def test_the_best_is_that_of_the_metric_at_its_own_step(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"best": {"metric": "val_loss", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": None}, disk={"save": {"every_n_steps": 1}, "keep": keep})
    scores: dict[int, float] = {}

    class Noting(Model):
        """Notes the scores."""

        def on_validation_epoch_end(self) -> None:
            scores[self.global_step] = float(self.trainer.callback_metrics["val_loss"])

        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            io: Any = self.trainer.strategy.checkpoint_io
            io.session.checkpointer.wait()  # a busy drain would leave steps out

    made = trainer(tmp_path, callbacks=[TieredCheckpoint(which)], max_steps=9, val_check_interval=4)
    made.fit(Noting(), ckpt_path="tiered://latest")
    found = made.checkpoint_callback
    assert isinstance(found, TieredCheckpoint)
    best = min(scores, key=lambda step: scores[step])
    assert found.best_model_path == step_uri(best)
    assert found.best_model_score == torch.tensor(scores[best])

    def kept() -> dict[str, str]:
        found = (tmp_path / "disk").rglob("record-00000.json")
        return {path.parent.name[5:15]: path.read_text() for path in found}

    wait_until(lambda: set(kept()) == {f"{best:010d}", f"{9:010d}"}, "what is neither best nor newest is not pruned")
    assert [name for name, text in kept().items() if "val_loss" in text] == [f"{best:010d}"]
    assert made.validate(Model(), ckpt_path="best")


def test_a_metric_that_is_never_logged_is_an_error_at_the_end_of_the_first_epoch(
    tmp_path: Path, memory_dir: Path
) -> None:
    keep = {"best": {"metric": "val_lost", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 4}}, disk={"save": None, "keep": keep})
    with pytest.raises(ConfigError, match=r"'val_lost', which was not logged; there are \['val_loss'\]"):
        fit(which, tmp_path, max_epochs=2)


class Told(Logger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, list[float]] = {}
        self.committed: list[str] = []

    @property
    def name(self) -> str:
        return "told"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, *arguments: Any, **options: Any) -> None:
        """Nothing of ours."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.committed.append(checkpoint_callback.last_model_path)


def test_loggers_hear_of_saves_and_of_what_is_durable(which: dict[str, Any], tmp_path: Path) -> None:
    logger = Told()
    fit(which, tmp_path, max_steps=8, logger=logger)
    told = {name.removeprefix("sm_tiered/"): values for name, values in logger.values.items() if "sm_tiered" in name}
    assert told["memory_step"] == [2, 4, 6, 8]
    assert told["durable_step"][-1] in (4, 8)  # a busy drain leaves the second one out
    assert all(lag >= 0 for lag in told["drain_lag_steps"])
    assert all(0 < secs < 5 for secs in told["blocked_secs"])
    assert min(told["saved_bytes"]) > 500
    assert len(logger.committed) == len(told["durable_step"])


def test_a_fit_inside_an_except_block_is_no_failed_one(which: dict[str, Any], tmp_path: Path) -> None:
    try:
        raise ZeroDivisionError
    except ZeroDivisionError:
        fit(which, tmp_path, max_steps=4)
    assert set(steps(tmp_path / "disk", "manifest.json")) == {4}
    assert all(steps(tmp_path / "disk", "manifest.json").values())


def test_in_one_line(which: dict[str, Any], tmp_path: Path, memory_dir: Path) -> None:
    made = trainer(tmp_path, **tiered(which), max_steps=2)
    made.fit(Model(), ckpt_path="tiered://latest")
    assert set(steps(memory_dir)) == {2}


def test_a_training_that_leaves_an_earlier_one_behind_says_so(which: dict[str, Any], tmp_path: Path) -> None:
    fit(which, tmp_path, max_steps=2)
    with pytest.warns(UserWarning, match=r"begins at step 0, though step 2 of an earlier one can be restored"):
        fit(which, tmp_path, max_steps=1, path="last")
