"""How trainings end, well or not: what is saved then, and what the next one, or the same Trainer, goes on from."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy

from sm_tiered.errors import ConfigError
from sm_tiered_lightning import TieredCheckpoint
from tests.distributed.dcp_jobs import bits, recipe, steps
from tests.lightning.test_cuts import Model, fit, trainer_of
from tests.unit.children import in_child
from tests.waiting import wait_until


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
    each_step: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("sm_tiered_dcp.checkpointer.TieredCheckpointer.promote_newest", full)
    with (
        pytest.warns(UserWarning, match="not brought to the durable tiers: no space left"),
        pytest.raises(ZeroDivisionError),
    ):
        fit(each_step, Model(fails_at=3), tmp_path)


def test_after_a_training_a_sigterm_is_what_it_was_before(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": "on_preemption"}, disk={"save": None})
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        trainer = fit(which, Model(), tmp_path, max_steps=2)
        assert "_sigterm_notifier_fn" not in vars(vars(trainer)["_signal_connector"])
        assert in_child(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("loader", "fails_at"), [("shuffled", 7), ("stream", 7), ("shuffled", -6)])
def test_a_trainer_whose_training_has_failed_trains_again(
    each_step: dict[str, Any], tmp_path: Path, loader: str, fails_at: int
) -> None:
    plain, model = Model(loader=loader), Model(loader=loader, fails_at=fails_at)
    validating = {"val_check_interval": 3} if fails_at < 0 else {}
    fit(None, plain, tmp_path, **validating)
    torch.manual_seed(0)
    trainer = trainer_of(each_step, tmp_path, **validating)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, ckpt_path="tiered://latest")
    model.fails_at = -99
    trainer.fit(model, ckpt_path="tiered://latest")
    assert trainer.global_step == 14
    assert model.losses == plain.losses
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_a_trainer_that_has_failed_before_anything_was_saved_does_not_go_on(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 5}}, disk={"save": None})
    trainer, model = trainer_of(which, tmp_path), Model(fails_at=3)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(model, ckpt_path="tiered://latest")
    with pytest.raises(ConfigError, match="nothing was ever saved to go on from, and this Trainer is at step 3"):
        trainer.fit(model, ckpt_path="tiered://latest")


def test_how_much_is_accumulated_in_an_epoch_is_known_inside_it(each_step: dict[str, Any], tmp_path: Path) -> None:
    plain, first, second = Model(), Model(fails_at=4), Model()
    accumulate = partial(GradientAccumulationScheduler, {0: 2, 1: 5})
    fit(None, plain, tmp_path, accumulate(), max_steps=8)
    with pytest.raises(ZeroDivisionError):
        fit(each_step, first, tmp_path, accumulate(), max_steps=8)
    fit(each_step, second, tmp_path, accumulate(), max_steps=8)
    assert first.losses | second.losses == plain.losses
    assert bits(second.state_dict()) == bits(plain.state_dict())


class Replaces(Callback):
    """Puts other weights into the model when the training is over, as averaging callbacks do."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for weight in pl_module.parameters():
            weight.data.zero_()


def test_what_is_saved_at_the_end_is_what_the_training_ended_with(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": None}, disk={"save": "on_end"})
    plain, first, second = Model(), Model(), Model()
    fit(None, plain, tmp_path)
    trainer = trainer_of(which, tmp_path, max_steps=7)
    vars(trainer)["callbacks"].insert(0, Replaces())
    torch.manual_seed(0)
    trainer.fit(first, ckpt_path="tiered://latest")
    fit(which, second, tmp_path)
    assert first.losses | second.losses == plain.losses


def test_a_training_that_died_before_its_end_was_saved_has_it_saved_by_the_next(
    tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = recipe(tmp_path, memory_dir, disk={"save": "on_end"})

    monkeypatch.setattr("sm_tiered_dcp.checkpointer.TieredCheckpointer.promote_newest", lambda _: None)
    with pytest.raises(ZeroDivisionError):
        fit(which, Model(fails_at=7), tmp_path)
    assert max(steps(memory_dir)) == 7
    assert not steps(tmp_path / "disk")
    assert fit(which, Model(), tmp_path, max_steps=7).global_step == 7
    assert steps(tmp_path / "disk", "manifest.json") == {7: ["manifest.json"]}
    assert fit(which, Model(), tmp_path, max_steps=7).global_step == 7


def test_the_end_has_its_metrics_and_is_told_of(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"best": {"metric": "val_loss", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": None}, disk={"save": "on_end", "keep": keep})
    found = fit(which, Model(), tmp_path, max_steps=10).checkpoint_callback
    assert isinstance(found, TieredCheckpoint)
    assert found.best_model_path == found.last_model_path == "tiered://step/10"


def test_a_validation_that_can_rank_nothing_is_warned_of(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"best": {"metric": "val_loss", "mode": "min", "n": 1}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": None, "keep": keep})
    with pytest.warns(UserWarning, match=r"within an accumulation ranks no checkpoint by \['val_loss'\]"):
        fit(which, Model(), tmp_path, accumulate_grad_batches=3, val_check_interval=4, max_steps=2)


def test_a_state_that_failed_is_kept_for_a_look_at_it_and_nothing_goes_on_from_it(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path
) -> None:
    for failed_at, newest in ((5, 4), (7, 6)):
        torch.manual_seed(0)
        made = trainer_of(None, tmp_path, TieredCheckpoint(which, on_exception="save"), enable_checkpointing=True)
        with (
            pytest.warns(UserWarning, match=rf"kept in .*exceptions/step_000000000{failed_at}-rank_00000\.ckpt"),
            pytest.raises(ZeroDivisionError),
        ):
            made.fit(Model(fails_at=failed_at), ckpt_path="tiered://latest")
        (path,) = (memory_dir / "run-1/exceptions").iterdir()
        assert torch.load(path, weights_only=True)["global_step"] == failed_at
        again = fit(which, Model(), tmp_path, max_steps=newest + 1)
        assert again.global_step == newest + 1
        stock = trainer_of(None, tmp_path, max_steps=9)
        stock.fit(Model(), ckpt_path=path)
        assert stock.global_step == 9


def test_how_a_failed_state_is_kept_is_checked_before_the_training(which: dict[str, Any], tmp_path: Path) -> None:
    wrong: Any = "sav"
    with pytest.raises(ConfigError, match=r"on_exception is 'sav'. Give 'promote' or 'save'"):
        TieredCheckpoint(which, on_exception=wrong)
    s3 = {"kind": "s3", "uri": "s3://bucket/prefix", "region": "us-east-1"}
    with pytest.raises(ConfigError, match="needs a tier on this machine, and the recipe has none"):
        TieredCheckpoint(recipe(tmp_path, None, disk=None, tiers={"s3": s3}), on_exception="save")
    made = trainer_of(None, tmp_path, strategy=ModelParallelStrategy())
    with pytest.raises(ConfigError, match="can't be had with ModelParallelStrategy: each rank has a share only"):
        TieredCheckpoint(which, on_exception="save").setup(made, Model(), "fit")


def test_after_an_exception_the_newest_step_in_memory_is_brought_to_safety(
    each_step: dict[str, Any], tmp_path: Path, memory_dir: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        fit(each_step, Model(fails_at=7), tmp_path)
    assert max(steps(memory_dir)) == 7
    wait_until(lambda: list((tmp_path / "disk").rglob("manifest.json")), "step 7 is not brought to the disk")
    assert set(steps(tmp_path / "disk")) == {7}
