"""Saving: the one copy in the training thread, and all that follows in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sm_tiered.acks import Acks
from sm_tiered.agreement import Agreement, Negotiator, Request
from sm_tiered.composing import Composer
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import SaveError, TieredError, TierFullError, typed
from sm_tiered.events import SaveAcknowledged, SaveFailed, SaveStaged
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered.ledger import Ledger
from sm_tiered.parts import PartSource
from sm_tiered.promotions import Promotions
from sm_tiered.records import CheckpointId, Record
from sm_tiered.rescue import RESCUE_SECS, lacking, promote_newest
from sm_tiered.restore import Restored
from sm_tiered.stager import Staged, Stager
from sm_tiered.store import Store
from sm_tiered.streaming import Streamer
from sm_tiered.worker import Worker

__all__ = ["Saver"]

_HANDLES_KEPT = 64
"""So many saves back a handle can still be asked for; older counters are dropped from the job's store."""
_SETTLE_SECS = 1.0
"""How long a save waits for the digests of the one before it, so that its generation can be counted as whole."""


class Saver:
    """Saves through one `Store`. Not thread-safe: called from the training thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._worker = Worker("sm_tiered-finish", on_error=self._worker_failed)
        self._stager = Stager(store)
        self._acks = Acks(store.group)
        self._promotions = Promotions(store)
        self._negotiator = Negotiator(store, self._promotions)
        self._ledger = Ledger(store)
        self._streamer = Streamer(store, self._worker, self._ledger)
        self._composer = Composer(store, self._stager, self._acks)
        self._agreed: Agreement | None = None
        """What was agreed and neither saved nor aborted yet."""
        self._lost: dict[CheckpointId, TieredError] = {}
        """Saves of this attempt whose share of this rank is not in memory, and why."""
        self._recorded = threading.Event()
        """Of the newest save: its record is written, or will never be."""
        self._recorded.set()

    def agree(self, request: Request) -> Agreement:
        """Bring all ranks to one decision about the save; see `Negotiator.agree`. Collective."""
        self._recorded.wait(_SETTLE_SECS)
        left, gave_up = self._agreed, "this rank gave it up before its share was copied"
        if left is not None and left.repeated is not None:
            # Its bytes were there before: the others may be promoting it, and wait for this rank's share.
            self.save(left, (), metrics={}, begun=time.monotonic())
            left = None
        agreed = self._negotiator.agree(replace(request, gave_up=left.checkpoint if left is not None else None))
        if left is not None and agreed.others_went_on:
            self._abort(left, SaveError(gave_up))
            if agreed.checkpoint == left.checkpoint:
                agreed = replace(agreed, repeated=self._negotiator.handles[left.checkpoint])
        self._agreed = agreed
        return agreed

    def save(
        self, agreement: Agreement, parts: Sequence[PartSource], *, metrics: Mapping[str, float], begun: float
    ) -> SaveHandle:
        """Copy *parts* and return a handle; when this returns the state may change.

        *begun* is the ``time.monotonic()`` at which the training began to wait.
        """
        self._agreed = None
        store, checkpoint = self._store, agreement.checkpoint
        promote = self._promotions.choose(checkpoint.step, agreement.due, busy=agreement.busy, urgent=agreement.urgent)
        if agreement.repeated is not None:
            return self._again(agreement, agreement.repeated, parts, promote, metrics)
        record = self._blank(checkpoint, metrics)
        handle = self._new_handle(checkpoint, agreement)
        error = self._stage(agreement, parts, record, handle, promote) if agreement.in_memory else None
        if not agreement.in_memory or error is not None:
            self._streamer.stream(parts, record, handle, promote, error)
        if not agreement.in_memory:
            others = frozenset[str]() if promote else agreement.tiers
            self._ledger.skip(handle, store.no_room_reason, self._memory_name() | others)
        self._ledger.skip(handle, "the drain is busy: a later step takes its place", agreement.due - promote)
        handle.saved_bytes = sum(part.size for part in parts)
        handle.blocked_secs = time.monotonic() - begun
        store.events.emit(
            SaveStaged(
                step=checkpoint.step,
                tiers=tuple(sorted(handle.tiers)),
                blocked_secs=handle.blocked_secs,
                bytes=handle.saved_bytes,
            )
        )
        return handle

    def _abort(self, agreement: Agreement, error: TieredError) -> None:
        """Say that this rank's share of what others saved will not come, so that nobody waits for it."""
        checkpoint = agreement.checkpoint
        promote = self._promotions.choose(checkpoint.step, agreement.due, busy=agreement.busy, urgent=agreement.urgent)
        record = self._blank(checkpoint, {})
        self._fail(record, self._new_handle(checkpoint, agreement), error)
        self._give_up(record, error)
        self._streamer.refuse(record, promote, error)

    def _again(
        self,
        agreement: Agreement,
        handle: SaveHandle,
        parts: Sequence[PartSource],
        promote: frozenset[str],
        metrics: Mapping[str, float],
    ) -> SaveHandle:
        """A step is written once in an attempt: add the tiers and metrics that the first save lacked."""
        checkpoint, arena = agreement.checkpoint, self._store.arena
        durable = self._store.tiers.durable.keys()
        new = promote - {tier for tier in handle.tiers if not handle.skipped(tier)}
        memory = self._memory_name()
        in_memory = bool(memory & set(handle.tiers)) and not any(map(handle.skipped, memory))
        lost = self._lost.get(checkpoint) or (
            None if in_memory or parts else SaveError("its share was not given again")
        )
        if new and lost is not None:
            # The other ranks have written what they had then: with what this one has now, two states would mix.
            return self._refuse(handle, self._blank(checkpoint, metrics), new, lost)
        if metrics and arena is not None and all(handle.skipped(tier) for tier in durable & set(handle.tiers)):
            # A record that is on its way to another tier must stay as it is.
            self._worker.submit(lambda: self._stager.add_metrics(checkpoint, metrics))
        if new and not in_memory:
            self._streamer.stream(parts, self._blank(checkpoint, metrics), handle, new, None)
        elif new:
            self._promotions.begin(checkpoint, new)
            for tier in new:
                self._ledger.track(handle, tier, self._promotions.state(checkpoint, tier))
            self._worker.submit(lambda: self._promote_later(checkpoint, handle, new))
        self._ledger.skip(handle, "the drain is busy: a later step takes its place", agreement.due - promote)
        return handle

    def _refuse(self, handle: SaveHandle, record: Record, tiers: frozenset[str], error: TieredError) -> SaveHandle:
        for tier in sorted(tiers):
            state = TierState()
            state.settle(error)
            self._ledger.track(handle, tier, state)
        self._streamer.refuse(record, tiers, error)
        return handle

    def _blank(self, checkpoint: CheckpointId, metrics: Mapping[str, float]) -> Record:
        """What is known of this rank's record before anything is copied."""
        store = self._store
        return Record(
            namespace=store.settings.namespace,
            checkpoint=checkpoint,
            rank=store.group.rank,
            world=store.group.world,
            saved_at=time.time(),
            watermark=store.generations.watermark,
            metrics=dict(metrics),
        )

    # ---- the memory tier

    def _stage(
        self,
        agreement: Agreement,
        parts: Sequence[PartSource],
        record: Record,
        handle: SaveHandle,
        promote: frozenset[str],
    ) -> TieredError | None:
        """Copy into memory and leave the rest to the worker; return why that could not be done."""
        checkpoint = agreement.checkpoint
        try:
            staged = self._stager.stage(parts, record)
        except Exception as cause:  # also torch's own, such as a device without memory: the others must hear of it
            full = TierFullError(f"memory: {cause}", step=checkpoint.step) if isinstance(cause, OSError) else None
            error = full or typed(cause)
            self._fail(record, handle, error)
            self._give_up(record, error)
            return error
        self._promotions.begin(checkpoint, promote)
        for tier in sorted(promote):
            self._ledger.track(handle, tier, self._promotions.state(checkpoint, tier))
        recorded = self._recorded = threading.Event()
        self._worker.submit(lambda: self._finish_save(staged, handle, promote, recorded))
        return None

    def _finish_save(
        self, staged: Staged, handle: SaveHandle, promote: frozenset[str], recorded: threading.Event
    ) -> None:
        """On the worker: digests, record, acknowledgement; then promotion."""
        checkpoint, began = staged.record.checkpoint, time.monotonic()
        try:
            self._stager.finish(staged)
        except Exception as cause:  # The worker has no caller: the handle delivers it.
            recorded.set()
            self._lose(staged, handle, promote, typed(cause))
            return
        # The record stands, and others may count on it: nothing below may take it back.
        self._negotiator.written[checkpoint] = True
        try:
            crashpoint("ack.before")
            self._acks.give(checkpoint)
            self._store.events.emit(SaveAcknowledged(step=checkpoint.step, secs=time.monotonic() - began))
        except Exception as cause:
            self._settle_memory(handle, typed(cause))
        finally:
            recorded.set()
        error = self._promote(checkpoint, promote) if promote else None
        if error is not None:
            self._streamer.stream(staged.sources(), staged.record, handle, promote, error)
        elif not promote:
            # What is queued is drained, whoever queued it and whatever became of the drainer.
            self._promotions.nudge_or_tell(checkpoint)
        if self._composer.needed:
            self._worker.poll(lambda: self._composer.compose(checkpoint, at_once=bool(promote)))

    def _promote(self, checkpoint: CheckpointId, tiers: frozenset[str]) -> TieredError | None:
        """Hand *checkpoint* to the drainer; return why that could not be done."""
        try:
            self._promotions.enqueue(checkpoint, tiers)
        except Exception as cause:
            self._promotions.withdraw(checkpoint, tiers)
            return typed(cause)
        return None

    def _promote_later(self, checkpoint: CheckpointId, handle: SaveHandle, tiers: frozenset[str]) -> None:
        error = self._promote(checkpoint, tiers)
        if error is not None:
            for tier in tiers:
                handle.settle(tier, error)
            self._streamer.refuse(self._blank(checkpoint, {}), tiers, error)

    def _lose(self, staged: Staged, handle: SaveHandle, promote: frozenset[str], error: TieredError) -> None:
        """What was copied can't be recorded in memory: bring it to the durable tiers all the same, then let it go."""
        record = staged.record
        self._fail(record, handle, error)
        self._promotions.withdraw(record.checkpoint, promote)
        self._streamer.stream(staged.sources(), record, handle, promote, error)
        self._give_up(record, error)

    def _fail(self, record: Record, handle: SaveHandle, error: TieredError) -> None:
        """This rank's share in memory is lost: tell the handle and the other ranks."""
        self._lost[record.checkpoint] = error
        error.step = error.step if error.step is not None else record.checkpoint.step
        self._settle_memory(handle, error)
        try:
            self._acks.refuse(record.checkpoint)
        except TieredError as second:
            self._tell(record.checkpoint, f"{error}; the other ranks could not be told: {second}")

    def _give_up(self, record: Record, error: TieredError) -> None:
        """Free what was copied, and say in the directory why there is no more of it."""
        if self._store.arena is None:
            return
        try:
            self._store.arena.drop([record.checkpoint])
            self._stager.put_failed(record, error.message)
        except (TieredError, OSError) as second:
            # A directory without this record is as incomplete as one that tells why.
            self._tell(record.checkpoint, str(second))

    def _settle_memory(self, handle: SaveHandle, error: TieredError) -> None:
        for name in self._memory_name():
            handle.settle(name, error)

    def _worker_failed(self, error: Exception) -> None:
        """What no job expected; it must not end the thread that acknowledges saves."""
        step = self._store.line.last_step
        self._store.events.emit(
            SaveFailed(step=step if step is not None else 0, tier="memory", error=str(typed(error)))
        )

    def _tell(self, checkpoint: CheckpointId, error: str) -> None:
        self._store.events.emit(SaveFailed(step=checkpoint.step, tier="memory", error=error))

    # ---- handles

    def _new_handle(self, checkpoint: CheckpointId, agreement: Agreement) -> SaveHandle:
        handle = SaveHandle(step=checkpoint.step, nudge=self._promotions.nudge)
        self._negotiator.handles[checkpoint] = handle
        for old in list(self._negotiator.handles)[:-_HANDLES_KEPT]:
            del self._negotiator.handles[old]
            self._lost.pop(old, None)
            self._worker.submit(lambda old=old: self._acks.forget(old))
        if agreement.in_memory:
            for name in self._memory_name():
                self._ledger.track(handle, name, TierState(lambda: self._acks.look(checkpoint)))
        return handle

    def _memory_name(self) -> frozenset[str]:
        memory = self._store.settings.memory
        return frozenset({memory.name}) if memory else frozenset()

    # ---- the end

    def promote_restored(self, restored: Restored, tiers: frozenset[str]) -> None:
        """Bring what was restored to those of *tiers* that lack it. Every rank must call, for its own share."""
        checkpoint, new = restored.checkpoint, lacking(restored, self._store, tiers)
        if not new:
            return
        handle = SaveHandle(step=checkpoint.step, nudge=self._promotions.nudge)
        self._promotions.begin(checkpoint, new)
        for tier in sorted(new):
            self._ledger.track(handle, tier, self._promotions.state(checkpoint, tier))
        self._worker.submit(lambda: self._promote_later(checkpoint, handle, new))
        if self._composer.needed:
            self._worker.poll(lambda: self._composer.compose(checkpoint, at_once=True, acknowledged=True))

    def promote_newest(self, tiers: frozenset[str] | None = None) -> int | None:
        """After a failure: bring the newest step in memory to safety; see `rescue.promote_newest`. Not collective."""
        self._recorded.wait(RESCUE_SECS)
        return promote_newest(self._negotiator.handles, self._store, self._promotions, tiers)

    def deliver(self) -> TieredError | None:
        """Tell of failed saves; see `Ledger.deliver`."""
        return self._ledger.deliver()

    def settle(self) -> None:
        """Wait until this rank's newest record is written."""
        self._recorded.wait(self._store.settings.group_timeout_secs)

    def quiesce(self) -> None:
        """Wait until the worker has done what was handed to it: it may read memory that a restore is about to free."""
        self._store.check_process()  # a fork has no worker to wait for
        self._worker.quiesce(self._store.settings.group_timeout_secs)

    def wait(self, timeout_secs: float) -> None:
        """Wait until every save has ended on every tier; see `Ledger.wait`. Not collective."""
        self._ledger.wait(timeout_secs)

    def close(self, *, patient: bool = True) -> None:
        """End the worker. What the drainer has goes on without it.

        *patient*: wait for what this process itself streamed to be committed. Not after a `wait`, which did so, nor
        where the training has failed.
        """
        self._composer.hurry()
        self._worker.close(patient=patient)
