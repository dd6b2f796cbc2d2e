"""One checkpoint on the tiers that hold it, and what its records tell: parts, tensors, Python values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sm_tiered.cli.common import is_durable
from sm_tiered.cli.survey import TierView, View
from sm_tiered.errors import FormatError
from sm_tiered.inventory import Holding
from sm_tiered.manifest import record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Item, Part, Record

__all__ = ["Copy", "Shown", "Tensor", "grouped", "parts_of", "state_of", "tensors_of", "values_of"]

_NUMBERS = re.compile(r"(\d{1,9})", re.ASCII)
_BITS = re.compile(r"(?:bfloat|float|complex|uint|int|bits)(\d+)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A checkpoint on one tier."""

    tier: TierView
    view: View
    holding: Holding


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    fqn: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    chunks: int


@dataclass(slots=True, kw_only=True)
class Shown:
    """One checkpoint, with the copies whose records are the same."""

    checkpoint: CheckpointId
    attempt: AttemptRecord | None
    copies: list[Copy]
    records: Sequence[Record]
    damage: list[str] = field(default_factory=list[str])


def grouped(copies: Iterable[Copy], attempts: Mapping[Attempt, AttemptRecord]) -> list[Shown]:
    found: dict[tuple[CheckpointId, tuple[tuple[int, bytes], ...]], Shown] = {}
    for copy in copies:
        checkpoint = copy.view.checkpoint
        key = (checkpoint, tuple(sorted(copy.holding.records.items())))
        if key in found:
            found[key].copies.append(copy)
            continue
        records: list[Record] = []
        damage: list[str] = []
        for rank, data in key[1]:
            try:
                records.append(record_from_json(data))
            except FormatError as error:
                damage.append(f"the record of rank {rank} is damaged: {error.message}")
        found[key] = Shown(
            checkpoint=checkpoint,
            attempt=attempts.get(checkpoint.attempt),
            copies=[copy],
            records=records,
            damage=damage,
        )
    return sorted(found.values(), key=lambda one: one.checkpoint, reverse=True)


def parts_of(one: Shown) -> list[tuple[int, Part]]:
    return [(record.rank, part) for record in one.records for part in record.parts]


def tensors_of(one: Shown) -> list[Tensor]:
    found: dict[str, list[Item]] = {}
    for record in one.records:
        replicas = {part.name for part in record.parts if part.replica}
        for item in record.items:
            if item.payload is not None and item.part not in replicas:
                found.setdefault(item.fqn, []).append(item)
    return [_tensor(items) for _, items in sorted(found.items(), key=lambda pair: _natural(pair[0]))]


def _tensor(items: Sequence[Item]) -> Tensor:
    first, dtype = items[0], items[0].dtype or "?"
    places = {item.offsets: item for item in items}
    bits = _BITS.match(dtype)
    width = 1 if dtype == "bool" else int(bits[1]) // 8 if bits else None
    stored = sum(item.length for item in places.values())
    whole = math.prod(first.shape) * width if width else stored
    return Tensor(fqn=first.fqn, dtype=dtype, shape=first.shape, bytes=whole, chunks=len(places))


def values_of(one: Shown) -> list[str]:
    return sorted({item.fqn for record in one.records for item in record.items if item.payload is None}, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in _NUMBERS.split(name)]


def state_of(copy: Copy) -> str:
    if copy.holding.problem is not None:
        return copy.holding.problem
    return "committed" if is_durable(copy.tier.settings) else "complete"
