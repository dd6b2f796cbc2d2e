"""How the ranks come to one decision about a save: one all-reduce, before anything is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sm_tiered.errors import RankFailedError, StructureError, TierError, typed
from sm_tiered.events import SaveFailed
from sm_tiered.exchange import HISTORY, Agreed, Offer, exchange
from sm_tiered.handle import SaveHandle
from sm_tiered.promotions import Promotions
from sm_tiered.records import CheckpointId
from sm_tiered.store import Store

__all__ = ["Agreement", "Negotiator", "Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a rank knows about a save before the ranks agree on it."""

    step: int
    tiers: frozenset[str]
    urgent: bool = False
    """The last save before an end: it is queued even behind one that is in flight."""
    structure_changed: bool = False
    values_signature: int = 0
    values_fingerprint: int = 0
    size: int | None = None
    """Bytes of this rank's recycled part, where they are known."""
    failure: Exception | None = None
    """Why this rank could not read its state."""
    gave_up: CheckpointId | None = None
    """What was agreed on last, if this rank never came to save it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What all ranks do, alike."""

    checkpoint: CheckpointId
    tiers: frozenset[str]
    """Those that were asked for."""
    due: frozenset[str]
    """Durable tiers that want a step, older marks included."""
    busy: frozenset[str]
    """Durable tiers in whose lane something is in flight."""
    urgent: bool
    in_memory: bool
    structure_changed: bool
    same_value_names: bool
    same_values: bool
    others_went_on: bool
    """Some ranks saved what was agreed on last, and some gave it up."""
    repeated: SaveHandle | None = None
    """The step was saved before in this attempt: its handle."""


@dataclass(slots=True)
class Negotiator:
    """One rank's side of the exchange before a save."""

    _store: Store
    _promotions: Promotions
    written: dict[CheckpointId, bool] = field(default_factory=dict[CheckpointId, bool])
    """Whether this rank's record is written; what is not listed is."""
    handles: dict[CheckpointId, SaveHandle] = field(default_factory=dict[CheckpointId, SaveHandle])

    def agree(self, request: Request) -> Agreement:
        """Bring all ranks to one decision about the save. Collective: one all-reduce of fixed size.

        Raises:
            StructureError: the ranks are at different steps, or this one is below one already saved.
            RankFailedError: another rank could not read its state; that rank raises its own error.
        """
        store = self._store
        store.check_process()
        checkpoint = store.line.next_checkpoint(request.step)
        request, offer = self._offer_or_failure(request)
        agreed = exchange(store.group, offer)
        self._refuse(request, agreed)
        before = store.generations.watermark
        store.generations.learn(agreed.written)  # first: it is about the line as it was when the ranks told of it
        if request.gave_up is not None and not agreed.went_on:
            # On all ranks alike: nobody has written anything, the step is free again.
            store.line.forget(request.gave_up)
        for tier, failed in zip(store.settings.tiers, agreed.drain_failed, strict=False):
            if failed:
                self._promotions.abandon(failed - 1, tier.name)
        repeated = self.handles.get(checkpoint)
        if repeated is None:
            # Noted here, where all ranks are: whatever stops one of them now, their lines stay alike. It counts as
            # whole only once its record is written.
            self.written[checkpoint] = False
            store.line.note_saved(checkpoint)
            # In place, because the worker writes into it.
            for known in set(self.written) - set(store.generations.line):
                del self.written[known]
        no_room = agreed.no_room if store.generations.watermark == before else agreed.no_room_yet
        tiers = frozenset(tier.name for bit, tier in enumerate(store.settings.tiers) if agreed.tiers >> bit & 1)
        return Agreement(
            checkpoint=checkpoint,
            tiers=tiers,
            due=tiers & store.tiers.durable.keys(),
            busy=self._busy(agreed),
            urgent=request.urgent,
            in_memory=not no_room,
            structure_changed=agreed.structure_changed,
            same_value_names=agreed.same_value_names,
            same_values=agreed.same_values,
            repeated=repeated,
            others_went_on=agreed.gave_up and agreed.went_on,
        )

    def _busy(self, agreed: Agreed) -> frozenset[str]:
        """What failed is in flight no more; what else is in its lane still is."""
        settings, told = self._store.settings, zip(agreed.in_flight, agreed.drain_failed, strict=True)
        left = (count - bool(failed) for count, failed in told)
        lanes = {tier.lane for tier, count in zip(settings.tiers, left, strict=False) if count > 0}
        return frozenset(tier.name for tier in settings.durable if tier.lane in lanes)

    def _refuse(self, request: Request, agreed: Agreed) -> None:
        if request.failure is not None:
            raise request.failure
        step, last = request.step, self._store.line.last_step
        if agreed.failed_rank is not None:
            raise RankFailedError(
                "another rank could not read its state: nothing was saved",
                hint="That rank raised the reason.",
                step=step,
                rank=agreed.failed_rank,
            )
        if not agreed.same_step:
            raise StructureError(
                f"the ranks are at different steps (step {step} here)", hint="Save the same step on every rank."
            )
        if last is not None and step < last:
            raise StructureError(
                f"step {step} is below step {last}, already saved in this attempt",
                hint="Call restore(state, step=…) first: going back begins a new attempt.",
                step=step,
            )

    def _offer_or_failure(self, request: Request) -> tuple[Request, Offer]:
        """What can't even be looked up is told to the others before it is raised."""
        try:
            return request, self._offer(request)
        except Exception as error:
            return replace(request, failure=request.failure or typed(error)), Offer(
                step=request.step, failed=True, gave_up=request.gave_up is not None, went_on=request.gave_up is None
            )

    def _offer(self, request: Request) -> Offer:
        store, names = self._store, [tier.name for tier in self._store.settings.tiers]
        written = [self.written.get(checkpoint, True) for checkpoint in store.generations.recent()]
        try:
            in_flight = self._promotions.look()
            no_room, no_room_yet = self._no_room(request.size, written)
        except (TierError, OSError) as error:
            # A memory tier that can't be looked at takes no save, and keeps none from the durable tiers.
            store.events.emit(SaveFailed(step=request.step, tier="memory", error=str(typed(error))))
            in_flight, no_room, no_room_yet = self._promotions.seen(), True, True
        return Offer(
            step=request.step,
            tiers=sum(1 << bit for bit, name in enumerate(names) if name in request.tiers),
            structure_changed=request.structure_changed,
            values_signature=request.values_signature,
            values_fingerprint=request.values_fingerprint,
            failed=request.failure is not None,
            no_room=no_room,
            no_room_yet=no_room_yet,
            in_flight=tuple(in_flight.counts.get(name, 0) for name in names),
            drain_failed=tuple(in_flight.failed.get(name, -1) + 1 for name in names),
            gave_up=request.gave_up is not None,
            went_on=request.gave_up is None,
            written=tuple(written + [False] * (HISTORY - len(written))),
        )

    def _no_room(self, size: int | None, written: Sequence[bool]) -> tuple[bool, bool]:
        store, memory = self._store, self._store.settings.memory
        if store.arena is None or memory is None:
            return True, True
        if size is None:
            return False, False  # planned anew, and only then looked whether it fits
        if store.over_budget:
            return True, True
        published, held = store.arena.published(), store.held()
        now = store.generations.releasable(published, held)
        soon = store.generations.supposing(written).releasable(published, held)
        slots = store.settings.arena_slots
        return not store.arena.can_take(size, now, slots), not store.arena.can_take(size, soon, slots)
