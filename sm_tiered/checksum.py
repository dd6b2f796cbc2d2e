"""Digests: XXH3-128 of every 8 MiB chunk of a part.

XXH3 (https://xxhash.com, 128-bit variant) finds damage at memory speed; it is no signature and does not
stop somebody who means harm. Chunks let a reader that needs a tenth of a part verify a tenth of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import xxhash

from sm_tiered.errors import CorruptPartError

__all__ = ["CHUNK_BYTES", "chunk_count", "chunk_range", "chunks_of", "digest", "digest_chunks", "verified"]

CHUNK_BYTES = 8 * 1024 * 1024
"""Size of a chunk, in bytes; the last chunk of a part is shorter. Part of the format."""

_WORTH_A_THREAD = 4


def digest(data: bytes | memoryview) -> str:
    """Return the XXH3-128 of *data* as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def chunks_of(data: memoryview) -> Iterator[memoryview]:
    """Yield *data* in chunks, without a copy."""
    for start in range(0, len(data), CHUNK_BYTES):
        yield data[start : start + CHUNK_BYTES]


def digest_chunks(data: memoryview) -> tuple[str, ...]:
    """Return one digest for each chunk of *data*, by two threads; none for no bytes."""
    chunks = list(chunks_of(data))
    if len(chunks) < _WORTH_A_THREAD:
        return tuple(map(digest, chunks))
    with ThreadPoolExecutor(1, thread_name_prefix="sm_tiered-digest") as pool:
        try:
            odd = pool.submit(lambda: [digest(chunk) for chunk in chunks[1::2]])
        except RuntimeError:  # the interpreter is going down, and the last save must still get its digests
            return tuple(map(digest, chunks))
        found = [""] * len(chunks)
        found[::2] = [digest(chunk) for chunk in chunks[::2]]
        found[1::2] = odd.result()
    return tuple(found)


def chunk_count(size: int) -> int:
    """Return how many chunks a part of *size* bytes has."""
    return -(-size // CHUNK_BYTES)


def chunk_range(offset: int, length: int) -> range:
    """Return the indices of the chunks that ``[offset, offset + length)`` touches."""
    if length <= 0:
        return range(0)
    return range(offset // CHUNK_BYTES, (offset + length - 1) // CHUNK_BYTES + 1)


def verified(chunks: Iterable[memoryview], digests: Iterable[str], what: str) -> Iterator[memoryview]:
    """Yield *chunks*, each one only after its digest was found right.

    Raises:
        CorruptPartError: before the chunk that differs is handed on; *what* names the part.
    """
    for index, (chunk, expected) in enumerate(zip(chunks, digests, strict=True)):
        found = digest(chunk)
        if found != expected:
            raise CorruptPartError(f"{what}: chunk {index} has XXH3-128 {found}, recorded {expected}", key=what)
        yield chunk
