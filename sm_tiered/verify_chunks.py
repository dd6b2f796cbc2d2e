"""Verifying chunks of parts: which ones, and whether each is what was saved. A wrong one is read again first."""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sm_tiered import checksum
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CorruptPartError, KeyNotFoundError, TierUnavailableError
from sm_tiered.records import Part
from sm_tiered.tiers.base import Tier

__all__ = ["ChunkFound", "check_chunk", "choose_chunks", "chunk_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFound:
    """What reading a chunk told."""

    problem: str | None = None
    reread: bool = False
    """Whether it was wrong once and then right: a bad transfer, no bad chunk."""


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


def _broken_disk(error: TierUnavailableError) -> bool:
    """Whether the medium gave up on these very bytes: then the tier answers, and the part is damaged."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno == errno.EIO
