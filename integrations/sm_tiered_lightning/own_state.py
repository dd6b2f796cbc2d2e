"""What Lightning's checkpoint lacks: each rank's own state. It holds rank 0's loaders and callbacks, and no RNG."""

from __future__ import annotations

from typing import Any

from sm_tiered_dcp import RngState

__all__ = ["own_state", "put_back"]

_LOADERS = "combined_loader"
"""Where Lightning keeps the states of the training's dataloaders, in the state of its fit loop."""


def own_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what belongs to this rank alone: the random generators now, and out of its own *checkpoint* the rest."""
    return {
        "rng": RngState().state_dict(),
        "loaders": _fit_loop(checkpoint).get(_LOADERS),
        "callbacks": checkpoint.get("callbacks"),
    }


def put_back(own: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put this rank's loaders and callbacks into *checkpoint*, which is rank 0's."""
    if own["loaders"] is not None:
        _fit_loop(checkpoint)[_LOADERS] = own["loaders"]
    if own["callbacks"] is not None:
        checkpoint["callbacks"] = own["callbacks"]


def _fit_loop(checkpoint: dict[str, Any]) -> dict[str, Any]:
    loops: dict[str, Any] = checkpoint.get("loops", {})
    return loops.get("fit_loop", {}).get("state_dict", {})
