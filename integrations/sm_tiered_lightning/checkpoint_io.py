"""`TieredCheckpointIO`: Lightning's plugin for where checkpoints are saved and loaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import CheckpointIO

from sm_tiered import layout
from sm_tiered.errors import CheckpointNotFoundError, ConfigError
from sm_tiered.recipe import load_recipe
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_lightning.session import Session
from sm_tiered_lightning.uri import parse_uri

__all__ = ["TieredCheckpointIO"]

PathLike = str | Path


class TieredCheckpointIO(CheckpointIO):
    """Loads ``tiered://latest`` and ``tiered://step/<n>`` from the nearest tier; saves into the tiers.

    A checkpoint that is saved under a path of the file system goes there, as Lightning documents it, and into the
    tiers; one under ``tiered://step/<n>`` into the tiers alone. Other paths are loaded from where they point to.
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
        self.on_every_rank = False
        """Whether every rank calls `save_checkpoint`, rather than rank 0 alone: the callback sees to it."""
        self.fitting = True
        """Whether what is loaded is trained on: where nothing was ever saved, that may begin afresh."""

    @property
    def session(self) -> Session:
        """What is shared with the callback. Collective when it is opened."""
        if self._session is None:
            self._session = Session(self.recipe)
        return self._session

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Save *checkpoint* into the tiers, and to *path* if that is a file's. Every rank must call it.

        Raises:
            ConfigError: *path* names another step, or *storage_options* are given.
            SaveError: with ``on_error: raise``, what an earlier save failed of.
        """
        if storage_options is not None:
            raise ConfigError(f"storage_options {storage_options!r} can't be used", hint="Leave them out.")
        if not self.on_every_rank and _is_one_of_many():
            raise ConfigError(
                "TieredCheckpointIO alone can't save for several processes: Lightning calls it on rank 0 only",
                hint="Add callbacks=[TieredCheckpoint(recipe)] to the Trainer.",
            )
        step = layout.check_step(checkpoint["global_step"], name="global_step")
        wanted = parse_uri(path)
        if wanted is not None and wanted.step not in (None, step):
            raise ConfigError(f"{path} can't be what the trainer has: it is at step {step}", hint="Use its own step.")
        self.session.save(step, checkpoint)
        if wanted is None and self.session.is_first:
            self._files.save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: PathLike, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return what *path* names. For a URI of ours every rank must call it; all get the same step, or all raise.

        Raises:
            ConfigError: an unknown form of ``tiered://``.
            CheckpointNotFoundError: there is no such step, or nothing at all to evaluate.
            TieredError: see `TieredCheckpointer.restore`.
        """
        wanted = parse_uri(path)
        if wanted is None:
            return self._files.load_checkpoint(path, map_location, weights_only)
        found = self.session.load(wanted)
        if not found and not self.fitting:
            namespace = self.recipe.settings().namespace
            raise CheckpointNotFoundError(f"nothing was ever saved in namespace {namespace!r}", hint="Train first.")
        return found

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the file at *path*, if there is one. What the tiers hold is left to the recipe's keep policies."""
        if parse_uri(path) is None and os.path.lexists(path):
            self._files.remove_checkpoint(path)

    def teardown(self) -> None:
        """Wait for the drain and close the tiers; they are opened again when needed. Can be called many times.

        After an exception of the training nothing is waited for, and nothing else is raised.
        """
        session, self._session = self._session, None
        if session is not None:
            session.close(abandon=sys.exc_info()[0] is not None)


def _is_one_of_many() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
