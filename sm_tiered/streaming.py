"""Saving straight to a durable tier from the trainer, for when the memory tier can't be used.

It blocks the training, so it has a deadline; the commit follows the same protocol, by the tier alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import xxhash

from sm_tiered import deadline, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.commit import TAKEOVER_SECS, Outcome, put_once, try_commit
from sm_tiered.errors import DeadlineExceededError, KeyExistsError, SaveError, TieredError, typed
from sm_tiered.events import SaveFailed, SaveStreamed
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered.ledger import Ledger
from sm_tiered.manifest import record_to_json
from sm_tiered.parts import PartSource
from sm_tiered.records import CheckpointId, Part, Record
from sm_tiered.store import Store
from sm_tiered.tiers.base import Chunks, Tier
from sm_tiered.tiers.file_list import put_file_list
from sm_tiered.tiers.shares import ShareTier, share_of
from sm_tiered.worker import Worker

__all__ = ["Streamer", "stream"]

_WATCH_SECS = (0.05, 2.0)
"""Shortest and longest pause between two looks whether a streamed save is committed."""
_LAST_WORDS_SECS = 10.0
"""How long a rank tries to tell a tier that it failed there."""


class Streamer:
    """Brings saves to the durable tiers from the trainer; what can wait goes on in *worker*."""

    def __init__(self, store: Store, worker: Worker, ledger: Ledger) -> None:
        self._store, self._worker, self._ledger = store, worker, ledger
        self._committed: CheckpointId | None = None
        """The newest that this rank saw committed: without a memory tier nothing else tells the next record of it."""

    def stream(
        self,
        parts: Sequence[PartSource],
        record: Record,
        handle: SaveHandle,
        tiers: Iterable[str],
        cause: TieredError | None,
    ) -> None:
        """Bring *parts* to *tiers*; *cause* is why memory can't be used, None when it has no free generation."""
        store, limit = self._store, self._limit(alone=cause is not None)
        record = replace(record, watermark=record.watermark or self._committed)
        end = time.monotonic() + limit
        for name in sorted(tiers):
            state, begun, tier = handle.state(name), time.monotonic(), store.tiers.durable[name]
            if state is None or handle.skipped(name):
                state = TierState()
                self._ledger.track(handle, name, state)
            try:
                with deadline.within(end - begun):
                    store.line.publish(tier)
                    written = stream(tier, parts, record, timeout_secs=end - begun)
            except Exception as failure:  # noqa: BLE001 - the handle delivers it
                error = typed(failure)
                state.settle(error)
                self._worker.submit(lambda tier=tier, error=error: self._put_failed(tier, record, error))
                continue
            reason = str(cause) if cause else store.no_room_reason
            secs = time.monotonic() - begun
            store.events.emit(SaveStreamed(step=record.checkpoint.step, tier=name, reason=reason, secs=secs))
            look = _CommitWatch(store, tier, written, state, self._note_committed).look
            self._worker.submit(lambda look=look: self._worker.poll(look, to_the_end=True, pause_secs=_WATCH_SECS))

    def _note_committed(self, checkpoint: CheckpointId) -> None:
        self._committed = max(checkpoint, self._committed or checkpoint)

    def _limit(self, *, alone: bool) -> float:
        """How long the training may wait; where this rank streams *alone*, the others wait in the next exchange."""
        settings = self._store.settings
        longest = settings.stream_timeout_secs
        return min(longest, settings.group_timeout_secs / 2) if alone else longest

    def refuse(self, record: Record, tiers: Iterable[str], error: TieredError) -> None:
        """Tell whoever commits on *tiers* that this rank's share will not come."""
        for name in sorted(tiers):
            tier = self._store.tiers.durable[name]
            self._worker.submit(lambda tier=tier: self._put_failed(tier, record, error))

    def _put_failed(self, tier: Tier, record: Record, error: TieredError) -> None:
        """Leave a failed record where the other ranks look for this one's, so that none waits for its deadline."""
        key = layout.in_dir(record.checkpoint, layout.record_name(record.rank))
        try:
            with deadline.within(min(_LAST_WORDS_SECS, self._store.settings.stream_timeout_secs)):
                put_once(tier, key, record_to_json(replace(record, parts=(), tables=(), failed=error.message)))
        except TieredError as second:
            self._tell(tier, record, second)

    def _tell(self, tier: Tier, record: Record, error: TieredError) -> None:
        self._store.events.emit(SaveFailed(step=record.checkpoint.step, tier=tier.name, error=str(error)))


