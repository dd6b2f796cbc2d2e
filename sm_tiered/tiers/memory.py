"""The memory tier: this node's RAM as a private directory on tmpfs, and who is alive in it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import socket
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType

from sm_tiered import layout
from sm_tiered.errors import (
    ConfigError,
    KeyNotFoundError,
    NamespaceInUseError,
    TierError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.locks import FileLock, Holder, probe
from sm_tiered.settings import MemorySettings
from sm_tiered.tiers import safeio
from sm_tiered.tiers.files import DirectoryTier, pread_full

__all__ = ["MemoryTier", "OpenPart", "trainers_at"]

_IN_MEMORY = frozenset({0x01021994, 0x858458F6})
"""TMPFS_MAGIC, RAMFS_MAGIC of statfs(2)."""
_SUBDIRS = (layout.ARENA, layout.QUEUE, layout.LOCKS, layout.EVENTS, layout.ATTEMPTS)
_LOCK_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}", re.ASCII)
_TRAINER = re.compile(r"trainer-([A-Za-z0-9_-]{1,100})-(\d{1,6})", re.ASCII)
_TRAINER_LOCK_SECS = 5.0
_OPEN_TRIES = 20


class OpenPart:
    """A part, open for reading. While it is, a shared lock keeps the arena from recycling the file."""

    def __init__(self, fd: int, *, tier: str, key: str) -> None:
        self._fd, self._tier, self._key = fd, tier, key
        self.size = os.fstat(fd).st_size

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *offset* on. Threads may share it.

        Raises:
            CorruptPartError: the part ends before.
        """
        with safeio.translated(self._tier, self._key):
            pread_full(self._fd, offset, buffer, tier=self._tier, key=self._key)

    def pread(self, offset: int, size: int) -> bytes:
        """Return *size* bytes from *offset* on: for who hands on `bytes`, one copy less than `pread_into`.

        Raises:
            CorruptPartError: the part ends before.
        """
        with safeio.translated(self._tier, self._key):
            data = os.pread(self._fd, size, offset)
        if len(data) == size:
            return data
        whole = bytearray(size)
        self.pread_into(offset, memoryview(whole))
        return bytes(whole)

    def close(self) -> None:
        """Close the file and with it the lock. Can be called many times."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> OpenPart:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def __del__(self) -> None:
        self.close()


class MemoryTier(DirectoryTier):
    """A tier below ``path/namespace`` on tmpfs. Nothing is synced: it lives as long as the node.

    Raises:
        ConfigError: *path* is not in memory.
        TierRefusedError: it is not a directory of this user alone.
    """

    def __init__(self, settings: MemorySettings, namespace: str) -> None:
        super().__init__(name=settings.name, base=settings.path, namespace=namespace, fsync=False)
        self.settings = settings
        with self._made(settings.path), self._translated(settings.path):
            _make_private(self._base, tier=self.name)
        if not settings.allow_disk and (found := _filesystem(settings.path)) not in _IN_MEMORY:
            raise ConfigError(
                f"memory tier: {settings.path} is on no tmpfs (file system type {found:#x})",
                hint="Use a path below /dev/shm or mount a tmpfs there; `allow_disk: true` takes a disk for tests.",
            )
        with self._made(f"what belongs into {self.root}"):
            self.make_dirs()
        with self._translated(str(self.root)):
            found = os.stat(self.root)
        self._node_key = f"{socket.gethostname()}-{_boot_id()}-{found.st_dev:x}-{found.st_ino:x}"

    @contextmanager
    def _made(self, what: str) -> Generator[None, None, None]:
        """Where something stands in the way of a directory, tell which, and what to do."""
        try:
            yield
        except KeyNotFoundError as error:
            hint = f"Set tiers.{self.name}.path to a place where directories can be made."
            raise TierRefusedError(f"{what} can't be made", hint=hint, tier=self.name) from error

    def make_dirs(self) -> None:
        """Make the directories that everything else expects, again if somebody deleted them."""
        with self._translated(str(self.root)):
            _make_private(self._base, tier=self.name)
            for name in _SUBDIRS:
                os.close(self._open_dir([name], create=True))
            with self._directory(()) as root:
                _check_private(os.fstat(root), str(self.root), tier=self.name)

    def node_key(self) -> str:
        """Return what tells this directory from those of other nodes and containers, as it was when this was opened."""
        return self._node_key

    # ---- parts

    def open_part(self, key: str) -> OpenPart:
        """Open a part for reading, and keep it from being recycled until that is closed.

        Raises:
            KeyNotFoundError: it is not there, or just being recycled.
        """
        with self._translated(key):
            for _ in range(_OPEN_TRIES):
                fd = self._open_file(key)
                try:
                    if self._locked(fd, key):
                        return OpenPart(fd, tier=self.name, key=key)
                except BaseException:
                    os.close(fd)
                    raise
                os.close(fd)
                time.sleep(0.001)
        raise KeyNotFoundError(f"{key} is being recycled", tier=self.name, key=key)

    def _locked(self, fd: int, key: str) -> bool:
        """Lock the open file; False when the arena has it. That may be for a moment: it asks who reads, and goes on."""
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # Between open and lock the file may have got another name and other bytes.
            named, opened = os.stat(self.root / key, follow_symlinks=False), os.fstat(fd)
        except (BlockingIOError, FileNotFoundError):
            return False
        return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`; the part can't be recycled meanwhile."""
        with self.open_part(key) as part:
            part.pread_into(offset, buffer)

    # ---- who is alive

    def lock_path(self, name: str) -> Path:
        """Return where the lock called *name* stands."""
        if not _LOCK_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} can't be the name of a lock")
        return self.root / layout.LOCKS / name

    def trainer_lock(self, launch: str, rank: int) -> FileLock:
        """Take the lock that says that *rank* of *launch* is alive here; keep it for life.

        Raises:
            NamespaceInUseError: another process holds it.
        """
        name = f"trainer-{launch}-{rank}"
        if not _TRAINER.fullmatch(name):
            raise ConfigError(f"launch {launch!r}, rank {rank} can't be the name of a lock")
        lock = FileLock(self.lock_path(name))
        text = f"{os.getpid()} on {socket.gethostname()}, rank {rank} of launch {launch}"
        with self._translated(f"{layout.LOCKS}/{name}"):
            if lock.acquire(timeout_secs=_TRAINER_LOCK_SECS, text=text):
                return lock
        holder = probe(lock.path)
        pids = (holder.pid,) if holder and holder.pid is not None else ()
        raise NamespaceInUseError(
            f"rank {rank} of launch {launch} is alive already: {holder.text if holder else 'unknown'}",
            pids=pids,
            hint="Give every process a rank of its own.",
        )

    def live_trainers(self, except_launch: str) -> list[tuple[int, str]]:
        """Return pid (0: not yet known) and text of the living trainers of other launches in this directory.

        Take your own `trainer_lock` first and look then: of two launches that begin at once, one sees the other.
        """
        alive: list[tuple[int, str]] = []
        with self._translated(layout.LOCKS):
            for name in sorted(os.listdir(self.root / layout.LOCKS)):
                found = _TRAINER.fullmatch(name)
                if found is None or found[1] == except_launch:
                    continue
                lock = FileLock(self.lock_path(name))
                holder = probe(lock.path)
                if holder is not None:
                    alive.append((holder.pid or 0, holder.text))
                elif lock.acquire():
                    # Nobody holds it: its trainer is dead, and the file of no use.
                    lock.remove()
        return alive


