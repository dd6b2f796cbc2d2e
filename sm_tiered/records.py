"""The facts of a checkpoint, as frozen values. What they look like as JSON is in `sm_tiered.manifest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

__all__ = [
    "IMPORTED_SECS",
    "Attempt",
    "AttemptRecord",
    "CheckpointId",
    "Item",
    "ItemTable",
    "Manifest",
    "Part",
    "Record",
]

IMPORTED_SECS = 10**9
"""Seconds of attempts that were imported are from 1 up to here; those of ours are the time, which passed it in 2001."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Attempt:
    """One lineage of saves. Attempts are ordered by ordinal; time and nonce only break ties."""

    ordinal: int
    """1 + the highest that any rank saw in any tier that answered."""
    utc_secs: int
    nonce: str
    """8 hex digits."""

    @property
    def is_imported(self) -> bool:
        """Whether it holds what another program saved: then its seconds are no time (`lineage.imported_attempt`)."""
        return self.ordinal == 1 and 0 < self.utc_secs <= IMPORTED_SECS

    def __str__(self) -> str:
        return f"a{self.ordinal:06d}-{self.utc_secs}-{self.nonce}"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class CheckpointId:
    """A step of an attempt. The order is that of candidates: by attempt first, then by step."""

    attempt: Attempt
    step: int

    def __str__(self) -> str:
        return f"step {self.step} of {self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """Where an attempt comes from."""

    namespace: str
    attempt: Attempt
    parent: CheckpointId | None
    """The checkpoint it was restored from."""
    chosen: bool
    """Whether the user named that step: then later steps of the parent are no candidates for latest."""
    source: str | None = None
    """The tiers that the parent was read from, joined with ``+``; None where nobody told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of a checkpoint, written by one rank."""

    name: str
    size: int
    """In bytes."""
    chunks: tuple[str, ...]
    """XXH3-128 of each 8 MiB chunk."""
    replica: bool = False
    """A second source for items that another part holds too; stays in memory, never promoted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Where one stored value stands. Tensors: one chunk of a possibly larger tensor; shapes in elements."""

    fqn: str
    path: tuple[str | int, ...]
    """The keys that lead to the value in the state it was saved from."""
    part: str
    offset: int
    """First byte, inside the part, of what a stock DCP reader loads."""
    length: int
    payload: int | None = None
    """First byte of the tensor's own data, row-major; None for a Python value."""
    dtype: str | None = None
    """As torch prints it, without the ``torch.``"""
    sizes: tuple[int, ...] = ()
    """Shape of this chunk."""
    offsets: tuple[int, ...] = ()
    """Where this chunk begins in the whole tensor."""
    shape: tuple[int, ...] = ()
    """Shape of the whole tensor."""

    @property
    def is_file(self) -> bool:
        """Whether this is a whole file under a name of its own, and no value of a state."""
        return self.fqn == self.part


@dataclass(frozen=True, kw_only=True)
class ItemTable:
    """Items that stay the same from save to save; their JSON is made once."""

    items: tuple[Item, ...]

    @cached_property
    def json(self) -> str:
        """The items as the inside of a JSON list."""
        from sm_tiered.manifest import items_to_json

        return items_to_json(self.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one rank wrote for one checkpoint. Its presence says that the parts are whole."""

    namespace: str
    checkpoint: CheckpointId
    rank: int
    world: int
    saved_at: float
    """UTC seconds since the epoch by this rank's clock; ages use rank 0's."""
    parts: tuple[Part, ...] = ()
    tables: tuple[ItemTable, ...] = ()
    watermark: CheckpointId | None = None
    """The newest checkpoint whose record every rank is known to have written."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    failed: str | None = None
    """Why this rank could not write its parts; then there are none."""

    @property
    def items(self) -> tuple[Item, ...]:
        """All items, in the order in which they were stored."""
        return tuple(item for table in self.tables for item in table.items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The commit record of a durable tier: a canonical function of the records.

    A tombstone is a manifest without parts or records: the checkpoint is being deleted.
    """

    namespace: str
    checkpoint: CheckpointId
    world: int
    saved_at: float
    """Rank 0's."""
    parts: dict[str, int] = field(default_factory=dict[str, int])
    """Size of each promoted part, in bytes."""
    records: dict[int, str] = field(default_factory=dict[int, str])
    """Digest of each rank's record."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    tombstone: bool = False