def stream(tier: Tier, parts: Sequence[PartSource], record: Record, *, timeout_secs: float) -> Record:
    """Write *parts*, hashed on their way, and then *record* with them; return the record as written.

    Raises:
        DeadlineExceededError: it took longer than *timeout_secs*; nothing of it is visible.
        TierError: the tier refused.
    """
    end = time.monotonic() + timeout_secs
    own = [part for part in parts if not part.replica]
    if isinstance(tier, ShareTier):
        return _stream_share(tier, own, record, end)
    put_file_list(tier, record, own)
    written = tuple(_stream_part(tier, part, record, end) for part in own)
    full = replace(record, parts=written, tables=tuple(part.table for part in own))
    key = layout.in_dir(record.checkpoint, layout.record_name(record.rank))
    if not put_once(tier, key, record_to_json(full)):
        raise KeyExistsError(f"another record of rank {record.rank} stands there", tier=tier.name, key=key)
    return full


def _stream_share(tier: ShareTier, own: Sequence[PartSource], record: Record, end: float) -> Record:
    """Hash first: what tells of the parts goes ahead of them."""
    hashed: list[tuple[Part, Chunks]] = []
    for part in own:
        digests: list[str] = []
        for _ in _hashed(_in_time(part, end)(), digests):
            pass
        hashed.append((Part(name=part.name, size=part.size, chunks=tuple(digests)), _in_time(part, end)))
    full = replace(record, parts=tuple(part for part, _ in hashed), tables=tuple(part.table for part in own))
    tier.put_share(share_of(full, record_to_json(full), hashed))
    return full


def _stream_part(tier: Tier, part: PartSource, record: Record, end: float) -> Part:
    digests: list[str] = []

    def chunks() -> Iterator[memoryview]:
        digests.clear()
        return _hashed(_in_time(part, end)(), digests)

    tier.put_part(layout.in_dir(record.checkpoint, part.name), chunks, part.size)
    return Part(name=part.name, size=part.size, chunks=tuple(digests))


def _in_time(part: PartSource, end: float) -> Chunks:
    def chunks() -> Iterator[memoryview]:
        for chunk in part.chunks():
            if time.monotonic() > end:
                raise DeadlineExceededError("the memory tier can't be used and the durable one is too slow")
            yield chunk

    return chunks


def _hashed(pieces: Iterator[memoryview], digests: list[str]) -> Iterator[memoryview]:
    """Yield *pieces* as they are, leaving the digest of every 8 MiB in *digests*."""
    state, room = xxhash.xxh3_128(), CHUNK_BYTES
    for piece in pieces:
        view = piece.cast("B")
        start = 0
        while start < len(view):
            taken = view[start : start + room]
            state.update(taken)
            start += len(taken)
            room -= len(taken)
            if room == 0:
                digests.append(state.hexdigest())
                state, room = xxhash.xxh3_128(), CHUNK_BYTES
        yield view
    if room < CHUNK_BYTES:
        digests.append(state.hexdigest())


class _CommitWatch:
    """Looks after a streamed save, now and then, until its checkpoint is committed; rank 0 commits it itself."""

    def __init__(
        self, store: Store, tier: Tier, record: Record, state: TierState, told: Callable[[CheckpointId], None]
    ) -> None:
        self._store, self._tier, self._record, self._state, self._told = store, tier, record, state, told
        now = time.monotonic()
        self._lead_at = now if record.rank == 0 else now + TAKEOVER_SECS
        self._end = now + store.settings.commit_deadline_secs

    def look(self) -> bool:
        """Return whether it has ended, one way or the other: then the handle has been told."""
        try:
            if not self._committed(time.monotonic()):
                return False
        except Exception as error:  # noqa: BLE001 - the worker has no caller: the handle delivers it
            self._state.settle(typed(error))
            return True
        self._told(self._record.checkpoint)
        self._state.settle(None)
        if self._record.rank == 0:
            self._prune()
        return True

    def _committed(self, now: float) -> bool:
        tier, record = self._tier, self._record
        lead, compose = now >= self._lead_at, self._store.tiers.compose
        outcome = try_commit(tier, record.checkpoint, world=record.world, compose=compose, lead=lead)
        if outcome is Outcome.DELETED:
            raise SaveError("retention deleted it before it was whole", step=record.checkpoint.step, tier=tier.name)
        if outcome is Outcome.WAITING and now > self._end:
            raise DeadlineExceededError(
                "the other ranks' records did not come", step=record.checkpoint.step, tier=tier.name
            )
        return outcome is Outcome.COMMITTED

    def _prune(self) -> None:
        try:
            self._store.prune(self._tier, self._record.checkpoint)
        except TieredError as error:
            step = self._record.checkpoint.step
            self._store.events.emit(SaveFailed(step=step, tier=self._tier.name, error=str(error)))
