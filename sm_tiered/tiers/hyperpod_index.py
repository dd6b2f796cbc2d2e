"""What stands on the HyperPod service, told as checkpoints and attempts: which shares there are, and whose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sm_tiered.errors import FormatError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import PROBE_ORDINAL, Chain, attempt_wire, wire_steps
from sm_tiered.tiers.hyperpod_looks import each, once
from sm_tiered.tiers.hyperpod_manifests import Commit, manifest_rank
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_slots import Found, Kind, Leave, Slots

__all__ = ["Index"]

_UNKNOWN = (0, "00000000")
"""Seconds and digits of an attempt of which only the ordinal can be told."""


class Index:
    """Tells what stands there. Threads may share it."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings, namespace: str) -> None:
        self._service = service
        self.slots = Slots(service, settings, namespace)
        self.chain = Chain(service, namespace, kept=settings.slots, holders=self.holders)
        self._wires: dict[str, tuple[int, ...]] = {}
        self._lowest: dict[tuple[str, int], int] = {}
        self._vacant: set[tuple[str, int]] = set()
        self.waiting: dict[Attempt, bytes] = {}
        """Records of attempts that wait for a namespace to be made, which takes a world size."""

    # ---- listings

    def refresh(self) -> None:
        """Ask which steps there are, once in a pass."""
        once((self, "steps"), self._refresh)

    def _refresh(self) -> None:
        self._wires = {member.name: tuple(wires) for member, wires in self.chain.steps().items()}
        standing = {(name, wire) for name, wires in self._wires.items() for wire in wires}
        self.slots.keep_only(standing)
        self._lowest = {place: rank for place, rank in list(self._lowest.items()) if place in standing}
        self._vacant = self._vacant & standing

    def checkpoints(self, firsts: Sequence[Found]) -> list[CheckpointId]:
        """Return every checkpoint of which a share stands, whole or not, oldest first; *firsts*: see there."""
        found = set(map(self._whose, firsts))
        known = {(c.attempt.ordinal, c.step) for c in found if not _is_unknown(c.attempt)}
        return sorted(c for c in found if not _is_unknown(c.attempt) or (c.attempt.ordinal, c.step) not in known)

    def attempts(self, firsts: Sequence[Found]) -> dict[Attempt, bytes]:
        """Return the records of attempts that are told of, also by *firsts*: see there."""
        found: dict[Attempt, bytes] = {}
        for member in self.chain.members():
            for wire in self._wires.get(member.name, ()):
                data = self.slots.attempt(_slot(member, member.ranks - 1, wire)) if wire % MAX_STEP == 0 else None
                if data is not None:
                    found[_attempt_of(data, wire)] = data
        for first in firsts:
            told = first.head or (first.commit.head if first.commit is not None else None)
            if told is not None and told.attempt is not None:
                found.setdefault(told.checkpoint.attempt, told.attempt.encode())
        good = {attempt.ordinal for attempt in found if not _is_unknown(attempt)}
        return {a: data for a, data in found.items() if not _is_unknown(a) or a.ordinal not in good}

    def firsts(self) -> list[Found]:
        """Return what tells whose each step is: its manifest, else a share, the lowest rank's that is whole.

        Where all is damaged, it is a damaged one. `refresh` before.
        """
        found: list[Found] = []
        for member in self.chain.members():
            for wire in self._wires.get(member.name, ()):
                first = None if wire // MAX_STEP == PROBE_ORDINAL else self._first(member, wire)
                if first is not None and first.kind is not Kind.OTHER:
                    found.append(first)
        return found

    def holders(self, member: Namespace, wire: int) -> set[Attempt | None]:
        """Return whose *wire* of *member* is; None stands for what is none of this run's.

        Where attempts have no steps of their own, so is the one whose record stands there and tells of a choice: that
        must not be written over.
        """
        first = None if wire // MAX_STEP == PROBE_ORDINAL else self._first(member, wire)
        found = set[Attempt | None]()
        if first is not None:
            found.add(None if first.kind is Kind.OTHER else self._whose(first).attempt)
        slot = _slot(member, member.ranks - 1, wire)
        if wire == 0 and self.is_choice(slot):
            found.add(self.attempt_in(slot))
        return found

    def _first(self, member: Namespace, wire: int) -> Found | None:
        place, looks = (member.name, wire), self.slots.look
        likely = list(dict.fromkeys((self._lowest.get(place, 0), 0)))
        newest = max(self._wires.get(member.name, ()), default=wire)
        # The record of an attempt stands at step 0, mostly alone. Only of the newest may there be shares to come.
        vacant = place in self._vacant and wire < newest
        before = [] if vacant else self._manifest_at(member, wire, likely)
        if before and before[0] is not None and before[0].commit is not None:
            return before[0]
        found = [*before, *map(looks, _row(member, likely, wire))]
        if not vacant and not any(map(_settles, found)):
            rest = _row(member, range(1, member.ranks - 1 - len(before)), wire)
            found += each(looks, rest, secs=self.slots.look_secs, enough=_settles)
        there = [one for one in found if one is not None and one.kind is not Kind.MANIFEST]
        there.sort(key=lambda one: one.slot.rank)
        first = next(filter(_settles, there), there[0] if there else None)
        if first is None and wire % MAX_STEP == 0:
            self._vacant = self._vacant | {place}
        elif first is not None and _settles(first):
            self._lowest[place] = first.slot.rank
        return first

    def _manifest_at(self, member: Namespace, wire: int, likely: Iterable[int]) -> list[Found | None]:
        """Return what the slot of manifests has; nothing where a share of *likely* ranks is known to tell as much."""
        rank = manifest_rank(member)
        if rank is None:
            return []
        slot = _slot(member, rank, wire)
        known = self.slots.peek(slot)
        if known is None and any(map(_settles, map(self.slots.peek, _row(member, likely, wire)))):
            return []
        return [known or self._manifest_in(slot)]

    def _manifest_in(self, slot: Slot, *, fresh: bool = False) -> Found | None:
        """Return what stands in a slot of manifests; where that does not answer, the shares may all the same."""
        try:
            return self.slots.look(slot, fresh=fresh)
        except TierUnavailableError:
            return None

    def _whose(self, found: Found) -> CheckpointId:
        if found.checkpoint is not None:
            return found.checkpoint
        ordinal, step = divmod(found.slot.wire, MAX_STEP)
        return CheckpointId(attempt=Attempt(ordinal=ordinal, utc_secs=_UNKNOWN[0], nonce=_UNKNOWN[1]), step=step)

    # ---- single shares, and manifests

    def find(
        self,
        checkpoint: CheckpointId,
        rank: int,
        *,
        fresh: bool = False,
        leave: Leave | None = None,
    ) -> Found | None:
        """Return the share of *rank*, damaged or not, or None when there is none; the others: see `Slots.look`."""
        damaged = None
        for slot in self._slots(checkpoint, rank):
            found = self.slots.look(slot, fresh=fresh, leave=leave)
            if found is None or found.kind is not Kind.SHARE:
                continue
            if found.checkpoint == checkpoint:
                return found
            damaged = found if found.head is None else damaged
        return damaged

    def manifest(self, checkpoint: CheckpointId, *, fresh: bool = False) -> Found | None:
        """Return the manifest of *checkpoint* where one stands by itself and is whole: it was committed once."""
        for slot in self.manifest_slots(checkpoint):
            before, found = self.slots.peek(slot), self._manifest_in(slot, fresh=fresh)
            if found is not None and found.commit is not None and found.checkpoint == checkpoint:
                return found
            if before is not None and before.commit is not None and before.checkpoint == checkpoint:
                # Who deletes a share, or writes another in its place, deletes it before: one may be gone.
                for share in [replace(slot, rank=rank) for rank in range(before.commit.manifest.world)]:
                    self.slots.forget(share)
        return None

    def told(self, checkpoint: CheckpointId) -> Commit | None:
        """Return the manifest of *checkpoint* as it is known, or asked for where its first share is not."""
        known = map(self.slots.peek, self.manifest_slots(checkpoint))
        found = next((one for one in known if one is not None and one.checkpoint == checkpoint), None)
        if found is None and self.peek(checkpoint, 0) is None:
            found = self.manifest(checkpoint)
        return None if found is None else found.commit

    def manifest_slots(self, checkpoint: CheckpointId) -> list[Slot]:
        """Return where the manifest of *checkpoint* may stand."""
        if not self._places(checkpoint):
            self.refresh()
        places = [(member, wire, manifest_rank(member)) for member, wire in self._places(checkpoint)]
        slots = [_slot(member, rank, wire) for member, wire, rank in places if rank is not None]
        known = map(self.slots.peek, slots)
        # In a namespace without a slot to spare, it is that of the last rank.
        return [slot for slot, one in zip(slots, known, strict=True) if not _is_share_of(one, checkpoint)]

    def peek(self, checkpoint: CheckpointId, rank: int) -> Found | None:
        """Return the share of *rank* where it is known, without asking."""
        known = map(self.slots.peek, self._known_slots(checkpoint, rank))
        return next((one for one in known if _is_share_of(one, checkpoint)), None)

    def stands(self, checkpoint: CheckpointId) -> bool:
        """Whether something stands at its step, as far as is known."""
        return bool(self._known_slots(checkpoint, 0))

    def most_ranks(self) -> int:
        """Return how many ranks a checkpoint has at the most."""
        return max((member.ranks - 1 for member in self.chain.members()), default=0)

    def likely_ranks(self) -> int:
        """Return how many ranks the job most likely has: those that the largest namespace was made for."""
        return max((manifest_rank(member) or 1 for member in self.chain.members()), default=1)

    def most_looks(self, *, one: bool) -> int:
        """Return how many shares there may be, of *one* checkpoint or of all."""
        if not self._wires:
            self.refresh()
        return self.most_ranks() * (1 if one else sum(map(len, self._wires.values())))

    def _slots(self, checkpoint: CheckpointId, rank: int) -> list[Slot]:
        found = self._known_slots(checkpoint, rank)
        if not found:
            self.refresh()
            found = self._known_slots(checkpoint, rank)
        return found

    def _known_slots(self, checkpoint: CheckpointId, rank: int) -> list[Slot]:
        return [_slot(member, rank, wire) for member, wire in self._places(checkpoint) if rank < member.ranks - 1]

    def _places(self, checkpoint: CheckpointId) -> list[tuple[Namespace, int]]:
        """Return the namespaces that have something at a step of *checkpoint*, and the step."""
        return [
            (member, wire)
            for member in self.chain.members()
            for wire in dict.fromkeys(wire_steps(checkpoint))
            if wire in self.wires(member)
        ]

    def wires(self, member: Namespace) -> Sequence[int]:
        """Return at which steps something stands in *member*, as far as is known."""
        return self._wires.get(member.name, ())

    def held(self, slot: Slot, wires: Iterable[int]) -> list[Found]:
        """Return what stands beside *slot*, in the same rank's slots at other *wires*, lowest first."""
        slots = [replace(slot, wire=wire) for wire in sorted(wires)]
        looks = each(self.slots.look, slots, secs=self.slots.look_secs)
        return [found for found in looks if found is not None]

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

    def is_choice(self, slot: Slot) -> bool:
        """Whether the record in *slot* tells that the user chose where its attempt begins; damage may have told it."""
        self.slots.forget_attempt(slot)
        data = self.slots.attempt(slot)
        try:
            return data is not None and attempt_record_from_json(data).chosen
        except FormatError:
            return True


def _slot(member: Namespace, rank: int, wire: int) -> Slot:
    return Slot(namespace=member.name, rank=rank, wire=wire)


def _row(member: Namespace, ranks: Iterable[int], wire: int) -> list[Slot]:
    return [_slot(member, rank, wire) for rank in ranks]


def _is_share_of(found: Found | None, checkpoint: CheckpointId) -> bool:
    return found is not None and found.head is not None and found.checkpoint == checkpoint


def _settles(found: Found | None) -> bool:
    """Whether it tells whose a step is: damage does not, and others may."""
    return found is not None and (found.checkpoint is not None or found.kind is Kind.OTHER)


def _attempt_of(data: bytes, wire: int) -> Attempt:
    try:
        return attempt_record_from_json(data).attempt
    except FormatError:
        return Attempt(ordinal=wire // MAX_STEP, utc_secs=_UNKNOWN[0], nonce=_UNKNOWN[1])


def _is_unknown(attempt: Attempt) -> bool:
    return (attempt.utc_secs, attempt.nonce) == _UNKNOWN
