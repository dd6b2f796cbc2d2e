"""Where the bytes of a part come from during a restore: every byte is verified before anything may use it.

A rank reads only chunks that its own plan touches. From memory they are verified in place and read again into the
state; from a durable tier they go into recycled arena files first (the memory tier is warm again), or, where there is
no room, straight into the state chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from sm_tiered import checksum, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CorruptPartError, TierError, TierUnavailableError
from sm_tiered.records import CheckpointId, Part
from sm_tiered.resolve import Candidate, Tiers, unreachable
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier, OpenPart

__all__ = [
    "FetchedPart",
    "InPlacePart",
    "MemoryPart",
    "PartSourceReader",
    "Place",
    "Room",
    "Span",
    "open_part",
    "touched_chunks",
]

Span = tuple[int, int]
"""(first byte, length) inside a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Bytes to fetch a part into."""

    buffer: memoryview
    free: Callable[[], None]
    """Gives them back."""
    path: str | None = None
    """The file in memory that the buffer is, where it stays when the load is over."""


Room = Callable[[int], Place | None]
"""Gives a place of so many bytes, or None where there is no room."""

_SPLIT_BYTES = 2 * 1024 * 1024
"""From here on it pays to give half of a read to a second thread."""


class PartSourceReader(Protocol):
    """Verified bytes of one part."""

    @property
    def tier(self) -> str:
        """Where they come from."""
        ...

    @property
    def path(self) -> str | None:
        """The file in memory that holds them, or None."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the part's bytes from *offset* on."""
        ...

    def close(self) -> None:
        """Let go of files and memory."""
        ...


def touched_chunks(spans: Iterable[Span]) -> list[int]:
    """Return the indices of all chunks that *spans* touch, ascending."""
    return sorted({index for offset, length in spans for index in checksum.chunk_range(offset, length)})


class MemoryPart:
    """A part in this node's memory tier; a shared lock keeps it from being recycled while this is open."""

    def __init__(self, memory: MemoryTier, checkpoint: CheckpointId, part: Part) -> None:
        self._key = layout.in_dir(checkpoint, part.name)
        self._part, self.tier = part, memory.name
        self.path: str | None = str(memory.root / self._key)
        self._pool: ThreadPoolExecutor | None = None
        self._file: OpenPart = memory.open_part(self._key)
        if self._file.size != part.size:
            found = self._file.size
            self._file.close()
            raise CorruptPartError(f"{self._key} has {found} bytes, recorded {part.size}", tier=self.tier)

    def verify(self, chunks: Sequence[int]) -> None:
        """Check *chunks* against their digests, on two threads.

        Raises:
            CorruptPartError: one differs.
        """
        half = self._second_thread().submit(self._verify, chunks[1::2])
        try:
            self._verify(chunks[::2])
        finally:
            half.result()

    def _verify(self, chunks: Sequence[int]) -> None:
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, self._part.size))))
        for index in chunks:
            view = buffer[: _chunk_length(self._part, index)]
            self._file.pread_into(index * CHUNK_BYTES, view)
            _check(view, self._part, index, self.tier, self._key)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read from the file, into *buffer*; a large one on two threads."""
        if len(buffer) < _SPLIT_BYTES:
            self._file.pread_into(offset, buffer)
            return
        middle = len(buffer) // 2
        half = self._second_thread().submit(self._file.pread_into, offset + middle, buffer[middle:])
        try:
            self._file.pread_into(offset, buffer[:middle])
        finally:
            half.result()

    def _second_thread(self) -> ThreadPoolExecutor:
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="sm_tiered-read")
        return self._pool

    def close(self) -> None:
        """Close the file and with it the lock."""
        if self._pool is not None:
            self._pool.shutdown()
        self._file.close()


class FetchedPart:
    """Chunks of a part, fetched from a durable tier into *room* and verified there."""

    def __init__(self, tier: Tier, checkpoint: CheckpointId, part: Part, place: Place) -> None:
        self._source, self._part, self._free, self.path = tier, part, place.free, place.path
        self._room = place.buffer
        self._key = layout.in_dir(checkpoint, part.name)
        self._starts: dict[int, int] = {}
        self.tier = tier.name

    @staticmethod
    def room_for(part: Part, chunks: Sequence[int]) -> int:
        """Return how many bytes *chunks* take."""
        return sum(_chunk_length(part, index) for index in chunks)

    def fetch(self, chunks: Sequence[int]) -> None:
        """Fetch *chunks*, neighbours in one request, and verify each; a bad one is fetched once more.

        Raises:
            CorruptPartError: a chunk differs twice.
        """
        start = 0
        for run in _runs(chunks):
            length = sum(_chunk_length(self._part, index) for index in run)
            self._source.read_into(self._key, run[0] * CHUNK_BYTES, self._room[start : start + length])
            for index in run:
                self._starts[index] = start
                start += _chunk_length(self._part, index)
        for index in chunks:
            self._settle(index)

    def _settle(self, index: int) -> None:
        view = self._chunk(index)
        if checksum.digest(view) != self._part.chunks[index]:
            self._source.read_into(self._key, index * CHUNK_BYTES, view)
            _check(view, self._part, index, self.tier, self._key)

    def _chunk(self, index: int) -> memoryview:
        start = self._starts[index]
        return self._room[start : start + _chunk_length(self._part, index)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy out of the fetched chunks."""
        done = 0
        for index in checksum.chunk_range(offset, len(buffer)):
            inside = offset + done - index * CHUNK_BYTES
            view = self._chunk(index)[inside : inside + len(buffer) - done]
            buffer[done : done + len(view)] = view
            done += len(view)

    def close(self) -> None:
        """Give the room back."""
        self._room.release()
        self._free()


