"""A tier in a directory: small objects and parts are files, each of which appears whole or not at all.

What is written goes to a hidden file first, which is synced and then renamed or linked. Hidden files are not listed,
except `.metadata`, unless the prefix names their directory.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from sm_tiered import checksum, layout
from sm_tiered.errors import CorruptPartError, KeyExistsError, TierRefusedError, TierUnavailableError
from sm_tiered.locks import FileLock
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.tiers import safeio
from sm_tiered.tiers.base import Blob, Chunks, Entry

__all__ = ["DirectoryTier", "pread_full"]

_REPLACE_LOCK = ".replace"
_REPLACE_WAIT_SECS = 30.0
_TRIES = 16
"""How often a directory that disappears between making it and using it is made again."""


class DirectoryTier:
    """The `Tier` contract on the files below ``base/namespace``, which is made by the first write."""

    def __init__(self, *, name: str, base: str, namespace: str, fsync: bool) -> None:
        self._name, self._base, self._fsync = name, Path(base), fsync
        self.namespace = layout.check_namespace(namespace)
        self.root = self._base / self.namespace

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self._name

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`."""
        head, _, stem = prefix.rpartition("/")
        segments = safeio.split_key(head, tier=self._name) if head else []
        with self._translated(prefix):
            try:
                directory = self._open_dir(segments)
            except FileNotFoundError:
                return []
            found = list(_walk(directory, f"{head}/" if head else "", stem))
        return sorted(found, key=lambda entry: entry.key)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`."""
        segments = safeio.split_key(prefix[:-1], tier=self._name) if prefix else []
        with self._translated(prefix):
            try:
                directory = self._open_dir(segments)
            except FileNotFoundError:
                return []
            try:
                names = [found.name for found in _scan(directory) if _visible_dir(found)]
                return sorted(name for name in names if self._holds_keys(directory, name))
            finally:
                os.close(directory)

    def _holds_keys(self, parent: int, name: str) -> bool:
        try:
            below = safeio.open_below(parent, name, tier=self._name, create=False, fsync=False)
        except FileNotFoundError:
            return False
        return next(_walk(below, "", ""), None) is not None

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`; the version is the digest of the bytes."""
        with self._translated(key), self._opened(key) as fd:
            size = os.fstat(fd).st_size
            data = bytearray()
            # One byte beyond the limit is enough to know that it is too long, whatever the size was said to be.
            while size <= max_bytes and len(data) <= max_bytes:
                piece = os.read(fd, min(max(size - len(data), 0) + 1, max_bytes + 1 - len(data)))
                if not piece:
                    break
                data += piece
        if size > max_bytes or len(data) > max_bytes:
            raise CorruptPartError(f"{key} is longer than {max_bytes} bytes", tier=self._name, key=key)
        whole = bytes(data)
        return Blob(data=whole, version=checksum.digest(whole))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`."""
        with self._translated(key), self._opened(key) as fd:
            pread_full(fd, offset, buffer, tier=self._name, key=key)

    def put(self, key: str, data: bytes) -> None:
        """See `Tier.put`."""
        self._write(key, data, exclusive=False)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See `Tier.put_if_absent`."""
        self._write(key, data, exclusive=True)

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """See `Tier.replace`. Comparing and writing are one step for others who `replace`, not for a plain `put`."""
        with self._replacing(key):
            standing = self.get(key).version
            if standing != version:
                raise KeyExistsError(f"{key} is at version {standing}, not {version}", tier=self._name, key=key)
            self.put(key, data)

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """See `Tier.put_part`. What stands under *key* is replaced as a whole, so that a part can be sent again."""
        new = self._create(key)
        try:
            for chunk in chunks():
                new.write(chunk)
                if new.size > size:
                    break
            if new.size != size:
                more = "more than " if new.size > size else ""
                message = f"{key}: {more}{min(new.size, size)} of {size} bytes were given"
                raise CorruptPartError(message, tier=self._name, key=key)
            new.finish(exclusive=False)
        finally:
            new.discard()

    def delete(self, keys: Iterable[str]) -> None:
        """See `Tier.delete`."""
        parents: set[tuple[str, ...]] = set()
        for key in keys:
            *segments, name = safeio.split_key(key, tier=self._name)
            # A directory is no object: that none stands under its name is no error.
            absent = suppress(FileNotFoundError, IsADirectoryError)
            with self._translated(key), absent, self._directory(segments) as directory:
                os.unlink(name, dir_fd=directory)
            parents |= {tuple(segments[: depth + 1]) for depth in range(len(segments))}
        for path in sorted(parents, key=len, reverse=True):
            with self._translated("/".join(path)):
                self._remove_empty(path)

    def probe(self) -> None:
        """See `Tier.probe`."""
        token = secrets.token_hex(8)
        self.put(f".probe-{token}", token.encode())
        try:
            if self.get(f".probe-{token}").data != token.encode():
                raise TierRefusedError(f"{self.root} gives back other bytes than were written", tier=self._name)
        finally:
            self.delete([f".probe-{token}"])

    def close(self) -> None:
        """Nothing is held."""

    # ---- directories

    def _translated(self, key: str) -> AbstractContextManager[None]:
        return safeio.translated(self._name, key)

    def _write(self, key: str, data: bytes, *, exclusive: bool) -> None:
        new = self._create(key)
        try:
            new.write(data)
            new.finish(exclusive=exclusive)
        finally:
            new.discard()

    def _create(self, key: str) -> safeio.NewFile:
        segments = safeio.split_key(key, tier=self._name)[:-1]
        with self._translated(key):
            for _ in range(_TRIES):
                with suppress(FileNotFoundError):
                    directory = self._open_dir(segments, create=True)
                    return safeio.NewFile(directory, tier=self._name, key=key, fsync=self._fsync)
        raise TierUnavailableError(f"{key}: its directory disappears again and again", tier=self._name, key=key)

    def _open_dir(self, segments: Sequence[str], *, create: bool = False) -> int:
        try:
            directory = safeio.open_dir(str(self.root), tier=self._name)
        except FileNotFoundError:
            if not create:
                raise
            directory = self._make_root()
        for name in segments:
            try:
                below = safeio.open_below(directory, name, tier=self._name, create=create, fsync=self._fsync)
            finally:
                os.close(directory)
            directory = below
        return directory

    def _make_root(self) -> int:
        os.makedirs(self._base, mode=0o700, exist_ok=True)
        base = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return safeio.open_below(base, self.namespace, tier=self._name, create=True, fsync=self._fsync)
        finally:
            os.close(base)

    @contextmanager
    def _directory(self, segments: Sequence[str], *, create: bool = False) -> Generator[int, None, None]:
        directory = self._open_dir(segments, create=create)
        try:
            yield directory
        finally:
            os.close(directory)

    @contextmanager
    def _opened(self, key: str) -> Generator[int, None, None]:
        fd = self._open_file(key)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open_file(self, key: str) -> int:
        *segments, name = safeio.split_key(key, tier=self._name)
        with self._directory(segments) as directory:
            return safeio.open_file(directory, name, tier=self._name)

    @contextmanager
    def _replacing(self, key: str) -> Generator[None, None, None]:
        lock = FileLock(self.root / _REPLACE_LOCK)
        with lock:
            with self._translated(key):
                try:
                    taken = lock.acquire(timeout_secs=_REPLACE_WAIT_SECS)
                except OSError as error:
                    if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                        raise
                    taken = True  # without locks here, only comparing and writing close together is left
            if not taken:
                message = f"{key}: somebody else is replacing an object for more than {_REPLACE_WAIT_SECS:.0f} s"
                raise TierUnavailableError(message, tier=self._name, key=key)
            yield

    def _remove_empty(self, segments: Sequence[str]) -> None:
        with suppress(FileNotFoundError), self._directory(segments[:-1]) as parent:
            try:
                os.rmdir(segments[-1], dir_fd=parent)
            except OSError:
                with self._directory(segments) as directory:
                    left = os.listdir(directory)
                    if not left or not all(map(safeio.is_temp, left)):
                        return
                    safeio.sweep(directory)
                with suppress(OSError):
                    os.rmdir(segments[-1], dir_fd=parent)


def pread_full(fd: int, offset: int, buffer: memoryview, *, tier: str, key: str) -> None:
    """Fill *buffer* from *offset* of the open file on.

    Raises:
        CorruptPartError: the file ends before.
    """
    with buffer.cast("B") as left:
        done = 0
        while done < len(left):
            got = os.preadv(fd, [left[done:]], offset + done)
            if got == 0:
                message = f"{key} ends {len(left) - done} bytes before byte {offset + len(left)}"
                raise CorruptPartError(message, tier=tier, key=key)
            done += got


def _scan(directory: int) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)


def _visible_dir(found: os.DirEntry[str]) -> bool:
    return not found.name.startswith(".") and found.is_dir(follow_symlinks=False)


def _walk(directory: int, head: str, stem: str) -> Iterator[Entry]:
    """Yield the objects below the open *directory*, which is closed, whose name there begins with *stem*."""
    try:
        for found in _scan(directory):
            if not found.name.startswith(stem) or (found.name.startswith(".") and found.name != layout.METADATA):
                continue
            with suppress(FileNotFoundError):
                facts = found.stat(follow_symlinks=False)
                if stat.S_ISREG(facts.st_mode):
                    yield Entry(key=head + found.name, size=facts.st_size, modified_at=facts.st_mtime)
                elif stat.S_ISDIR(facts.st_mode) and not found.name.startswith("."):
                    below = os.open(
                        found.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory
                    )
                    yield from _walk(below, f"{head}{found.name}/", "")
    finally:
        os.close(directory)
