"""Stock ``torch.save`` streams without their payload, so that a tensor is copied once, straight to its final place."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import threading
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import IO, Any, cast

import torch

__all__ = ["ALIGNMENT", "Skeleton", "skeleton"]

ALIGNMENT = 64
"""Payloads begin at multiples of this, in bytes: a cache line, and what torch itself aligns records to."""

_PAYLOAD_RECORD = "data/0"

_crc_setting = threading.Lock()
"""It is torch's, for the whole process: two threads would restore each other's."""


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


def _blank(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    # Not torch.empty(shape): in deterministic mode that fills, and so allocates, the whole payload.
    storage = torch.UntypedStorage(math.prod(shape) * dtype.itemsize, device="cpu")
    tensor = torch.empty(0, dtype=dtype, device="cpu")
    return tensor.set_(cast(Any, storage), 0, shape, _row_major_strides(shape))


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    stride = 1
    for length in reversed(shape):
        strides.append(stride)
        stride *= max(length, 1)
    return tuple(reversed(strides))


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
    skip_data = getattr(torch.serialization, "skip_data", None)
    if skip_data is None:
        return None
    stream = _Sparse()
    with _without_crc(), skip_data():
        torch.save(_blank(dtype, shape), cast("IO[bytes]", stream))
    return stream.skeleton(math.prod(shape) * dtype.itemsize)


def _plain(dtype: torch.dtype, shape: tuple[int, ...]) -> Skeleton:
    """The slow way, for a torch without `skip_data`: write everything, keep what is around the payload."""
    blank = _blank(dtype, shape).zero_()
    with tempfile.TemporaryFile() if blank.nbytes else io.BytesIO() as stream, _without_crc():
        torch.save(blank, cast("IO[bytes]", stream))
        offset = _payload_offset(stream)
        stream.seek(0)
        header = stream.read(offset)
        stream.seek(offset + blank.nbytes)
        return Skeleton(header=header, payload_bytes=blank.nbytes, trailer=stream.read())


def _payload_offset(stream: Any) -> int:
    stream.seek(0)
    reader = cast(Any, torch._C).PyTorchFileReader(stream)  # pyright: ignore[reportPrivateUsage]
    return int(reader.get_record_offset(_PAYLOAD_RECORD))


@contextlib.contextmanager
def _without_crc() -> Generator[None, None, None]:
    """CRCs of a payload that isn't there would be wrong; without them the stream also is made faster."""
    read = getattr(torch.serialization, "get_crc32_options", None)
    write = getattr(torch.serialization, "set_crc32_options", None)
    if read is None or write is None:
        yield
        return
    with _crc_setting:
        before = bool(read())
        write(False)
        try:
            yield
        finally:
            write(before)


class _Sparse:
    """A file to write to that remembers what was written, and where it was seeked over instead."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = 0
        self._holes: list[tuple[int, int, int]] = []

    def skeleton(self, payload_bytes: int) -> Skeleton | None:
        """What was written, when there is exactly one hole in it, of *payload_bytes*."""
        if len(self._holes) != 1:
            return None
        pieces, start, length = self._holes[0]
        header, trailer = b"".join(self._pieces[:pieces]), b"".join(self._pieces[pieces:])
        if len(header) != start or length != payload_bytes:
            return None
        return Skeleton(header=header, payload_bytes=payload_bytes, trailer=trailer)

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR or offset < 0:
            raise io.UnsupportedOperation("only seeks forward from here are known")
        self._holes.append((len(self._pieces), self._at, offset))
        self._at += offset
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass
