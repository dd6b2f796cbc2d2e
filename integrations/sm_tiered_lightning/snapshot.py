"""Lightning's own checkpoint, taken where a step is over and told as Lightning's loops tell it in their hooks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from sm_tiered_lightning.moments import is_epochs_last_batch
from sm_tiered_lightning.overrides import Overrides

__all__ = ["snapshot"]

_Progress = dict[str, dict[str, int]]


def snapshot(trainer: Trainer, *, with_tensors: bool) -> dict[str, Any]:
    """Return `dump_checkpoint` of *trainer*, which goes on from it with the next batch or epoch, with or without us.

    Its counters have passed the hooks at which Lightning saves, and no loop of it restarts where they stand: they are
    set back to that hook.

    Args:
        trainer: at one of the `Moments`, or at the end of the training.
        with_tensors: False leaves model and optimizer states empty: who shards them stores them apart.
    """
    connector: Any = vars(trainer)["_checkpoint_connector"]
    with nullcontext() if with_tensors else _empty_states(trainer.strategy):
        checkpoint: dict[str, Any] = connector.dump_checkpoint(weights_only=False)
    if not with_tensors:
        del checkpoint["optimizer_states"]
    fit_loop: dict[str, Any] = checkpoint["loops"]["fit_loop"]
    if is_epochs_last_batch(trainer):
        _set_back(fit_loop["epoch_progress"], "completed")
    else:
        _set_back_to_batch(trainer, fit_loop)
    checkpoint["epoch"] = fit_loop["epoch_progress"]["current"]["completed"]
    return checkpoint


def _set_back_to_batch(trainer: Trainer, fit_loop: dict[str, Any]) -> None:
    epochs = fit_loop["epoch_progress"]["total"]
    if epochs["processed"] == epochs["started"]:
        # The training ended within an epoch, which was counted all the same.
        _set_back(fit_loop["epoch_progress"], "completed", "processed")
    batches = fit_loop["epoch_loop.batch_progress"]
    if batches["total"]["started"] == batches["total"]["ready"] == batches["total"]["processed"]:
        # Where an earlier epoch skipped its rest these differ for good, and Lightning goes on after `completed`.
        _set_back(batches, "completed")
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    if not epoch_loop._should_accumulate():
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _set_back(progress: _Progress, *counters: str) -> None:
    for scope in ("total", "current"):
        for counter in counters:
            progress[scope][counter] -= 1


def _empty_states(strategy: Strategy) -> Overrides:
    overrides = Overrides()
    overrides.put(strategy, "lightning_module_state_dict", dict)
    overrides.put(strategy, "optimizer_state", _empty)
    return overrides


def _empty(optimizer: object) -> dict[str, Any]:
    return {}
