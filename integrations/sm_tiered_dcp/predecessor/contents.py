"""What one checkpoint of the predecessor's holds, as its metadata tells: values, and where each of them stands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

__all__ = ["Contents", "Span", "StoredTensor", "StoredValue"]

_Entry = TypeVar("_Entry", "StoredTensor", "StoredValue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one ``torch.save`` stream stands."""

    rank: int
    offset: int
    """First byte inside that rank's shard."""
    length: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One chunk of a tensor, or all of it; lengths in elements."""

    fqn: str
    path: tuple[str | int, ...]
    span: Span
    dtype: torch.dtype
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    """Where the chunk begins in the whole tensor."""
    shape: tuple[int, ...]
    """Of the whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValue:
    """One Python value."""

    fqn: str
    path: tuple[str | int, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that one checkpoint holds."""

    tensors: tuple[StoredTensor, ...]
    values: tuple[StoredValue, ...]

    entries: tuple[StoredTensor | StoredValue, ...] = field(init=False, repr=False, compare=False)
    """Both together."""
    size: int = field(init=False, compare=False)
    """Of all that is stored, in bytes."""
    ends: Mapping[int, int] = field(init=False, compare=False)
    """For each rank that stored something, how long its shard must be at least, in bytes."""
    _tensors_of: Mapping[int, Sequence[StoredTensor]] = field(init=False, repr=False, compare=False)
    _values_of: Mapping[int, Sequence[StoredValue]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Go through all of it once: there may be a million entries, and each of them is asked for."""
        entries = (*self.tensors, *self.values)
        ends: dict[int, int] = {}
        for entry in entries:
            ends[entry.span.rank] = max(ends.get(entry.span.rank, 0), entry.span.end)
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "size", sum(entry.span.length for entry in entries))
        object.__setattr__(self, "ends", ends)
        object.__setattr__(self, "_tensors_of", _by_rank(self.tensors))
        object.__setattr__(self, "_values_of", _by_rank(self.values))

    @property
    def world(self) -> int:
        """How many ranks wrote it, as far as the highest that stored something tells."""
        return 1 + max(self.ends, default=0)

    def of(self, rank: int) -> tuple[Sequence[StoredTensor], Sequence[StoredValue]]:
        """Return what *rank* stored, in the order in which it stands in the shard."""
        return self._tensors_of.get(rank, ()), self._values_of.get(rank, ())


def _by_rank(entries: Iterable[_Entry]) -> Mapping[int, Sequence[_Entry]]:
    found: dict[int, list[_Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.span.offset):
        found.setdefault(entry.span.rank, []).append(entry)
    return found
