"""Checkpoints of Accelerate and of the Hugging Face Trainer through the tiers of a recipe."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sm_tiered_accelerate.attached import TieredAccelerator, attach
    from sm_tiered_accelerate.hooks import TieredHooks
    from sm_tiered_accelerate.trainer import TieredTrainerCallback

__all__ = ["TieredAccelerator", "TieredHooks", "TieredTrainerCallback", "attach"]

_HOMES = {
    "TieredAccelerator": "attached",
    "TieredHooks": "hooks",
    "TieredTrainerCallback": "trainer",
    "attach": "attached",
}


def __getattr__(name: str) -> object:
    # Loaded when asked for: Accelerate takes seconds to import, and transformers may not be there.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
