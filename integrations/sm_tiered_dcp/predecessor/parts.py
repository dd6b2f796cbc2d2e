"""What one rank of the predecessor stored, as parts of ours: tensors at their own size, values as they load safely."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, cast

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.records import Item, ItemTable
from sm_tiered_dcp.copies import Piece, in_chunks
from sm_tiered_dcp.dcp_parts import LaidOut, TensorEntry, TensorLayout, layout_tensors
from sm_tiered_dcp.predecessor.contents import StoredTensor, StoredValue
from sm_tiered_dcp.predecessor.shards import Checks, Shard, read_tensors, read_values
from sm_tiered_dcp.predecessor.temporary import using_temporary

__all__ = ["TensorsFrom", "ValuesFrom", "lay_out", "take_values"]

_IN_MEMORY_BYTES = 32 * 1024 * 1024


def lay_out(name: str, entries: Sequence[StoredTensor]) -> TensorLayout:
    """Return where the tensors of *entries* will stand in a part called *name*: in the order of the shard."""
    return layout_tensors(
        name,
        [
            TensorEntry(
                fqn=entry.fqn,
                path=entry.path,
                dtype=entry.dtype,
                sizes=entry.sizes,
                offsets=entry.offsets,
                shape=entry.shape,
            )
            for entry in entries
        ],
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorsFrom(LaidOut):
    """Tensors that are read out of a shard while they are written. A `sm_tiered.parts.PartSource`."""

    shard: Shard = field(repr=False)
    entries: Sequence[StoredTensor] = field(repr=False)
    told: Callable[[int], None] = field(repr=False)
    """Is told how many bytes of the shard each tensor took."""
    checks: Checks = field(repr=False)
    replica: bool = False
    recycled: bool = False

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*; nothing is kept in *cache*."""
        cache.clear()
        _fill(buffer, self.chunks())

    def chunks(self) -> Iterator[memoryview]:
        """Yield the part in pieces of 8 MiB, through a buffer of that size; the shard is read again each time."""
        return in_chunks(self._pieces(), self.size)

    def _pieces(self) -> Iterator[Piece]:
        end, tensors = 0, read_tensors(self.shard, self.entries, self.checks)
        for item, found, entry in zip(self.table.items, self.layout.skeletons, self.entries, strict=True):
            tensor = next(tensors)
            yield item.offset - end, bytes(item.offset - end)
            yield len(found.header), found.header
            yield found.payload_bytes, tensor
            yield len(found.trailer), found.trailer
            end = item.offset + item.length
            self.told(entry.span.length)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValuesFrom:
    """Python values, in a temporary file where they are large. A `sm_tiered.parts.PartSource` and a context manager."""

    name: str
    table: ItemTable
    size: int
    pickled: tuple[str, ...]
    """Names of those that can only be loaded by a pickle."""
    _file: IO[bytes] = field(repr=False)
    replica: bool = False
    recycled: bool = False

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*; nothing is kept in *cache*."""
        cache.clear()
        _fill(buffer, self.chunks())

    def chunks(self) -> Iterator[memoryview]:
        """Yield the values, in pieces of up to 8 MiB."""
        self._file.seek(0)
        while data := self._file.read(CHUNK_BYTES):
            yield memoryview(data)

    def __enter__(self) -> ValuesFrom:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the temporary file."""
        self._file.close()


def _fill(buffer: memoryview, chunks: Iterator[memoryview]) -> None:
    at = 0
    for chunk in chunks:
        buffer[at : at + len(chunk)] = chunk
        at += len(chunk)


def take_values(
    name: str,
    shard: Shard,
    entries: Sequence[StoredValue],
    checks: Checks,
    *,
    allow_pickle: bool,
    told: Callable[[int], None],
) -> AbstractContextManager[ValuesFrom]:
    """Read the values of *entries* out of *shard* into a part called *name*.

    Raises:
        TierFullError: they don't fit into TMPDIR.
        CorruptPartError: one is damaged.
        MismatchError: one can only be loaded by a pickle, and *allow_pickle* is False.
        UnsafeValueError: one can't be stored by us.
    """
    file = cast("IO[bytes]", tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES))  # noqa: SIM115 - the part has it
    items: list[Item] = []
    pickled: list[str] = []
    at, length = 0, sum(entry.span.length for entry in entries)
    try:
        for entry, value in zip(entries, read_values(shard, entries, checks, allow_pickle=allow_pickle), strict=True):
            with using_temporary(f"the values in {shard.title}", length):
                file.write(value.data)
            items.append(Item(fqn=entry.fqn, path=entry.path, part=name, offset=at, length=len(value.data)))
            at += len(value.data)
            if value.pickled:
                pickled.append(entry.fqn)
            told(entry.span.length)
        with using_temporary(f"the values in {shard.title}", length):
            file.flush()
    except BaseException:
        file.close()
        raise
    return ValuesFrom(name=name, table=ItemTable(items=tuple(items)), size=at, pickled=tuple(pickled), _file=file)
