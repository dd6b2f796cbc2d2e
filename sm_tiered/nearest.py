"""Where each value of a checkpoint stands, as near to this rank as may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sm_tiered.records import Item, Record

__all__ = ["ItemSource", "Sources"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemSource:
    """Where one stored chunk or value stands."""

    rank: int
    item: Item


class Sources:
    """Every stored item of a candidate by name and offsets, each at the nearest part that holds it."""

    def __init__(self, records: Sequence[Record], near: frozenset[int]) -> None:
        self._found: dict[tuple[str, tuple[int, ...]], ItemSource] = {}
        self._ranks: dict[tuple[str, tuple[int, ...]], int] = {}
        for record in records:
            replicas = {part.name for part in record.parts if part.replica}
            for item in record.items:
                self._offer(ItemSource(rank=record.rank, item=item), item.part in replicas, record.rank in near)

    def _offer(self, source: ItemSource, replica: bool, near: bool) -> None:
        # A main part here, a replica here, a main part elsewhere; a replica elsewhere can't be reached at all.
        order = (0 if near else 2) + replica
        key = (source.item.fqn, source.item.offsets)
        if order < 3 and order < self._ranks.get(key, 3):
            self._found[key], self._ranks[key] = source, order

    def get(self, fqn: str, offsets: tuple[int, ...] = ()) -> ItemSource:
        """Return where a chunk of a tensor, or a Python value, stands."""
        return self._found[fqn, offsets]

    def __iter__(self) -> Iterator[ItemSource]:
        """Yield every one that can be reached."""
        return iter(self._found.values())
