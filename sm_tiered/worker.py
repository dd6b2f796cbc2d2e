"""The one background thread of a trainer: digests, record, acknowledgement, all after `save` has returned."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Worker"]

_LAST_PAUSE_SECS = 0.05
_T = TypeVar("_T")


@dataclass(slots=True)
class _Poll:
    look: Callable[[], bool]
    to_the_end: bool
    pause_secs: float
    longest_secs: float
    next_at: float = 0.0

    def due(self) -> bool:
        """Whether it is time for a look; then the next one is later."""
        now = time.monotonic()
        if now < self.next_at:
            return False
        self.next_at, self.pause_secs = now + self.pause_secs, min(2 * self.pause_secs, self.longest_secs)
        return True


class Worker:
    """Runs jobs one after the other, and a repeated poll while there is none. What one raises goes to *on_error*."""

    def __init__(self, name: str, *, on_error: Callable[[Exception], None]) -> None:
        self._on_error = on_error
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._polls: list[_Poll] = []
        self._end = 0.0
        self._name = name
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Run *job* soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def poll(
        self, look: Callable[[], bool], *, to_the_end: bool = False, pause_secs: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        """From within a job: call *look* now and then, until it returns True.

        Args:
            look: what to call; once more when the worker is closed.
            to_the_end: `close` waits for it, while its time lasts.
            pause_secs: at least so long between two looks: the first time, and at the longest.
        """
        self._polls.append(_Poll(look, to_the_end, *pause_secs))

    def quiesce(self, timeout_secs: float) -> bool:
        """Wait until all that was submitted is done, at most so long; return whether it is."""
        if self._thread is None:
            return True
        done = threading.Event()
        self.submit(done.set)
        return done.wait(timeout_secs)

    def close(self, timeout_secs: float = 60.0, *, patient: bool = True) -> None:
        """Run what is queued, give up the polls but, if *patient*, those that are `to_the_end`, end the thread."""
        if self._thread is not None:
            self._end = time.monotonic() + (timeout_secs if patient else 0.0)
            self._jobs.put(None)
            self._thread.join(timeout_secs)
            self._thread = None

    def _run(self) -> None:
        pause = 0.002
        while True:
            try:
                job = self._jobs.get(timeout=pause if self._polls else None)
            except queue.Empty:
                self._polls = [poll for poll in self._polls if not (poll.due() and self._looked(poll))]
                pause = min(2 * pause, 0.25)
                continue
            if job is None:
                self._last_looks()
                return
            self._guarded(job)
            pause = 0.002

    def _last_looks(self) -> None:
        left = [poll for poll in self._polls if not self._looked(poll) and poll.to_the_end]
        while left and time.monotonic() < self._end:
            time.sleep(_LAST_PAUSE_SECS)
            left = [poll for poll in left if not (poll.due() and self._looked(poll))]

    def _looked(self, poll: _Poll) -> bool:
        return self._guarded(poll.look) is not False

    def _guarded(self, action: Callable[[], _T]) -> _T | None:
        try:
            return action()
        except Exception as error:
            self._on_error(error)
            return None
