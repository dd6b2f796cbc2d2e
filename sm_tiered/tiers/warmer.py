"""Fetching an arena's pages in the background, so that the first saves are as fast as the later ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from sm_tiered.tiers.slot import OnMap, Slot, State

__all__ = ["Warmer"]

_JOIN_SECS = 30.0


class Warmer:
    """A daemon thread that lives while there is something to prepare. Shares the arena's lock.

    *next_cold* names the next slot for a size and count, *done* gets it back, both with the lock held.
    """

    def __init__(
        self,
        changed: threading.Condition,
        next_cold: Callable[[int, int], Slot | None],
        done: Callable[[Slot], None],
        on_map: OnMap | None,
    ) -> None:
        self._changed, self._next_cold, self._done, self._on_map = changed, next_cold, done, on_map
        self._requests: deque[tuple[int, int]] = deque()
        self._thread: threading.Thread | None = None
        self._slot: Slot | None = None
        self._size = 0
        self._stopping = False
        self._failure: BaseException | None = None

    def ask(self, size: int, count: int) -> None:
        """Prepare up to *count* slots of *size* bytes. With the lock held."""
        self._requests.append((size, count))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sm_tiered-prepare", daemon=True)
            self._thread.start()

    def busy_with(self, size: int) -> bool:
        """Whether slots of about *size* bytes are still to come. With the lock held."""
        return any(abs(wanted - size) * 16 <= max(wanted, size) for wanted, _ in self._requests)

    def check(self) -> None:
        """Raise, once, what went wrong in the background and would not go wrong in `take` itself."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self, timeout_secs: float) -> bool:
        """Return whether nothing is left to do, within that time."""
        end = time.monotonic() + timeout_secs
        with self._changed:
            while self._requests:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
        return True

    def close(self) -> None:
        """Stop between two slices and wait for that."""
        self._stopping = True
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_JOIN_SECS)

    def abandon(self) -> None:
        """In a forked child, where the thread does not exist."""
        self._stopping, self._thread = True, None
        self._requests.clear()

    def _run(self) -> None:
        while self._begin():
            slot = self._slot
            assert slot is not None
            failure: BaseException | None = None
            try:
                slot.prepare(self._size, self._on_map, populate=lambda: self._stopping)
            except BaseException as error:
                failure = error
            with self._changed:
                self._slot = None
                self._done(slot)
                if failure is not None:
                    self._requests.popleft()
                    # What the system refuses, `take` meets too, and says; anything else would be lost here.
                    self._failure = None if isinstance(failure, OSError) else failure
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Choose the next slot; False when there is nothing left to do."""
        with self._changed:
            while self._requests and not self._stopping:
                try:
                    self._slot = self._next_cold(*self._requests[0])
                except OSError:
                    self._slot = None
                except BaseException as error:
                    self._slot, self._failure = None, error
                if self._slot is not None:
                    # What is published is mapped as it is; it may become free, and asked for, at any moment.
                    free = self._slot.state is State.FREE
                    self._size = self._requests[0][0] if free else self._slot.size
                    return True
                self._requests.popleft()
                self._changed.notify_all()
            self._thread = None
            self._requests.clear()
            self._changed.notify_all()
            return False
