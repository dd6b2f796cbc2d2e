"""Promotion: what one node's drainer does with the queue. The process around it is `sm_tiered.drainer`.

Every promotion is a small state machine that is driven by `Drain.turn`: upload this node's parts and records, then
look for the other ranks' records until the checkpoint is committed, a rank failed, or the deadline has passed. A
promotion that waits for another node never holds up the next one, and what is being sent only those of its own lane.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field

from sm_tiered import deadline, layout
from sm_tiered.commit import TAKEOVER_SECS, Compose, Outcome, put_once, try_commit
from sm_tiered.errors import (
    DeadlineExceededError,
    FormatError,
    KeyNotFoundError,
    RankFailedError,
    SaveError,
    TieredError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
    typed,
)
from sm_tiered.event_log import Events
from sm_tiered.events import Committed, PromoteFailed, PromoteStarted, Pruned
from sm_tiered.inventory import read_records
from sm_tiered.manifest import MAX_BYTES, record_to_json
from sm_tiered.queue import Entry, Queue
from sm_tiered.records import CheckpointId, Record
from sm_tiered.sending import Sender
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.tiers.shares import ShareTier

__all__ = ["Drain", "Target"]

_POLL_SECS = (0.05, 2.0)
"""Shortest and longest pause between two looks for the other ranks' records."""
_LAST_TRY_SECS = 60.0
_PREPARE_SECS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A durable tier, and what happens after a commit on it."""

    tier: Tier
    prune: Callable[[CheckpointId], list[CheckpointId]]


@dataclass(slots=True, kw_only=True)
class _Promotion:
    entries: list[Entry]
    begun_at: float
    bytes: int = 0
    sent: set[int] = field(default_factory=set[int])
    """Ranks whose parts and record are on the tier."""
    next_at: float = 0.0
    pause_secs: float = _POLL_SECS[0]
    complete_since: float | None = None

    def later(self, now: float, longest: float = _POLL_SECS[1]) -> None:
        self.next_at = now + self.pause_secs
        self.pause_secs = min(2 * self.pause_secs, longest)


class Drain:
    """Works through those entries of a node's queue that *entries* returns, whenever it is asked.

    Not thread-safe; one process at a time, guarded by the drainer's lock.
    """

    def __init__(
        self,
        memory: MemoryTier,
        queue: Queue,
        *,
        target: Callable[[Entry], Target],
        compose: Callable[[str], Compose],
        events: Events,
        entries: Callable[[], list[Entry]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._memory, self._queue, self._target, self._entries = memory, queue, target, entries
        self._compose, self._events, self._clock = compose, events, clock
        self._promotions: dict[tuple[CheckpointId, str], _Promotion] = {}
        self._sender = Sender(memory)

    def turn(self) -> float | None:
        """Do what can be done now. Return the seconds until there may be more to do, or None when nothing is queued."""
        grouped = itertools.groupby(self._entries(), key=lambda entry: (entry.checkpoint, entry.tier))
        found = {key: list(entries) for key, entries in grouped}
        for key in set(self._promotions) - set(found):
            del self._promotions[key]
        for key, entries in found.items():
            promotion = self._promotions.get(key)
            if promotion is None:
                promotion = self._promotions[key] = _Promotion(entries=entries, begun_at=self._clock())
                self._events.emit(PromoteStarted(step=key[0].step, tier=key[1]))
            promotion.entries = entries
            if promotion.next_at <= self._clock() and self._advanced(promotion):
                del self._promotions[key]
        if not self._promotions:
            return None if not found else 0.0
        return max(0.0, min(p.next_at for p in self._promotions.values()) - self._clock())

    def _advanced(self, promotion: _Promotion) -> bool:
        """`_advance`; what keeps even the end of one promotion from being told must not end the drainer of all."""
        first = promotion.entries[0]
        try:
            return self._advance(promotion)
        except Exception as error:
            self._events.emit(PromoteFailed(step=first.checkpoint.step, tier=first.tier, error=str(typed(error))))
            promotion.later(self._clock(), longest=30.0)
            return False

    def _advance(self, promotion: _Promotion) -> bool:
        """Bring one promotion on; True when it has ended, well or not."""
        first = promotion.entries[0]
        # What waited for a node to come back is tried all the same: it is late, not lost.
        late = promotion.begun_at > first.deadline_at
        overdue = self._clock() > (promotion.begun_at + _LAST_TRY_SECS if late else first.deadline_at)
        try:
            if overdue:
                raise DeadlineExceededError(
                    "not committed within commit_deadline", step=first.checkpoint.step, tier=first.tier
                )
            committed = self._work(promotion)
        except TierUnavailableError as error:
            if overdue or not first.patient:
                self._end(promotion, error)
                return True
            promotion.later(self._clock(), longest=30.0)
            return False
        except (TieredError, OSError) as error:
            self._end(promotion, error if isinstance(error, TieredError) else SaveError(str(error)))
            return True
        if committed:
            # Outside of the `try`: what can't be told now is no failure of what is committed.
            self._end(promotion, None)
            if self._may_commit(promotion):
                self._prune(first)
        return committed

    def _work(self, promotion: _Promotion) -> bool:
        """Bring one promotion on; True once its checkpoint is committed."""
        first = promotion.entries[0]
        target = self._target(first)
        for entry in [e for e in promotion.entries if not e.sent and e.rank not in promotion.sent]:
            promotion.bytes += self._send(entry, target)
            promotion.sent.add(entry.rank)
            with suppress(TierFullError):  # then its bytes are held until the commit, and no longer
                self._queue.mark_sent(entry)
        lead = self._may_commit(promotion)
        compose = self._composer(promotion, target)
        if compose is None:
            promotion.later(self._clock())
            return False
        outcome = try_commit(target.tier, first.checkpoint, world=first.world, compose=compose, lead=lead)
        if outcome is Outcome.WAITING:
            promotion.later(self._clock())
            return False
        if outcome is Outcome.DELETED:
            raise SaveError("retention deleted it before it was whole", step=first.checkpoint.step, tier=first.tier)
        return True

    def _send(self, entry: Entry, target: Target) -> int:
        # What has no patience must not hold up the others: they are sent one after the other.
        limit = nullcontext() if entry.patient else deadline.within(max(1.0, entry.deadline_at - self._clock()))
        with limit:
            try:
                return self._sender.send(entry, target.tier)
            except TierFullError:
                if not isinstance(target.tier, ShareTier):
                    raise
                # Its service would drop what is lowest: what is not wanted any more has to go before.
                self._prune(entry)
                return self._sender.send(entry, target.tier)

    def _composer(self, promotion: _Promotion, target: Target) -> Compose | None:
        """Who makes the files for other readers; None: the trainers may be about to leave them."""
        first = promotion.entries[0]
        if isinstance(target.tier, ShareTier):
            return lambda records: {}
        prepared = self._prepared(first)
        if prepared is None and first.finisher and self._clock() - promotion.begun_at < self._patience(first):
            return None
        return prepared or self._compose(first.finisher)

    def _patience(self, entry: Entry) -> float:
        """How long to leave the files for other readers to the trainers: a child of our own costs seconds of CPU."""
        return _PREPARE_SECS if len(read_records(self._memory, entry.checkpoint)) == entry.world else 0.0

    def _prepared(self, entry: Entry) -> Compose | None:
        """The files for other readers as the trainers left them beside the parts, where one node holds all records."""
        try:
            made = {
                name: self._memory.get(layout.in_dir(entry.checkpoint, name), max_bytes=MAX_BYTES).data
                for name in (layout.METADATA, layout.INDEX)
            }
        except KeyNotFoundError:
            return None
        return lambda records: made

    def _may_commit(self, promotion: _Promotion) -> bool:
        """The node of rank 0 commits at once, the others only when it does not."""
        if any(entry.rank == 0 for entry in promotion.entries):
            return True
        now = self._clock()
        promotion.complete_since = promotion.complete_since or now
        return now - promotion.complete_since > TAKEOVER_SECS

    def _end(self, promotion: _Promotion, error: TieredError | None) -> None:
        first, secs = promotion.entries[0], self._clock() - promotion.begun_at
        step, tier = first.checkpoint.step, first.tier
        if error is not None:
            error.step, error.tier = error.step if error.step is not None else step, error.tier or tier
            self._events.emit(PromoteFailed(step=step, tier=tier, error=str(error)))
            self._tell_others(promotion, error)
        else:
            self._events.emit(Committed(step=step, tier=tier, secs=secs, bytes=promotion.bytes))
        self._queue.put_result(first.checkpoint, first.tier, error)
        for entry in promotion.entries:
            self._queue.remove(entry)

    def _tell_others(self, promotion: _Promotion, error: TieredError) -> None:
        """Leave a failed record where this node's record should be, so that no other node waits for the deadline."""
        if isinstance(error, (RankFailedError, DeadlineExceededError, TierRefusedError, TierUnavailableError)):
            return
        for entry in promotion.entries:
            failed = Record(
                namespace=self._memory.namespace,
                checkpoint=entry.checkpoint,
                rank=entry.rank,
                world=entry.world,
                saved_at=self._clock(),
                failed=error.message,
            )
            key = layout.in_dir(entry.checkpoint, layout.record_name(entry.rank))
            try:
                put_once(self._target(entry).tier, key, record_to_json(failed))
            except TieredError as second:
                self._events.emit(PromoteFailed(step=entry.checkpoint.step, tier=entry.tier, error=str(second)))

    def _prune(self, entry: Entry) -> None:
        try:
            gone = self._target(entry).prune(entry.checkpoint)
        except (TieredError, FormatError) as error:
            self._events.emit(PromoteFailed(step=entry.checkpoint.step, tier=entry.tier, error=f"retention: {error}"))
            return
        if gone:
            self._events.emit(Pruned(tier=entry.tier, steps=tuple(c.step for c in gone)))
