"""What is easily done wrong with Lightning's checkpoints, and what happens then."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from sm_tiered.errors import ConfigError, MismatchError, TieredError
from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO, tiered
from sm_tiered_lightning.serving import serve
from tests.distributed.dcp_jobs import recipe, steps
from tests.lightning.test_cuts import Model, fit, trainer_of


def test_a_url_makes_no_local_directory_where_states_are_sharded(
    which: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strategy = ModelParallelStrategy()
    serve(strategy, TieredCheckpointIO(which))
    for call in (lambda path: strategy.save_checkpoint({}, path), strategy.load_checkpoint):
        with pytest.raises(ConfigError, match=re.escape("can't use 's3://bucket/run': Lightning would make")):
            call("s3://bucket/run")
    assert not (tmp_path / "s3:").exists()


def test_two_plugins_or_two_callbacks_are_refused_by_lightning(which: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="CheckpointIO"):
        Trainer(plugins=[TieredCheckpointIO(which), TieredCheckpointIO(which)])
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TieredCheckpoint`"):
        fit(which, Model(), tmp_path, TieredCheckpoint(which))


@pytest.mark.parametrize("callback", [True, False])
def test_a_plugin_that_another_one_wraps_is_refused(which: dict[str, Any], tmp_path: Path, callback: bool) -> None:
    ours = [TieredCheckpoint(which)] if callback else [ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2)]
    made = trainer_of(None, tmp_path, enable_checkpointing=True, plugins=[AsyncCheckpointIO(TieredCheckpointIO(which))])
    vars(made)["callbacks"] += ours
    with pytest.raises(ConfigError, match="it saves in the background by itself"):
        made.fit(Model())


def test_a_save_that_failed_in_the_background_is_heard_of_once(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(
        tmp_path,
        memory_dir,
        memory={"save": {"every_n_steps": 1}},
        disk={"save": {"every_n_steps": 4}},
        on_error="raise",
        commit_deadline_secs=1,
    )
    disk, away = tmp_path / "disk", tmp_path / "away"

    class TakeAway(Callback):
        """No directory from step 3 on."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 3 and not away.exists():
                disk.rename(away)
                disk.touch()
            elif trainer.global_step == 8:
                io: Any = trainer.strategy.checkpoint_io
                io.session.checkpointer.wait()

    made = trainer_of(which, tmp_path, TakeAway())
    model = Model()
    with pytest.raises(TieredError, match="disk"):
        made.fit(model, ckpt_path="tiered://latest")
    assert made.global_step < 10
    disk.unlink()
    away.rename(disk)
    made.fit(model, ckpt_path="tiered://latest")
    assert made.global_step == 14


@pytest.mark.parametrize("callback", [True, False])
def test_a_file_from_a_gpu_is_read_where_there_is_none(
    which: dict[str, Any], tmp_path: Path, callback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cuda.ckpt"
    ours: Any = tiered(which) if callback else {"plugins": [TieredCheckpointIO(which)]}
    stock = trainer_of(None, tmp_path, max_steps=2)
    stock.fit(Model())
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        stock.save_checkpoint(path)
    made = Trainer(**ours, max_steps=3, default_root_dir=tmp_path, accelerator="cpu", logger=False)
    made.fit(Model(), ckpt_path=path)
    assert made.global_step == 3


def test_files_behind_a_url_are_removed(which: dict[str, Any], tmp_path: Path) -> None:
    stock = ModelCheckpoint(dirpath="memory://test-traps", every_n_train_steps=2, save_top_k=1)
    fit(which, Model(), tmp_path, stock, max_steps=6)
    assert [Path(found).name for found in fsspec.filesystem("memory").ls("/test-traps", detail=False)] == [
        "epoch=0-step=6.ckpt"
    ]


class Own:
    """An object that only a pickle can store."""


class Keeps(Callback):
    """Puts it into every checkpoint."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = Own()


def test_weights_only_wins_over_what_the_recipe_allows(which: dict[str, Any], tmp_path: Path) -> None:
    which = {**which, "allow_pickle": True}
    made = fit(which, Model(), tmp_path, Keeps(), max_steps=2)
    assert made.validate(Model(), ckpt_path="tiered://latest")
    with pytest.raises(MismatchError, match="allow_pickle"):
        made.validate(Model(), ckpt_path="tiered://latest", weights_only=True)


def test_two_trainers_in_one_process_keep_apart(tmp_path: Path, memory_dir: Path) -> None:
    places = {name: (tmp_path / name, memory_dir / name) for name in ("one", "other")}
    recipes = {name: recipe(*place, memory={"save": {"every_n_steps": 2}}) for name, place in places.items()}

    class Other(Callback):
        """Trains another model within the first one's training."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == 3:
                fit(recipes["other"], Model(), tmp_path, max_steps=6)

    state = torch.random.get_rng_state()
    one = fit(recipes["one"], Model(), tmp_path, Other(), max_steps=4)
    torch.random.set_rng_state(state)
    assert one.global_step == 4
    assert max(steps(places["one"][1])) == 4
    assert max(steps(places["other"][1])) == 6
    assert fit(recipes["other"], Model(), tmp_path, max_steps=8).global_step == 8
    assert fit(recipes["one"], Model(), tmp_path, max_steps=5).global_step == 5


def test_a_trainer_goes_from_one_recipe_to_another(tmp_path: Path, memory_dir: Path) -> None:
    first, second = (recipe(tmp_path / name, memory_dir / name) for name in ("one", "other"))
    fit(first, Model(), tmp_path, max_steps=3)
    assert fit(second, Model(), tmp_path, max_steps=2).global_step == 2
    assert set(tiered(first)) == {"plugins", "callbacks"}
    assert max(steps(memory_dir / "one")) == 3
    assert max(steps(memory_dir / "other")) == 2
