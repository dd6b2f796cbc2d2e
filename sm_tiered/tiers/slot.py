"""One file of the arena: who else has it open, how long it is, and where it is mapped.

What guards a file: a shared lock of the rank that maps it, shared locks of readers who know us, and, for those who
don't, a write lease, which the kernel refuses while anybody else has the file open or mapped.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import stat
from collections.abc import Callable
from enum import Enum

from sm_tiered.records import CheckpointId
from sm_tiered.tiers.mapping import Mapping, allocate

__all__ = ["Claim", "OnMap", "Slot", "SlotFile", "State"]

OnMap = Callable[[memoryview], Callable[[], None]]
"""Told of each new mapping, e.g. to pin it for a device; returns what undoes that."""


class Claim(Enum):
    """Whether a file may be written."""

    OURS = "ours"
    BUSY = "busy"
    """Somebody reads it. Ask again later."""
    LOST = "lost"
    """It has a second name, or none, or another process took it: it is no longer the arena's."""


class State(Enum):
    """What a slot is used for."""

    FREE = "free"
    TAKEN = "taken"
    PUBLISHED = "published"


class SlotFile:
    """An open file. One descriptor for everything: the kernel counts opens before it gives a lease."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd, self.path = fd, path

    @classmethod
    def create(cls, directory: str, rank: int) -> SlotFile:
        """Make an empty file of *rank*, locked shared."""
        path = free_path(directory, rank)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            os.unlink(path)
            raise
        return cls(fd, path)

    @classmethod
    def adopt(cls, path: str) -> SlotFile | None:
        """Open a file that an earlier process left, locked shared; None when it is not ours to use."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            found = os.fstat(fd)
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return cls(fd, path)
        except BlockingIOError:
            pass
        os.close(fd)
        return None

    @property
    def size(self) -> int:
        """How long the file is."""
        return os.fstat(self._fd).st_size

    @property
    def links(self) -> int:
        """How many names the file has."""
        return os.fstat(self._fd).st_nlink

    @property
    def inode(self) -> int:
        """The file's number."""
        return os.fstat(self._fd).st_ino

    def claim(self) -> Claim:
        """Get the file for writing if nobody else has it; keep the shared lock if somebody has."""
        if self.links != 1:
            return Claim.LOST
        if not self._flock(fcntl.LOCK_EX):
            # Asking for the exclusive lock gave up the shared one.
            return Claim.BUSY if self._flock(fcntl.LOCK_SH) else Claim.LOST
        if self._alone():
            return Claim.OURS
        return Claim.BUSY if self.share() else Claim.LOST

    def share(self) -> bool:
        """Let readers in again; False when another process was faster and has the file now."""
        return self._flock(fcntl.LOCK_SH)

    def ask(self) -> Claim:
        """Find out what `claim` would say, and keep the shared lock."""
        found = self.claim()
        return found if found is not Claim.OURS or self.share() else Claim.LOST

    def _flock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _alone(self) -> bool:
        try:
            # Somebody who opens the file during the lease makes the kernel send a signal, by default SIGIO, which is
            # deadly. Giving a lease back also forgets which signal was chosen.
            fcntl.fcntl(self._fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        except OSError:
            return True  # no leases here: locks and links must do
        fcntl.fcntl(self._fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        return True

    def allocate(self, size: int) -> None:
        """Make the file exactly *size* bytes long, all of them with memory behind."""
        allocate(self._fd, size)

    def map(self, size: int) -> Mapping:
        """Map the file, with room to grow a little beyond *size*."""
        return Mapping(self._fd, size)

    def rename(self, path: str) -> None:
        """Give the file another name."""
        os.rename(self.path, path)
        self.path = path

    def close(self) -> None:
        """Let go of the file; a mapping keeps it, and its lock, alive."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Slot:
    """One mapped file. Between take and publish it is yours: write into *buffer*, which is *size* bytes long."""

    def __init__(self, file: SlotFile, size: int, *, wanted_at: int) -> None:
        self.size = size
        """In bytes."""
        self.buffer = memoryview(b"")
        """Writable while the slot is taken."""
        self.cache: dict[object, object] = {}
        """Kept as long as the mapping and the bytes in it; cleared when they go."""
        self.file = file
        self.state = State.FREE
        self.checkpoint: CheckpointId | None = None
        self.wanted_at = wanted_at
        """By the arena's count of takes: when a size like this one was last asked for."""
        self.warming = False
        """A background thread is at work on it."""
        self._mapping: Mapping | None = None
        self._undo: Callable[[], None] | None = None
        self._mapped_size = -1

    @property
    def mapped(self) -> bool:
        """Whether *buffer* is there for all of *size*."""
        return self._mapping is not None and self._mapped_size == self.size

    def near(self, size: int) -> bool:
        """Whether *size* is of the same kind: parts change by a few bytes from save to save."""
        return abs(self.size - size) * 16 <= max(self.size, size)

    def prepare(self, size: int, on_map: OnMap | None, populate: Callable[[], bool] | None = None) -> None:
        """Make file, mapping and buffer *size* bytes; *populate*: fetch all pages now, unless it says stop.

        Raises:
            OSError: no room; the slot is as it was, unmapped at worst.
        """
        if size != self.size or not self.mapped:
            self._detach()
            if self._mapping is not None and self._mapping.capacity < size:
                self._mapping = None
            self.file.allocate(size)
            self.size = size
        if self._mapping is None:
            self._mapping = self.file.map(size)
        if self._mapped_size != size:
            if populate is not None:
                self._mapping.populate(size, populate)
            self.buffer = self._mapping.view(size)
            self._undo = on_map(self.buffer) if on_map and size else None
            self._mapped_size = size

    def _detach(self) -> None:
        self.cache.clear()
        undo, self._undo = self._undo, None
        self.buffer, self._mapped_size = memoryview(b""), -1
        if undo is not None:
            undo()

    def close(self) -> None:
        """Let go of mapping and file."""
        try:
            self._detach()
        finally:
            self._mapping = None
            self.file.close()

    def abandon(self) -> None:
        """In a forked child: the mapping is not there, and the device knows only the parent."""
        self._undo = None
        self.close()


def free_path(directory: str, rank: int) -> str:
    """Return a new name for a file that *rank* does not use."""
    return f"{directory}/{rank}-{secrets.token_hex(4)}"
