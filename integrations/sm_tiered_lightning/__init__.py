"""Checkpoints of Lightning trainers through the tiers of a recipe: a plugin, and a callback that asks the policies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sm_tiered_lightning.callback import TieredCheckpoint
    from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO

__all__ = ["TieredCheckpoint", "TieredCheckpointIO"]

_HOMES = {"TieredCheckpoint": "callback", "TieredCheckpointIO": "checkpoint_io"}


def __getattr__(name: str) -> object:
    # Loaded when asked for: Lightning takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
