"""Where a compat job's log lines go: the console or the user's logger, and the file that the predecessor writes.

That file is this user's alone, mode 0600 in a directory that is made with 0700, as all that this library writes;
the predecessor's was readable for whom the umask let. Lines name buckets, keys and hosts, which is nobody else's
business on a shared node, and a cluster's log collector (a DaemonSet's Fluent Bit or CloudWatch agent) runs as root
and reads it nevertheless. For one that does not, in a sidecar of another uid, give the config a ``logger`` whose
handler writes where and as that needs: the lines go there too.
"""

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

__all__ = ["DIRECTORY", "Logs"]

DIRECTORY = "/var/log/sagemaker_checkpointing"
"""Where the predecessor's log files stand, ``<namespace>_checkpointing.log`` each."""

_LOGGERS = ("sm_tiered", "sm_tiered_dcp")
_DEFAULTS = LogSettings()
_logger = logging.getLogger("sm_tiered_dcp")


class Logs:
    """The lines of one namespace: to its file, and to the console or the user's logger."""

    def __init__(self, *, namespace: str, rank: int, logger: logging.Logger | None, first: bool) -> None:
        """Open both.

        Args:
            namespace: whose lines.
            rank: of the process.
            logger: the user's, instead of the console.
            first: of this node's ranks: the one that rotates the file and tells where it is.
        """
        self._namespace, self._rank = namespace, rank
        self._theirs = logger
        self._undo_lines = self._lines()
        self._undo_file: Undo | None = None
        file = _opened(namespace, rotates=first)
        if file is not None:
            file.setFormatter(LineFormatter(namespace=namespace, rank=rank))
            file.addFilter(lambda record: getattr(record, "namespace", namespace) == namespace)
            self._undo_file = _attached.add(file, lambda: file)
            if first:
                _logger.info("log file: %s", plain(file.baseFilename), extra={"namespace": namespace, "rank": rank})

    def use(self, logger: logging.Logger | None) -> None:
        """Send the lines to *logger* from now on, None: to the console."""
        if logger is not self._theirs:
            before, self._theirs = self._undo_lines, logger
            self._undo_lines = self._lines()
            before()

    def _lines(self) -> Undo:
        theirs = self._theirs
        if theirs is None:
            return to_console("INFO", namespace=self._namespace, rank=self._rank)
        return _attached.add(theirs, lambda: _Forward(theirs))

    def close(self) -> None:
        """Undo both; can be called many times."""
        self._undo_lines()
        if self._undo_file is not None:
            self._undo_file()


class _Attached:
    """Handlers of our loggers: each is there once, however many namespaces want it."""

    def __init__(self) -> None:
        self._open: dict[object, tuple[logging.Handler, list[object]]] = {}
        self._levels: dict[str, int] = {}

    def add(self, key: object, make: Callable[[], logging.Handler]) -> Undo:
        """Attach what *make* returns, unless *key* is there; return what undoes it, which can be called many times."""
        if not self._open:
            self._raise_levels()
        if key not in self._open:
            handler = make()
            handler.setLevel(logging.INFO)
            self._open[key] = handler, []
            for name in _LOGGERS:
                logging.getLogger(name).addHandler(handler)
        wish = object()
        self._open[key][1].append(wish)
        return lambda: self._undo(key, wish)

    def _undo(self, key: object, wish: object) -> None:
        if key not in self._open or wish not in self._open[key][1]:
            return
        handler, wishes = self._open[key]
        wishes.remove(wish)
        if wishes:
            return
        del self._open[key]
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()
        if not self._open:
            self._restore_levels()

    def _raise_levels(self) -> None:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            if logger.getEffectiveLevel() > logging.INFO:
                self._levels[name] = logger.level
                logger.setLevel(logging.INFO)

    def _restore_levels(self) -> None:
        while self._levels:
            name, level = self._levels.popitem()
            if logging.getLogger(name).level == logging.INFO:
                logging.getLogger(name).setLevel(level)


_attached = _Attached()


class _Forward(logging.Handler):
    """To what handles the user's logger's records, but not twice to what ours reach by themselves."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self._theirs = logger

    def emit(self, record: logging.LogRecord) -> None:
        if not self._theirs.isEnabledFor(record.levelno) or not self._theirs.filter(record):
            return
        ours = _handlers(logging.getLogger(record.name))
        # As `logging` does with the lines of a logger that has no handler: warnings are not lost.
        last = [logging.lastResort] if logging.lastResort is not None else []
        for handler in _handlers(self._theirs) or last:
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
