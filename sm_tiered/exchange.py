"""The exchange: all that ranks must agree on before a save, in one all-reduce of fixed size.

Every field is combined by maximum. What all ranks must have alike is sent twice, once negated: the two maxima are each
other's negation only if every rank sent the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from sm_tiered.group import Group

__all__ = ["HISTORY", "MOST_TIERS", "Agreed", "Offer", "exchange"]

HISTORY = 8
"""How many of the last saves a rank reports on."""

MOST_TIERS = 16
"""So many tiers a recipe can have."""

_FLAGS = ("structure_changed", "no_room", "no_room_yet", "preempted", "gave_up", "went_on", "requested")
"""What holds for all as soon as it holds for one."""


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
    in_flight: tuple[int, ...] = ()
    """For each tier of the recipe, how many promotions to it are in flight."""
    drain_failed: tuple[int, ...] = ()
    """For each, one more than the newest step of which one has failed here; 0: none has."""
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
    in_flight: tuple[int, ...]
    """For each tier, as many as on the rank that has most."""
    drain_failed: tuple[int, ...]
    """For each, the newest of all ranks'."""
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
    lists = [
        *alike,
        *(-value for value in alike),
        *(bool(getattr(offer, name)) for name in _FLAGS),
        rank + 1 if offer.failed else 0,
        offer.cost_micros,
        *(not done for done in offer.written),
        *(mask >> bit & 1 for mask in (offer.tiers, offer.decided) for bit in range(MOST_TIERS)),
    ]
    by_tier = ((*values, *[0] * (MOST_TIERS - len(values))) for values in (offer.in_flight, offer.drain_failed))
    return [*map(int, lists), *chain(*by_tier)]


def _decode(highest: Sequence[int]) -> Agreed:
    left = iter(highest)

    def some(count: int) -> tuple[int, ...]:
        return tuple(islice(left, count))

    alike, negated = some(3), some(3)
    same = [value == -other for value, other in zip(alike, negated, strict=True)]
    flags = dict(zip(_FLAGS, map(bool, some(len(_FLAGS))), strict=True))
    failed_rank, cost_micros = some(2)
    return Agreed(
        same_step=same[0],
        same_value_names=same[1],
        same_values=same[2],
        **flags,
        failed_rank=failed_rank - 1 if failed_rank else None,
        cost_micros=cost_micros,
        written=tuple(not missing for missing in some(HISTORY)),
        tiers=_mask(some(MOST_TIERS)),
        decided=_mask(some(MOST_TIERS)),
        in_flight=some(MOST_TIERS),
        drain_failed=some(MOST_TIERS),
    )


def _mask(bits: Sequence[int]) -> int:
    return sum(bit << index for index, bit in enumerate(bits))
