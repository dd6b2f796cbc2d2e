"""Waiting for what another process does, in one place for all tests."""

from __future__ import annotations

import threading
from collections.abc import Callable

WAIT_SECS = 20.0


def wait_until(found: Callable[[], object], what: str, *, secs: float = WAIT_SECS) -> None:
    """Return once *found* gives something true; fail with *what* after *secs*."""
    waited = threading.Event()
    for _ in range(int(secs / 0.01)):
        if found():
            return
        waited.wait(0.01)
    raise AssertionError(f"after {secs} s {what}")
