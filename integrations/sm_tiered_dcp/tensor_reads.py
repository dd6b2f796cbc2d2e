"""Which bytes of a part hold a box of a stored tensor, and how they get into the tensor that wants them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch

from sm_tiered.errors import FormatError, MismatchError, StructureError
from sm_tiered.records import Item
from sm_tiered_dcp.leaves import lacks_storage

__all__ = [
    "BOUNCE_BYTES",
    "GAP_BYTES",
    "Read",
    "dtype_name",
    "dtype_named",
    "own_bytes",
    "place",
    "ranges",
    "row_major",
]

Read = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes of the part from an offset on, or raises."""

BOUNCE_BYTES = 16 * 1024 * 1024
"""The most private memory that `place` takes, in bytes."""

GAP_BYTES = 64 * 1024
"""Two ranges that are not farther apart than this are read as one, in bytes."""

_NAMES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
)
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES if hasattr(torch, name)}
_NAMED: dict[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a record calls *dtype*.

    Raises:
        StructureError: tensors of it (quantized ones, for example) can't be stored.
    """
    if dtype not in _NAMED:
        raise StructureError(f"tensors of {dtype} can't be stored", hint=f"Allowed: {', '.join(_DTYPES)}.")
    return _NAMED[dtype]


def dtype_named(name: str | None) -> torch.dtype:
    """Return the dtype that a record calls *name*.

    Raises:
        FormatError: this torch has none of that name.
    """
    if name not in _DTYPES:
        raise FormatError(
            f"this torch ({torch.__version__}) has no dtype {str(name)[:40]!r}", hint=f"Known: {', '.join(_DTYPES)}."
        )
    return _DTYPES[name]


def own_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes."""
    if not tensor.numel():
        return memoryview(b"")
    # as_strided, because one element may have any stride and yet be contiguous
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return memoryview(cast("bytearray", flat.view(torch.uint8).numpy()))


def row_major(tensor: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield views of *tensor*, few and large, that one after the other are its elements *start* to *stop*."""
    if start >= stop:
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)[start:stop]
    elif tensor.dim() == 1:
        yield tensor[start:stop]
    else:
        row = tensor[0].numel()
        (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
        if first == last:
            yield from row_major(tensor[first], head, tail)
            return
        if head:
            yield from row_major(tensor[first], head, row)
            first += 1
        if first < last:
            yield tensor[first:last]
        if tail:
            yield from row_major(tensor[last], 0, tail)


def ranges(
    item: Item, offsets: Sequence[int], lengths: Sequence[int], *, gap_bytes: int = GAP_BYTES
) -> list[tuple[int, int]]:
    """Return (offset in the part, length) of what `place` reads for the box at *offsets* of the chunk, in bytes.

    Neighbours not farther apart than *gap_bytes* are one range; 0 gives the bytes of the box and no others.

    Raises:
        MismatchError: the box doesn't lie inside the chunk.
    """
    box = _Box(item, offsets, lengths)
    if not math.prod(lengths):
        return []
    depth = box.depth(gap_bytes)
    outer = itertools.product(*(range(count) for count in lengths[:depth]))
    found: list[tuple[int, int]] = []
    for index in outer:
        start = box.start + sum(i * stride for i, stride in zip(index, box.strides, strict=False))
        if found and start - sum(found[-1]) <= gap_bytes:
            found[-1] = (found[-1][0], start + box.span(depth) - found[-1][0])
        else:
            found.append((start, box.span(depth)))
    return found


def place(
    item: Item,
    offsets: Sequence[int],
    lengths: Sequence[int],
    target: torch.Tensor,
    read: Read,
    *,
    gap_bytes: int = GAP_BYTES,
) -> None:
    """Fill *target* with the box at *offsets* of the chunk that *item* describes.

    *target* has the shape of the box and the dtype of the item; it may be strided, on any device, require grad.
    Private memory is bounded by `BOUNCE_BYTES`; nothing outside `ranges` is read.

    Raises:
        MismatchError: *target* isn't as said, or the box doesn't lie inside the chunk. Nothing was read.
    """
    box = _Box(item, offsets, lengths)
    if tuple(target.shape) != tuple(lengths) or target.dtype is not box.dtype:
        raise MismatchError(
            f"{item.fqn}: {box.dtype} {list(lengths)} is wanted, the target is {target.dtype} {list(target.shape)}"
        )
    if lacks_storage(target):
        raise MismatchError(f"{item.fqn}: the target is larger than its storage, which was freed or resized")
    with torch.no_grad():
        if target.numel():
            _fill(box, 0, box.start, target.detach(), read, gap_bytes)


class _Box:
    """A box inside a stored chunk, in bytes of the part."""

    def __init__(self, item: Item, offsets: Sequence[int], lengths: Sequence[int]) -> None:
        sizes = item.sizes
        inside = len(offsets) == len(lengths) == len(sizes) and all(
            min(offset, length) >= 0 and offset + length <= size
            for offset, length, size in zip(offsets, lengths, sizes, strict=True)
        )
        if item.payload is None or not inside:
            raise MismatchError(
                f"{item.fqn}: no box of {list(lengths)} at {list(offsets)} lies in what is stored, {list(sizes)}"
            )
        self.dtype = dtype_named(item.dtype)
        self.lengths = tuple(lengths)
        self.strides = tuple(self.dtype.itemsize * math.prod(sizes[dim + 1 :]) for dim in range(len(sizes)))
        self.start = item.payload + sum(o * stride for o, stride in zip(offsets, self.strides, strict=True))
        if item.payload + self.dtype.itemsize * math.prod(sizes) > item.offset + item.length:
            raise FormatError(f"{item.fqn}: {item.dtype} {list(sizes)} doesn't fit into {item.length} stored bytes")

    def span(self, dim: int) -> int:
        """Bytes from the first to the last element of the box in dimensions *dim* and on."""
        steps = zip(self.lengths[dim:], self.strides[dim:], strict=True)
        return self.dtype.itemsize + sum((length - 1) * stride for length, stride in steps)

    def depth(self, gap_bytes: int) -> int:
        """The outermost dimension from which on the box has no gap above *gap_bytes*."""
        for dim in reversed(range(len(self.lengths))):
            if self.lengths[dim] > 1 and self.strides[dim] - self.span(dim + 1) > gap_bytes:
                return dim + 1
        return 0


def _fill(box: _Box, dim: int, start: int, target: torch.Tensor, read: Read, gap_bytes: int) -> None:
    """Fill *target*, the box from *dim* on, whose first byte stands at *start*."""
    if box.span(dim) == target.numel() * box.dtype.itemsize:
        _fill_run(start, target, read)
    elif dim >= box.depth(gap_bytes) and box.span(dim + 1) <= BOUNCE_BYTES:
        _fill_rows(box, dim, start, target, read)
    else:
        for row in range(box.lengths[dim]):
            _fill(box, dim + 1, start + row * box.strides[dim], target[row], read, gap_bytes)


def _fill_run(start: int, target: torch.Tensor, read: Read) -> None:
    """The stored bytes of *target* are one run."""
    if target.device.type == "cpu" and target.is_contiguous() and not (target.is_conj() or target.is_neg()):
        read(start, own_bytes(target))
        return
    itemsize, count = target.dtype.itemsize, target.numel()
    step = min(count, BOUNCE_BYTES // itemsize)
    bounce = torch.empty(step, dtype=target.dtype, device="cpu")
    for first in range(0, count, step):
        last = min(first + step, count)
        read(start + first * itemsize, own_bytes(bounce[: last - first]))
        at = 0
        for piece in row_major(target, first, last):
            piece.copy_(bounce[at : at + piece.numel()].view(piece.shape))
            at += piece.numel()


def _fill_rows(box: _Box, dim: int, start: int, target: torch.Tensor, read: Read) -> None:
    """The stored rows of *target* have small gaps: read them with their gaps, as many at a time as fit."""
    itemsize, stride, inner = box.dtype.itemsize, box.strides[dim], box.span(dim + 1)
    rows = min(box.lengths[dim], 1 + (BOUNCE_BYTES - inner) // stride)
    bounce = torch.empty(((rows - 1) * stride + inner) // itemsize, dtype=box.dtype, device="cpu")
    strides = [step // itemsize for step in box.strides[dim:]]
    for first in range(0, box.lengths[dim], rows):
        count = min(rows, box.lengths[dim] - first)
        read(start + first * stride, own_bytes(bounce[: ((count - 1) * stride + inner) // itemsize]))
        stored = bounce.as_strided((count, *target.shape[1:]), strides)
        target[first : first + count].copy_(stored)
