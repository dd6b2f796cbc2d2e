"""Saved steps whose copies can be taken away, damaged or made unreachable, and what a restore must give then."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sm_tiered.errors import NothingRestorableError, TieredError, TierUnavailableError
from sm_tiered.group import SoloGroup
from sm_tiered.resolve import Tiers, survey
from sm_tiered.restore import walk
from sm_tiered.store import Store
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier
from sm_tiered.testing.plain import PlainEngine, PlainLoader
from sm_tiered.tiers.base import Blob, Entry
from sm_tiered.tiers.memory import MemoryTier, OpenPart
from tests.faults.core_jobs import NAMESPACE, Job, origin, state

State = Literal["ok", "missing", "corrupt", "unreachable"]
STATES: tuple[State, ...] = ("ok", "missing", "corrupt", "unreachable")


def oracle(cells: Mapping[tuple[str, int], State], *, use_memory: bool) -> int | type[TieredError] | None:
    """Say what a restore gives when *cells* is how each step is on each tier.

    The newest step that any tier has whole, memory first. A durable tier that does not answer ends the search, for what
    it has may be newer than all that follows; with *use_memory* the search goes on in memory alone.
    """
    silent = False
    for step in sorted({step for _, step in cells}, reverse=True):
        far = {cells[place] for place in cells if place[0] != "memory" and place[1] == step}
        if cells["memory", step] == "ok" or ("ok" in far and not silent):
            return step
        if "unreachable" in far and not use_memory:
            return TierUnavailableError
        silent |= "unreachable" in far
    if silent:
        return TierUnavailableError
    return None if set(cells.values()) == {"missing"} else NothingRestorableError


def nearest(cells: Mapping[tuple[str, int], State], step: int) -> str:
    """Return the first tier that has *step* whole; *cells* are in the order of the recipe."""
    return next(tier for tier, of in cells if of == step and cells[tier, of] == "ok")


class MemoryOfStates(MemoryTier):
    """A memory tier some of whose directories can't be read."""

    unreachable: frozenset[str] = frozenset()

    def _answer(self, key: str) -> None:
        if key.split("/", 1)[0] in self.unreachable:
            raise TierUnavailableError("injected", tier="memory", key=key)

    def get(self, key: str, **options: Any) -> Blob:
        self._answer(key)
        return super().get(key, **options)

    def list(self, prefix: str) -> list[Entry]:
        self._answer(prefix)
        return super().list(prefix)

    def open_part(self, key: str) -> OpenPart:
        self._answer(key)
        return super().open_part(key)


def make_saved(root: Path, steps: tuple[int, ...], *, world: int = 1, more: tuple[str, ...] = ()) -> Job:
    """Save *steps* to memory, to a directory, and to those of *more* durable tiers."""
    job = Job(root, world=world, keep=len(steps), durable_keep=9)
    others = {name: {"kind": "local", "path": str(root / name), "fsync": False, "keep": {"latest": 9}} for name in more}
    if more:
        job = replace(job, options={"tiers": {**job.recipe()["tiers"], **others}})

    def work(engine: PlainEngine) -> None:
        for step in steps:
            engine.save(step, state(0, step, engine.group.rank), urgent=True).wait("memory")

    with job.no_drainer():
        job.work(work)
    assert job.drain() == 0
    return job


@dataclass
class Table:
    """Saved steps whose copies can be taken away, damaged or made unreachable, and put back."""

    job: Job
    tiers: Tiers
    store: Store
    taken: str = ""
    """The tier that the last restore took its step from."""

    def _directory(self, tier: str, step: int) -> Path:
        if tier in ("memory", "durable"):
            return self.job.step_dirs(tier)[step]
        return next((self.job.root / tier / NAMESPACE).glob(f"step_{step:010d}-*"))

    @contextmanager
    def states(self, cells: Mapping[tuple[str, int], State]) -> Iterator[None]:
        undo: list[Callable[[], object]] = []
        silent: dict[str, set[str]] = {tier: set() for tier in ("memory", *self.tiers.durable)}
        for (tier, step), found in cells.items():
            directory = self._directory(tier, step)
            if found == "missing":
                aside = directory.with_name(f"aside-{step}")
                directory.rename(aside)
                undo.append(lambda aside=aside, directory=directory: aside.rename(directory))
            elif found == "corrupt":
                flip(directory / "__0_0.distcp")
                undo.append(lambda directory=directory: flip(directory / "__0_0.distcp"))
            elif found == "unreachable":
                silent[tier].add(directory.name)
        assert isinstance(self.tiers.memory, MemoryOfStates)
        self.tiers.memory.unreachable = frozenset(silent["memory"])
        for name, durable in self.tiers.durable.items():
            assert isinstance(durable, FaultyTier)
            durable.plan = FaultPlan(faults=[Fault(key=directory, times=10**9) for directory in silent[name]])
        yield
        while undo:
            undo.pop()()

    def restore(self, *, use_memory: bool, tiers: Tiers | None = None) -> int | type[TieredError] | None:
        tiers = tiers or self.tiers
        group, loader = SoloGroup(), PlainLoader(SoloGroup())
        try:
            found = walk(
                group,
                tiers,
                survey(group, tiers),
                loader,
                step=None,
                events=self.store.events,
                room=self.store.room,
                use_memory=use_memory,
            )
        except TieredError as error:
            return type(error)
        if found is None:
            return None
        assert origin(loader.parts["__0_0.distcp"], 0) == (0, found.step)
        self.taken = found.tier
        return found.step


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        before = os.pread(file.fileno(), 1, 777)[0]
        os.pwrite(file.fileno(), bytes([before ^ 16]), 777)


@contextmanager
def table_of(root: Path, steps: tuple[int, ...], more: tuple[str, ...] = ()) -> Iterator[Table]:
    """Save *steps* and open their tiers, those of *more* with them."""
    job = make_saved(root, steps, more=more)
    settings = job.settings()
    store = Store(settings, SoloGroup())
    assert settings.memory is not None
    memory = MemoryOfStates(settings.memory, NAMESPACE)
    tiers = replace(
        store.tiers, memory=memory, durable={name: FaultyTier(tier) for name, tier in store.tiers.durable.items()}
    )
    store.events.emit = lambda event: None
    try:
        yield Table(job, tiers, store)
    finally:
        store.close()
