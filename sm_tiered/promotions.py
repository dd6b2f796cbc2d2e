"""One rank's side of the drain: which step goes to which durable tier, and how that ended.

The choice is made once for the whole job: all ranks call `choose` with the same agreed facts, so what is in flight and
what is marked is the same list everywhere.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
    """What one rank sees of its promotions, told by tiers: those of one lane share the answer."""

    busy: frozenset[str]
    """A promotion is in flight in the tier's lane."""
    busier: frozenset[str]
    """More than one is."""
    failed: int = 0
    """A number for one that has failed here, or 0. A larger one is a later step; `Promotions.abandon` takes it."""


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
        return self.seen(max((self._number(*pair) for pair in told), default=0))

    def seen(self, failed: int = 0) -> InFlight:
        """Return what was in flight at the last look."""
        settings = self._store.settings
        counts = Counter(settings.tier(tier).lane for _, tier in self._in_flight)
        lanes = {tier.name: counts[tier.lane] for tier in settings.durable}
        return InFlight(
            busy=frozenset(tier for tier, count in lanes.items() if count),
            busier=frozenset(tier for tier, count in lanes.items() if count > 1),
            failed=failed,
        )

    def lane_of(self, number: int) -> frozenset[str]:
        """Return the tiers in the lane of the promotion of that *number*."""
        settings = self._store.settings
        lane = settings.tiers[(number - 1) % len(settings.tiers)].lane
        return frozenset(tier.name for tier in settings.durable if tier.lane == lane)

    def _number(self, checkpoint: CheckpointId, tier: str) -> int:
        """A number, the same on all ranks, for a promotion of the present attempt; above 0."""
        names = [known.name for known in self._store.settings.tiers]
        return checkpoint.step * len(names) + names.index(tier) + 1

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
        """Return the durable tiers that *step* goes to now; those that are *busy* are only marked, unless *urgent*."""
        wanted = frozenset(due) | frozenset(self._marked)
        chosen = wanted if urgent else wanted.difference(busy)
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
                    lane=settings.tier(tier).lane,
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

    def abandon(self, number: int) -> None:
        """Give up the promotion of that *number* (see `look`): it failed on a rank, so it can't become whole."""
        queue, rank = self._store.queue, self._store.group.rank
        if queue is None:
            return
        current = self._store.line.current
        lost_pairs = [p for p in self._in_flight if p[0].attempt == current and self._number(*p) == number]
        for entry in queue.entries():
            if entry.rank == rank and (entry.checkpoint, entry.tier) in lost_pairs:
                queue.remove(entry)
        for checkpoint, tier in lost_pairs:
            if queue.result(checkpoint, tier) is None:
                lost = SaveError("another node could not promote it", step=checkpoint.step, tier=tier)
                queue.put_result(checkpoint, tier, lost)
        self._in_flight = [pair for pair in self._in_flight if pair not in lost_pairs]

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
