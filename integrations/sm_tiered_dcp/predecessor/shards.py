"""What stands in a shard of the predecessor's: ``torch.save`` streams, one after the other, read one at a time.

Each is checked before it is used: that it is such a stream, the CRC-32 of every record that torch wrote into it, and
that it holds what the metadata said. Nothing is unpickled that ``torch.load(weights_only=True)`` refuses. Streams may
be without any CRC, and places without a checksum: what could not be compared with one is noted in `Checks`, to be told.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TypeVar, cast

import torch

from sm_tiered.errors import CorruptPartError, MismatchError, SaveError, UnsafeValueError
from sm_tiered_dcp.predecessor.contents import Span, StoredTensor, StoredValue
from sm_tiered_dcp.values import dump_value, load_stream
from sm_tiered_dcp.zips import check_zip

__all__ = ["Checks", "Shard", "Value", "enough_memory", "read_tensors", "read_values"]

_WINDOW_BYTES = 32 * 1024 * 1024
"""Neighbours are read together up to here; a stream that is longer is read alone."""
_GAP_BYTES = 64 * 1024
_OLDER = "Import an older step, or from the other place that it was saved to, S3 or the cluster's service."
_NO_MEMORY = ("can't allocate memory", "not enough memory")
"""What torch's allocator says, in a RuntimeError like any other."""

_Entry = TypeVar("_Entry", StoredTensor, StoredValue)


class Shard(Protocol):
    """One rank's shard of one checkpoint."""

    @property
    def title(self) -> str:
        """Where it is, for messages."""
        ...

    @property
    def size(self) -> int:
        """In bytes."""
        ...

    @property
    def compared(self) -> bool:
        """Whether every byte of it was compared with a checksum that came with it."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *offset* on.

        Raises:
            TierError: it can't be read, or ends before.
        """
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class Checks:
    """Which values were compared with a checksum that their save left: torch's of the value, or that of their shard."""

    compared: set[Span] = field(default_factory=set[Span])
    bare: dict[Span, str] = field(default_factory=dict[Span, str])
    """Those that have none, and their names: nothing tells whether they are what was saved."""

    def note(self, entry: StoredTensor | StoredValue, *, compared: bool) -> None:
        """Take note of *entry*, which may be read several times."""
        if compared:
            self.compared.add(entry.span)
        else:
            self.bare[entry.span] = entry.fqn


def read_tensors(shard: Shard, entries: Sequence[StoredTensor], checks: Checks) -> Iterator[torch.Tensor]:
    """Yield the tensor of each of *entries*, which are in the order of the shard; *checks* is told of each.

    Needs memory for the longest stream twice, and 32 MiB.

    Raises:
        SaveError: there is not so much.
        CorruptPartError: what is stored is damaged, or not what the metadata said.
        MismatchError: it is no plain tensor.
    """
    for entry, data in _streams(shard, entries):
        what = f"{entry.fqn} in {shard.title}"
        with enough_memory(what, len(data)):
            summed = _check_crc(data, what)
            tensor = _tensor(data, entry, what)
        checks.note(entry, compared=summed or shard.compared)
        yield tensor


