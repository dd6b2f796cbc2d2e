"""How far many threads are with reading tensors; see `sm_tiered.cli.meter`."""

from __future__ import annotations

import threading
import time

from sm_tiered.cli.meter import Meter

__all__ = ["Gauge"]


class Gauge:
    """Told by many threads how many more bytes are done."""

    def __init__(self, label: str, total: int, *, quiet: bool) -> None:
        """Begin at 0 of *total* bytes; *quiet* says nothing at all."""
        self._label, self._total, self._done = label, total, 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._meter = Meter(quiet=quiet)

    @property
    def secs(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def __enter__(self) -> Gauge:
        """Show it."""
        self._meter.begin(self._label)
        self._meter.tell(0, self._total)
        return self

    def __exit__(self, *exc: object) -> None:
        """Give the terminal back."""
        with self._lock:
            self._meter.end()

    def add(self, count: int) -> None:
        """Note that *count* more bytes are done."""
        with self._lock:
            self._done += count
            self._meter.tell(self._done, self._total)