def trainers_at(root: Path) -> list[Holder]:
    """Return the living trainers in the namespace's directory *root*. Nothing is made, locked or removed."""
    try:
        names = sorted(name for name in os.listdir(root / layout.LOCKS) if _TRAINER.fullmatch(name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [holder for name in names if (holder := probe(root / layout.LOCKS / name)) is not None]


def _make_private(path: Path, *, tier: str) -> None:
    with suppress(FileExistsError):
        os.makedirs(path.parent, exist_ok=True)
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)  # whatever the umask
    _check_private(os.lstat(path), str(path), tier=tier)


def _check_private(found: os.stat_result, what: str, *, tier: str) -> None:
    hint = f"Remove it, or set tiers.{tier}.path to a directory of your own with mode 0700."
    if not stat.S_ISDIR(found.st_mode):
        raise TierRefusedError(f"{what} is no directory", hint=hint, tier=tier)
    safeio.check_owner(found, what, tier=tier)
    if found.st_mode & 0o077:
        message = f"{what} (uid {found.st_uid}) has mode {stat.S_IMODE(found.st_mode):04o}: others can get in"
        raise TierRefusedError(message, hint=hint, tier=tier)


def _filesystem(path: str) -> int:
    """Return f_type of statfs(2), which os.statvfs does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    facts = (ctypes.c_long * 64)()
    if libc.statfs(os.fsencode(path), facts):
        raise TierUnavailableError(f"statfs {path}: {os.strerror(ctypes.get_errno())}")
    return facts[0] & 0xFFFFFFFF


@cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError as error:
        raise TierError(f"the node can't be told from others: {error}") from error
