"""The exchange: all that ranks must agree on before a save, in one all-reduce of fixed size.

Every field is combined by maximum. What all ranks must have alike is sent twice, once negated: the two maxima are each
other's negation only if every rank sent the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sm_tiered.group import Group

__all__ = ["HISTORY", "Agreed", "Offer", "exchange"]

HISTORY = 8
"""How many of the last saves a rank reports on."""

_MOST_TIERS = 16
"""So many tiers a recipe can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one rank brings to an exchange."""

    step: int = 0
    tiers: int = 0
    """Bit i: tier i of the recipe is due by what this rank can tell from the step alone, or was named."""
    decided: int = 0
    """Rank 0's answer of the policies that look at clocks and metrics; 0 on the other ranks."""
    structure_changed: bool = False
    values_signature: int = 0
    """Of the names of the Python values."""
    values_fingerprint: int = 0
    """Of the Python values themselves."""
    failed: bool = False
    """This rank could not even read its state."""
    no_room: bool = False
    """No generation is free."""
    no_room_yet: bool = False
    """No generation is free even once the save before this one is known to be whole."""
    draining: int = 0
    """Bit i: a promotion is in flight in the lane of tier i."""
    draining_more: int = 0
    """Bit i: more than one is."""
    drain_failed: int = 0
    """Which promotion failed here (see `Promotions.look`); 0: none."""
    preempted: bool = False
    requested: bool = False
    """This rank sees a request for a save."""
    cost_micros: int = 0
    """How long a save blocks this rank, in microseconds; 0: not measured yet."""
    gave_up: bool = False
    """This rank never came to save what was agreed on last."""
    went_on: bool = False
    """This rank did."""
    written: tuple[bool, ...] = field(default=(False,) * HISTORY)
    """For each of the last saves, newest first: is my record written?"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """The same on every rank."""

    same_step: bool
    tiers: int
    decided: int
    structure_changed: bool
    same_value_names: bool
    same_values: bool
    failed_rank: int | None
    no_room: bool
    no_room_yet: bool
    draining: int
    """See `Offer`, as are the bits of any rank's."""
    draining_more: int
    drain_failed: int
    preempted: bool
    requested: bool
    cost_micros: int
    """The slowest rank's."""
    gave_up: bool
    went_on: bool
    written: tuple[bool, ...]
    """Whether every rank's record is written."""


def exchange(group: Group, offer: Offer) -> Agreed:
    """Give *offer* to all ranks and return what they have in common. Collective."""
    highest = group.max(_encode(offer, group.rank))
    return _decode(highest)


def _encode(offer: Offer, rank: int) -> list[int]:
    alike = [offer.step, offer.values_signature, offer.values_fingerprint]
    flags = [
        offer.structure_changed,
        offer.no_room,
        offer.no_room_yet,
        offer.drain_failed,
        offer.preempted,
        offer.gave_up,
        offer.went_on,
        offer.requested,
        offer.cost_micros,
        *(not done for done in offer.written),
    ]
    masks = (offer.tiers, offer.decided, offer.draining, offer.draining_more)
    bits = [mask >> bit & 1 for mask in masks for bit in range(_MOST_TIERS)]
    return [*alike, *(-value for value in alike), rank + 1 if offer.failed else 0, *map(int, flags), *bits]


def _decode(highest: Sequence[int]) -> Agreed:
    same = [highest[index] == -highest[index + 3] for index in range(3)]
    changed, no_room, no_room_yet, _, preempted, gave_up, went_on, requested = map(bool, highest[7:15])
    missing = highest[16 : 16 + HISTORY]
    bits = highest[16 + HISTORY :]
    tiers, decided, draining, more = (_mask(bits[at : at + _MOST_TIERS]) for at in range(0, len(bits), _MOST_TIERS))
    return Agreed(
        same_step=same[0],
        same_value_names=same[1],
        same_values=same[2],
        failed_rank=highest[6] - 1 if highest[6] else None,
        structure_changed=changed,
        no_room=no_room,
        no_room_yet=no_room_yet,
        draining=draining,
        draining_more=more,
        drain_failed=highest[10],
        preempted=preempted,
        requested=requested,
        cost_micros=highest[15],
        gave_up=gave_up,
        went_on=went_on,
        written=tuple(not value for value in missing),
        tiers=tiers,
        decided=decided,
    )


def _mask(bits: Sequence[int]) -> int:
    return sum(bit << index for index, bit in enumerate(bits))
