"""Stock ``torch.save`` streams with holes where the data goes: it is copied once, straight to its final place."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import threading
from collections.abc import Generator
from dataclasses import dataclass
from typing import IO, Any, cast

import torch

__all__ = ["Frame", "Hole", "blank", "framed", "without_crc"]

_LOCAL_HEADER = b"PK\x03\x04"
_NAME_LENGTH_AT, _NAME_AT = 26, 30
"""Where a zip's local header tells the length of its record's name, and the name: APPNOTE.TXT 4.3.7."""

_crc_setting = threading.Lock()
"""It is torch's, for the whole process: two threads would restore each other's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Where the data of one storage goes, in bytes from the start of the stream."""

    offset: int
    length: int
    record: str
    """Its name in the zip, such as ``data/0``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Everything of a stream but the data of its tensors."""

    size: int
    """Of the whole stream, in bytes."""
    pieces: tuple[tuple[int, bytes], ...]
    """What stands around the holes, each with its offset."""
    holes: tuple[Hole, ...]
    """Ascending; storages of no bytes have none."""


def framed(value: object, *, pickle_module: Any = pickle) -> Frame | None:
    """Return what ``torch.save(value)`` writes around the data; None where this torch does not seek over it.

    CRC fields of the zip stream are left empty: torch doesn't read them.
    """
    skip_data = getattr(torch.serialization, "skip_data", None)
    if skip_data is None:
        return None
    stream = _Sparse()
    with without_crc(), skip_data():
        torch.save(value, cast("IO[bytes]", stream), pickle_module=pickle_module)
    return stream.frame()


def blank(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor whose pages are never touched, in row-major order, on the CPU."""
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


@contextlib.contextmanager
def without_crc() -> Generator[None, None, None]:
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
        self._run: list[bytes] = []
        self._run_at = 0
        self._at = 0
        self._pieces: list[tuple[int, bytes]] = []
        self._holes: list[tuple[int, int]] = []

    def frame(self) -> Frame | None:
        """What was written, if there is a zip's header before each hole."""
        self._end_run()
        before = {at + len(piece): piece for at, piece in self._pieces}
        holes: list[Hole] = []
        for offset, length in self._holes:
            record = _record_name(before.get(offset, b""))
            if record is None:
                return None
            holes.append(Hole(offset=offset, length=length, record=record))
        return Frame(size=self._at, pieces=tuple(self._pieces), holes=tuple(holes))

    def _end_run(self) -> None:
        if self._run:
            self._pieces.append((self._run_at, b"".join(self._run)))
        self._run, self._run_at = [], self._at

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._run.append(piece)
        self._at += len(piece)
        return len(piece)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_CUR or offset < 0:
            raise io.UnsupportedOperation("only seeks forward from here are known")
        if offset:
            self._end_run()
            self._holes.append((self._at, offset))
            self._at += offset
            self._run_at = self._at
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        pass


def _record_name(piece: bytes) -> str | None:
    """Return the name of the record whose header ends *piece*, without the archive's own name before it."""
    start = piece.rfind(_LOCAL_HEADER)
    if start < 0:
        return None
    length = int.from_bytes(piece[start + _NAME_LENGTH_AT : start + _NAME_LENGTH_AT + 2], "little")
    name = piece[start + _NAME_AT : start + _NAME_AT + length].decode("utf-8", "replace")
    return name.partition("/")[2]
