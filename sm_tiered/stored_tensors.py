"""The tensors of a stored checkpoint, put together from all ranks' records: no data is read, nothing is unpickled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sm_tiered.errors import FormatError
from sm_tiered.records import Item, Record

__all__ = [
    "ITEM_BYTES",
    "Stored",
    "StoredChunk",
    "StoredTensor",
    "StoredValue",
    "check_whole",
    "in_order",
    "natural",
    "stored_in",
]

ITEM_BYTES: Mapping[str, int] = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    "float4_e2m1fn_x2": 1,
}
"""Size of one element, in bytes, by dtype as records name it. A `float4_e2m1fn_x2` is two numbers."""

_NUMBERS = re.compile(r"(\d{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A box of a tensor, its data in a row; shapes in elements."""

    part: str
    start: int
    """First byte of the data inside the part."""
    offsets: tuple[int, ...]
    """Where the box begins in the whole tensor."""
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A whole tensor, and the chunks that it is made of."""

    name: str
    """No two of a checkpoint have the same."""
    path: tuple[str | int, ...]
    """The keys that lead to it in the state it was saved from; inside a file: the file's name and the keys there."""
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]
    """Without those of no elements, in order of their offsets."""
    file: str | None = None
    """The name of the whole file, or of the value, that it stands inside, if it does."""
    alias_of: str | None = None
    """The name that these very bytes were saved under, where this one only repeats them."""

    @property
    def elements(self) -> int:
        """How many it has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the data."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def bare_name(self) -> str:
        """Its name without that of the file that it stands in."""
        return self.name if self.file is None else self.name.removeprefix(f"{self.file}:")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValue:
    """What is stored and no tensor: a Python value, or a whole file."""

    name: str
    part: str
    offset: int
    """First byte inside the part."""
    length: int
    """In bytes."""
    is_file: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Everything that a checkpoint holds, by name, in natural order: layer 2 before layer 10."""

    tensors: Mapping[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    values: Mapping[str, StoredValue] = field(default_factory=dict[str, StoredValue])
    odd: Mapping[str, StoredTensor] = field(default_factory=dict[str, StoredTensor])
    """Tensors inside files whose numbers do not stand in row-major order; without chunks, so they can't be read."""


def stored_in(records: Iterable[Record]) -> Stored:
    """Return what *records*, those of all ranks, tell of a checkpoint. Replicas are left out: others hold the same.

    Raises:
        FormatError: a tensor is not whole, its chunks do not fit together, or it is of an unknown dtype.
    """
    items: dict[str, list[Item]] = {}
    values: dict[str, StoredValue] = {}
    for record in records:
        replicas = {part.name for part in record.parts if part.replica}
        for item in record.items:
            if item.part in replicas:
                continue
            if item.payload is not None:
                items.setdefault(item.fqn, []).append(item)
            else:
                values.setdefault(item.fqn, _value(item))
    tensors = {name: _tensor(found) for name, found in items.items()}
    return Stored(
        tensors=in_order(tensors),
        values={name: values[name] for name in sorted(values, key=natural)},
    )


def in_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return *tensors*, given in the order in which they were saved, by name, and told of which only repeat others."""
    known = dict(tensors)
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        saved_as = first.setdefault((tensor.dtype, tensor.shape, tensor.chunks), name) if tensor.chunks else name
        if saved_as != name:
            known[name] = replace(tensor, alias_of=saved_as)
    return {name: known[name] for name in sorted(known, key=natural)}


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key under which layer 2 stands before layer 10."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in _NUMBERS.split(name)]


def _value(item: Item) -> StoredValue:
    return StoredValue(
        name=item.fqn, part=item.part, offset=item.offset, length=item.length, is_file=item.offset == 0 and item.is_file
    )


def _tensor(items: Sequence[Item]) -> StoredTensor:
    first = items[0]
    dtype = first.dtype or ""
    if dtype not in ITEM_BYTES:
        raise FormatError(f"{first.fqn}: a dtype {dtype[:40]!r} is not known", hint=f"Known: {', '.join(ITEM_BYTES)}.")
    chunks: dict[tuple[int, ...], StoredChunk] = {}
    for item in items:
        if (item.dtype, item.shape) != (first.dtype, first.shape):
            raise FormatError(f"{first.fqn}: its chunks are of different dtypes or shapes")
        size = math.prod(item.sizes) * ITEM_BYTES[dtype]
        if size and (item.payload or 0) + size > item.offset + item.length:
            raise FormatError(f"{first.fqn}: {dtype} {list(item.sizes)} does not fit into {item.length} stored bytes")
        if size:
            chunk = StoredChunk(part=item.part, start=item.payload or 0, offsets=item.offsets, sizes=item.sizes)
            chunks.setdefault(item.offsets, chunk)
    ordered = tuple(chunks[offsets] for offsets in sorted(chunks))
    tensor = StoredTensor(name=first.fqn, path=first.path, dtype=dtype, shape=first.shape, chunks=ordered)
    check_whole(tensor)
    return tensor


def check_whole(tensor: StoredTensor) -> None:
    """See that the chunks of *tensor* cover it, each element once.

    Raises:
        FormatError: they do not.
    """
    there = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)
    if there != tensor.elements:
        raise FormatError(f"{tensor.name}: {there} of {tensor.elements} elements are stored")
    reaching: list[StoredChunk] = []
    for chunk in tensor.chunks:
        if chunk.sizes:
            reaching = [other for other in reaching if other.offsets[0] + other.sizes[0] > chunk.offsets[0]]
        if any(_overlap(chunk, other) for other in reaching):
            raise FormatError(f"{tensor.name}: two of its chunks hold the same elements")
        reaching.append(chunk)


def _overlap(one: StoredChunk, other: StoredChunk) -> bool:
    return all(
        max(a, b) < min(a + n, b + m)
        for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )
