"""What Lightning's checkpoint lacks: each rank's own state. It holds rank 0's loaders and callbacks, and no RNG."""

from __future__ import annotations

from typing import Any

from sm_tiered_dcp import RngState

__all__ = ["own_state", "put_back", "taken_from"]

_LOADERS = "combined_loader"
"""Where Lightning keeps the states of the training's dataloaders, in the state of its fit loop."""


def own_state(
    checkpoint: dict[str, Any],
    *,
    rank: int,
    rng_ahead: dict[str, Any] | None = None,
    made: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what belongs to this rank alone: the random generators now, and out of its own *checkpoint* the rest.

    Args:
        checkpoint: as this rank dumped it.
        rank: this rank.
        rng_ahead: the generators before the fetch of a batch that is not yet trained on; see `Lookahead`.
        made: of the dataloaders, where that is known; see `loaders_made`.
    """
    return {
        "rank": rank,
        "rng": RngState().state_dict(),
        "rng_ahead": rng_ahead,
        "made": made,
        "loaders": _fit_loop(checkpoint).get(_LOADERS),
        "callbacks": checkpoint.get("callbacks"),
    }


def put_back(own: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Put this rank's loaders and callbacks into *checkpoint*, which is rank 0's."""
    if own["loaders"] is not None:
        _fit_loop(checkpoint)[_LOADERS] = own["loaders"]
    if own["callbacks"] is not None:
        checkpoint["callbacks"] = own["callbacks"]


def taken_from(rank: int, _world: int, saved_world: int) -> int:
    """Return the saved rank whose own state *rank* takes: its own, and of more ranks each further one an older one's.

    So all loaders stand after the same number of batches. The generators it takes from itself alone (`own_state` has
    the rank): ranks that draw the same numbers would make the same dropout masks.
    """
    return rank % saved_world


def _fit_loop(checkpoint: dict[str, Any]) -> dict[str, Any]:
    loops: dict[str, Any] = checkpoint.get("loops", {})
    return loops.get("fit_loop", {}).get("state_dict", {})
