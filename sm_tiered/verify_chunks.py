"""Verifying chunks of parts: which ones, and whether each is what was saved. A wrong one is read again first."""

from __future__ import annotations

import contextvars
import errno
import math
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sm_tiered import checksum
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CorruptPartError, KeyNotFoundError, TierUnavailableError
from sm_tiered.records import Part
from sm_tiered.tiers.base import Tier

__all__ = ["Chunk", "ChunkFound", "check_chunk", "check_chunks", "choose_chunks", "chunk_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFound:
    """What reading a chunk told."""

    problem: str | None = None
    reread: bool = False
    """Whether it was wrong once and then right: a bad transfer, no bad chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk of a part, and where the part stands."""

    key: str
    part: Part
    index: int

    @property
    def length(self) -> int:
        """In bytes."""
        return chunk_length(self.part, self.index)


def chunk_length(part: Part, index: int) -> int:
    """Return the length of a chunk of *part*, in bytes."""
    return min(CHUNK_BYTES, part.size - index * CHUNK_BYTES)


def choose_chunks(parts: Sequence[Part], *, share: float, seed: str) -> Iterator[tuple[Part, int]]:
    """Yield part and index of that *share* of all chunks, at least one; the same *seed* chooses the same ones."""
    total = sum(len(part.chunks) for part in parts)
    wanted: set[int] | None = None
    if share < 1.0:
        # Rounded first: 0.07 × 100 is a hair above 7.
        wanted = set(random.Random(seed).sample(range(total), min(total, math.ceil(round(share * total, 9)))))
    place = 0
    for part in parts:
        for index in range(len(part.chunks)):
            if wanted is None or place in wanted:
                yield part, index
            place += 1


def check_chunk(tier: Tier, key: str, part: Part, index: int, view: memoryview) -> ChunkFound:
    """Read a chunk of *part* into *view*, which is as long, and compare it with its digest.

    Raises:
        TierError: the tier did not answer or refused.
    """
    wrong: list[str] = []
    for _ in range(2):
        try:
            tier.read_into(key, index * CHUNK_BYTES, view)
        except (CorruptPartError, KeyNotFoundError) as error:
            return ChunkFound(problem=error.message)
        except TierUnavailableError as error:
            if not _broken_disk(error):
                raise
            return ChunkFound(problem=error.message)
        found = checksum.digest(view)
        if found == part.chunks[index]:
            return ChunkFound(reread=bool(wrong))
        wrong.append(found)
    unsteady = " (and each read gives other bytes)" if wrong[0] != wrong[1] else ""
    return ChunkFound(problem=f"has XXH3-128 {wrong[-1]}, recorded {part.chunks[index]}{unsteady}")


def check_chunks(tier: Tier, chunks: Sequence[Chunk], *, threads: int) -> Iterator[ChunkFound]:
    """Yield what `check_chunk` finds of each of *chunks*, in order, read and hashed by so many threads.

    A thread needs a buffer of the longest chunk. The threads are daemons: neither an error nor Ctrl-C waits for them.

    Raises:
        TierError: the tier did not answer or refused.
    """
    longest = max((chunk.length for chunk in chunks), default=0)
    if threads <= 1 or len(chunks) <= 1:
        buffer = memoryview(bytearray(longest))
        for chunk in chunks:
            yield check_chunk(tier, chunk.key, chunk.part, chunk.index, buffer[: chunk.length])
        return
    crew = _Crew(tier, chunks, longest)
    try:
        crew.start(min(threads, len(chunks)))
        for place in range(len(chunks)):
            yield crew.found(place)
    finally:
        crew.stopping = True


class _Crew:
    """Threads that work through *chunks*; each takes the first one that nobody has."""

    def __init__(self, tier: Tier, chunks: Sequence[Chunk], longest: int) -> None:
        self._tier, self._chunks, self._longest = tier, chunks, longest
        self._places = iter(range(len(chunks)))
        self._results: dict[int, ChunkFound | BaseException] = {}
        self._changed = threading.Condition()
        self.stopping = False

    def start(self, threads: int) -> None:
        for _ in range(threads):
            # Each in a copy of the caller's context: its deadline holds here too.
            context = contextvars.copy_context()
            threading.Thread(target=context.run, args=(self._work,), name="sm_tiered-verify", daemon=True).start()

    def _work(self) -> None:
        buffer = memoryview(bytearray(self._longest))
        for place in self._places:
            if self.stopping:
                return
            chunk = self._chunks[place]
            result: ChunkFound | BaseException
            try:
                result = check_chunk(self._tier, chunk.key, chunk.part, chunk.index, buffer[: chunk.length])
            except BaseException as error:  # noqa: BLE001 - raised again by who waits for it
                result = error
            with self._changed:
                self._results[place] = result
                self._changed.notify_all()

    def found(self, place: int) -> ChunkFound:
        """Wait for the chunk at *place*."""
        with self._changed:
            while place not in self._results:
                self._changed.wait()
            result = self._results.pop(place)
        if isinstance(result, BaseException):
            raise result
        return result


def _broken_disk(error: TierUnavailableError) -> bool:
    """Whether the medium gave up on these very bytes: then the tier answers, and the part is damaged."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.EIO
