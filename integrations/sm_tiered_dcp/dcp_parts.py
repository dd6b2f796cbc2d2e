"""Parts of a checkpoint in stock DCP format: tensors at offsets that stay the same from save to save, and values.

A `TensorLayout` is made once for each structure of the state. What surrounds the tensors' data is written once into
each mapping; after that a save copies the data and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch

from sm_tiered.errors import StructureError
from sm_tiered.records import Item, ItemTable
from sm_tiered_dcp.bytes_part import BytesPart, ValueEntry
from sm_tiered_dcp.copies import Piece, copy_tensors, in_chunks, kept_views
from sm_tiered_dcp.payload import ALIGNMENT, Skeleton, skeleton
from sm_tiered_dcp.tensor_reads import dtype_name

__all__ = ["BytesPart", "LaidOut", "TensorEntry", "TensorLayout", "TensorPart", "ValueEntry", "layout_tensors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor to store, or one chunk of a sharded one; lengths in elements."""

    fqn: str
    path: tuple[str | int, ...]
    dtype: torch.dtype
    sizes: tuple[int, ...]
    """Shape of this chunk."""
    offsets: tuple[int, ...]
    """Where this chunk begins in the whole tensor."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorLayout:
    """Where each tensor of a part stands. Two layouts are the same only if they are the same object."""

    name: str
    size: int
    """In bytes."""
    table: ItemTable
    """One item for each tensor, in their order; names that only repeat another's bytes may stand after them."""
    replica: bool
    skeletons: tuple[Skeleton, ...] = field(repr=False)
    shapes: tuple[torch.Size, ...] = field(repr=False)
    dtypes: tuple[torch.dtype, ...] = field(repr=False)

    def source(self, tensors: Sequence[torch.Tensor]) -> TensorPart:
        """Return the part for one save of *tensors*, in the order of the entries.

        They may be views, expanded, strided, on any device; a DTensor is given as its local tensor.

        Raises:
            StructureError: a tensor isn't what its entry says.
        """
        # Three list comparisons, because a look at each tensor in Python would cost more than its copy.
        fits = (
            [tensor.shape for tensor in tensors] == list(self.shapes)
            and [tensor.dtype for tensor in tensors] == list(self.dtypes)
            and {tensor.layout for tensor in tensors} <= {torch.strided}
        )
        if not fits:
            self._explain(tensors)
        others = [tensor.device for tensor in tensors if not tensor.is_cpu]
        if any(device.type == "meta" for device in others):
            self._explain(tensors)
        return TensorPart(layout=self, tensors=tuple(tensors), devices=frozenset(others))

    def _explain(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self.shapes):
            raise StructureError(f"{self.name} holds {len(self.shapes)} tensors, {len(tensors)} were given")
        for item, tensor, shape, dtype in zip(self.table.items, tensors, self.shapes, self.dtypes, strict=False):
            if tensor.shape != shape or tensor.dtype is not dtype:
                raise StructureError(
                    f"{item.fqn}: {dtype} {list(shape)} was planned, the tensor is {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.layout is not torch.strided or tensor.device.type == "meta":
                raise StructureError(
                    f"{item.fqn}: a {tensor.layout} tensor on {tensor.device} can't be stored",
                    hint="Give a dense tensor that has data.",
                )


def layout_tensors(name: str, entries: Sequence[TensorEntry], *, replica: bool = False) -> TensorLayout:
    """Return where the tensors of *entries* stand in a part called *name*.

    Raises:
        StructureError: a chunk doesn't lie inside its tensor, stands twice, or is of a dtype that can't be stored.
    """
    at = 0
    items: list[Item] = []
    skeletons: list[Skeleton] = []
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for entry in entries:
        _check(entry)
        if (entry.fqn, entry.offsets) in seen:
            raise StructureError(f"{entry.fqn} at {list(entry.offsets)} stands twice in {name}")
        seen.add((entry.fqn, entry.offsets))
        found = skeleton(entry.dtype, entry.sizes)
        payload = -(-(at + found.payload_offset) // ALIGNMENT) * ALIGNMENT
        offset = payload - found.payload_offset
        items.append(_item(name, entry, offset, payload, found))
        skeletons.append(found)
        at = offset + found.length
    return TensorLayout(
        name=name,
        size=at,
        table=ItemTable(items=tuple(items)),
        replica=replica,
        skeletons=tuple(skeletons),
        shapes=tuple(torch.Size(entry.sizes) for entry in entries),
        dtypes=tuple(entry.dtype for entry in entries),
    )


def _check(entry: TensorEntry) -> None:
    dtype_name(entry.dtype)
    fits = len(entry.sizes) == len(entry.offsets) == len(entry.shape) and all(
        min(offset, size) >= 0 and offset + size <= whole
        for offset, size, whole in zip(entry.offsets, entry.sizes, entry.shape, strict=True)
    )
    if not fits:
        raise StructureError(
            f"{entry.fqn}: a chunk of {list(entry.sizes)} at {list(entry.offsets)} is no part of {list(entry.shape)}"
        )


def _item(part: str, entry: TensorEntry, offset: int, payload: int, found: Skeleton) -> Item:
    return Item(
        fqn=entry.fqn,
        path=entry.path,
        part=part,
        offset=offset,
        length=found.length,
        payload=payload,
        dtype=dtype_name(entry.dtype),
        sizes=entry.sizes,
        offsets=entry.offsets,
        shape=entry.shape,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaidOut:
    """A part whose tensors go where *layout* says."""

    layout: TensorLayout

    @property
    def name(self) -> str:
        """Its file name."""
        return self.layout.name

    @property
    def size(self) -> int:
        """In bytes."""
        return self.layout.size

    @property
    def table(self) -> ItemTable:
        """The items that it holds."""
        return self.layout.table


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorPart(LaidOut):
    """Live tensors, about to be saved. A `sm_tiered.parts.PartSource`."""

    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    devices: frozenset[torch.device]
    """Those of the tensors, the CPU apart."""

    @property
    def replica(self) -> bool:
        """Whether other parts hold the same."""
        return self.layout.replica

    @property
    def recycled(self) -> bool:
        """True: the layout is the same at each save."""
        return True

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*. Tensors that view it stay in *cache*: drop that before the mapping behind is closed."""
        views = kept_views(cache, self.layout, lambda: _framed(buffer, self.layout))
        with torch.no_grad():
            copy_tensors(views, self.tensors, self.devices)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the part in pieces of 8 MiB, through a buffer of that size."""
        return in_chunks(_pieces(self), self.size)


def _write_frame(buffer: memoryview, layout: TensorLayout) -> None:
    """Write everything but the tensors' data; what stands between two streams is zeroed."""
    end = 0
    for item, found in zip(layout.table.items, layout.skeletons, strict=False):
        payload = cast(int, item.payload)
        buffer[end : item.offset] = bytes(item.offset - end)
        buffer[item.offset : payload] = found.header
        end = item.offset + item.length
        buffer[payload + found.payload_bytes : end] = found.trailer


def _framed(buffer: memoryview, layout: TensorLayout) -> list[torch.Tensor]:
    """Write all but the data, and return one tensor for each item, on the memory of *buffer*."""
    _write_frame(buffer, layout)
    if not layout.size:
        return []
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    views: list[torch.Tensor] = []
    for item, shape, dtype in zip(layout.table.items, layout.shapes, layout.dtypes, strict=False):
        start = cast(int, item.payload)
        views.append(whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape))
    return views


def _pieces(part: TensorPart) -> Iterator[Piece]:
    """Yield what the part consists of, in order."""
    end = 0
    for item, found, tensor in zip(part.table.items, part.layout.skeletons, part.tensors, strict=False):
        yield item.offset - end, bytes(item.offset - end)
        yield len(found.header), found.header
        yield found.payload_bytes, tensor.detach()
        yield len(found.trailer), found.trailer
        end = item.offset + item.length
