"""The yardstick, and what memory a process has for itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist

__all__ = ["MIB", "Peak", "Yardstick", "anonymous_bytes", "secs_of", "together", "unshared_bytes"]

MIB = 1024 * 1024


def secs_of(action: Callable[[], object]) -> float:
    """Return how long *action* took."""
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def together() -> None:
    """Let all ranks go on at the same time."""
    if dist.is_initialized():
        dist.barrier()


class Yardstick:
    """``torch.Tensor.copy_`` of as many bytes as a state has, as one tensor, into a buffer whose pages are there."""

    def __init__(self, size: int) -> None:
        self._source = torch.ones(size, dtype=torch.uint8)
        self._target = torch.zeros(size, dtype=torch.uint8)
        self.secs()

    def secs(self) -> float:
        """Copy once; return how long that took."""
        together()
        return secs_of(lambda: self._target.copy_(self._source))


def anonymous_bytes(pid: int | None = None) -> int:
    """Return the private memory of process *pid*, or of this one. Files, and so the arena, are not in it."""
    return _field(Path(f"/proc/{pid or 'self'}/status"), "RssAnon:")


def unshared_bytes(pid: int) -> int:
    """Return all memory that would be free if process *pid* ended: private pages of files too; 0 if it has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup")
        return _field(rollup, "Private_Clean:", "Private_Dirty:")
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _field(path: Path, *names: str) -> int:
    lines = [line.split() for line in path.read_text().splitlines()]
    return 1024 * sum(int(words[1]) for words in lines if words[0] in names)


class Peak:
    """The highest of what *look* returns while this is open, looked at from a thread."""

    def __init__(self, look: Callable[[], int], *, every_secs: float = 0.005) -> None:
        self._look, self._every_secs = look, every_secs
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.highest = 0

    def _run(self) -> None:
        while not self._stop.wait(self._every_secs):
            self.highest = max(self.highest, self._look())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
