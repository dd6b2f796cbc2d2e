"""Log lines on the console and in files, for those who ask: by a call here, or by ``log:`` in the recipe.

Nothing is configured unasked, and never the root logger. Who asks gets a function that undoes it; what several ask for
is there once, as verbose as the most verbose of them, until the last of them has undone it. Handlers that the root
logger has get the same records.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from sm_tiered.errors import ConfigError, TieredError
from sm_tiered.events import plain
from sm_tiered.layout import check_namespace
from sm_tiered.log_files import LogFile, log_path, private_directory
from sm_tiered.log_lines import LineFormatter
from sm_tiered.settings import LogSettings

__all__ = ["LEVELS", "Undo", "install", "to_console", "to_file"]

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_LOGGERS = ("sm_tiered", "sm_tiered_dcp", "sm_tiered_lightning", "sm_tiered_accelerate")
"""Integrations may log under the names of their own packages."""
_DEFAULTS = LogSettings()

Undo = Callable[[], None]

_logger = logging.getLogger("sm_tiered")


def to_console(level: str = "INFO", *, namespace: str | None = None, rank: int | None = None) -> Undo:
    """Write the lines of this process to stderr; return what undoes it, which can be called many times.

    *namespace* and *rank* are for records that do not say.

    Raises:
        ConfigError: there is no such level.
    """
    return _outlets.add("console", _Console, _Wish(level=_level(level), namespace=namespace, rank=rank))


def to_file(
    directory: str | os.PathLike[str],
    *,
    namespace: str,
    rank: int | None,
    level: str = "INFO",
    max_bytes: int = _DEFAULTS.max_bytes,
    kept: int = _DEFAULTS.kept,
) -> Undo:
    """Write the lines of *rank* (None: the drainer's) to a file in ``<directory>/<namespace>``; return what undoes it.

    Only records of that namespace and rank, and those that do not say, go there. The file rotates at *max_bytes*;
    *kept* old ones stay.

    Raises:
        ConfigError: the namespace, level, size or directory can't be used, or the file is another user's.
    """
    if max_bytes < 1 or kept < 1:
        hint = "A log rotates by size, and at least one old file stays."
        raise ConfigError(f"max_bytes and kept must be 1 or more, got {max_bytes} and {kept}", hint=hint)
    wish = _Wish(level=_level(level), namespace=check_namespace(namespace), rank=rank)
    path = log_path(directory, namespace=namespace, rank=rank)

    def make() -> logging.Handler:
        try:
            private_directory(path.parent)
            handler = LogFile(path, max_bytes=max_bytes, kept=kept)
        except OSError as error:
            hint = "Name a directory that this user can write to."
            raise ConfigError(f"no log can be written to {plain(str(path))}: {plain(error)}", hint=hint) from error
        handler.addFilter(_Ours(namespace, rank))
        return handler

    return _outlets.add(path, make, wish)


def install(settings: LogSettings | None, *, namespace: str, rank: int | None) -> Undo:
    """Do what a recipe asks for; return what undoes it. A file that can't be written is said, and never stops a job.

    The drainer (*rank* None) has no console of its own: what it prints goes to a file of the queue already.
    """
    undos: list[Undo] = []
    asked = settings or LogSettings()
    try:
        if asked.console and rank is not None:
            undos.append(to_console(asked.level, namespace=namespace, rank=rank))
        if asked.path is not None:
            size = {"max_bytes": asked.max_bytes, "kept": asked.kept}
            undos.append(to_file(asked.path, namespace=namespace, rank=rank, level=asked.level, **size))
    except TieredError as error:
        _logger.warning("%s", error)

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


def _level(name: str) -> int:
    if name not in LEVELS:
        raise ConfigError(f"{plain(name)!r} is no level of a log", hint=f"One of {', '.join(LEVELS)}.")
    return int(getattr(logging, name))


class _Console(logging.Handler):
    """To whatever `sys.stderr` is now; one write a line, so that lines of several ranks do not mix."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()
        except Exception:  # noqa: BLE001 - as all handlers of `logging` do
            self.handleError(record)


class _Ours(logging.Filter):
    """Passes what one namespace and rank tell, and what does not say whose it is."""

    def __init__(self, namespace: str, rank: int | None) -> None:
        super().__init__()
        self._namespace, self._rank = namespace, rank

    def filter(self, record: logging.LogRecord) -> bool:
        theirs = getattr(record, "namespace", self._namespace), getattr(record, "rank", self._rank)
        return theirs == (self._namespace, self._rank)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Wish:
    level: int
    namespace: str | None
    rank: int | None


@dataclass(slots=True, kw_only=True)
class _Outlet:
    handler: logging.Handler
    wishes: list[_Wish] = field(default_factory=list[_Wish])

    def fit(self) -> None:
        """Be as verbose as any wants; whose the records are that do not say is known only where all agree."""
        self.handler.setLevel(min(wish.level for wish in self.wishes))
        whose = {(wish.namespace, wish.rank) for wish in self.wishes}
        namespace, rank = whose.pop() if len(whose) == 1 else (None, None)
        self.handler.setFormatter(LineFormatter(namespace=namespace, rank=rank))


class _Outlets:
    """The handlers of this process. Any thread may add and undo."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Hashable, _Outlet] = {}
        self._levels: dict[str, tuple[int, int]] = {}
        """Of each logger: its level before us, and the one that we gave it."""

    def add(self, key: Hashable, make: Callable[[], logging.Handler], wish: _Wish) -> Undo:
        with self._lock:
            outlet = self._open.get(key)
            if outlet is None:
                outlet = _Outlet(handler=make())
                self._open[key] = outlet
            outlet.wishes.append(wish)
            outlet.fit()
            for name in _LOGGERS:
                logging.getLogger(name).addHandler(outlet.handler)
            self._set_levels()
        return lambda: self._undo(key, wish)

    def _undo(self, key: Hashable, wish: _Wish) -> None:
        with self._lock:
            outlet = self._open.get(key)
            if outlet is None or wish not in outlet.wishes:
                return
            outlet.wishes.remove(wish)
            if outlet.wishes:
                outlet.fit()
            else:
                del self._open[key]
                for name in _LOGGERS:
                    logging.getLogger(name).removeHandler(outlet.handler)
                outlet.handler.close()
            self._set_levels()

    def _set_levels(self) -> None:
        """Let through what some handler wants; a level that somebody else has set since is left alone."""
        wanted = min((outlet.handler.level for outlet in self._open.values()), default=None)
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            before, given = self._levels.pop(name, (logger.level, logger.level))
            if logger.level != given:
                before = logger.level
            above = logger.parent.getEffectiveLevel() if logger.parent is not None else logging.NOTSET
            level = before if wanted is None or (before or above) <= wanted else wanted
            logger.setLevel(level)
            if wanted is not None:
                self._levels[name] = (before, level)


_outlets = _Outlets()
