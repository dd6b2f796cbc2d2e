"""Whole jobs in one process: ranks are threads, nodes are directories, drainers are driven by hand on a virtual clock.

A launch, a save or a crash takes milliseconds, so that thousands of them fit into a test. What a crash is here: locks
and mappings go, as the kernel lets them go, and what a rank had not yet written is never written.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

from sm_tiered import drainer
from sm_tiered.drain import Drain
from sm_tiered.errors import RankFailedError
from sm_tiered.event_log import Events
from sm_tiered.finish import finisher
from sm_tiered.policies.keep import Latest
from sm_tiered.queue import Entry, Queue
from sm_tiered.recipe import Recipe
from sm_tiered.settings import MemorySettings, Settings
from sm_tiered.testing.plain import PlainEngine
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["NAMESPACE", "Cluster", "Job", "Lost", "ThreadGroup", "ThreadHub"]

NAMESPACE = "run-1"
_SHORT_SECS = 1.0
_HANG_SECS = 10.0
_T = TypeVar("_T")


class Lost(BaseException):
    """A rank dies here: nothing of it goes on, and the others do so without it, as far as they can."""


class ThreadHub:
    """What the threads of one job meet in."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.changed = threading.Condition()
        self.lost: set[int] = set()
        self.counters: dict[str, int] = {}
        self._offers: dict[int, str] = {}
        self._answer = ""
        self._round = 0

    def gather(self, rank: int, value: object) -> list[Any]:
        """Return every rank's *value*; raise when a rank has died, fail the test when one never comes."""
        with self.changed:
            begun = self._round
            self._offers[rank] = json.dumps(value)
            if len(self._offers) == self.world:
                self._answer = f"[{','.join(self._offers[other] for other in range(self.world))}]"
                self._offers.clear()
                self._round += 1
                self.changed.notify_all()
            elif not self.changed.wait_for(lambda: self._round != begun or self.lost, _HANG_SECS):
                raise AssertionError(f"rank {rank} waits in a collective: only {sorted(self._offers)} have come")
            if self._round == begun:
                raise RankFailedError("a rank ended", rank=min(self.lost))
            return json.loads(self._answer)

    def leave(self, rank: int) -> None:
        """Say that *rank* comes to no collective of this call any more."""
        with self.changed:
            self.lost.add(rank)
            self.changed.notify_all()

    def begin(self) -> None:
        """Let everybody meet again: what one call of all ranks left undone is over."""
        with self.changed:
            self.lost.clear()
            self._offers.clear()


class ThreadGroup:
    """One thread's end. A `sm_tiered.group.Group`."""

    def __init__(self, hub: ThreadHub, rank: int) -> None:
        self._hub, self.rank, self.world = hub, rank, hub.world

    def max(self, values: Sequence[int]) -> list[int]:
        """See `Group.max`."""
        return [max(column) for column in zip(*self.gather(list(values)), strict=True)]

    def gather(self, value: object) -> list[Any]:
        """See `Group.gather`."""
        return self._hub.gather(self.rank, value)

    def add(self, key: str, amount: int) -> int:
        """See `Group.add`."""
        with self._hub.changed:
            self._hub.counters[key] = self._hub.counters.get(key, 0) + amount
            return self._hub.counters[key]

    def drop(self, key: str) -> None:
        """See `Group.drop`."""
        with self._hub.changed:
            self._hub.counters.pop(key, None)

    def close(self) -> None:
        """See `Group.close`."""


class Job:
    """One launch: an engine for each rank, on its node."""

    def __init__(self, cluster: Cluster, placement: Sequence[int]) -> None:
        self.placement, self.world = tuple(placement), len(placement)
        self._hub = ThreadHub(self.world)
        self._pool = ThreadPoolExecutor(self.world, thread_name_prefix="rank")
        self.engines: list[PlainEngine] = []
        self.engines = self._each(lambda rank: cluster.open(rank, placement[rank], ThreadGroup(self._hub, rank)))

    def _each(self, work: Callable[[int], _T]) -> list[_T]:
        """Run *work* for all ranks at once; raise what a rank raised, one that was not merely left alone first."""
        self._hub.begin()

        def guarded(rank: int) -> _T:
            try:
                return work(rank)
            except BaseException:
                self._hub.leave(rank)
                raise

        futures = [self._pool.submit(guarded, rank) for rank in range(self.world)]
        errors = [error for future in futures if (error := future.exception(2 * _HANG_SECS)) is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, RankFailedError)), errors[0])
        return [future.result() for future in futures]

    def each(self, work: Callable[[PlainEngine], _T]) -> list[_T]:
        """Run *work* with every rank's engine at once and return what each returned."""
        return self._each(lambda rank: work(self.engines[rank]))

    def settle(self, ranks: Sequence[int] | None = None) -> None:
        """Wait until the background threads of *ranks*, by default of all, have nothing left to do."""
        for engine in self.engines if ranks is None else [self.engines[rank] for rank in ranks]:
            done = threading.Event()
            engine.saver._worker.submit(done.set)
            assert done.wait(_HANG_SECS), f"rank {engine.group.rank}: its background thread does not end"
        self._await_commits(_HANG_SECS if ranks is None else _SHORT_SECS)

    def _await_commits(self, secs: float) -> None:
        """Wait for the commits of what was streamed; with a dead rank some never come."""
        end = time.monotonic() + secs
        while any(poll.to_the_end for engine in self.engines for poll in engine.saver._worker._polls):
            if time.monotonic() > end:
                return
            time.sleep(0.005)

    def end(self) -> None:
        """Let go of everything, as the kernel does with a dead process."""
        for engine in self.engines:
            # A dead process waits for nobody's commit.
            worker = engine.saver._worker
            worker.submit(lambda worker=worker: worker._polls.clear())  # looked up there: each round has a new list
            engine.close()
        self._pool.shutdown()
        self.engines = []


