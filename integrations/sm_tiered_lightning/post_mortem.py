"""The state of a training that has failed, for people to look at.

It may be half updated: nothing goes on from it by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from sm_tiered.errors import ConfigError
from sm_tiered.settings import LocalSettings, Settings

__all__ = ["PostMortem"]


class PostMortem:
    """Keeps this rank's last failed state as a stock ``.ckpt``, on a tier of this machine beside its checkpoints."""

    def __init__(self, settings: Settings) -> None:
        """Choose the place: the memory tier, else the first one in a directory.

        Raises:
            ConfigError: all tiers are elsewhere.
        """
        near = [settings.memory] if settings.memory else [t for t in settings.durable if isinstance(t, LocalSettings)]
        if not near:
            raise ConfigError(
                "on_exception='save' needs a tier on this machine, and the recipe has none",
                hint="Add a memory tier, or leave on_exception out.",
            )
        self.folder = Path(near[0].path) / settings.namespace / "exceptions"

    def write(self, trainer: Trainer) -> Path:
        """Write what *trainer* would save now, instead of what this rank kept before; return where. Not collective.

        Raises:
            ConfigError: an optimizer's state is spread over the ranks, and some of them may be gone.
            OSError: it can't be written.
        """
        if any(hasattr(optimizer, "consolidate_state_dict") for optimizer in trainer.optimizers):
            raise ConfigError("the optimizer's state is spread over the ranks", hint="Leave on_exception out.")
        connector: Any = vars(trainer)["_checkpoint_connector"]
        checkpoint: dict[str, Any] = connector.dump_checkpoint(weights_only=False)
        rank = f"rank_{trainer.global_rank:05d}.ckpt"
        path = self.folder / f"step_{trainer.global_step:010d}-{rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        try:
            torch.save(checkpoint, unfinished)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        for older in self.folder.glob(f"step_*-{rank}"):
            if older != path:
                older.unlink(missing_ok=True)
        return path