class InPlacePart:
    """A part of a durable tier, read chunk by chunk through one chunk of private memory."""

    path: str | None = None

    def __init__(self, tier: Tier, checkpoint: CheckpointId, part: Part) -> None:
        self._source, self._part, self.tier = tier, part, tier.name
        self._key = layout.in_dir(checkpoint, part.name)
        self._buffer = memoryview(bytearray(min(CHUNK_BYTES, max(1, part.size))))
        self._held: int | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fetch, verify and copy, one chunk after the other; a bad one is fetched once more.

        Raises:
            CorruptPartError: a chunk differs twice.
        """
        done = 0
        for index in checksum.chunk_range(offset, len(buffer)):
            chunk = self._load(index)
            inside = offset + done - index * CHUNK_BYTES
            view = chunk[inside : inside + len(buffer) - done]
            buffer[done : done + len(view)] = view
            done += len(view)

    def _load(self, index: int) -> memoryview:
        view = self._buffer[: _chunk_length(self._part, index)]
        if self._held == index:
            return view
        self._held = None
        self._source.read_into(self._key, index * CHUNK_BYTES, view)
        if checksum.digest(view) != self._part.chunks[index]:
            self._source.read_into(self._key, index * CHUNK_BYTES, view)
            _check(view, self._part, index, self.tier, self._key)
        self._held = index
        return view

    def close(self) -> None:
        """Let the buffer go."""
        self._buffer = memoryview(b"")


def open_part(
    tiers: Tiers,
    candidate: Candidate,
    rank: int,
    part: Part,
    chunks: Sequence[int],
    room: Room,
    passed_over: list[str] | None = None,
) -> PartSourceReader:
    """Open *part* at the nearest tier that has *chunks* of it whole; add to *passed_over* why no nearer one has.

    Raises:
        CorruptPartError: no tier has; the message says what is wrong on each.
    """
    problems: list[str] = []
    silent: str | None = None
    if tiers.memory is not None and rank in candidate.near:
        try:
            return _near(tiers.memory, candidate, part, chunks)
        except TierError as error:
            problems.append(f"{tiers.memory.name}: {error.message}")
    elif tiers.memory is not None:
        problems.append(f"{tiers.memory.name}: {candidate.near_problem or 'not on this node'}")
    for name in () if part.replica else candidate.durable:
        try:
            source = _fetch(tiers.durable[name], candidate, part, chunks, room)
        except TierError as error:
            problems.append(f"{name}: {error.message}")
            if isinstance(error, TierUnavailableError) and name not in tiers.optional:
                silent = name
        else:
            if problems and passed_over is not None:
                passed_over.append(f"part {part.name}: {'; '.join(problems)}")
            return source
    if silent is not None:
        raise unreachable(silent, f"part {part.name}: {'; '.join(problems)}")
    if not candidate.durable:
        problems.append("committed on no durable tier")
    raise CorruptPartError(f"part {part.name} can't be had: {'; '.join(problems)}", rank=rank)


def _near(memory: MemoryTier, candidate: Candidate, part: Part, chunks: Sequence[int]) -> PartSourceReader:
    source = MemoryPart(memory, candidate.checkpoint, part)
    try:
        source.verify(chunks)
    except BaseException:
        source.close()
        raise
    return source


def _fetch(tier: Tier, candidate: Candidate, part: Part, chunks: Sequence[int], room: Room) -> PartSourceReader:
    size = FetchedPart.room_for(part, chunks)
    given = room(size) if size else None
    if given is None:
        return InPlacePart(tier, candidate.checkpoint, part)
    source = FetchedPart(tier, candidate.checkpoint, part, given)
    try:
        source.fetch(chunks)
    except BaseException:
        source.close()
        raise
    return source


def _chunk_length(part: Part, index: int) -> int:
    return min(CHUNK_BYTES, part.size - index * CHUNK_BYTES)


def _runs(chunks: Sequence[int]) -> list[list[int]]:
    """Neighbouring chunks together."""
    return [[index for _, index in run] for _, run in groupby(enumerate(chunks), key=lambda pair: pair[1] - pair[0])]


def _check(view: memoryview, part: Part, index: int, tier: str, key: str) -> None:
    found = checksum.digest(view)
    if found != part.chunks[index]:
        raise CorruptPartError(f"chunk {index} has XXH3-128 {found}, recorded {part.chunks[index]}", tier=tier, key=key)
