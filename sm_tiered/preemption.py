"""SIGTERM as a fact that policies can ask for; whatever handler was installed before still runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["Preemption"]


class Preemption:
    """Notices SIGTERM from `install` to `remove`."""

    def __init__(self) -> None:
        self.noticed = False
        """Whether a SIGTERM came to this process."""
        self._before: Any = None
        self._installed = False

    def install(self) -> None:
        """Begin to notice. Python lets only the main thread do so; elsewhere nothing happens."""
        if self._installed or threading.current_thread() is not threading.main_thread():
            return
        self._before = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, self._notice)
        self._installed = True

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if not self._installed and signal.getsignal(number) == self._notice:
            # Somebody who came after us has put us back after we were removed: the signal is not ours to keep.
            self._put_back()
            signal.raise_signal(number)
            return
        self.noticed |= self._installed
        before: Callable[[int, FrameType | None], object] | object = self._before
        if callable(before):
            before(number, frame)

    def remove(self) -> None:
        """Put the handler back that was there before, unless somebody has replaced this one since."""
        if self._installed and signal.getsignal(signal.SIGTERM) == self._notice:
            self._put_back()
        self._installed = False

    def _put_back(self) -> None:
        signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
