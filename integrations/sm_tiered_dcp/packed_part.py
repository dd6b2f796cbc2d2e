"""What is packed, a frame and the live tensors that fill it, as a part of a checkpoint: one file of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from sm_tiered.records import Item, ItemTable
from sm_tiered_dcp.archive import Packed
from sm_tiered_dcp.copies import Piece, copy_tensors, in_chunks, kept_views

__all__ = ["PackedPart", "whole_file"]


def whole_file(name: str, fqn: str, path: tuple[str | int, ...], size: int) -> ItemTable:
    """Return the items of a part that is one value, called *fqn*: all of it, *size* bytes."""
    return ItemTable(items=(Item(fqn=fqn, path=path, part=name, offset=0, length=size),))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedPart:
    """One file of its own, which is also a DCP value: stock readers find it as such. A `sm_tiered.parts.PartSource`."""

    name: str
    fqn: str
    path: tuple[str | int, ...]
    packed: Packed = field(repr=False)
    replica: bool = False
    recycled: bool = True

    @property
    def size(self) -> int:
        """In bytes."""
        return self.packed.frame.size

    @property
    def table(self) -> ItemTable:
        """The one item: all of the file."""
        return whole_file(self.name, self.fqn, self.path, self.size)

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*. Tensors that view it stay in *cache*: drop that before the mapping behind is closed."""
        frame, tensors = self.packed.frame, self.packed.tensors
        kinds = [(tensor.dtype, tensor.shape) for tensor in tensors]
        views = kept_views(cache, (frame.holes, kinds), lambda: self._views(buffer))
        for start, piece in frame.pieces:
            buffer[start : start + len(piece)] = piece
        with torch.no_grad():
            copy_tensors(views, tensors, frozenset(tensor.device for tensor in tensors if not tensor.is_cpu))

    def _views(self, buffer: memoryview) -> list[torch.Tensor]:
        if not self.packed.tensors:
            return []
        whole = torch.frombuffer(buffer, dtype=torch.uint8)
        return [
            whole[hole.offset : hole.offset + hole.length].view(tensor.dtype).view(tensor.shape)
            for hole, tensor in zip(self.packed.frame.holes, self.packed.tensors, strict=True)
        ]

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file in pieces of 8 MiB, through a buffer of that size."""
        return in_chunks(self._pieces(), self.size)

    def _pieces(self) -> Iterator[Piece]:
        frame = self.packed.frame
        parts: dict[int, Piece] = {start: (len(piece), piece) for start, piece in frame.pieces}
        for hole, tensor in zip(frame.holes, self.packed.tensors, strict=True):
            parts[hole.offset] = (hole.length, tensor.detach())
        yield from (parts[start] for start in sorted(parts))
