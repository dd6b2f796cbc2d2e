"""Which namespaces of the HyperPod service a run uses, and which steps it counts there.

A namespace has a fixed number of slots and of steps, and the service drops the lowest step. So a run has a chain of
namespaces, ``run``, ``run__2``, ``run__3``: what is written goes to the first one that is large enough, or to a new
one; what is read may stand in any. On the wire the attempt comes before the step, so that the lowest is the oldest.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from contextlib import suppress

from sm_tiered.errors import KeyNotFoundError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.tiers.hyperpod_looks import each
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot

__all__ = ["PROBE_ORDINAL", "Chain", "attempt_wire", "newest_ordinal", "wire_steps"]

PROBE_ORDINAL = 900_000
"""Steps of this ordinal are tried, and deleted, before the first write; those of attempts are below."""

_MOST_MEMBERS = 64
_ABSENT = 4
"""After as many names in a row that are not there, no more are asked for: one in between may have been deleted."""

_PROBES = 3

_random = random.Random()
"""Of our own: the user's is part of what a checkpoint holds."""

Holders = Callable[[Namespace, int], "set[Attempt | None]"]
"""Whose shares stand in a namespace at a wire step: None stands for what is no share of this run."""


def wire_steps(checkpoint: CheckpointId) -> tuple[int, int]:
    """Return the wire steps under which a share of *checkpoint* may stand, the usual one first."""
    return checkpoint.attempt.ordinal * MAX_STEP + checkpoint.step, checkpoint.step


def newest_ordinal(wires: Iterable[int]) -> int:
    """Return the ordinal of the newest attempt that *wires* tell of; 0: of none. Steps that are tried do not count."""
    return max((wire // MAX_STEP for wire in wires if wire // MAX_STEP != PROBE_ORDINAL), default=0)


def attempt_wire(attempt: Attempt, *, large: bool) -> int:
    """Return the wire step of the attempt's record, which stands in the last slot."""
    return attempt.ordinal * MAX_STEP if large else 0


class Chain:
    """The namespaces of one run. *kept*: how many steps of a rank must fit."""

    def __init__(self, service: HyperPodService, namespace: str, *, kept: int, holders: Holders) -> None:
        self._service, self._namespace, self._kept, self._holders = service, namespace, kept, holders
        self._members: tuple[Namespace, ...] | None = None
        self._places: list[Namespace | None] = []
        self._large: dict[str, bool] = {}
        self._homes: dict[tuple[Attempt, int], Namespace] = {}

    def members(self, *, fresh: bool = False) -> tuple[Namespace, ...]:
        """Return the namespaces that are there; *fresh*: ask again."""
        if self._members is None or fresh:
            # What others make takes the first name that is free: once some are known, that is where to look.
            found = self._ask(len(self._places), 1) if self._members else self._ask(0, _ABSENT)
            self._places = found[: max((place + 1 for place, one in enumerate(found) if one is not None), default=0)]
            self._members = tuple(member for member in self._places if member is not None)
        return self._members

    def steps(self) -> dict[Namespace, list[int]]:
        """Ask which namespaces are there, and which steps each has.

        Those that were there last are asked for their steps while it is asked whether they still are: that is one round
        trip.
        """
        listed = dict[Namespace, list[int]]()

        def ask(member: Namespace | None) -> None:
            if member is None:
                self.members(fresh=True)
            else:
                listed[member] = self._service.latest(member)

        secs = self._service.call_secs
        each(ask, [None, *(self._members or ())], secs=2 * secs)
        members = self.members()
        each(ask, [member for member in members if member not in listed], secs=secs)
        return {member: listed[member] for member in members}

    def _ask(self, known: int, absent: int) -> list[Namespace | None]:
        """Return what stands under the first *known* names, and on, until *absent* in a row are not there."""
        found: list[Namespace | None] = []
        more = known + absent
        while more > 0 and len(found) < _MOST_MEMBERS:
            names = list(map(self._name, range(len(found), min(_MOST_MEMBERS, len(found) + more))))
            found += each(self._service.describe, names, secs=self._service.call_secs)
            more = absent - next((n for n, one in enumerate(reversed(found)) if one is not None), len(found))
        return found

    def forget(self) -> None:
        """Ask anew what is there: something has changed."""
        self._members = None
        self._large.clear()
        self._homes.clear()

    def home(self, attempt: Attempt, *, world: int, slot: int | None, empty: Callable[[Namespace], bool]) -> Namespace:
        """Return the namespace that *attempt* writes to with *world* ranks; it is made where there is none.

        *slot* is the rank whose slot may be tried with a large step; None: the last one. *empty* empties a namespace
        that holds nothing that is needed, and returns whether it did: it is asked once no name is left.

        Raises:
            TierRefusedError: the service does not make a namespace that is large enough.
        """
        found = self._homes.get((attempt, world)) or self.standing_home(attempt, world=world, slot=slot)
        while found is None:
            self._make(world, empty)
            found = self.standing_home(attempt, world=world, slot=slot)
        self._homes[attempt, world] = found
        return found

    def standing_home(self, attempt: Attempt, *, world: int, slot: int | None) -> Namespace | None:
        """Return the namespace that `home` would, or None where it is yet to be made."""
        if attempt.ordinal >= PROBE_ORDINAL:
            raise TierRefusedError(f"{attempt} is beyond what the service can count", tier=self._service.tier)
        for member in self.members(fresh=True):
            if not self._fits(member, world):
                continue
            held = set[Attempt | None]().union(*(self._holders(member, w) for w in self._service.latest(member)))
            # Room that others use is not ours: the service would drop what is lowest, and that may be theirs.
            if None not in held and (self.counts_large(member, slot) or held <= {attempt}):
                return member
        return None

    def counts_large(self, member: Namespace, slot: int | None) -> bool:
        """Return whether *member* takes steps that begin with an attempt; *slot* is where that may be tried."""
        known = self._large.get(member.name)
        if known is None:
            listed = any(wire >= MAX_STEP for wire in self._service.latest(member))
            known = self._large[member.name] = listed or self._try_large(
                member, member.ranks - 1 if slot is None else slot
            )
        return known

    def _try_large(self, member: Namespace, rank: int) -> bool:
        for _ in range(_PROBES):
            wire = PROBE_ORDINAL * MAX_STEP + _random.randrange(MAX_STEP)
            slot, data = Slot(namespace=member.name, rank=rank, wire=wire), b"%d" % wire
            try:
                there = self._service.put_small(slot, data)
            except TierRefusedError:
                return False
            if not there:
                raise TierUnavailableError(f"namespace {member.name} was there and is gone", tier=self._service.tier)
            try:
                # Others may try in the same slot at the same time, and drop each other's.
                if any(found >= MAX_STEP for found in self._service.latest(member)) and self._reads(slot, data):
                    return True
            finally:
                self._service.delete(slot)
        return False

    def _reads(self, slot: Slot, data: bytes) -> bool:
        try:
            body = self._service.open(slot)
        except KeyNotFoundError:
            return False
        try:
            return body.take(len(data) + 1) == data
        finally:
            body.close()

    def _make(self, world: int, empty: Callable[[Namespace], bool]) -> None:
        members = self.members(fresh=True)
        taken = {member.name for member in members}
        name = next((name for name in map(self._name, range(_MOST_MEMBERS)) if name not in taken), None)
        if name is None:
            if any(empty(member) for member in members if self._fits(member, world)):
                return
            hint = "Delete namespaces that are no longer needed, or take another namespace for the run."
            message = f"the run has {len(members)} namespaces already, none of which takes {world} ranks"
            raise TierRefusedError(message, hint=hint, tier=self._service.tier)
        # Behind the slots of ranks: one for manifests, and one for records of attempts.
        made = self._service.create(name, ranks=world + 2, kept=self._kept)
        found = self._service.describe(name)
        if found is None:
            raise TierUnavailableError(f"namespace {name} was made and is not there", tier=self._service.tier)
        if made and not self._fits(found, world):
            with suppress(TierError):  # else each save would leave one more
                self._service.remove(name)
            message = (
                f"namespace {name} was made for {world + 2} slots of {self._kept} steps; the service gave it "
                f"{found.ranks} slots of {found.kept}"
            )
            raise TierRefusedError(message, hint="Let the tier keep fewer checkpoints.", tier=self._service.tier)

    def _fits(self, member: Namespace, world: int) -> bool:
        return member.ranks > world and member.kept >= self._kept

    def _name(self, index: int) -> str:
        return self._namespace if index == 0 else f"{self._namespace}__{index + 1}"
