"""Figures of a job's saves, for whoever keeps a log of the training: what was saved, and what has become durable."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sm_tiered.errors import TieredError
from sm_tiered.handle import SaveHandle

__all__ = ["Figures", "left_out"]

_PREFIX = "sm_tiered/"


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


class Figures:
    """Follows saves, and tells of them: of each when it is made, and when the newest durable step changes.

    ``blocked_secs``, ``saved_bytes`` (this rank's) and, unless memory left it out, ``memory_step``; then
    ``durable_step`` and ``drain_lag_steps``, how far the training is beyond it.
    """

    def __init__(self, log: Callable[[Mapping[str, float]], None], memory: str | None) -> None:
        """Tell *log*, by name; *memory* is the memory tier's name."""
        self._log, self._memory = log, memory
        self._open: list[tuple[SaveHandle, str]] = []
        self._newest: SaveHandle | None = None
        self._followed = set[str]()
        """Tiers of the newest save that are looked after."""
        self._durable_step: int | None = None

    def saved(self, handle: SaveHandle) -> None:
        """Tell of a save that was just made; one that was told of may have come to more tiers since."""
        if handle is not self._newest:
            self._newest = handle
            found: dict[str, float] = {"blocked_secs": handle.blocked_secs, "saved_bytes": float(handle.saved_bytes)}
            if self._memory in handle.tiers and not left_out(handle, self._memory):
                found["memory_step"] = float(handle.step)
            self._followed.clear()
            self._tell(found)
        new = {*handle.tiers} - {self._memory} - self._followed
        self._followed |= new
        self._open += [(handle, tier) for tier in handle.tiers if tier in new]

    def look(self, step: int) -> bool:
        """Tell of what has become durable since, and return whether there is any; *step* is where the training is."""
        ended = [(handle, tier) for handle, tier in self._open if _ended(handle, tier)]
        if not ended:
            return False
        self._open = [pair for pair in self._open if pair not in ended]
        steps = [handle.step for handle, tier in ended if handle.exception(tier) is None]
        newest = max(steps, default=None)
        if newest is None or newest <= (self._durable_step if self._durable_step is not None else -1):
            return False
        self._durable_step = newest
        self._tell({"durable_step": float(newest), "drain_lag_steps": float(step - newest)})
        return True

    def under_way(self) -> list[tuple[int, str]]:
        """Return step and tier of what is not yet durable."""
        return [(handle.step, tier) for handle, tier in self._open if not _ended(handle, tier)]

    def _tell(self, found: Mapping[str, float]) -> None:
        self._log({f"{_PREFIX}{name}": value for name, value in found.items()})
