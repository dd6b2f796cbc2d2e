"""Writing to the HyperPod service: shares, records of attempts, and the room that they need."""

from __future__ import annotations

from collections.abc import Iterator

from sm_tiered.errors import (
    CorruptPartError,
    KeyExistsError,
    KeyNotFoundError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.manifest import attempt_record_from_json, record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import attempt_wire, wire_steps
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_shares import ATTEMPT_MAGIC, outgoing
from sm_tiered.tiers.hyperpod_slots import Found
from sm_tiered.tiers.shares import Share

__all__ = ["Writer"]


class Writer:
    """Writes and deletes what *index* shows."""

    def __init__(self, service: HyperPodService, index: Index, settings: HyperPodSettings, namespace: str) -> None:
        self._service, self._index, self._settings, self._namespace = service, index, settings, namespace
        self._told: dict[Attempt, bytes] = {}
        self.waiting: dict[Attempt, bytes] = {}
        """Records of attempts that wait for a namespace to be made, which takes a world size."""

    # ---- shares

    def put_share(self, share: Share) -> None:
        """See `ShareTier.put_share`. Shares of older checkpoints that were never whole make room for it."""
        attempt = share.checkpoint.attempt
        try:
            home = self._index.chain.home(attempt, world=share.world, slot=share.rank)
            slot = self._slot(home, share)
            self._make_room(home, slot, share.checkpoint)
            if attempt in self.waiting:
                self._write_attempt(home, attempt, self.waiting[attempt])
            out = outgoing(share, namespace=self._namespace, attempt=self._attempt_text(attempt))
            self._index.slots.forget(slot)
            self._was_there(slot, self._service.put(slot, out.chunks, out.head.size, out.meta()))
        except TierError:
            self._index.chain.forget()  # a service that was started again has none of its namespaces
            raise

    def _was_there(self, slot: Slot, there: bool) -> None:
        if not there:
            message = f"namespace {slot.namespace} was there and is gone"
            raise TierUnavailableError(message, tier=self._settings.name)

    def _slot(self, home: Namespace, share: Share) -> Slot:
        large, small = wire_steps(share.checkpoint)
        counts = self._index.chain.counts_large(home, share.rank)
        return Slot(namespace=home.name, rank=share.rank, wire=large if counts else small)

    def _make_room(self, home: Namespace, slot: Slot, checkpoint: CheckpointId) -> None:
        """See that the rank has a free step for *slot*: else the service would drop its lowest.

        Raises:
            TierFullError: all are taken by what must stay.
        """
        wires = sorted(wire for wire in self._service.latest(home) if wire != slot.wire)
        if len(wires) < home.kept:
            return
        slots = (Slot(namespace=home.name, rank=slot.rank, wire=wire) for wire in wires)
        held = [found for found in map(self._index.slots.look, slots) if found is not None]
        for found in self._deletable(list(held), slot):
            if len(held) < home.kept:
                return
            self._delete(found.slot)
            held.remove(found)
        if len(held) >= home.kept:
            raise TierFullError(
                f"rank {slot.rank} has all its {home.kept} steps taken by checkpoints that stay",
                hint="Let the tier keep fewer checkpoints, or see why older ones are not deleted.",
                step=checkpoint.step,
                tier=self._settings.name,
                rank=slot.rank,
            )

    def _deletable(self, held: list[Found], slot: Slot) -> Iterator[Found]:
        """Yield what is of older checkpoints that were never whole, oldest first; only then what is damaged.

        One save is in flight at a time, so what is older than what is being written and not whole will never be.
        """
        damaged: list[Found] = []
        for found in (one for one in held if one.slot.wire < slot.wire):
            if found.head is None:
                damaged += [found] if found.problem is not None else []
                continue
            try:
                self._index.manifest(found.head.checkpoint)
            except KeyNotFoundError:
                yield found
            except CorruptPartError:
                damaged.append(found)
        yield from damaged

    def drop(self, checkpoint: CheckpointId) -> None:
        """See `ShareTier.drop`."""
        doomed = [found for found in self._index.shares(checkpoint) if self._is_of(found, checkpoint)]
        for found in sorted(doomed, key=lambda found: found.slot.rank):
            self._delete(found.slot)

    def _is_of(self, found: Found, checkpoint: CheckpointId) -> bool:
        """Whether what stands in the slot now is of *checkpoint*; what is damaged can't tell otherwise."""
        now = self._index.slots.look(found.slot, fresh=True)
        return now is not None and (now.problem is not None if now.head is None else now.head.checkpoint == checkpoint)

    def _delete(self, slot: Slot) -> None:
        self._service.delete(slot)
        self._index.slots.forget(slot)

    # ---- records

    def put_record(self, key: str, checkpoint: CheckpointId, rank: int, data: bytes) -> None:
        """Write the record of a rank that failed, as a share without parts, unless a share stands there.

        Raises:
            TierRefusedError: it tells of no failure: others come with their parts.
        """
        record = record_from_json(data)
        if not record.failed or (record.checkpoint, record.rank) != (checkpoint, rank):
            message = f"{key}: only the record of a rank that failed is written by itself"
            raise TierRefusedError(message, hint="Use put_share.", tier=self._settings.name, key=key)
        if self._index.find(checkpoint, rank, fresh=True) is not None:
            raise KeyExistsError(f"{key} is there already", tier=self._settings.name, key=key)
        self.put_share(Share(checkpoint=checkpoint, rank=rank, world=record.world, record=data))

    def put_attempt(self, key: str, attempt: Attempt, data: bytes) -> None:
        """Write the record of *attempt*: at once where there is a namespace, else with its first share."""
        if self._parsed(data).attempt != attempt:
            raise TierRefusedError(f"{key}: that is the record of another attempt", tier=self._settings.name, key=key)
        standing = self._index.attempt(attempt)
        if standing is None:
            self._index.refresh()
            standing = self._index.attempts().get(attempt)
        self._told[attempt] = standing or data
        if standing is not None:
            raise KeyExistsError(f"{key} is there already", tier=self._settings.name, key=key)
        self.waiting[attempt] = data
        home = self._index.chain.standing_home(attempt, world=1, slot=None)
        if home is not None:
            self._write_attempt(home, attempt, data)

    def delete_attempt(self, attempt: Attempt) -> None:
        """Delete the record of *attempt* where it stands by itself."""
        self._told.pop(attempt, None)
        self.waiting.pop(attempt, None)
        for slot in self._index.attempt_slots(attempt):
            if self._index.attempt_in(slot) == attempt:
                self._service.delete(slot)
                self._index.slots.forget_attempt(slot)

    def _parsed(self, data: bytes) -> AttemptRecord:
        record = attempt_record_from_json(data)
        if record.namespace != self._namespace:
            raise TierRefusedError(f"the record is of namespace {record.namespace!r}", tier=self._settings.name)
        return record

    def _write_attempt(self, home: Namespace, attempt: Attempt, data: bytes) -> None:
        """Of two attempts of one ordinal the later one's record stands by itself; both stand in their shares."""
        large = self._index.chain.counts_large(home, None)
        slot = Slot(namespace=home.name, rank=home.ranks - 1, wire=attempt_wire(attempt, large=large))
        other = self._index.attempt_in(slot)
        if other is None or not large or other < attempt:
            self._was_there(slot, self._service.put_small(slot, ATTEMPT_MAGIC + data))
            self._index.slots.forget_attempt(slot)
        self.waiting.pop(attempt, None)

    def _attempt_text(self, attempt: Attempt) -> str | None:
        data = self._told.get(attempt) or self._index.attempt(attempt)
        if data is None:
            return None
        self._told[attempt] = data
        return data.decode()