@dataclass
class Cluster:
    """Nodes that keep memory directories, one durable directory, and jobs one after the other."""

    root: Path
    nodes: int = 2
    keep: int = 1
    durable_keep: Mapping[str, Any] = field(default_factory=lambda: {"latest": 2})
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Top-level fields of the recipe."""
    skew_secs: float = 0.0
    """How far the drainers' clock is ahead."""
    _drains: dict[int, Drain] = field(default_factory=dict[int, Drain])

    def memory(self, node: int) -> Path:
        """Where the checkpoints of *node*'s memory are."""
        return self.root / f"memory-{node}" / NAMESPACE

    @property
    def durable(self) -> Path:
        """Where the checkpoints of the durable tier are."""
        return self.root / "durable" / NAMESPACE

    def settings(self, node: int) -> Settings:
        """Return the settings of a rank on *node*."""
        recipe = {
            "version": 1,
            "namespace": NAMESPACE,
            "group_timeout_secs": _HANG_SECS,
            "in_use_wait_secs": 1,
            "tiers": {
                "memory": {
                    "kind": "memory",
                    "path": str(self.memory(node).parent),
                    "allow_disk": True,
                    "keep": {"latest": self.keep},
                },
                "durable": {
                    "kind": "local",
                    "path": str(self.durable.parent),
                    "fsync": False,
                    "keep": dict(self.durable_keep),
                },
            },
            **self.options,
        }
        return Recipe.parse(recipe).settings()

    def open(self, rank: int, node: int, group: ThreadGroup) -> PlainEngine:
        """Open the engine of *rank* on *node*. Collective. Nothing starts a drainer: the test is the drainer."""
        engine = PlainEngine(self.settings(node), group)
        engine.store.start_drainer = lambda: None
        return engine

    def launch(self, placement: Sequence[int]) -> Job:
        """Start a job, rank by rank on the nodes of *placement*."""
        return Job(self, placement)

    def lose(self, node: int) -> None:
        """Take away all that *node* has in memory, its drainer among it."""
        self._drains.pop(node, None)
        shutil.rmtree(self.memory(node).parent, ignore_errors=True)

    # ---- draining

    def now(self) -> float:
        """The time that drainers go by."""
        return time.time() + self.skew_secs

    def clock(self) -> AbstractContextManager[object]:
        """Let trainers go by the same clock as drainers when they set deadlines."""
        return patch("sm_tiered.promotions.time", SimpleNamespace(time=self.now, monotonic=time.monotonic))

    def queue(self, node: int) -> Queue:
        """Return the queue of *node*."""
        return Queue(self._memory_tier(node))

    def waiting(self, node: int) -> list[Entry]:
        """Return what *node* has still to promote."""
        return self.queue(node).entries() if self.memory(node).exists() else []

    def _memory_tier(self, node: int) -> MemoryTier:
        path = str(self.memory(node).parent)
        keep = Latest(n=1)
        tier = MemorySettings(name="memory", save=None, keep=keep, path=path, budget_bytes=None, allow_disk=True)
        return MemoryTier(tier, NAMESPACE)

    def drainer(self, node: int, *, fresh: bool = False) -> Drain:
        """Return the drainer of *node*; *fresh*: one that has just been started."""
        if fresh or node not in self._drains:
            memory = self._memory_tier(node)
            queue, events = Queue(memory), Events(namespace=NAMESPACE, rank=None, path=None)
            targets = drainer._Targets(memory, queue, events)
            self._drains[node] = Drain(
                memory,
                queue,
                target=targets.target,
                compose=finisher,
                events=events,
                entries=queue.entries,
                clock=self.now,
            )
        return self._drains[node]

    def drain(self, nodes: Sequence[int], *, rounds: int = 4, pause_secs: float = 2.5, fresh: bool = False) -> None:
        """Let the drainers of *nodes* take turns, until they have nothing left or *rounds* are over."""
        for number in range(rounds):
            busy = [node for node in nodes if self.memory(node).exists()]
            idle = [self.drainer(node, fresh=fresh and number == 0).turn() is None for node in busy]
            if all(idle):
                return
            self.skew_secs += pause_secs


@contextmanager
def running(job: Job) -> Iterator[Job]:
    """End *job* in any case."""
    try:
        yield job
    finally:
        job.end()
