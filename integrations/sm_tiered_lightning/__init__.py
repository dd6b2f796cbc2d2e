"""Checkpoints of Lightning trainers through the tiers of a recipe: a plugin, and a callback that asks the policies."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sm_tiered_dcp.engine import RecipeLike
    from sm_tiered_lightning.callback import TieredCheckpoint
    from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO

__all__ = ["TieredCheckpoint", "TieredCheckpointIO", "tiered"]

_HOMES = {"TieredCheckpoint": "callback", "TieredCheckpointIO": "checkpoint_io"}


def tiered(recipe: RecipeLike) -> dict[str, Any]:
    """Return plugin and callback as a Trainer takes them: ``Trainer(**tiered("recipe.yaml"))``.

    Raises:
        RecipeError: *recipe* can't be used.
    """
    from sm_tiered_lightning.callback import TieredCheckpoint
    from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO

    return {"plugins": [TieredCheckpointIO(recipe)], "callbacks": [TieredCheckpoint(recipe)]}


def __getattr__(name: str) -> object:
    # Loaded when asked for: Lightning takes seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
