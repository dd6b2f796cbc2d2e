"""Files below a directory that must be ours: no link is followed, no foreign file is read, no temporary one is left.

Everything is opened relative to an open directory, so nothing can be swapped under a path that was checked before.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

from sm_tiered.errors import (
    KeyExistsError,
    KeyNotFoundError,
    TieredError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)

__all__ = [
    "NewFile",
    "check_owner",
    "is_temp",
    "open_below",
    "open_dir",
    "open_file",
    "split_key",
    "sweep",
    "tier_error",
    "translated",
]

_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_TEMP = re.compile(r"\.tmp-[0-9a-f]{8}", re.ASCII)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENXIO,
        errno.ENAMETOOLONG,
        errno.EINVAL,
        errno.EOPNOTSUPP,
    }
)
_LEASE_WAIT_SECS = 2.0
_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


def tier_error(error: OSError, *, tier: str, key: str) -> TierError:
    """Return what *error*, met while working on *key*, means for a tier."""
    text = f"{key}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno == errno.ENOENT:
        return KeyNotFoundError(f"nothing stands under {key!r}", tier=tier, key=key)
    if error.errno == errno.EEXIST:
        return KeyExistsError(f"something stands under {key!r}", tier=tier, key=key)
    if error.errno in _FULL:
        return TierFullError(text, hint="Make room, or keep fewer checkpoints there.", tier=tier, key=key)
    if error.errno in _REFUSED:
        return TierRefusedError(text, hint="Check owner and mode of the tier's directory.", tier=tier, key=key)
    return TierUnavailableError(text, tier=tier, key=key)


@contextmanager
def translated(tier: str, key: str) -> Generator[None, None, None]:
    """Turn an OSError of the block into the error of the tree that it means."""
    try:
        yield
    except TieredError:  # some of them are OSErrors themselves
        raise
    except OSError as error:
        raise tier_error(error, tier=tier, key=key) from error


def split_key(key: str, *, tier: str) -> list[str]:
    """Return the segments of *key*.

    Raises:
        TierRefusedError: it leads elsewhere, or to a name that is used inside.
    """
    parts = key.split("/")
    for part in parts:
        if part in ("", ".", "..") or "\0" in part or _TEMP.fullmatch(part) or not _fits(part):
            hint = "Segments are separated by single slashes; '.', '..' and '.tmp-…' are none."
            raise TierRefusedError(f"{key[:200]!r} can't be a key", hint=hint, tier=tier)
    return parts


def _fits(name: str) -> bool:
    try:
        return len(name.encode()) <= 255
    except UnicodeEncodeError:
        return False


def is_temp(name: str) -> bool:
    """Return whether *name* is that of a file which is still being written, or was when its writer died."""
    return _TEMP.fullmatch(name) is not None


def check_owner(found: os.stat_result, what: str, *, tier: str) -> None:
    """Raise TierRefusedError unless this user owns *what*."""
    if found.st_uid != os.geteuid():
        message = f"{what} belongs to uid {found.st_uid}, this process is uid {os.geteuid()}"
        raise TierRefusedError(message, hint="Remove it, or give the tier a path of its own.", tier=tier)


def open_dir(path: str, *, tier: str) -> int:
    """Open the directory *path*; its last segment must be no link, and ours."""
    return _checked_dir(os.open(path, _DIR), path, tier)


def open_below(parent: int, name: str, *, tier: str, create: bool, fsync: bool) -> int:
    """Open the directory *name* in *parent*, which is made 0700 when missing and *create*."""
    try:
        return _checked_dir(_open_nofollow(name, _DIR, parent, tier), name, tier)
    except FileNotFoundError:
        if not create:
            raise
    made = True
    try:
        os.mkdir(name, 0o700, dir_fd=parent)
    except FileExistsError:
        made = False
    child = _checked_dir(_open_nofollow(name, _DIR, parent, tier), name, tier)
    if made:
        os.fchmod(child, 0o700)
        if fsync:
            os.fsync(parent)
    return child


def open_file(parent: int, name: str, *, tier: str) -> int:
    """Open the regular file *name* in *parent* for reading; a directory there is as good as nothing."""
    fd = _open_nofollow(name, _READ, parent, tier)
    try:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "a directory")
        if not stat.S_ISREG(found.st_mode):
            raise TierRefusedError(f"{name} is no regular file", hint="Remove it.", tier=tier)
        check_owner(found, name, tier=tier)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _checked_dir(fd: int, what: str, tier: str) -> int:
    try:
        check_owner(os.fstat(fd), what, tier=tier)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open_nofollow(name: str, flags: int, parent: int, tier: str) -> int:
    end = 0.0
    while True:
        try:
            return os.open(name, flags, dir_fd=parent)
        except BlockingIOError:
            # The arena asks for a lease, and gives it back at once, to see whether anybody reads a file.
            end = end or time.monotonic() + _LEASE_WAIT_SECS
            if time.monotonic() > end:
                raise
            time.sleep(0.0005)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO) and _odd(name, parent):
                message = f"{name} is a link or no regular file"
                raise TierRefusedError(message, hint="Remove it.", tier=tier) from error
            if error.errno == errno.ENOTDIR:  # a file stands where a directory would: nothing stands below it
                raise FileNotFoundError(errno.ENOENT, name) from error
            raise


def _odd(name: str, parent: int) -> bool:
    with suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return False


class NewFile:
    """A hidden file in the making: it gets its name when it is whole, or disappears. Owns *directory*, an open one."""

    def __init__(self, directory: int, *, tier: str, key: str, fsync: bool) -> None:
        self._directory, self._tier, self._key, self._fsync = directory, tier, key, fsync
        self._name = key.rsplit("/", 1)[-1]
        self.size = 0
        try:
            self._fd, self._temp = _open_temp(directory)
        except BaseException:
            os.close(directory)
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append *data*."""
        with memoryview(data) as view, view.cast("B") as left, translated(self._tier, self._key):
            done = 0
            while done < len(left):
                done += os.write(self._fd, left[done:])
            self.size += done

    def finish(self, *, exclusive: bool) -> None:
        """Give the file its name, in the place of what has it, or, *exclusive*, only if nothing has.

        Raises:
            KeyExistsError: exclusive, and something has.
        """
        with translated(self._tier, self._key):
            if self._fsync:
                os.fsync(self._fd)
            try:
                if exclusive:
                    self._link()
                else:
                    os.rename(self._temp, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileNotFoundError as error:
                message = f"{self._key} was deleted while it was written"
                raise TierUnavailableError(message, tier=self._tier, key=self._key) from error
            if self._fsync:
                os.fsync(self._directory)

    def discard(self) -> None:
        """Remove what has got no name, and let go of file and directory."""
        try:
            with suppress(FileNotFoundError):
                os.unlink(self._temp, dir_fd=self._directory)
        finally:
            os.close(self._fd)
            os.close(self._directory)

    def _link(self) -> None:
        try:
            os.link(self._temp, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except FileExistsError:
            # Over NFS the answer to a link that was made can be lost; the second try then finds it there.
            if os.fstat(self._fd).st_nlink != 2:
                raise
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                raise
            self._rename_exclusively()

    def _rename_exclusively(self) -> None:
        """For file systems without hard links."""
        temp, name = os.fsencode(self._temp), os.fsencode(self._name)
        if _libc.renameat2(self._directory, temp, self._directory, name, _RENAME_NOREPLACE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _open_temp(directory: int) -> tuple[int, str]:
    while True:
        name = f".tmp-{secrets.token_hex(4)}"
        try:
            fd = os.open(name, _NEW, 0o600, dir_fd=directory)
        except FileExistsError:
            continue
        try:
            # Shared, so that readers of the finished file get in; `sweep` wants it for itself and stays out.
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.fchmod(fd, 0o600)
            if os.fstat(fd).st_nlink:
                return fd, name
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory)
            os.close(fd)
            raise
        os.close(fd)


def sweep(directory: int) -> int:
    """Remove the temporary files of dead writers in *directory*; return how many."""
    swept = 0
    for name in filter(is_temp, os.listdir(directory)):
        try:
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(name, dir_fd=directory)
            swept += 1
        except OSError:  # its writer is alive, locks are unknown here, or it was faster
            continue
        finally:
            os.close(fd)
    return swept
