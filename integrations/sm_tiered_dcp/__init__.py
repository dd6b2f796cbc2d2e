"""Checkpoints of PyTorch states through the tiers of a recipe: a loop's own checkpointer, and DCP drop-ins."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sm_tiered_dcp.checkpointer import TieredCheckpointer
    from sm_tiered_dcp.leaves import Archive
    from sm_tiered_dcp.reader import TieredStorageReader
    from sm_tiered_dcp.rng import RngState
    from sm_tiered_dcp.state import TrainState
    from sm_tiered_dcp.writer import TieredStorageWriter

__all__ = ["Archive", "RngState", "TieredCheckpointer", "TieredStorageReader", "TieredStorageWriter", "TrainState"]

_HOMES = {
    "Archive": "leaves",
    "RngState": "rng",
    "TieredCheckpointer": "checkpointer",
    "TieredStorageReader": "reader",
    "TieredStorageWriter": "writer",
    "TrainState": "state",
}


def __getattr__(name: str) -> object:
    # Loaded when asked for: the finisher's child imports this package at every commit and needs none of them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
