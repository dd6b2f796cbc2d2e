"""Whole tensors of a checkpoint, read a window at a time, however many chunks of however many ranks they are made of.

A window is a run of a tensor's elements in row-major order. Memory is bounded by the window and by what
`VerifiedChunks` keeps, never by a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_tensors import ITEM_BYTES, StoredChunk, StoredTensor

__all__ = ["Run", "TensorReader", "WINDOW_BYTES", "room_for", "runs_of", "windows"]

WINDOW_BYTES = 4 * 1024 * 1024
"""How much of a tensor is looked at at once, in bytes."""
_MOST_ROOM = 64
"""Half a GiB: a tensor that is cut into more than that, across its rows, is read more than once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Part of a window: a run of stored bytes, and the box of the window that it fills."""

    chunk: int
    """Which chunk of the tensor."""
    start: int
    """First byte inside the part."""
    length: int
    """In bytes."""
    target: int
    """First byte, inside the window, of the box that *shape* is cut out of."""
    whole: tuple[int, ...]
    """Shape of that box, in elements."""
    first: tuple[int, ...]
    """Where the run's own box begins in it."""
    shape: tuple[int, ...]
    """Shape of the run's own box."""


def windows(tensor: StoredTensor, window_bytes: int = WINDOW_BYTES) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the windows of *tensor*, in elements; none where it has no elements."""
    step = max(1, window_bytes // ITEM_BYTES[tensor.dtype])
    for first in range(0, tensor.elements, step):
        yield first, min(first + step, tensor.elements)


def room_for(tensor: StoredTensor) -> int:
    """Return how many chunks `VerifiedChunks` should keep, so that those that a window touches are read once."""
    across = {chunk.offsets[1:] for chunk in tensor.chunks}
    return min(_MOST_ROOM, 4 + len(across))


def runs_of(tensor: StoredTensor, first: int, end: int) -> Iterator[Run]:
    """Yield what the elements *first* to *end* of *tensor* are read from."""
    shape = tensor.shape or (1,)
    target = 0
    for prefix, low, high in _boxes(shape, first, end):
        depth = len(prefix)
        whole = (high - low, *shape[depth + 1 :])
        for number, chunk in enumerate(tensor.chunks):
            run = _run(tensor, number, chunk, prefix, low, high, target, whole)
            if run is not None:
                yield run
        target += math.prod(whole) * ITEM_BYTES[tensor.dtype]


def _boxes(shape: Sequence[int], first: int, end: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield, in order, the boxes that a run of elements is made of.

    Each is an index for some outermost dimensions, a range of the next one, and all of those after it.
    """
    if first >= end:
        return
    row = math.prod(shape[1:])
    (low, head), (high, tail) = divmod(first, row), divmod(end, row)
    if low == high:
        yield from (((low, *prefix), a, b) for prefix, a, b in _boxes(shape[1:], head, tail))
        return
    if head:
        yield from (((low, *prefix), a, b) for prefix, a, b in _boxes(shape[1:], head, row))
        low += 1
    if low < high:
        yield (), low, high
    if tail:
        yield from (((high, *prefix), a, b) for prefix, a, b in _boxes(shape[1:], 0, tail))


def _run(
    tensor: StoredTensor,
    number: int,
    chunk: StoredChunk,
    prefix: tuple[int, ...],
    low: int,
    high: int,
    target: int,
    whole: tuple[int, ...],
) -> Run | None:
    """Return what *chunk* gives to a box; None for nothing. Of what it has there it lacks nothing: so it is one run."""
    offsets, sizes = chunk.offsets or (0,), chunk.sizes or (1,)
    depth = len(prefix)
    inside = [index - offset for index, offset in zip(prefix, offsets, strict=False)]
    if not all(0 <= index < size for index, size in zip(inside, sizes, strict=False)):
        return None
    begin, stop = max(low, offsets[depth]), min(high, offsets[depth] + sizes[depth])
    if begin >= stop:
        return None
    inner = math.prod(sizes[depth + 1 :])
    place = begin - offsets[depth]
    for index, stride in zip(inside, _strides(sizes), strict=False):
        place += index * (stride // inner)
    width = ITEM_BYTES[tensor.dtype]
    return Run(
        chunk=number,
        start=chunk.start + place * inner * width,
        length=(stop - begin) * inner * width,
        target=target,
        whole=whole,
        first=(begin - low, *offsets[depth + 1 :]),
        shape=(stop - begin, *sizes[depth + 1 :]),
    )


def _strides(sizes: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(reversed(sizes[1:]), lambda a, b: a * b, initial=1))[::-1]


class TensorReader:
    """Reads windows of the tensors of one checkpoint, for any number of threads."""

    def __init__(self, chunks: VerifiedChunks) -> None:
        """Read what *chunks* verifies."""
        self.chunks = chunks

    def read_into(self, tensor: StoredTensor, first: int, end: int, buffer: memoryview) -> None:
        """Fill *buffer* with the elements *first* to *end* of *tensor*, in row-major order, as they are stored.

        Raises:
            CorruptPartError: what is stored is not what was saved, or is gone.
            CheckpointNotFoundError: a running job deleted or recycled the checkpoint meanwhile.
            TierError: the tier did not answer or refused.
        """
        for run in runs_of(tensor, first, end):
            part = tensor.chunks[run.chunk].part
            if run.shape == run.whole:
                self.chunks.read_into(part, run.start, buffer[run.target : run.target + run.length])
            else:
                self._scatter(part, run, ITEM_BYTES[tensor.dtype], buffer)

    def _scatter(self, part: str, run: Run, width: int, buffer: memoryview) -> None:
        """Read *run*, and put its rows where they belong."""
        import numpy

        np: Any = numpy
        kind = np.complex128 if width == 16 else np.dtype(f"u{width}")
        read = bytearray(run.length)
        self.chunks.read_into(part, run.start, memoryview(read))
        box = np.frombuffer(buffer, dtype=kind, count=math.prod(run.whole), offset=run.target).reshape(run.whole)
        place = tuple(slice(a, a + n) for a, n in zip(run.first, run.shape, strict=True))
        box[place] = np.frombuffer(read, dtype=kind).reshape(run.shape)
