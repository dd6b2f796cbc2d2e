"""One rank's side of the drain: which step goes to which durable tier, and how that ended.

The choice is made once for the whole job: all ranks call `choose` with the same agreed facts, so what is in flight and
what is marked is the same list everywhere.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from sm_tiered.drainer import QUEUE_LOCK
from sm_tiered.errors import SaveError, TieredError, TierUnavailableError
from sm_tiered.events import DurableSkipped, SaveFailed
from sm_tiered.handle import TierState
from sm_tiered.locks import FileLock
from sm_tiered.queue import Entry, Result
from sm_tiered.records import CheckpointId
from sm_tiered.store import Store

__all__ = ["InFlight", "Promotions"]

_LOCK_SECS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """What one rank sees of its promotions."""

    counts: Mapping[str, int]
    """By tier, how many are in flight, those that have failed here among them until all ranks have heard of it."""
    failed: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tier, the newest step of the present attempt that has failed here."""


class Promotions:
    """What this rank has asked of its node's drainer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._in_flight: list[tuple[CheckpointId, str]] = []
        self._withdrawn: set[tuple[CheckpointId, str]] = set()
        self._handed: set[tuple[CheckpointId, str]] = set()
        """Those that the queue has had from this rank."""
        self._marked: dict[str, int] = {}

    def look(self) -> InFlight:
        """Find out which promotions have ended, and return what is in flight."""
        self._in_flight = [pair for pair in self._in_flight if pair not in self._withdrawn]
        ended = {pair: self._ended(*pair) for pair in self._in_flight}
        failed = {pair for pair, result in ended.items() if result is not None and result[0] is not None}
        # A failed one stays in flight until all ranks have heard of it; of an attempt that was left, nobody waits.
        told = {pair for pair in failed if pair[0].attempt == self._store.line.current}
        self._in_flight = [pair for pair, result in ended.items() if result is None or pair in told]
        self._withdrawn &= set(self._in_flight)
        self._handed &= set(self._in_flight)
        return replace(self.seen(), failed={tier: c.step for c, tier in sorted(told)})

    def seen(self) -> InFlight:
        """Return what was in flight at the last look, nothing of it known to have failed."""
        return InFlight(counts=Counter(tier for _, tier in self._in_flight))

    def _ended(self, checkpoint: CheckpointId, tier: str) -> tuple[TieredError | None] | None:
        queue = self._store.queue
        if queue is None:
            return None
        found = queue.result(checkpoint, tier)
        if found is None and self._lost(checkpoint, tier):
            found = queue.result(checkpoint, tier) or Result(
                error=SaveError(
                    "the queue has lost it",
                    hint="Was the memory tier's directory deleted? The next save goes on.",
                    step=checkpoint.step,
                    tier=tier,
                )
            )
        return (found.error,) if found else None

    def _lost(self, checkpoint: CheckpointId, tier: str) -> bool:
        """Whether an entry that the queue had is gone; without a result, nobody will ever tell how it ended."""
        queue, rank = self._store.queue, self._store.group.rank
        if queue is None or (checkpoint, tier) not in self._handed:
            return False

        def is_there() -> bool:
            return any((e.checkpoint, e.tier, e.rank) == (checkpoint, tier, rank) for e in queue.entries())

        # Twice: an entry that the drainer renames, once in its life, may slip through one look.
        return not is_there() and not is_there()

    def choose(self, step: int, due: Iterable[str], *, busy: Collection[str], urgent: bool) -> frozenset[str]:
        """Return the durable tiers that *step* goes to now; those that are *busy* are only marked, unless *urgent*.

        What was marked before waits until its tier is free.
        """
        due = frozenset(due)
        free = due.union(self._marked).difference(busy)
        chosen = free | due if urgent else free
        for tier in sorted(chosen.union(due)):
            older = self._marked.pop(tier, step)
            if older != step:
                how = "was" if tier in chosen else "is still"
                reason = f"step {step} takes its place: the drain {how} busy"
                self._store.events.emit(DurableSkipped(step=older, tier=tier, reason=reason))
            if tier not in chosen:
                self._marked[tier] = step
        return chosen

    def begin(self, checkpoint: CheckpointId, tiers: Iterable[str]) -> None:
        """Say that *checkpoint* is in flight, on all ranks alike; its entry follows when its record is written."""
        self._in_flight += [(checkpoint, tier) for tier in sorted(tiers)]

    def enqueue(self, checkpoint: CheckpointId, tiers: Iterable[str], *, ranks: Iterable[int] | None = None) -> None:
        """Hand what this rank, or each of *ranks* of this node, wrote of *checkpoint* to the drainer.

        See to it that there is a drainer.
        """
        tiers = sorted(tiers)
        queue, memory = self._store.queue, self._store.tiers.memory
        if queue is None or memory is None:
            raise SaveError("there is no memory tier to promote from", step=checkpoint.step)
        group, settings = self._store.group, self._store.settings
        recipe = queue.put_recipe(settings.text)
        guard = FileLock(memory.lock_path(QUEUE_LOCK))
        if not guard.acquire(exclusive=True, timeout_secs=_LOCK_SECS):
            raise TierUnavailableError(f"the queue's lock was not to be had in {_LOCK_SECS:.0f} s", tier=memory.name)
        try:
            for rank, tier in itertools.product((group.rank,) if ranks is None else ranks, tiers):
                entry = Entry(
                    checkpoint=checkpoint,
                    rank=rank,
                    tier=tier,
                    world=group.world,
                    recipe=recipe,
                    finisher=self._store.finisher.module,
                    deadline_at=time.time() + settings.tier(tier).in_flight_secs(settings.commit_deadline_secs),
                    patient=settings.tier(tier).patient,
                    place=settings.place_of(tier),
                )
                queue.put(entry)
                self._handed.add((checkpoint, tier))
            self.nudge_or_tell(checkpoint)
        except BaseException:
            self._take_back({(checkpoint, tier) for tier in tiers})
            raise
        finally:
            guard.release()

    def _take_back(self, pairs: set[tuple[CheckpointId, str]]) -> None:
        """Leave no entry behind of what the trainer now brings to the tiers itself."""
        queue, rank = self._store.queue, self._store.group.rank
        assert queue is not None
        for entry in queue.entries():
            if entry.rank == rank and (entry.checkpoint, entry.tier) in pairs:
                queue.remove(entry)
        self._handed -= pairs

    def abandon(self, step: int, tier: str) -> None:
        """Give up the promotion of *step* to *tier*: it failed on a rank, so it can't become whole."""
        queue, rank = self._store.queue, self._store.group.rank
        if queue is None:
            return
        lost = [c for c, to in self._in_flight if (c.attempt, c.step, to) == (self._store.line.current, step, tier)]
        for entry in queue.entries():
            if (entry.rank, entry.tier) == (rank, tier) and entry.checkpoint in lost:
                queue.remove(entry)
        for checkpoint in lost:
            if queue.result(checkpoint, tier) is None:
                error = SaveError("another node could not promote it", step=checkpoint.step, tier=tier)
                queue.put_result(checkpoint, tier, error)
        self._in_flight = [(c, to) for c, to in self._in_flight if to != tier or c not in lost]

    def withdraw(self, checkpoint: CheckpointId, tiers: Iterable[str]) -> None:
        """Say that *checkpoint* does not go through the drainer after all. Any thread may."""
        self._withdrawn.update((checkpoint, tier) for tier in tiers)

    def state(self, checkpoint: CheckpointId, tier: str) -> TierState:
        """Return how the promotion of *checkpoint* to *tier* stands, to be asked again and again."""

        def look() -> tuple[bool, TieredError | None]:
            result = self._ended(checkpoint, tier)
            return (True, result[0]) if result else (False, None)

        return TierState(look)

    def nudge_or_tell(self, checkpoint: CheckpointId) -> None:
        """`nudge`; that no drainer can be started just now is told, for the next save or wait tries again."""
        try:
            self.nudge()
        except (TieredError, OSError) as error:
            reason = f"the drainer can't be started: {error}"
            self._store.events.emit(SaveFailed(step=checkpoint.step, tier="memory", error=reason))

    def nudge(self) -> None:
        """Start the drainer again if it is gone and there is something to drain."""
        if self._store.queue is not None and self._store.queue.entries():
            self._store.start_drainer()
