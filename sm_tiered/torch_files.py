"""``torch.save`` files, looked into without torch: which of their bytes are which tensor's."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from sm_tiered.pickled_tensors import Pickled, pickled_tensors
from sm_tiered.stored_tensors import ITEM_BYTES, StoredChunk, StoredTensor, StoredValue

__all__ = ["TorchFile", "look_into"]

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: verified bytes of the file."""

_MAX_PICKLE_BYTES = 256 * 1024 * 1024
_LOCAL_HEADER_BYTES, _ALIGNMENT = 30, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchFile:
    """What is inside a file."""

    tensors: dict[str, StoredTensor]
    odd: dict[str, StoredTensor]
    """Tensors, without chunks, whose numbers are not stored in row-major order."""
    rest: StoredValue
    """The pickle: all that is no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Record:
    start: int
    """First byte inside the file."""
    length: int


def look_into(value: StoredValue, read: Read) -> TorchFile | None:
    """Return what is inside the file that *value* is, or None where it is none that ``torch.save`` writes.

    Raises:
        TierError: it can't be read, or is damaged.
    """
    try:
        records = _records(value, read)
        pickle = next(record for name, record in records.items() if name == "data.pkl")
        if pickle.length > _MAX_PICKLE_BYTES:
            return None
        order = records.get("byteorder")
        if order is not None and read(order.start, order.length) != b"little":
            return None
        found = pickled_tensors(read(pickle.start, pickle.length))
        tensors, odd = _tensors(value, found, records)
    except (ValueError, StopIteration, zipfile.BadZipFile, KeyError, NotImplementedError):
        return None
    name = f"{value.name}:data.pkl"
    rest = StoredValue(name=name, part=value.part, offset=value.offset + pickle.start, length=pickle.length)
    return TorchFile(tensors=tensors, odd=odd, rest=rest)


def _records(value: StoredValue, read: Read) -> dict[str, _Record]:
    """Return the records of the archive, by name without that of the archive."""
    with zipfile.ZipFile(_Window(read, value.length)) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    found: dict[str, _Record] = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed record")
        start = _start(entry, read, read_it=len(found) < 2)
        if start + entry.file_size > value.length:
            raise ValueError("a record that ends outside the file")
        found[entry.filename.partition("/")[2]] = _Record(start=start, length=entry.file_size)
    _check_apart(entries, list(found.values()))
    return found


def _start(entry: zipfile.ZipInfo, read: Read, *, read_it: bool) -> int:
    """Return where the data of a record begins: torch pads its header, so that this is a multiple of 64.

    With *read_it* it is read, and no rule of torch's is trusted; each header read costs a chunk of the part.
    """
    name = len(entry.filename.encode())
    told = entry.header_offset + _LOCAL_HEADER_BYTES + name + 4
    if max(entry.file_size, entry.header_offset) >= 0xFFFFFFFF:
        told += 4 + 8 * ((entry.file_size >= 0xFFFFFFFF) * 2 + (entry.header_offset >= 0xFFFFFFFF))
    ruled = -(-told // _ALIGNMENT) * _ALIGNMENT
    if not read_it:
        return ruled
    header = read(entry.header_offset, _LOCAL_HEADER_BYTES)
    lengths = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = entry.header_offset + _LOCAL_HEADER_BYTES + sum(lengths)
    if start != ruled:
        raise ValueError("an archive that torch did not write")
    return start


def _check_apart(entries: list[zipfile.ZipInfo], records: list[_Record]) -> None:
    """See that between records there is what torch writes there, a data descriptor of one length or another."""
    ends = [record.start + record.length for record in records]
    gaps = {entry.header_offset - end for entry, end in zip(entries[1:], ends, strict=False)}
    if not gaps <= {0, 16, 24}:
        raise ValueError("an archive that torch did not write")


def _tensors(
    value: StoredValue, found: list[Pickled], records: dict[str, _Record]
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    tensors: dict[str, StoredTensor] = {}
    odd: dict[str, StoredTensor] = {}
    for one in found:
        name = f"{value.name}:{'.'.join(map(str, one.path))}"
        record = records[f"data/{one.storage.key}"]
        width = ITEM_BYTES[one.dtype]
        count = math.prod(one.shape)
        if count and min(one.start, *one.strides, 0) < 0:
            raise ValueError("a tensor that begins before its storage")
        last = one.start + sum((n - 1) * stride for n, stride in zip(one.shape, one.strides, strict=True))
        if count and (last + 1) * width > record.length:
            raise ValueError("a tensor that ends outside its storage")
        straight = not count or _is_row_major(one)
        start = value.offset + record.start + one.start * width
        chunk = StoredChunk(part=value.part, start=start, offsets=(0,) * len(one.shape), sizes=one.shape)
        (tensors if straight else odd)[name] = StoredTensor(
            name=name,
            path=(value.name, *one.path),
            dtype=one.dtype,
            shape=one.shape,
            chunks=(chunk,) if count and straight else (),
            file=value.name,
        )
    return tensors, odd


def _is_row_major(one: Pickled) -> bool:
    stride = 1
    for n, found in zip(reversed(one.shape), reversed(one.strides), strict=True):
        if n != 1 and found != stride:
            return False
        stride *= n
    return True


class _Window(io.RawIOBase):
    """A file of *length* bytes that is read by *read*."""

    def __init__(self, read: Read, length: int) -> None:
        super().__init__()
        self._read, self._length, self._at = read, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        count = left if size is None or size < 0 else min(size, left)
        found = self._read(self._at, count)
        self._at += count
        return found
