"""Tells events: to the logger ``sm_tiered`` and, one JSON object a line, to a file.

Telling never raises: a file that can't be written is given up, and that is logged once.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from sm_tiered import metrics
from sm_tiered.errors import TierRefusedError
from sm_tiered.events import Event, plain

__all__ = ["MAX_FILE_BYTES", "PIECES_KEPT", "Events"]

MAX_FILE_BYTES = 1024 * 1024
"""A file that would grow beyond this is put aside as ``<name>.1``, the next one as ``<name>.2``.

So what is published again with every commit stays small, and the rest is published once.
"""

PIECES_KEPT = 32
"""How many of those stay here; the oldest goes."""

_logger = logging.getLogger("sm_tiered")


class Events:
    """Tells events of one rank, or with None of the drainer. Any thread and any process may, without a lock."""

    def __init__(self, *, namespace: str, rank: int | None, path: Path | None = None) -> None:
        self._namespace, self._rank, self._path = namespace, rank, path

    def emit(self, event: Event) -> None:
        """Tell *event* to the logger and the file. Never raises."""
        facts = event.facts()
        extra = {
            "namespace": self._namespace,
            "rank": self._rank,
            "step": facts.get("step"),
            "event": type(event).__name__,
        }
        level = logging.DEBUG if event.alike and self._rank else event.level
        _logger.log(level, "%s", event.message(), extra=extra, stacklevel=2)
        metrics.record(event, namespace=self._namespace, rank=self._rank)
        path = self._path
        if path is None:
            return
        head: dict[str, object] = {
            "time": time.time(),
            "event": type(event).__name__,
            "namespace": self._namespace,
            "rank": self._rank,
        }
        try:
            _append(path, json.dumps(head | facts, separators=(",", ":"), allow_nan=False).encode() + b"\n")
        except (OSError, ValueError) as error:
            self._give_up(error)

    def close(self) -> None:
        """Write no more to the file. Can be called many times."""
        self._path = None

    def _give_up(self, error: Exception) -> None:
        path, self._path = self._path, None
        if path is not None:
            reason = plain(error)
            _logger.warning(
                "events are no longer written to %s: %s; the logger still has them", plain(str(path)), reason
            )


def _append(path: Path, line: bytes) -> None:
    """Append with one write, so that lines of several processes never mix. Opened each time: others may rotate it."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise TierRefusedError(f"not a file of uid {os.geteuid()}")
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o600)
        if found.st_size and found.st_size + len(line) > MAX_FILE_BYTES and _rotated(path, descriptor):
            _append(path, line)
            return
        if os.write(descriptor, line) != len(line):
            raise OSError("no room for a whole line")
    finally:
        os.close(descriptor)


def _rotated(path: Path, descriptor: int) -> bool:
    """Put the file aside unless another process just did or does; the lock dies with its holder."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
        pieces = _pieces(path)
        os.rename(path, f"{path}.{max(pieces, default=0) + 1}")
        for piece in pieces[: len(pieces) + 1 - PIECES_KEPT]:
            with suppress(FileNotFoundError):
                os.unlink(f"{path}.{piece}")
    return True


def _pieces(path: Path) -> list[int]:
    """Return the numbers of what was put aside, oldest first."""
    stem = f"{path.name}."
    numbers = (name.removeprefix(stem) for name in os.listdir(path.parent) if name.startswith(stem))
    return sorted(int(number) for number in numbers if number.isascii() and number.isdecimal())
