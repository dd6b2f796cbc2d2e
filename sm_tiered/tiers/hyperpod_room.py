"""Room on the HyperPod service, which drops the lowest step of a rank that has too many: what we delete before."""

from __future__ import annotations

from collections.abc import Iterator

from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError, TierFullError, TierRefusedError
from sm_tiered.layout import MAX_STEP
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import PROBE_ORDINAL, newest_ordinal
from sm_tiered.tiers.hyperpod_commits import Commits
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_looks import each
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_slots import Found, Kind
from sm_tiered.tiers.hyperpod_whole import Whole

__all__ = ["Room"]


class Room:
    """Deletes what is of no use any more, and nothing else."""

    def __init__(
        self, service: HyperPodService, index: Index, commits: Commits, whole: Whole, settings: HyperPodSettings
    ) -> None:
        self._service, self._index, self._commits = service, index, commits
        self._whole, self._settings = whole, settings

    def delete(self, slot: Slot) -> None:
        """Delete what stands in *slot*."""
        self._service.delete(slot)
        self._index.slots.forget(slot)
        self._index.slots.forget_attempt(slot)

    # ---- for a share

    def make(self, home: Namespace, slot: Slot, checkpoint: CheckpointId) -> bool:
        """See that the rank has a free step for *slot*: else the service would drop its lowest.

        Return whether something stands at its step already, whosesoever.

        Raises:
            TierFullError: all are taken by what must stay.
            TierRefusedError: a newer attempt writes there, and there is hardly room for that one.
        """
        listed = self._service.latest(home)
        wires = [wire for wire in listed if wire != slot.wire]
        newest = newest_ordinal(wires)
        overtaken = slot.wire >= MAX_STEP and newest > checkpoint.attempt.ordinal
        # Of two that write to one slot at once each may see the same free step, and the service drops the lowest.
        needed = 2 if overtaken else 1
        if len(wires) + needed <= home.kept:
            return slot.wire in listed
        held = self._index.held(slot, wires)
        if overtaken and len(held) + needed > home.kept:
            raise self._too_late(newest, checkpoint, slot)
        for found in self._deletable(list(held), slot):
            if len(held) < home.kept:
                break
            if found.kind is Kind.SHARE:
                self._commits.clear(home, found.slot.wire)
            self.delete(found.slot)
            held.remove(found)
        if len(held) >= home.kept:
            raise TierFullError(
                f"rank {slot.rank} has all its {home.kept} steps taken by checkpoints that stay",
                hint="Let the tier keep fewer checkpoints, or see why older ones are not deleted.",
                step=checkpoint.step,
                tier=self._settings.name,
                rank=slot.rank,
            )
        return slot.wire in listed

    def _too_late(self, newest: int, checkpoint: CheckpointId, slot: Slot) -> TierRefusedError:
        return TierRefusedError(
            f"attempt {newest} of this run has begun and needs the room: {checkpoint} is of an older one",
            hint="Nothing is to be done, unless an older job goes on beside the newer one: stop it then.",
            step=checkpoint.step,
            tier=self._settings.name,
            rank=slot.rank,
        )

    def _deletable(self, held: list[Found], slot: Slot) -> Iterator[Found]:
        """Yield trials that were left behind, then what is of older checkpoints that are not whole, oldest first.

        Only then comes what is damaged. One save is in flight at a time, so what is older than what is being written
        and not whole will never be. Manifests, which stand here where the job has grown, only say what shares do.
        """
        yield from (one for one in held if one.slot.wire // MAX_STEP == PROBE_ORDINAL)
        older = [one for one in held if one.slot.wire < slot.wire]
        yield from (one for one in older if one.kind is Kind.MANIFEST)
        damaged: list[Found] = []
        for found in (one for one in older if one.kind is Kind.SHARE):
            if found.head is None:
                damaged.append(found)
                continue
            try:
                self._whole.by_shares(found.head.checkpoint)
            except KeyNotFoundError:
                yield found
            except CorruptPartError:
                damaged.append(found)
        yield from damaged

    # ---- for the record of an attempt

    def make_for_attempt(self, home: Namespace, slot: Slot, record: AttemptRecord) -> bool:
        """See that the last slot has a free step for *record*; return False where others matter more than it does.

        What an attempt continues is told by its shares too, and without a choice it hardly matters: so the records
        without one give way first, and of the others those that a later choice makes void.
        """
        wires = [wire for wire in self._service.latest(home) if wire != slot.wire]
        if len(wires) < home.kept:
            return True
        slots = {wire: Slot(namespace=home.name, rank=slot.rank, wire=wire) for wire in wires}
        probes = [wire for wire in wires if wire // MAX_STEP == PROBE_ORDINAL]
        held = {wire: self._index.slots.attempt(slots[wire]) for wire in wires if wire % MAX_STEP == 0}
        records = {wire: _parsed(data) for wire, data in sorted(held.items()) if data is not None}
        for wire in probes:
            self.delete(slots[wire])
        for wire in _least_needed({**records, slot.wire: record}):
            if len(records) < home.kept:
                return True
            if wire == slot.wire:
                return False
            self.delete(slots[wire])
            del records[wire]
        return len(records) < home.kept

    # ---- a whole namespace

    def empty(self, member: Namespace, attempt: Attempt) -> bool:
        """Empty *member* where no step tells of an attempt, and it holds nothing but leftovers of older ones.

        Return whether that was so: nothing is whole, damaged, another's, or tells of a choice.
        """
        wires = self._service.latest(member)
        if any(wire >= MAX_STEP for wire in wires):
            return False
        slots = [Slot(namespace=member.name, rank=rank, wire=wire) for wire in wires for rank in range(member.ranks)]
        shares = [slot for slot in slots if slot.rank < member.ranks - 1]
        last = Slot(namespace=member.name, rank=member.ranks - 1, wire=0)
        look = self._index.slots.look
        looks = each(lambda slot: look(slot, fresh=True), shares, secs=self._index.slots.look_secs)
        held = sorted(filter(None, looks), key=lambda found: found.kind is not Kind.MANIFEST)
        if self._index.is_choice(last) or not all(self._is_leftover(found, attempt) for found in held):
            return False
        for slot in [*(found.slot for found in held), last]:
            self.delete(slot)
        return True

    def _is_leftover(self, found: Found, attempt: Attempt) -> bool:
        if found.checkpoint is None or found.checkpoint.attempt.ordinal >= attempt.ordinal:
            return found.kind is Kind.MANIFEST and found.commit is None  # damaged, it says nothing that shares don't
        try:
            self._whole.by_shares(found.checkpoint)
        except KeyNotFoundError:
            return True
        except CorruptPartError:
            return False
        return False


def _parsed(data: bytes) -> AttemptRecord | None:
    try:
        return attempt_record_from_json(data)
    except FormatError:
        return None


def _least_needed(records: dict[int, AttemptRecord | None]) -> list[int]:
    """Return where the records of attempts stand, what is needed least first; a damaged one may tell of a choice."""
    chosen = [record for record in records.values() if record is not None and record.chosen]

    def rank(wire: int) -> tuple[int, int]:
        record = records[wire]
        if record is not None and not record.chosen:
            return 0, wire
        void = record is not None and any(
            one.attempt > record.attempt and (one.parent is None or one.parent.attempt < record.attempt)
            for one in chosen
        )
        return (1 if void else 2), wire

    return sorted(records, key=rank)
