"""One engine for each recipe in a process: checkpointers, writers and readers of one recipe share it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from sm_tiered.errors import ConfigError, TierFullError
from sm_tiered.events import MemoryTight
from sm_tiered.finish import Finisher
from sm_tiered.group import Group
from sm_tiered.logs import Undo, install
from sm_tiered.policies.context import Need
from sm_tiered.preemption import Preemption
from sm_tiered.recipe import Recipe, load_recipe
from sm_tiered.requests import Requests, request_files
from sm_tiered.restore import Restored
from sm_tiered.saving import Saver
from sm_tiered.schedule import Schedule
from sm_tiered.settings import Settings
from sm_tiered.store import Store
from sm_tiered_dcp import finisher
from sm_tiered_dcp.group import open_group

__all__ = ["Engine", "Lease", "RecipeLike", "fits", "open_engine"]

_WITH_SLACK = 16 / 15
"""So much more than planned still goes into a file of the arena."""


def fits(sizes: Mapping[str, int], planned: Mapping[str, int]) -> bool:
    """Whether files of *sizes* bytes go where room was made for *planned*: they grow with what they hold."""
    return all(size <= _WITH_SLACK * planned.get(name, 0) for name, size in sizes.items())


RecipeLike = Mapping[str, Any] | str | os.PathLike[str] | Recipe


@dataclass(slots=True)
class Engine:
    """Store, saver, schedule and group of one recipe."""

    settings: Settings
    group: Group
    store: Store
    saver: Saver
    schedule: Schedule
    preemption: Preemption
    undo_logs: Undo
    users: int = 0
    closed: bool = False
    state_saver: Any = None
    """The `StateSaver` of this engine, once there is one."""

    def tiers(self, names: Sequence[str] | None) -> frozenset[str]:
        """Return *names* checked, or all tiers of the recipe.

        Raises:
            ConfigError: the recipe has no tier of that name.
        """
        known = [tier.name for tier in self.settings.tiers]
        if isinstance(names, str):
            raise ConfigError(f"tiers must be a list of names, got {names!r}", hint=f"The recipe has {known}.")
        if names is not None and not names:
            raise ConfigError("tiers is empty", hint=f"Leave it out for all, or choose from {known}.")
        for name in names or ():
            if name not in known:
                raise ConfigError(f"the recipe has no tier {name!r}", hint=f"It has {known}.")
        return frozenset(known if names is None else names)

    def remember(self, restored: Restored) -> None:
        """Tell the policies what was restored, and what had been before."""
        wanted = self.group.rank == 0 and Need.METRICS in self.schedule.needs
        self.schedule.started_from(restored.step, self.store.history(metrics=wanted))

    def make_room(self, sizes: Sequence[int], *, first: bool) -> None:
        """See on all ranks that parts of *sizes* bytes fit, and prepare their pages. Collective.

        Raises:
            ConfigError: the recipe's budget forbids them, at the *first* save: later ones are streamed, or skipped.
            TierFullError: they don't fit, at the first save.
        """
        try:
            self.store.make_room(sizes)
        except (ConfigError, TierFullError) as error:
            if first:
                raise
            self.store.events.emit(MemoryTight(warning=str(error)))

    def close(self, *, patient: bool = True) -> None:
        """Let go; the last user's call closes everything, see `Saver.close`. Not collective."""
        self.users -= 1
        if self.users <= 0:
            self.end(patient=patient)

    def end(self, *, patient: bool = True) -> None:
        """Close everything, whoever still uses it; can be called many times. Not collective."""
        if self.closed:
            return
        self.closed = True
        _engines.pop(_key(self.settings), None)
        self.preemption.remove()
        self.saver.close(patient=patient)
        self.store.close()
        self.undo_logs()
        self.group.close()


class Lease:
    """One user's hold on an engine, given up once."""

    def __init__(self, engine: Engine, user: str) -> None:
        self._engine: Engine | None = engine
        self._user = user

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ConfigError: it was given up.
        """
        if self._engine is None:
            raise ConfigError(f"this {self._user} is closed", hint="Make another one.")
        return self._engine

    def end(self) -> None:
        """Give it up; can be called many times."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


_engines: dict[tuple[int, str], Engine] = {}


@atexit.register
def _end_saves() -> None:
    """A script may end without a close: its last save is still recorded and handed to the drainer."""
    for (pid, _), engine in list(_engines.items()):
        if pid == os.getpid():
            engine.saver.close()


def open_engine(recipe: RecipeLike) -> Engine:
    """Return the engine of *recipe*, opened if this process has none yet. Collective then.

    Raises:
        ConfigError: the recipe can't be used, ranks have different ones, or a directory tier is not shared.
        NamespaceInUseError: trainers of another launch are alive in this memory directory.
    """
    settings = load_recipe(recipe).settings()
    engine = _engines.get(_key(settings))
    if engine is None:
        group = open_group(settings.group_timeout_secs)
        undo_logs = install(settings.log, namespace=settings.namespace, rank=group.rank)
        try:
            engine = _open(settings, group, undo_logs)
        except BaseException:
            undo_logs()
            group.close()
            raise
        _engines[_key(settings)] = engine
    engine.users += 1
    return engine


def _open(settings: Settings, group: Group, undo_logs: Undo) -> Engine:
    on_map = _pin if torch.cuda.is_available() else None
    finish = Finisher(module=finisher.__name__, make=finisher.compose_files)
    store = Store(settings, group, finisher=finish, on_map=on_map)
    saver = Saver(store)
    preemption = Preemption()
    schedule = Schedule(settings, group, preemption, Requests(request_files(settings)))
    if Need.SIGNAL in schedule.needs:
        preemption.install()
    return Engine(settings, group, store, saver, schedule, preemption, undo_logs)


def _key(settings: Settings) -> tuple[int, str]:
    return os.getpid(), settings.text


def _pin(buffer: memoryview) -> Any:
    """Page-lock *buffer* for direct copies from the GPU; return what undoes it."""
    runtime: Any = cast("Any", torch.cuda).cudart()
    address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
    if int(runtime.cudaHostRegister(address, len(buffer), 0)) != 0:
        return lambda: None  # Copies then go through the driver's own staging: slower, never wrong.
    return lambda: runtime.cudaHostUnregister(address)
