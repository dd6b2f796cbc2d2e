"""Locks between processes, kept by the kernel: they die with their holder and know no timestamps.

A lock belongs to an open file. Children of a fork get a copy of it, so they are made to close theirs: then neither
a child's release nor a child that outlives its parent has any effect on the lock.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

__all__ = ["FileLock", "Holder", "probe"]

_random = random.Random()
"""Of our own: the user's is part of what a checkpoint holds, and no wait may draw from it."""
_TEXT_BYTES = 512
_POLL_SECS = (0.002, 0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock, as far as the lock file tells: it is written just after the lock was taken."""

    pid: int | None
    text: str


class FileLock:
    """A lock on the file *path*, which is made when missing. Not re-entrant; one thread at a time.

    Methods raise OSError when the lock file itself can't be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd: int | None = None
        _live.add(self)

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    def acquire(self, *, exclusive: bool = True, timeout_secs: float = 0.0, text: str | None = None) -> bool:
        """Take the lock; return False when others still hold it after *timeout_secs*.

        An exclusive holder leaves *text* (a pid first; this process's own by default) for those who `probe`.
        """
        assert self._fd is None, "already held"
        end = time.monotonic() + timeout_secs
        pause = _POLL_SECS[0]
        while True:
            self._fd = _try(self.path, exclusive)
            if self._fd is not None:
                break
            left = end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(left, pause * _random.uniform(0.5, 1.0)))
            pause = min(2 * pause, _POLL_SECS[1])
        if exclusive:
            data = (str(os.getpid()) if text is None else text).encode()[:_TEXT_BYTES]
            with suppress(OSError):  # a full disk: the lock is held all the same, only by nobody knows whom
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, data, 0)
        return True

    def release(self) -> None:
        """Let go of the lock. Can be called many times, and in a forked child, where it does nothing."""
        fd, self._fd = self._fd, None
        if fd is not None:
            # Only closing: unlocking would also take the lock from a parent that shares the open file.
            os.close(fd)

    def stands(self) -> bool:
        """Whether a held lock is still on the file that others find: one that was deleted keeps nobody out."""
        assert self._fd is not None, "not held"
        try:
            return os.path.samestat(os.stat(self.path, follow_symlinks=False), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Delete the file of a held lock, and let go of it."""
        assert self._fd is not None, "not held"
        try:
            os.unlink(self.path)
        finally:
            self.release()

    def __enter__(self) -> FileLock:
        """Return itself, held or not."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release."""
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.release()


def probe(path: str | os.PathLike[str]) -> Holder | None:
    """Return who holds the lock on *path* exclusively, or None when nobody does."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, _TEXT_BYTES, 0).decode(errors="replace")
        first = text.split(" ", 1)[0]
        return Holder(pid=int(first) if first.isascii() and first.isdigit() else None, text=text)
    finally:
        os.close(fd)
    return None


def _try(path: str, exclusive: bool) -> int | None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        # Somebody may have deleted the file between open and lock: then the lock is on a file nobody else finds.
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


_live: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _after_fork() -> None:
    for lock in list(_live):
        lock.release()


os.register_at_fork(after_in_child=_after_fork)