def _tensor(data: memoryview, entry: StoredTensor, what: str) -> torch.Tensor:
    try:
        found = torch.load(_file(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise MismatchError(
            f"{what} is no plain tensor: only a pickle can load it",
            hint="Nothing of it was run. Load it with the library that wrote it, and save it with this one.",
        ) from error
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:120]}"
        raise CorruptPartError(f"{what} is damaged: {said}", hint=_OLDER) from error
    return _checked(found, entry, what)


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A Python value, as we store it."""

    data: bytes
    pickled: bool
    """Whether only a pickle can load it."""


def read_values(shard: Shard, entries: Sequence[StoredValue], checks: Checks, *, allow_pickle: bool) -> Iterator[Value]:
    """Yield what we store for each of *entries*, which are in the order of the shard; *checks* is told of each.

    Raises:
        SaveError: memory ran out.
        CorruptPartError: what is stored is damaged.
        MismatchError: a value can only be loaded by a pickle, and *allow_pickle* is False.
        UnsafeValueError: a value can't be stored by us.
    """
    for entry, data in _streams(shard, entries):
        what = f"{entry.fqn} in {shard.title}"
        with enough_memory(what, len(data)):
            summed = _check_crc(data, what)
            value = _value(data, entry.fqn, what, allow_pickle=allow_pickle)
        checks.note(entry, compared=summed or shard.compared)
        yield value


def _value(data: memoryview, fqn: str, what: str, *, allow_pickle: bool) -> Value:
    try:
        value = load_stream(_file(data), len(data), allow_pickle=False, what=what, checked=True)
    except MismatchError as error:
        if not allow_pickle:
            raise MismatchError(
                error.message, hint="If you trust who wrote it, add --allow-pickle (allow_pickle: true on the fly)."
            ) from error
        return _unpickled(fqn, data, what)
    except CorruptPartError as error:
        error.hint = error.hint or _OLDER
        raise
    return Value(data=dump_value(fqn, value, allow_pickle=False), pickled=False)


def _unpickled(fqn: str, data: memoryview, what: str) -> Value:
    value = load_stream(_file(data), len(data), allow_pickle=True, what=what, checked=True)
    try:
        return Value(data=dump_value(fqn, value, allow_pickle=False), pickled=False)
    except UnsafeValueError:
        return Value(data=dump_value(fqn, value, allow_pickle=True), pickled=True)


def _streams(shard: Shard, entries: Iterable[_Entry]) -> Iterator[tuple[_Entry, memoryview]]:
    """Yield each entry with its stream, whose memory is valid until the next."""
    for group in _grouped(entries):
        start, end = group[0].span.offset, group[-1].span.end
        if end > shard.size:
            raise CorruptPartError(f"{shard.title} has {shard.size} bytes, {group[-1].fqn} ends at {end}", hint=_OLDER)
        with enough_memory(f"{group[0].fqn} in {shard.title}", end - start):
            window = memoryview(bytearray(end - start))
        shard.read_into(start, window)
        for entry in group:
            yield entry, window[entry.span.offset - start : entry.span.end - start]


def _grouped(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    group: list[_Entry] = []
    for entry in entries:
        if group and not _together(group[0].span, group[-1].span, entry.span):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group


def _together(first: Span, last: Span, next_: Span) -> bool:
    return next_.offset - last.end <= _GAP_BYTES and next_.end - first.offset <= _WINDOW_BYTES


def _check_crc(data: memoryview, what: str) -> bool:
    """Torch writes a CRC-32 of each record and never looks at it. Where it was told to leave them out, all are 0."""
    try:
        check_zip(_file(data), len(data))
        with zipfile.ZipFile(_file(data)) as archive:
            summed = any(entry.CRC for entry in archive.infolist())
            bad = archive.testzip() if summed else None
    except Exception as error:  # whatever zipfile meets in bytes that are no zip
        said = f"{type(error).__name__}: {str(error)[:120]}"
        raise CorruptPartError(f"{what} is damaged: {said}", hint=_OLDER) from error
    if bad is not None:
        raise CorruptPartError(f"{what} is damaged: the checksum of {bad[:80]!r} is another one", hint=_OLDER)
    return summed


@contextmanager
def enough_memory(what: str, size: int) -> Generator[None, None, None]:
    """Tell a machine that is too small from damage, which torch's own words don't.

    Raises:
        SaveError: memory ran out over *what*, of *size* stored bytes.
    """
    try:
        yield
    except (MemoryError, RuntimeError, CorruptPartError) as error:
        cause = error.__cause__ if isinstance(error, CorruptPartError) else error
        if not (isinstance(cause, MemoryError) or any(word in str(cause) for word in _NO_MEMORY)):
            raise
        raise SaveError(
            f"{what}: there is not enough memory for its {size} bytes, twice",
            hint="It is not damaged: import where there is more.",
        ) from error


def _checked(found: object, entry: StoredTensor, what: str) -> torch.Tensor:
    if type(found) not in (torch.Tensor, torch.nn.Parameter):
        raise MismatchError(
            f"{what} is a {type(found).__name__}, not a tensor, as the metadata says",
            hint="It is of another save than its metadata: import another step.",
        )
    tensor = cast("torch.Tensor", found).detach()
    plain = tensor.layout is torch.strided and tensor.is_cpu and not tensor.is_quantized
    if not plain or tensor.dtype is not entry.dtype or tuple(tensor.shape) != entry.sizes:
        raise CorruptPartError(
            f"{what} is {tensor.dtype} {list(tensor.shape)}; the metadata says {entry.dtype} {list(entry.sizes)}",
            hint=_OLDER,
        )
    return tensor


def _file(data: memoryview) -> IO[bytes]:
    return cast("IO[bytes]", _Bytes(data))


class _Bytes(io.RawIOBase):
    """Bytes as a file, without a copy of them."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), len(self._data) - self._at))
        target[:count] = self._data[self._at : self._at + count]
        self._at += count
        return count
