"""A directory that gets a model: everything is written beside its final place and renamed when all is whole."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sm_tiered.cli.output import size
from sm_tiered.consolidate import INDEX_NAME, FilePlan
from sm_tiered.errors import ConfigError, TieredError

__all__ = ["Target"]

_OURS = re.compile(r"model(?:-\d{5}-of-\d{5})?\.safetensors|" + re.escape(INDEX_NAME))
"""What an export leaves in its directory."""


class Target:
    """Where an export goes."""

    def __init__(self, path: str, *, force: bool) -> None:
        """Look at *path*, which need not exist; with *force* an export that stands there is replaced.

        Raises:
            ConfigError: it is no directory, or an export stands there and *force* is False.
        """
        self.path = Path(path)
        self._old = self._standing()
        if self._old and not force:
            message = f"-o: {self.path} already holds {self._old[0].name}"
            raise ConfigError(message, hint="Take another directory, or --force to replace what is there.")

    def _standing(self) -> list[Path]:
        try:
            return sorted(path for path in self.path.iterdir() if _OURS.fullmatch(path.name))
        except FileNotFoundError:
            return []
        except NotADirectoryError:
            raise ConfigError(f"-o: {self.path} is no directory", hint="Name a directory; it is made.") from None
        except OSError as error:
            raise ConfigError(f"-o: {self.path} can't be read: {error.strerror}", hint="Name another one.") from error

    @contextmanager
    def writing(self, plans: Sequence[FilePlan], index: bytes | None) -> Generator[list[int], None, None]:
        """Give open files, one for each of *plans*, with their headers written; afterwards all is in its place.

        Whatever goes wrong, nothing new stays behind, and what stood there is as it was.

        Raises:
            TieredError: there is no room, or it can't be written.
        """
        made = _missing(self.path)
        scratch = self.path / f".export-{secrets.token_hex(4)}"
        try:
            try:
                scratch.mkdir(parents=True)
                self._check_room(sum(plan.size for plan in plans))
                with _opened(scratch, plans) as files:
                    yield files
                    for number in files:
                        os.fsync(number)
                if index is not None:
                    _write_whole(scratch / INDEX_NAME, index)
                self._place(scratch, [plan.name for plan in plans] + ([INDEX_NAME] if index is not None else []))
            except OSError as error:
                if isinstance(error, TieredError):
                    raise
                what = "there is no room" if error.errno == errno.ENOSPC else str(error.strerror)
                raise TieredError(f"{self.path} can't be written: {what}", hint="Name another one with -o.") from error
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            _remove_empty(made)
            raise
        scratch.rmdir()

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < needed:
            message = f"{self.path} has room for {size(free)}, and {size(needed)} are to be written"
            raise TieredError(message, hint="Name another one with -o.")

    def _place(self, scratch: Path, names: Sequence[str]) -> None:
        # The index last: without it the other files are no model to anybody.
        for old in sorted(self._old, key=lambda path: path.name != INDEX_NAME):
            if old.name not in names or old.name == INDEX_NAME:
                old.unlink(missing_ok=True)
        for name in names:
            os.replace(scratch / name, self.path / name)
        _sync(self.path)


@contextmanager
def _opened(scratch: Path, plans: Sequence[FilePlan]) -> Generator[list[int], None, None]:
    # Not closed when something failed: a thread may still write to that number, which must not become another file.
    files = [open(scratch / plan.name, "xb", buffering=0) for plan in plans]  # noqa: SIM115
    for file, plan in zip(files, plans, strict=True):
        file.write(plan.header)
        file.truncate(plan.size)
    yield [file.fileno() for file in files]
    for file in files:
        file.close()


def _write_whole(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _missing(path: Path) -> list[Path]:
    """Return *path* and those above it that do not exist, innermost first."""
    found: list[Path] = []
    for each in (path, *path.parents):
        if each.exists():
            break
        found.append(each)
    return found


def _remove_empty(made: Sequence[Path]) -> None:
    for path in made:
        try:
            path.rmdir()
        except OSError:
            return
