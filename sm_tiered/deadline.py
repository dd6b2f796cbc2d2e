"""Deadlines that hold whatever the other side does: a wait ends in time even when a call inside it never does."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

__all__ = ["MIN_BYTES_PER_SEC", "Task", "allowance", "remaining", "run", "within"]

MIN_BYTES_PER_SEC = 4 * 1024 * 1024
"""A transfer slower than this, on top of its operation's own deadline, counts as stuck."""

_EXIT_WAIT_SECS = 3.0

_T = TypeVar("_T")
_until: ContextVar[float | None] = ContextVar("sm_tiered_deadline", default=None)


def allowance(size: int) -> float:
    """Return how many seconds the transfer of *size* bytes may add to a deadline."""
    return size / MIN_BYTES_PER_SEC


@contextmanager
def within(secs: float) -> Generator[None, None, None]:
    """Let every operation that this thread begins inside end within *secs*; an earlier deadline outside stays."""
    until, outer = time.monotonic() + secs, _until.get()
    token = _until.set(until if outer is None else min(until, outer))
    try:
        yield
    finally:
        _until.reset(token)


def remaining(limit: float) -> float:
    """Return *limit*, or the seconds that are left until the deadline of `within` where those are fewer."""
    until = _until.get()
    return limit if until is None else max(0.0, min(limit, until - time.monotonic()))


class Task(Generic[_T]):
    """A call in a daemon thread of its own: waited for with a limit, and no longer than that.

    A call that overruns its limit goes on in its thread: give it nothing that must not change later.
    """

    def __init__(self, call: Callable[[], _T]) -> None:
        self._call: Callable[[], _T] | None = call
        self._value: list[_T] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()
        with _lock:
            _running.add(self)
        try:
            threading.Thread(target=self._main, name="sm_tiered-call", daemon=True).start()
        except RuntimeError:  # an interpreter that is going starts none; what it still has to say must be said
            self._main()

    def _main(self) -> None:
        call, self._call = self._call, None
        try:
            if call is not None:
                self._value.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in `result`
            self._error = error
        finally:
            del call
            self._ended.set()
            with _lock:
                _running.discard(self)

    def wait(self, secs: float) -> bool:
        """Return whether the call has ended, after at most *secs*."""
        return self._ended.wait(max(0.0, secs))

    def result(self, secs: float) -> _T:
        """Return what the call returned, or raise what it raised.

        Raises:
            TimeoutError: it did not end within *secs*.
        """
        if not self.wait(secs):
            raise TimeoutError(f"no answer within {secs:.1f} s")
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # else the frame and the traceback keep each other, and all that the call held, alive
        return self._value.pop()


_lock = threading.Lock()
_running: set[Task[Any]] = set()


def _forget_parent() -> None:
    """The threads of a parent are not in its child, and its lock may have been held by one."""
    global _lock
    _lock = threading.Lock()
    _running.clear()


os.register_at_fork(after_in_child=_forget_parent)


@atexit.register
def _wait_for_running() -> None:
    """Give calls under way a moment to end: native code that returns to a dying interpreter aborts the process."""
    until = time.monotonic() + _EXIT_WAIT_SECS
    with _lock:
        running = list(_running)
    for task in running:
        task.wait(until - time.monotonic())


def run(call: Callable[[], _T], secs: float) -> _T:
    """Return what *call* returns, waiting no longer than *secs* (see `Task`)."""
    return Task(call).result(secs)
