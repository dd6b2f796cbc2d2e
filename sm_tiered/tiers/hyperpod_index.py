"""What stands on the HyperPod service, told as checkpoints: which shares there are, whose, and which are whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.layout import MAX_STEP
from sm_tiered.manifest import attempt_record_from_json, compose_manifest, manifest_to_json, record_from_json
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import PROBE_ORDINAL, Chain, attempt_wire, wire_steps
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_shares import Head
from sm_tiered.tiers.hyperpod_slots import Found, Slots

__all__ = ["Index"]

_UNKNOWN = (0, "00000000")
"""Seconds and digits of an attempt of which only the ordinal can be told."""


class Index:
    """Tells what stands there. Threads may share it."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings, namespace: str) -> None:
        self._service, self._namespace = service, namespace
        self.slots = Slots(service, settings, namespace)
        self.chain = Chain(service, namespace, kept=settings.slots, holders=self.holders)
        self._wires: dict[str, tuple[int, ...]] = {}
        self._lowest: dict[tuple[str, int], int] = {}
        self._manifests: dict[CheckpointId, tuple[list[str], bytes]] = {}

    # ---- listings

    def refresh(self) -> None:
        """Ask which steps there are."""
        members = self.chain.members(fresh=True)
        self._wires = {member.name: tuple(self._service.latest(member)) for member in members}
        self.slots.keep_only({(name, wire) for name, wires in self._wires.items() for wire in wires})

    def checkpoints(self) -> list[CheckpointId]:
        """Return every checkpoint of which a share stands, whole or not, oldest first. `refresh` before."""
        found = {self._whose(first) for first in self._firsts()}
        known = {(c.attempt.ordinal, c.step) for c in found if not _is_unknown(c.attempt)}
        return sorted(c for c in found if not _is_unknown(c.attempt) or (c.attempt.ordinal, c.step) not in known)

    def attempts(self) -> dict[Attempt, bytes]:
        """Return the records of attempts that are told of. `refresh` before."""
        found: dict[Attempt, bytes] = {}
        for member in self.chain.members():
            for wire in self._wires.get(member.name, ()):
                data = self.slots.attempt(_slot(member, member.ranks - 1, wire)) if wire % MAX_STEP == 0 else None
                if data is not None:
                    found[_attempt_of(data, wire)] = data
        for first in self._firsts():
            if first.head is not None and first.head.attempt is not None:
                found.setdefault(first.head.checkpoint.attempt, first.head.attempt.encode())
        good = {attempt.ordinal for attempt in found if not _is_unknown(attempt)}
        return {a: data for a, data in found.items() if not _is_unknown(a) or a.ordinal not in good}

    def holders(self, member: Namespace, wire: int) -> set[Attempt | None]:
        """Return whose shares stand at *wire*; None stands for what is none of this run's."""
        first = None if wire // MAX_STEP == PROBE_ORDINAL else self._first(member, wire)
        if first is None:
            return set()
        return {self._whose(first).attempt if first.head is not None or first.problem is not None else None}

    def _firsts(self) -> Iterator[Found]:
        """Yield one share of each step, the lowest rank's that is whole; else a damaged one."""
        for member in self.chain.members():
            for wire in self._wires.get(member.name, ()):
                first = None if wire // MAX_STEP == PROBE_ORDINAL else self._first(member, wire)
                if first is not None and (first.head is not None or first.problem is not None):
                    yield first

    def _first(self, member: Namespace, wire: int) -> Found | None:
        # The record of an attempt stands at step 0: there, looking at all ranks would be looking at nothing mostly.
        ranks = range(1 if wire % MAX_STEP == 0 else max(1, member.ranks - 1))
        lowest, damaged = self._lowest.get((member.name, wire)), None
        for rank in ([] if lowest is None else [lowest], ranks):
            for found in filter(None, (self.slots.look(_slot(member, r, wire)) for r in rank)):
                if found.head is not None or found.problem is None:
                    self._lowest[member.name, wire] = found.slot.rank
                    return found
                damaged = damaged or found
        return damaged

    def _whose(self, found: Found) -> CheckpointId:
        if found.head is not None:
            return found.head.checkpoint
        ordinal, step = divmod(found.slot.wire, MAX_STEP)
        return CheckpointId(attempt=Attempt(ordinal=ordinal, utc_secs=_UNKNOWN[0], nonce=_UNKNOWN[1]), step=step)

    # ---- checkpoints

    def find(self, checkpoint: CheckpointId, rank: int, *, fresh: bool = False) -> Found | None:
        """Return the share of *rank*, damaged or not, or None when there is none."""
        damaged = None
        for slot in self._slots(checkpoint, rank):
            found = self.slots.look(slot, fresh=fresh)
            if found is None or (found.head is None and found.problem is None):
                continue
            if found.head is not None and found.head.checkpoint == checkpoint:
                return found
            damaged = found if found.head is None else damaged
        return damaged

    def _slots(self, checkpoint: CheckpointId, rank: int) -> list[Slot]:
        found = self._known_slots(checkpoint, rank)
        if not found:
            self.refresh()
            found = self._known_slots(checkpoint, rank)
        return found

    def _known_slots(self, checkpoint: CheckpointId, rank: int) -> list[Slot]:
        return [
            _slot(member, rank, wire)
            for member in self.chain.members()
            for wire in dict.fromkeys(wire_steps(checkpoint))
            if rank < member.ranks and wire in self._wires.get(member.name, ())
        ]

    def shares(self, checkpoint: CheckpointId) -> list[Found]:
        """Return the shares that stand, damaged ones too, by rank."""
        if not self._slots(checkpoint, 0):
            return []
        found = dict[int, Found]()
        most = max((member.ranks - 1 for member in self.chain.members()), default=0)
        rank = 0
        while rank < most:
            one = self.find(checkpoint, rank)
            if one is not None:
                found[rank] = one
                most = one.head.world if one.head is not None else most
            rank += 1
        return list(found.values())

    def manifest(self, checkpoint: CheckpointId) -> bytes:
        """Return the manifest that follows from the records of all ranks.

        Raises:
            KeyNotFoundError: not all of them stand there, or one tells of a failure: it is not committed.
            CorruptPartError: a share is damaged, or they do not make one checkpoint.
        """
        zero = self.find(checkpoint, 0, fresh=True)
        if zero is None:
            self._manifests.pop(checkpoint, None)
            raise self._no_manifest(checkpoint, 0)
        found = [zero]
        for rank in range(1, self.slots.sound(zero).world):
            share = self.find(checkpoint, rank)
            if share is None:
                raise self._no_manifest(checkpoint, rank)
            found.append(share)
        heads = list(map(self.slots.sound, found))
        seals, known = [head.seal for head in heads], self._manifests.get(checkpoint)
        if known is not None and known[0] == seals:
            return known[1]
        data = self._composed(checkpoint, heads, {share.slot.rank: self.slots.record(share) for share in found})
        self._manifests[checkpoint] = seals, data
        return data

    def _composed(self, checkpoint: CheckpointId, heads: list[Head], records: dict[int, bytes]) -> bytes:
        try:
            manifest = compose_manifest(records)
        except FormatError as error:
            with suppress(FormatError):
                if any(record_from_json(data).failed for data in records.values()):
                    raise self._no_manifest(checkpoint, None) from error
            raise CorruptPartError(error.message, step=checkpoint.step, tier=self._service.tier) from error
        parts = {name: place.size for head in heads for name, place in head.parts.items()}
        if manifest.parts != parts or manifest.checkpoint != checkpoint or manifest.namespace != self._namespace:
            message = f"the shares of {checkpoint} do not hold the parts that their records tell of"
            raise CorruptPartError(message, step=checkpoint.step, tier=self._service.tier)
        return manifest_to_json(manifest)

    def _no_manifest(self, checkpoint: CheckpointId, rank: int | None) -> KeyNotFoundError:
        how = "a rank failed" if rank is None else f"the share of rank {rank} is not there"
        key = layout.in_dir(checkpoint, layout.MANIFEST)
        return KeyNotFoundError(f"{checkpoint} is not committed: {how}", tier=self._service.tier, key=key)

    # ---- records of attempts

    def attempt(self, attempt: Attempt) -> bytes | None:
        """Return the record of *attempt* from where it stands by itself, or None."""
        for slot in self.attempt_slots(attempt):
            data = self.slots.attempt(slot)
            if data is not None and _attempt_of(data, slot.wire) == attempt:
                return data
        return None

    def attempt_slots(self, attempt: Attempt) -> list[Slot]:
        """Return where the record of *attempt* may stand."""
        wires = dict.fromkeys(attempt_wire(attempt, large=large) for large in (True, False))
        return [_slot(member, member.ranks - 1, wire) for member in self.chain.members() for wire in wires]

    def attempt_in(self, slot: Slot) -> Attempt | None:
        """Return the attempt whose record stands in *slot* now, or None."""
        self.slots.forget_attempt(slot)
        data = self.slots.attempt(slot)
        return None if data is None else _attempt_of(data, slot.wire)


def _slot(member: Namespace, rank: int, wire: int) -> Slot:
    return Slot(namespace=member.name, rank=rank, wire=wire)


def _attempt_of(data: bytes, wire: int) -> Attempt:
    try:
        return attempt_record_from_json(data).attempt
    except FormatError:
        return Attempt(ordinal=wire // MAX_STEP, utc_secs=_UNKNOWN[0], nonce=_UNKNOWN[1])


def _is_unknown(attempt: Attempt) -> bool:
    return (attempt.utc_secs, attempt.nonce) == _UNKNOWN
