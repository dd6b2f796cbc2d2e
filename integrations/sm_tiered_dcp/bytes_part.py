"""A part of Python values: small, of another length at each save, written whole."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from sm_tiered.records import Item, ItemTable

__all__ = ["BytesPart", "ValueEntry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueEntry:
    """One Python value to store, as `sm_tiered_dcp.values.dump_value` made it."""

    fqn: str
    path: tuple[str | int, ...]
    data: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class BytesPart:
    """Python values, one after the other in a fresh file. A `sm_tiered.parts.PartSource`."""

    name: str
    """Its file name."""
    entries: tuple[ValueEntry, ...] = field(repr=False)
    replica: bool = False
    recycled: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(len(entry.data) for entry in self.entries)

    @property
    def table(self) -> ItemTable:
        """The items that it holds."""
        return self._table

    @cached_property
    def _table(self) -> ItemTable:
        starts = itertools.accumulate((len(entry.data) for entry in self.entries), initial=0)
        return ItemTable(
            items=tuple(
                Item(fqn=entry.fqn, path=entry.path, part=self.name, offset=start, length=len(entry.data))
                for entry, start in zip(self.entries, starts, strict=False)
            )
        )

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*; nothing is kept in *cache*."""
        cache.clear()  # should a tensor part ever come into these bytes, its headers are gone
        buffer[:] = b"".join(entry.data for entry in self.entries)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the values."""
        return (memoryview(entry.data) for entry in self.entries if entry.data)
