"""Where a compat job's log lines go: the console or the user's logger, and the file that the predecessor writes."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sm_tiered.errors import TieredError
from sm_tiered.events import plain
from sm_tiered.log_files import LogFile, private_directory
from sm_tiered.log_lines import LineFormatter
from sm_tiered.logs import Undo, to_console
from sm_tiered.settings import LogSettings

__all__ = ["DIRECTORY", "begin_logs"]

DIRECTORY = "/var/log/sagemaker_checkpointing"
"""Where the predecessor's log files stand, ``<namespace>_checkpointing.log`` each."""

_LOGGERS = ("sm_tiered", "sm_tiered_dcp")
_DEFAULTS = LogSettings()
_logger = logging.getLogger("sm_tiered_dcp")


def begin_logs(*, namespace: str, rank: int, logger: logging.Logger | None, first: bool) -> Undo:
    """Send the lines of *namespace* where they belong; return what undoes it.

    *logger*: the user's, instead of the console. *first*: of this node's ranks: the one that rotates the file and
    tells where it is.
    """
    undos: list[Undo] = []
    if logger is None:
        undos.append(to_console("INFO", namespace=namespace, rank=rank))
    else:
        undos.append(_attached(_Forward(logger)))
    file = _opened(namespace, rotates=first)
    if file is not None:
        file.setFormatter(LineFormatter(namespace=namespace, rank=rank))
        file.addFilter(lambda record: getattr(record, "namespace", namespace) == namespace)
        undos.append(_attached(file))
        if first:
            _logger.info("log file: %s", plain(file.baseFilename), extra={"namespace": namespace, "rank": rank})

    def undo_all() -> None:
        while undos:
            undos.pop()()

    return undo_all


def _attached(handler: logging.Handler) -> Undo:
    handler.setLevel(logging.INFO)
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        if logger.getEffectiveLevel() > logging.INFO:
            logger.setLevel(logging.INFO)

    def undo() -> None:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.removeHandler(handler)
            if logger.level == logging.INFO:
                logger.setLevel(before[name])
        handler.close()

    return undo


class _Forward(logging.Handler):
    """To what handles the user's logger's records, but not twice to what ours reach by themselves."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._theirs = logger

    def emit(self, record: logging.LogRecord) -> None:
        if not self._theirs.isEnabledFor(record.levelno) or not self._theirs.filter(record):
            return
        ours = _handlers(logging.getLogger(record.name))
        for handler in _handlers(self._theirs):
            if handler not in ours and record.levelno >= handler.level:
                handler.handle(record)


def _handlers(logger: logging.Logger) -> list[logging.Handler]:
    found: list[logging.Handler] = []
    current: logging.Logger | None = logger
    while current is not None:
        found += current.handlers
        current = current.parent if current.propagate else None
    return found


class _SharedLog(LogFile):
    """A log file of all ranks of a node; one puts it aside when it is long, the others follow to the new one."""

    def __init__(self, path: Path, *, rotates: bool) -> None:
        super().__init__(path, max_bytes=_DEFAULTS.max_bytes, kept=_DEFAULTS.kept)
        self._rotates = rotates

    def shouldRollover(self, record: logging.LogRecord) -> bool:
        """Whether to put the file aside first; where another rank did, only follow it."""
        if self._rotates:
            return super().shouldRollover(record)
        stream = self.stream
        if stream is not None and self._moved(stream.fileno()):
            stream.close()
            self.stream = self._open()
        return False

    def _moved(self, descriptor: int) -> bool:
        try:
            return not os.path.samestat(os.stat(self.baseFilename, follow_symlinks=False), os.fstat(descriptor))
        except OSError:
            return True


def _opened(namespace: str, *, rotates: bool) -> _SharedLog | None:
    """Open the log file in the usual place, else in a private one; None where neither can be."""
    name = f"{namespace}_checkpointing.log"
    elsewhere = Path(tempfile.gettempdir()) / f"sm_tiered-{os.getuid()}" / "sagemaker_checkpointing"
    reason: Exception | None = None
    makers: tuple[tuple[Path, Callable[[Path], None]], ...] = (
        (Path(DIRECTORY), lambda path: os.makedirs(path, mode=0o700, exist_ok=True)),
        (elsewhere, private_directory),
    )
    for directory, make in makers:
        try:
            make(directory)
            found = _SharedLog(directory / name, rotates=rotates)
        except (OSError, TieredError) as error:
            reason = reason or error
            continue
        if reason is not None and rotates:
            _logger.warning("no log can be written to %s (%s): it is in %s", DIRECTORY, plain(reason), plain(directory))
        return found
    with suppress(TieredError):
        _logger.warning("no log can be written to %s: %s", DIRECTORY, plain(reason))
    return None
