"""What Lightning's loggers are told of saves."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from sm_tiered.errors import TieredError
from sm_tiered.handle import SaveHandle

__all__ = ["Report", "left_out"]


def left_out(handle: SaveHandle, tier: str) -> bool:
    """Return whether *handle*'s save was left out on *tier*, as far as that can be told now."""
    try:
        return handle.skipped(tier)
    except TieredError:
        return False


def _ended(handle: SaveHandle, tier: str) -> bool:
    # Where nobody is left to ask, the ranks will hear of it together, at their next save.
    try:
        return handle.done(tier)
    except TieredError:
        return False


class Report:
    """Follows saves on rank 0, and tells the loggers of what was saved and what is durable."""

    def __init__(self, trainer: Trainer, checkpoint_callback: Any, memory: str | None) -> None:
        """Tell the loggers of *trainer*; *memory* is the memory tier's name."""
        self._trainer, self._callback, self._memory = trainer, checkpoint_callback, memory
        self._open: list[tuple[SaveHandle, str]] = []
        self._newest: SaveHandle | None = None
        self._followed = set[str]()
        """Tiers of the newest save that are looked after."""
        self._durable_step: int | None = None

    def saved(self, handle: SaveHandle) -> None:
        """Tell of a save that was just made; one that was told of may have come to more tiers since."""
        if not self._trainer.is_global_zero:
            return
        if handle is not self._newest:
            self._newest = handle
            found: dict[str, float] = {"blocked_secs": handle.blocked_secs, "saved_bytes": float(handle.saved_bytes)}
            if self._memory in handle.tiers and not left_out(handle, self._memory):
                found["memory_step"] = float(handle.step)
            self._followed.clear()
            self._log(found)
        new = {*handle.tiers} - {self._memory} - self._followed
        self._followed |= new
        self._open += [(handle, tier) for tier in handle.tiers if tier in new]

    def look(self, step: int) -> None:
        """Tell of what has become durable since; *step* is where the training is."""
        ended = [(handle, tier) for handle, tier in self._open if _ended(handle, tier)]
        if not ended:
            return
        self._open = [pair for pair in self._open if pair not in ended]
        steps = [handle.step for handle, tier in ended if handle.exception(tier) is None]
        newest = max(steps, default=None)
        if newest is None or newest <= (self._durable_step if self._durable_step is not None else -1):
            return
        self._durable_step = newest
        self._log({"durable_step": float(newest), "drain_lag_steps": float(step - newest)})
        for logger in self._trainer.loggers:
            logger.after_save_checkpoint(self._callback)

    def waiting(self) -> None:
        """Say what the end of the training waits for."""
        for handle, tier in self._open:
            if not _ended(handle, tier):
                rank_zero_info(f"sm_tiered: waiting until step {handle.step} is durable on {tier}")

    def _log(self, found: dict[str, float]) -> None:
        # Loggers count as Lightning does, which is not by global steps where there are several optimizers.
        loop: Any = self._trainer.fit_loop.epoch_loop
        for logger in self._trainer.loggers:
            named = {f"sm_tiered/{name}": value for name, value in found.items()}
            logger.log_metrics(named, loop._batches_that_stepped)
