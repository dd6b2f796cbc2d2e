"""Which strategies can be served, and how they come to save and load by ``tiered://``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from sm_tiered.errors import ConfigError
from sm_tiered_dcp import TrainState
from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO
from sm_tiered_lightning.uri import parse_uri

__all__ = ["check_strategy", "serve", "shards", "shards_state"]

_WHOLE = (SingleDeviceStrategy, DDPStrategy)
_SHARDED = (FSDPStrategy, ModelParallelStrategy)
_STORING = ("save_checkpoint", "load_checkpoint", "lightning_module_state_dict", "optimizer_state")
"""What a strategy stores its state by. One that has its own way, as DeepSpeed's and XLA's have, is not known here."""


def check_strategy(strategy: Strategy) -> None:
    """See that *strategy* stores its state as one of those that are known.

    Raises:
        ConfigError: it does not.
    """
    for known in (*_WHOLE, *_SHARDED):
        if isinstance(strategy, known) and all(
            getattr(type(strategy), name) is getattr(known, name) for name in _STORING
        ):
            return
    raise ConfigError(
        f"the strategy {type(strategy).__name__} can't be served: it stores its state in a way of its own",
        hint="Use a single device, DDPStrategy, FSDPStrategy or ModelParallelStrategy.",
    )


def serve(strategy: Strategy, io: TieredCheckpointIO) -> None:
    """Bring saves and loads under ``tiered://`` to *io* on every rank; all others are the strategy's own.

    Lightning calls the plugin on rank 0 alone for a save, and not at all where states are sharded. Other URLs are
    refused there.
    """
    bound: Any = strategy
    if "save_checkpoint" in vars(strategy):
        return
    stock_save, stock_load = bound.save_checkpoint, bound.load_checkpoint

    def save(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        _check_path(strategy, filepath)
        chosen = stock_save if parse_uri(filepath) is None else io.save_checkpoint
        chosen(checkpoint, filepath, storage_options)

    def load(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        _check_path(strategy, checkpoint_path)
        if parse_uri(checkpoint_path) is None:
            return stock_load(checkpoint_path, weights_only)
        return io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    bound.save_checkpoint, bound.load_checkpoint = save, load


def _check_path(strategy: Strategy, path: Any) -> None:
    """Lightning (2.6) takes a URL for the name of a local directory where states are sharded: ``./s3:/bucket/…``."""
    if shards_state(strategy) and parse_uri(path) is None and "://" in str(path):
        raise ConfigError(
            f"{type(strategy).__name__} can't use {str(path)!r}: Lightning would make a local directory of that name",
            hint="Name the store as a tier in the recipe, and use tiered://latest or tiered://step/<n>.",
        )


def shards_state(strategy: Strategy) -> bool:
    """Return whether each rank of *strategy* has only a share of the model."""
    return isinstance(strategy, _SHARDED)


def shards(strategy: Strategy) -> TrainState | None:
    """Return model and optimizers of a strategy that shards them, None for the others."""
    if not shards_state(strategy):
        return None
    model = strategy.model
    assert model is not None
    return TrainState(model, strategy.optimizers)
