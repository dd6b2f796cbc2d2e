"""Loading a candidate into a state: DCP's own load planner decides what is read, resharding included."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from sm_tiered.nearest import ItemSource, Sources
from sm_tiered.sources import Span
from sm_tiered.voted_load import Read
from sm_tiered_dcp.tensor_reads import place, ranges

__all__ = ["PartStream", "read_plan_spans", "read_tensor", "read_value"]


def source_of(sources: Sources, request: ReadItem) -> ItemSource:
    """Return where what *request* asks for stands."""
    return sources.get(request.storage_index.fqn, tuple(request.storage_index.offset or ()))


def read_plan_spans(plan: LoadPlan, sources: Sources) -> dict[tuple[int, str], list[Span]]:
    """Return the bytes that *plan* touches, by rank and part."""
    spans: dict[tuple[int, str], list[Span]] = {}
    for request in plan.items:
        source = source_of(sources, request)
        item = source.item
        found = spans.setdefault((source.rank, item.part), [])
        if request.type == LoadItemType.BYTE_IO:
            found.append((item.offset, item.length))
        else:
            found += ranges(item, tuple(request.storage_offsets), tuple(request.lengths))
    return spans


def read_tensor(source: ItemSource, request: ReadItem, target: torch.Tensor, read: Read) -> None:
    """Fill *target* with the box of the stored chunk that *request* asks for."""

    def from_part(offset: int, buffer: memoryview) -> None:
        read(source.rank, source.item.part, offset, buffer)

    place(source.item, tuple(request.storage_offsets), tuple(request.lengths), target, from_part)


class PartStream(io.RawIOBase):
    """A stored stream that is read where it stands, for readers that ask for it piece by piece."""

    def __init__(self, source: ItemSource, read: Read) -> None:
        super().__init__()
        self._source, self._read, self._at = source, read, 0
        self.failure: Exception | None = None
        """What reading failed of first; who reads may not have passed it on."""

    @property
    def length(self) -> int:
        """In bytes."""
        return self._source.item.length

    def readable(self) -> bool:
        """Whether it can be read: it can."""
        return True

    def seekable(self) -> bool:
        """Whether it can be read from anywhere: it can."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte of the stream."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill *buffer*, as far as the stream goes."""
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.length - self._at)]
        if view:
            item = self._source.item
            try:
                self._read(self._source.rank, item.part, item.offset + self._at, view)
            except Exception as error:
                self.failure = self.failure or error
                raise
            self._at += len(view)
        return len(view)


def read_value(source: ItemSource, read: Read) -> bytes:
    """Return the stored stream of a Python value."""
    buffer = bytearray(source.item.length)
    read(source.rank, source.item.part, source.item.offset, memoryview(buffer))
    return bytes(buffer)
