"""Log files that are ours alone: made with mode 0600 below a directory of mode 0700, through no link, and rotated."""

from __future__ import annotations

import logging
import os
import re
import socket
import stat
import sys
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

from sm_tiered.errors import ConfigError
from sm_tiered.events import plain

__all__ = ["LogFile", "log_path", "private_directory"]

_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_logger = logging.getLogger("sm_tiered")


def log_path(directory: str | os.PathLike[str], *, namespace: str, rank: int | None) -> Path:
    """Return the file of *rank*, or with None of this host's drainer: nobody else writes there, so it can rotate."""
    host = re.sub(r"[^A-Za-z0-9_.-]", "_", socket.gethostname())[:64]
    name = f"rank-{rank:05d}.log" if rank is not None else f"drainer-{host}.log"
    return Path(os.path.abspath(directory)) / namespace / name


def private_directory(path: Path) -> None:
    """Make *path*, with what is above it, and see that it is ours alone.

    Raises:
        OSError: it can't be made.
        ConfigError: it is another user's, or no directory.
    """
    os.makedirs(path, mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"{plain(str(path))} belongs to uid {found.st_uid}, not to {os.geteuid()}",
                hint="Give the logs a directory of your own.",
            )
        if found.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)


class LogFile(RotatingFileHandler):
    """A file that is renamed to ``<name>.1`` before it grows beyond *max_bytes*; *kept* old ones are.

    Opened at once. What can't be written later is said once, to the logger, and never raised. Raises OSError when it
    can't be opened, ConfigError when it is not a file of this user.
    """

    def __init__(self, path: Path, *, max_bytes: int, kept: int) -> None:
        self._pid, self._told = os.getpid(), False
        super().__init__(path, maxBytes=max_bytes, backupCount=kept, encoding="utf-8", errors="backslashreplace")

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, _FLAGS, 0o600)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                raise ConfigError(
                    f"{plain(self.baseFilename)} is not a file of uid {os.geteuid()}",
                    hint="Remove it, or log elsewhere.",
                )
            if found.st_mode & 0o077:
                os.fchmod(descriptor, 0o600)
            return open(descriptor, "a", encoding=self.encoding, errors=self.errors)  # noqa: SIM115 - the handler's
        except BaseException:
            os.close(descriptor)
            raise

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Whether to put the file aside first. A forked child never does: its parent still writes there."""
        return os.getpid() == self._pid and bool(super().shouldRollover(record))

    def doRollover(self) -> None:
        """Put the file aside; where that fails it grows on, for a long log is better than none."""
        try:
            super().doRollover()
        except OSError as error:
            self._tell("can't be put aside", error)

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that lines are missing: a full disk must stop nothing, and fill no terminal."""
        self._tell("lacks lines", sys.exc_info()[1])

    def _tell(self, what: str, error: BaseException | None) -> None:
        if not self._told:
            self._told = True
            _logger.warning("the log %s %s: %s", plain(self.baseFilename), what, plain(error))
