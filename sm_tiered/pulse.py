"""What a training tells of itself, so that a ledger of the run sees where failures struck and where it just ended."""

from __future__ import annotations

import time

from sm_tiered.event_log import Events
from sm_tiered.events import Progress, TrainingEnded

__all__ = ["Pulse"]

_EVERY_SECS = 5.0


class Pulse:
    """Rank 0 tells now and then which step it has come to; every rank tells how the training ended."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._step: int | None = None
        self._told_at: float | None = None
        self._ended = False

    def beat(self, step: int, events: Events) -> None:
        """Say that the training has come to *step*."""
        self._step, self._ended, now = step, False, time.monotonic()
        if self._rank == 0 and (self._told_at is None or now - self._told_at >= _EVERY_SECS):
            self._told_at = now
            events.emit(Progress(step=step))

    def end(self, how: str, events: Events) -> None:
        """Say that the training let go, see `TrainingEnded`; until it goes on the first word counts."""
        if not self._ended:
            self._ended = True
            events.emit(TrainingEnded(step=self._step, how=how))
