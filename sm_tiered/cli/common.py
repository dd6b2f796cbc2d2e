"""What commands share: opening a recipe and its tiers for looking only, exit statuses, errors without a traceback."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from sm_tiered import layout
from sm_tiered.cli.output import OutputClosedError, clean, note_error
from sm_tiered.errors import ConfigError, CorruptPartError, FormatError, TieredError
from sm_tiered.settings import (
    HyperPodSettings,
    LocalSettings,
    MemorySettings,
    S3Settings,
    Settings,
    TierSettings,
)
from sm_tiered.tiers.base import Tier

if TYPE_CHECKING:
    from sm_tiered.recipe import Recipe

__all__ = [
    "EXIT_CORRUPT",
    "EXIT_FAILED",
    "EXIT_OK",
    "EXIT_USAGE",
    "check_step",
    "chosen_tiers",
    "is_durable",
    "kind_of",
    "location_of",
    "open_for_looking",
    "open_recipe",
    "overriding",
    "parallel",
    "parse_share",
    "read_recipe",
    "reported",
    "threads_for",
]

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_CORRUPT = 0, 1, 2, 3
_EXIT_INTERRUPTED, _EXIT_PIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

_PATIENCE_SECS = 15.0
"""How long a look waits for S3; a person waits for the answer."""
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d{1,9})?)%?", re.ASCII)
_S3_THREADS = 12
_overrides: ContextVar[tuple[str, ...]] = ContextVar("overrides", default=())

_P = ParamSpec("_P")
_T = TypeVar("_T")
_R = TypeVar("_R")


def reported(command: Callable[_P, int]) -> Callable[_P, None]:
    """Make *command*, which returns its exit status, one that ends the process with it and never with a traceback."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        raise SystemExit(_status(lambda: command(*args, **kwargs)))

    return run


def _status(command: Callable[[], int]) -> int:
    try:
        return command()
    except OutputClosedError:
        return _EXIT_PIPE
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _EXIT_INTERRUPTED
    except TieredError as error:
        note_error(error)
        if isinstance(error, ConfigError):
            return EXIT_USAGE
        return EXIT_CORRUPT if isinstance(error, (CorruptPartError, FormatError)) else EXIT_FAILED


@contextmanager
def overriding(options: Sequence[str]) -> Generator[None, None, None]:
    """Lay *options*, each a ``KEY.KEY=VALUE``, over every recipe that is opened meanwhile."""
    before = _overrides.set(tuple(options))
    try:
        yield
    finally:
        _overrides.reset(before)


def read_recipe(path: str) -> Recipe:
    """Return the recipe at *path*, with what the command line sets.

    Raises:
        RecipeError: there is none, or it can't be used.
    """
    from sm_tiered.recipe import Recipe

    return Recipe.load(path, overrides=_overrides.get())


def open_recipe(path: str) -> Settings:
    """Return the settings of the recipe at *path*, with what the command line sets.

    Raises:
        RecipeError: there is none, or it can't be used.
    """
    return read_recipe(path).settings()


def open_for_looking(settings: TierSettings, namespace: str, *, patient: bool = False) -> Tier:
    """Return a tier that makes no directory, takes no lock and, unless *patient*, soon gives up on S3."""
    if isinstance(settings, MemorySettings):
        from sm_tiered.tiers.files import DirectoryTier

        # `MemoryTier` makes its directories; a look must not.
        return DirectoryTier(name=settings.name, base=settings.path, namespace=namespace, fsync=False)
    from sm_tiered.tiers import open_tier

    if isinstance(settings, (S3Settings, HyperPodSettings)) and not patient:
        settings = replace(
            settings,
            retry_attempts=min(settings.retry_attempts, 3),
            retry_deadline_secs=min(settings.retry_deadline_secs, _PATIENCE_SECS),
            request_timeout_secs=min(settings.request_timeout_secs, _PATIENCE_SECS),
        )
    return open_tier(settings, namespace)


def chosen_tiers(settings: Settings, name: str | None) -> tuple[TierSettings, ...]:
    """Return the tier called *name*, or all.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return settings.tiers
    found = tuple(tier for tier in settings.tiers if tier.name == name)
    if not found:
        names = ", ".join(tier.name for tier in settings.tiers)
        raise ConfigError(f"--tier: the recipe has no tier {clean(name)!r}", hint=f"It has: {names}.")
    return found


def is_durable(settings: TierSettings) -> bool:
    """Return whether a checkpoint there outlives its node; there it has a manifest."""
    return not isinstance(settings, MemorySettings)


def kind_of(settings: TierSettings) -> str:
    """Return the tier's kind, as recipes write it."""
    kinds: dict[type[TierSettings], str] = {
        MemorySettings: "memory",
        LocalSettings: "local",
        S3Settings: "s3",
        HyperPodSettings: "hyperpod",
    }
    return kinds.get(type(settings), type(settings).__name__)


def location_of(settings: TierSettings) -> str:
    """Return where the tier is."""
    if isinstance(settings, S3Settings):
        return f"s3://{settings.bucket}/{settings.prefix}" if settings.prefix else f"s3://{settings.bucket}"
    if isinstance(settings, HyperPodSettings):
        return settings.url
    return settings.path if isinstance(settings, (MemorySettings, LocalSettings)) else ""


def threads_for(settings: TierSettings) -> int:
    """Return how many requests at once are worth it: many where each one waits for a network."""
    return _S3_THREADS if isinstance(settings, S3Settings) else 1


def check_step(step: int | None) -> int | None:
    """Return *step* when it can be one, or None when none was given.

    Raises:
        ConfigError: otherwise.
    """
    return None if step is None else layout.check_step(step, name="--step")


def parse_share(value: str) -> float:
    """Return the share that a percentage like ``10%``, ``10`` or ``0.5%`` stands for.

    Raises:
        ConfigError: it is none above 0% and at most 100%.
    """
    found = _PERCENT.fullmatch(value.strip())
    share = float(found[1]) / 100 if found else 0.0
    if not 0.0 < share <= 1.0:
        raise ConfigError(
            f"--read-data: {clean(value)[:40]!r} is no share of the data",
            hint="Allowed: above 0% and up to 100%, e.g. 10%.",
        )
    return share


def parallel(work: Callable[[_T], _R], items: Sequence[_T], *, threads: int) -> list[_R]:
    """Return what *work* makes of each of *items*, in order, asking for several at once.

    The threads are daemons: neither an error nor Ctrl-C waits for those that are still busy.
    """
    if threads <= 1 or len(items) <= 1:
        return [work(item) for item in items]
    results: dict[int, _R] = {}
    failures: list[BaseException] = []
    places = iter(range(len(items)))

    def run() -> None:
        for place in places:
            if failures:
                return
            try:
                results[place] = work(items[place])
            except BaseException as error:  # noqa: BLE001  (raised again by the caller's thread)
                failures.append(error)

    workers = [threading.Thread(target=run, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for worker in workers:
        while worker.is_alive() and not failures:
            worker.join(0.1)
    if failures:
        raise failures[0]
    return [results[place] for place in range(len(items))]


def fail_softly() -> None:
    """Give closed standard streams something to write to, so that nothing else has to ask."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  (for the whole process)
