"""The stream of one tensor as a skeleton: what ``torch.save`` writes before and after the data, and where that goes."""

from __future__ import annotations

import io
import math
import tempfile
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import IO, Any, cast

import torch

from sm_tiered_dcp.frames import blank, framed, without_crc

__all__ = ["ALIGNMENT", "Skeleton", "skeleton"]

ALIGNMENT = 64
"""Payloads begin at multiples of this, in bytes: a cache line, and what torch itself aligns records to."""

_PAYLOAD_RECORD = "data/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """The stream of one contiguous CPU tensor: *header*, *payload_bytes* of data in row-major order, *trailer*."""

    header: bytes
    payload_bytes: int
    trailer: bytes

    @property
    def payload_offset(self) -> int:
        """Where the payload begins, in bytes from the start of the stream."""
        return len(self.header)

    @property
    def length(self) -> int:
        """Of the whole stream, in bytes."""
        return len(self.header) + self.payload_bytes + len(self.trailer)


@lru_cache(maxsize=16384)
def skeleton(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton:
    """Return what ``torch.save`` writes around the data of a tensor of *dtype* and *shape*.

    CRC fields of the zip stream are left empty: torch doesn't read them.
    """
    if math.prod(shape) and _can_skip(dtype):
        found = _skipping(dtype, shape)
        if found is not None:
            return found
    return _plain(dtype, shape)


@cache
def _can_skip(dtype: torch.dtype) -> bool:
    """Whether this torch seeks over a payload in a way that can be filled in later; tried once for each dtype."""
    found = _skipping(dtype, (3,))
    if found is None:
        return False
    payload = bytes([1, 0] * found.payload_bytes)[: found.payload_bytes]
    stream = io.BytesIO(found.header + payload + found.trailer)
    if _payload_offset(stream) != found.payload_offset:
        return False
    stream.seek(0)
    loaded = cast(torch.Tensor, torch.load(stream, map_location="cpu", weights_only=True))
    return loaded.dtype is dtype and loaded.shape == (3,) and bytes(loaded.view(torch.uint8).numpy()) == payload


def _skipping(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton | None:
    """The quick way: torch seeks over the payload. None where this torch doesn't do so."""
    frame = framed(blank(dtype, shape))
    payload_bytes = math.prod(shape) * dtype.itemsize
    if frame is None or [hole.length for hole in frame.holes] != [payload_bytes]:
        return None
    (_, header), (_, trailer) = frame.pieces
    return Skeleton(header=header, payload_bytes=payload_bytes, trailer=trailer)


def _plain(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton:
    """The slow way, for a torch without `skip_data`: write everything, keep what is around the payload."""
    zeros = blank(dtype, shape).zero_()
    with tempfile.TemporaryFile() if zeros.nbytes else io.BytesIO() as stream, without_crc():
        torch.save(zeros, cast("IO[bytes]", stream))
        offset = _payload_offset(stream)
        stream.seek(0)
        header = stream.read(offset)
        stream.seek(offset + zeros.nbytes)
        return Skeleton(header=header, payload_bytes=zeros.nbytes, trailer=stream.read())


def _payload_offset(stream: Any) -> int:
    stream.seek(0)
    reader = cast(Any, torch._C).PyTorchFileReader(stream)  # pyright: ignore[reportPrivateUsage]
    return int(reader.get_record_offset(_PAYLOAD_RECORD))
