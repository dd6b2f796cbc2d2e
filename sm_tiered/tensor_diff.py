"""By how much a tensor of one checkpoint differs from that of another: a window at a time, in bounded memory.

What has equal digests on both sides at equal places is equal, and is not read at all, unless a tensor differs
elsewhere: then its norm and its NaNs are asked for, and one side is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sm_tiered.checksum import CHUNK_BYTES, chunk_range
from sm_tiered.number_formats import decoded, is_integer
from sm_tiered.stored_reads import TensorReader, runs_of, windows
from sm_tiered.stored_tensors import ITEM_BYTES, StoredChunk, StoredTensor, StoredValue

__all__ = ["Difference", "compare", "measure", "same_value"]

Tell = Callable[[int], None]
"""Told how many more bytes of a tensor are done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What comparing two tensors, or two windows of them, told. Of those that are equal, maybe only the elements."""

    elements: int = 0
    different: int = 0
    """Elements whose bits differ: NaN equals the same NaN, 0.0 is not -0.0."""
    max_abs: float = 0.0
    """Largest |a - b|, where both are finite."""
    square_gap: float = 0.0
    """Sum of |a - b|², where both are finite."""
    square_norm: float = 0.0
    """Sum of |a|², where both are finite."""
    nans: tuple[int, int] = (0, 0)
    """In a and in b."""
    infinities: tuple[int, int] = (0, 0)
    shards: int = 1
    """How many pieces were compared on their own: the stored chunks, where both sides have the same ones."""
    same_shards: int = 0
    """How many of these are equal and not all zeros; told of optimizer state only."""
    skipped_bytes: int = 0
    """What was not read, for its digests are equal."""

    @property
    def same(self) -> bool:
        """Whether all bits are equal."""
        return self.different == 0

    @property
    def relative(self) -> float:
        """Relative L2 norm of the difference, ‖a - b‖ / ‖a‖; infinite where a is all zeros and b is not."""
        if self.square_gap == 0.0:
            return 0.0
        return math.sqrt(self.square_gap / self.square_norm) if self.square_norm else math.inf

    def __add__(self, other: Difference) -> Difference:
        """Return what is told of both together; the number of shards stays."""
        return replace(
            self,
            elements=self.elements + other.elements,
            different=self.different + other.different,
            max_abs=max(self.max_abs, other.max_abs),
            square_gap=self.square_gap + other.square_gap,
            square_norm=self.square_norm + other.square_norm,
            nans=(self.nans[0] + other.nans[0], self.nans[1] + other.nans[1]),
            infinities=(self.infinities[0] + other.infinities[0], self.infinities[1] + other.infinities[1]),
            same_shards=self.same_shards + other.same_shards,
            skipped_bytes=self.skipped_bytes + other.skipped_bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    """A tensor, or one shard of it, on both sides."""

    a: StoredTensor
    b: StoredTensor


def compare(
    a: TensorReader, one: StoredTensor, b: TensorReader, other: StoredTensor, *, moment: bool, tell: Tell
) -> Difference:
    """Return by how much *one*, read by *a*, differs from *other*, read by *b*; both have one dtype and shape.

    With *moment* it also says how many shards are equal without being zeros.

    Raises:
        TierError: something could not be read, or is damaged.
    """
    pairs = list(_pairs(one, other))
    total = Difference(shards=len(pairs))
    unread: list[tuple[_Pair, int, int]] = []
    for pair in pairs:
        found = Difference()
        for first, end in windows(pair.a):
            if _digests_agree(a, pair.a, b, pair.b, first, end):
                unread.append((pair, first, end))
                size = (end - first) * ITEM_BYTES[one.dtype]
                found += Difference(elements=end - first, skipped_bytes=size)
            else:
                found += measure(one.dtype, _read(a, pair.a, first, end), _read(b, pair.b, first, end))
            tell((end - first) * ITEM_BYTES[one.dtype])
        same = moment and found.same and found.elements > 0 and _has_bits(a, pair.a)
        total += replace(found, same_shards=int(same))
    if total.same:
        return total
    total = replace(total, skipped_bytes=0)
    for pair, first, end in unread:
        data = _read(a, pair.a, first, end)
        total += replace(measure(one.dtype, data, data), elements=0)
    return total


def same_value(a: TensorReader, one: StoredValue, b: TensorReader, other: StoredValue) -> bool:
    """Return whether two values are stored as the same bytes."""
    if one.length != other.length:
        return False
    left, right = _as_bytes(one), _as_bytes(other)
    return all(
        _digests_agree(a, left, b, right, first, end) or _read(a, left, first, end) == _read(b, right, first, end)
        for first, end in windows(left)
    )


def _as_bytes(value: StoredValue) -> StoredTensor:
    shape = (value.length,)
    chunk = StoredChunk(part=value.part, start=value.offset, offsets=(0,), sizes=shape)
    return StoredTensor(name=value.name, path=(value.name,), dtype="uint8", shape=shape, chunks=(chunk,))


def _pairs(one: StoredTensor, other: StoredTensor) -> Iterator[_Pair]:
    """Yield the shards where both sides have the same ones, else the whole tensors."""
    layouts = [[(chunk.offsets, chunk.sizes) for chunk in tensor.chunks] for tensor in (one, other)]
    if layouts[0] != layouts[1]:
        yield _Pair(a=one, b=other)
        return
    for left, right in zip(one.chunks, other.chunks, strict=True):
        yield _Pair(a=_alone(one, left), b=_alone(other, right))


def _alone(tensor: StoredTensor, chunk: StoredChunk) -> StoredTensor:
    return replace(tensor, shape=chunk.sizes, chunks=(replace(chunk, offsets=(0,) * len(chunk.sizes)),))


def _read(reader: TensorReader, tensor: StoredTensor, first: int, end: int) -> bytearray:
    buffer = bytearray((end - first) * ITEM_BYTES[tensor.dtype])
    reader.read_into(tensor, first, end, memoryview(buffer))
    return buffer


def _has_bits(reader: TensorReader, tensor: StoredTensor) -> bool:
    pieces = (_read(reader, tensor, first, end) for first, end in windows(tensor))
    return any(piece.count(0) != len(piece) for piece in pieces)


def _digests_agree(
    a: TensorReader, one: StoredTensor, b: TensorReader, other: StoredTensor, first: int, end: int
) -> bool:
    """Whether digests tell that a window holds the same bytes on both sides."""
    left, right = list(runs_of(one, first, end)), list(runs_of(other, first, end))
    if [(run.target, run.whole, run.first, run.shape) for run in left] != [
        (run.target, run.whole, run.first, run.shape) for run in right
    ]:
        return False
    for mine, theirs in zip(left, right, strict=True):
        if (mine.start - theirs.start) % CHUNK_BYTES:
            return False
        digests, others = (
            reader.chunks.part(tensor.chunks[run.chunk].part).chunks
            for reader, tensor, run in ((a, one, mine), (b, other, theirs))
        )
        shift = (theirs.start - mine.start) // CHUNK_BYTES
        if any(digests[index] != others[index + shift] for index in chunk_range(mine.start, mine.length)):
            return False
    return True


def measure(dtype: str, a: bytearray, b: bytearray) -> Difference:
    """Return by how much the numbers in *b* differ from those in *a*, which are as many."""
    import numpy

    np: Any = numpy
    width = ITEM_BYTES[dtype]
    elements = len(a) // width
    bits, columns = ("<u8", 2) if width == 16 else (f"<u{width}", 1)
    rows = [np.frombuffer(data, dtype=bits).reshape(-1, columns) for data in (a, b)]
    different = 0 if a is b else int((rows[0] != rows[1]).any(axis=1).sum())
    x = decoded(dtype, a)
    y = decoded(dtype, b) if different else x
    if is_integer(dtype):
        return _measure_integers(np, x, y, different)
    with np.errstate(all="ignore"):
        finite = np.isfinite(x) & np.isfinite(y)
        norm = np.abs(x[finite])
        gap = np.abs(x[finite] - y[finite]) if different else np.zeros(0)
        return Difference(
            elements=elements,
            different=different,
            max_abs=float(gap.max(initial=0.0)),
            square_gap=float(np.dot(gap, gap)),
            square_norm=float(np.dot(norm, norm)),
            nans=(int(np.isnan(x).sum()), int(np.isnan(y).sum())),
            infinities=(int(np.isinf(x).sum()), int(np.isinf(y).sum())),
        )


def _measure_integers(np: Any, x: Any, y: Any, different: int) -> Difference:
    # As unsigned numbers, whose difference can't overflow.
    unsigned = f"<u{x.dtype.itemsize}"
    gap = np.maximum(x, y).view(unsigned) - np.minimum(x, y).view(unsigned)
    wide, norm = gap.astype(np.float64), x.astype(np.float64)
    return Difference(
        elements=len(x),
        different=different,
        max_abs=int(gap.max(initial=0)),
        square_gap=float(np.dot(wide, wide)),
        square_norm=float(np.dot(norm, norm)),
    )
