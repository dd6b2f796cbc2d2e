"""What Lightning's loggers are told of saves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from sm_tiered.figures import Figures
from sm_tiered.handle import SaveHandle

__all__ = ["Report"]


class Report:
    """Follows saves on rank 0, and tells the loggers of what was saved and what is durable."""

    def __init__(self, trainer: Trainer, checkpoint_callback: Any, memory: str | None) -> None:
        """Tell the loggers of *trainer*; *memory* is the memory tier's name."""
        self._trainer, self._callback = trainer, checkpoint_callback
        self._figures = Figures(self._log, memory)

    def saved(self, handle: SaveHandle) -> None:
        """Tell of a save that was just made."""
        if self._trainer.is_global_zero:
            self._figures.saved(handle)

    def look(self, step: int) -> None:
        """Tell of what has become durable since; *step* is where the training is."""
        if self._figures.look(step):
            for logger in self._trainer.loggers:
                logger.after_save_checkpoint(self._callback)

    def waiting(self) -> None:
        """Say what the end of the training waits for."""
        for step, tier in self._figures.under_way():
            rank_zero_info(f"sm_tiered: waiting until step {step} is durable on {tier}")

    def _log(self, found: Mapping[str, float]) -> None:
        # Loggers count as Lightning does, which is not by global steps where there are several optimizers.
        loop: Any = self._trainer.fit_loop.epoch_loop
        for logger in self._trainer.loggers:
            logger.log_metrics(dict(found), loop._batches_that_stepped)
