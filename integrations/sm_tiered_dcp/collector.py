"""Python's cyclic garbage collector, held back while the training waits for us."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["collector_paused"]


@contextmanager
def collector_paused() -> Generator[None, None, None]:
    """Keep the collector from running inside, unless it is off anyway.

    A save makes thousands of objects that reference counts free again. The collector would go through the whole heap
    of the trainer on their account, which can take several times as long as the copy.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
