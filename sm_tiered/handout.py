"""A directory with the files of a restored checkpoint, for a program that looks for them by name.

What this node has in memory stands there as a link; what came from afar is a file of its own, in memory as long as
there is room, else on the disk. The ranks of a node share it; each has a view of its own, for some files are its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from sm_tiered import layout
from sm_tiered.sources import Place
from sm_tiered.tiers.mapping import Mapping, allocate

__all__ = ["Handout", "remove_leftovers"]

_ON_DISK = "sm_tiered-restored-"


class Handout:
    """One rank's side of it. Nothing is locked: files of the memory tier must be held by whoever made the links."""

    def __init__(self, base: Path | None, rank: int, token: str) -> None:
        """Make it, at `open`, below *base*, a directory in this node's memory, else on the disk.

        *token* names it: the ranks of a node give the same.
        """
        self._base, self._rank, self._token = base, rank, token
        self._made: list[Path] = []
        """Files and links of this rank."""
        self._disks: list[_DiskDirectory] = []

    def open(self) -> None:
        """Make the directories, or take back what stands there of another checkpoint."""
        self._clear()
        root = self._base / layout.RESTORED / self._token if self._base is not None else self._on_disk()
        self._root, self._shared, self._view = root, root / "shared", root / f"rank-{self._rank:05d}"
        for directory in (self._shared, self._view):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _on_disk(self) -> Path:
        if not self._disks:
            self._disks.append(_DiskDirectory())
        return self._disks[0].path

    def room(self, size: int) -> Place | None:
        """Return a new file of *size* bytes to fetch a part into; None where neither memory nor disk has room."""
        for place in (self._in_memory, self._beside):
            try:
                return place(size)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
        return None

    def _in_memory(self, size: int) -> Place:
        return self._file(self._root, size)

    def _beside(self, size: int) -> Place:
        return self._file(self._on_disk(), size)

    def _file(self, directory: Path, size: int) -> Place:
        fd, path = tempfile.mkstemp(prefix=f"{self._rank}-", dir=directory)
        try:
            allocate(fd, size)
            buffer = Mapping(fd, size).view(size)
        except BaseException:
            os.unlink(path)
            raise
        finally:
            os.close(fd)
        self._made.append(Path(path))
        # Not given back after the load, for it is what the program reads; `close` does.
        return Place(buffer=buffer, free=lambda: None, path=path)

    def new_file(self) -> Path:
        """Return an empty file, for what is read piece by piece."""
        fd, path = tempfile.mkstemp(prefix=f"{self._rank}-", dir=self._root)
        os.close(fd)
        self._made.append(Path(path))
        return Path(path)

    def share(self, name: str, path: str) -> None:
        """Let the file at *path* be *name* for all ranks of this node."""
        self._link(self._shared / name, path)

    def view(self, called: str, shared: list[str], own: dict[str, str]) -> Path:
        """Return this rank's directory, *called* so, with what is *shared*, and its *own* files by name and path."""
        directory = self._view / called
        directory.mkdir(mode=0o700, exist_ok=True)
        for name, path in {**{name: str(self._shared / name) for name in shared}, **own}.items():
            self._link(directory / name, path)
        return directory

    def _link(self, at: Path, to: str) -> None:
        at.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        at.unlink(missing_ok=True)
        at.symlink_to(to)
        self._made.append(at)

    def _clear(self) -> None:
        while self._made:
            self._made.pop().unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what this rank put there, and the directory with the last rank's. Can be called many times."""
        self._clear()
        if self._base is not None:
            for directory, _, _ in os.walk(self._base / layout.RESTORED / self._token, topdown=False):
                _remove_empty(directory)
        while self._disks:
            self._disks.pop().remove()


class _DiskDirectory:
    """A directory for this process alone, below the system's for temporary files.

    It is locked: what a process left there that was killed is found unlocked, and removed by the next.
    """

    def __init__(self) -> None:
        prefix = f"{_ON_DISK}{os.getuid()}-"
        for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            self._remove_unlocked(left)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix))
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self.path.exists():
                return
            os.close(self._fd)  # another process took it for one that was left

    @staticmethod
    def _remove_unlocked(path: Path) -> None:
        with suppress(OSError):  # somebody else removes it, or it is none of ours
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(fd)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _remove_empty(directory: str) -> None:
    try:
        os.rmdir(directory)
    except OSError as error:
        # The other ranks of this node may not be done, or have been faster.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def remove_leftovers(base: Path) -> None:
    """Remove below *base* what trainers left there that are no more: directories of theirs, and files on their way."""
    for name in (layout.RESTORED, layout.STAGING):
        shutil.rmtree(base / name, ignore_errors=True)
