"""`TieredCheckpointIO`: Lightning's plugin for where checkpoints are saved and loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import CheckpointIO

from sm_tiered import layout
from sm_tiered.errors import CheckpointNotFoundError, ConfigError
from sm_tiered.recipe import load_recipe
from sm_tiered_dcp import TrainState
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_lightning.session import Session, Snapshot
from sm_tiered_lightning.uri import Wanted, parse_uri

__all__ = ["TieredCheckpointIO"]

PathLike = str | Path


class TieredCheckpointIO(CheckpointIO):
    """Loads ``tiered://latest`` and ``tiered://step/<n>`` from the nearest tier; saves into the tiers.

    A checkpoint under a path of the file system is written there, as Lightning documents it. Beside a
    `TieredCheckpoint` of the same recipe the policies decide what goes into the tiers; alone, every whole checkpoint
    that is saved, whatever its path, goes into all of them as well. Other paths are loaded from where they point to.
    """

    def __init__(self, recipe: RecipeLike, *, files: CheckpointIO | None = None) -> None:
        """Read *recipe*; tiers are opened when they are needed.

        Args:
            recipe: a path, a mapping or a `sm_tiered.recipe.Recipe`.
            files: what reads and writes files; None: Lightning's own.

        Raises:
            RecipeError: it can't be used.
        """
        self.recipe = load_recipe(recipe)
        self._files: Any = files or TorchCheckpointIO()
        self._session: Session | None = None
        self._handled: BaseException | None = None
        """What was being handled when the tiers were opened: no failure of what began then."""
        self._shards: Callable[[], TrainState | None] = _no_shards
        self._attached = False
        self._fits = False
        self._failed = False

    @property
    def session(self) -> Session:
        """What is shared with the callback. Collective when it is opened."""
        if self._session is None:
            self._session, self._handled = Session(self.recipe), sys.exc_info()[1]
        return self._session

    def attach(self, shards: Callable[[], TrainState | None], *, fits: bool) -> None:
        """Serve a `TieredCheckpoint`: every rank calls, and its policies decide what goes into the tiers.

        Args:
            shards: returns model and optimizers where the strategy shards them.
            fits: whether what is loaded is trained on: where nothing was ever saved, that may begin afresh.
        """
        self._attached, self._shards, self._fits, self._failed = True, shards, fits, False

    def fail(self) -> None:
        """Say that the training has failed: `teardown` waits for nothing."""
        self._failed = True

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Save *checkpoint* to *path* or, under ``tiered://step/<n>``, into the tiers; then every rank must call.

        Raises:
            ConfigError: *path* names another step, or *checkpoint* has weights alone, or *storage_options* are given.
            SaveError: with ``on_error: raise``, what an earlier save failed of.
        """
        if storage_options is not None:
            raise ConfigError(f"storage_options {storage_options!r} can't be used", hint="Leave them out.")
        wanted, whole = parse_uri(path), "lr_schedulers" in checkpoint
        if wanted is not None:
            self._save_to_tiers(checkpoint, wanted, str(path), whole=whole)
            return
        if not self._attached and whole:
            self._check_caller()
            self.session.save(_step_of(checkpoint), Snapshot(checkpoint=checkpoint))
        self._files.save_checkpoint(checkpoint, path)

    def _save_to_tiers(self, checkpoint: dict[str, Any], wanted: Wanted, path: str, *, whole: bool) -> None:
        step = _step_of(checkpoint)
        if wanted.step not in (None, step):
            raise ConfigError(f"{path} can't be what the trainer has: it is at step {step}", hint="Use its own step.")
        if not whole:
            raise ConfigError(
                f"weights alone can't be saved as {path}: a training would go on from them without its optimizer",
                hint="Save them under a path of the file system.",
            )
        self._check_caller()
        train = self._shards()
        if train is not None:
            checkpoint = {name: value for name, value in checkpoint.items() if name != "optimizer_states"}
            checkpoint["state_dict"] = {}
        self.session.save(step, Snapshot(checkpoint=checkpoint, train=train))

    def _check_caller(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "TieredCheckpointIO was called from a thread of its own, as by AsyncCheckpointIO",
                hint="Give it to the Trainer as it is: it saves in the background by itself.",
            )
        if not self._attached and _is_one_of_many():
            raise ConfigError(
                "TieredCheckpointIO alone can't save for several processes: Lightning calls it on rank 0 only",
                hint="Add callbacks=[TieredCheckpoint(recipe)] to the Trainer.",
            )

    def load_checkpoint(
        self, path: PathLike, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what *path* names. For a URI of ours every rank must call it; all get the same step, or all raise.

        Raises:
            ConfigError: an unknown form of ``tiered://``.
            MismatchError: *weights_only* is True, and something in it is a pickle.
            CheckpointNotFoundError: there is no such step, or nothing at all to evaluate.
            TieredError: see `TieredCheckpointer.restore`.
        """
        wanted = parse_uri(path)
        if wanted is None:
            # Without one, the default of whoever reads the file is meant, and that is the CPU.
            at = {} if map_location is None else {"map_location": map_location}
            return self._files.load_checkpoint(path, weights_only=weights_only, **at)
        found = self.session.load(wanted, self._shards(), fits=self._fits, weights_only=weights_only is True)
        if not found and not self._fits:
            namespace = self.recipe.settings().namespace
            raise CheckpointNotFoundError(
                f"nothing was ever saved in namespace {namespace!r}",
                hint="Train first; with callbacks=[TieredCheckpoint(recipe)] a training begins afresh here.",
            )
        return found

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the file at *path*, which may be a URL, if there is one.

        What the tiers hold is left to the recipe's keep policies.
        """
        if parse_uri(path) is None:
            self._files.remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait for the drain and close the tiers; they are opened again when needed. Can be called many times.

        After an exception of the training nothing is waited for, and nothing else is raised.
        """
        session, self._session = self._session, None
        if session is None:
            return
        raised = sys.exc_info()[1]
        failed = self._failed or (raised is not None and raised is not self._handled)
        try:
            if self._fits and session.own is not None and not failed:
                # Nothing was left to train on: what was restored is the end, and may not be saved as such yet.
                session.checkpointer.finish()
        except BaseException:
            failed = True
            raise
        finally:
            session.close(abandon=failed)


def _no_shards() -> None:
    return None


def _step_of(checkpoint: dict[str, Any]) -> int:
    return layout.check_step(checkpoint["global_step"], name="global_step")


def _is_one_of_many() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
