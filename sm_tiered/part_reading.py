"""Parts read in order, from any tier: each chunk is handed on only after its digest was found right."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

from sm_tiered import checksum, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, KeyNotFoundError
from sm_tiered.records import CheckpointId, Part
from sm_tiered.tiers.base import Chunks, Tier
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["open_verified"]

_Read = Callable[[int, memoryview], None]
"""Fills the view with the part's bytes from an offset on."""

_WINDOW_CHUNKS = 4
"""Chunks that are asked for at once: as much as an S3 tier reads over several connections."""


@contextmanager
def open_verified(tier: Tier, checkpoint: CheckpointId, part: Part) -> Generator[Chunks, None, None]:
    """Give what yields the chunks of *part*, from its beginning each time; each is valid until the next.

    In memory the part can't be recycled meanwhile. It needs 32 MiB. A chunk that differs is read once more.

    Raises:
        CheckpointNotFoundError: a job has recycled it.
        CorruptPartError: its size is another one or, out of the iterator, a chunk differs twice.
    """
    key = layout.in_dir(checkpoint, part.name)
    if not isinstance(tier, MemoryTier):
        yield lambda: _chunks(lambda at, view: tier.read_into(key, at, view), part, tier.name, key)
        return
    try:
        opened = tier.open_part(key)
    except KeyNotFoundError as error:
        raise CheckpointNotFoundError(
            "its files in memory were recycled meanwhile",
            hint="A running job did that. Take a newer step: `sm-tiered ls` lists them.",
            step=checkpoint.step,
            tier=tier.name,
            key=key,
        ) from error
    with opened:
        if opened.size != part.size:
            message = f"{key} has {opened.size} bytes, recorded {part.size}"
            raise CorruptPartError(message, tier=tier.name, key=key)
        yield lambda: _chunks(opened.pread_into, part, tier.name, key)


def _chunks(read: _Read, part: Part, tier: str, key: str) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_WINDOW_CHUNKS * CHUNK_BYTES, part.size)))
    for start in range(0, part.size, _WINDOW_CHUNKS * CHUNK_BYTES):
        window = buffer[: min(len(buffer), part.size - start)]
        read(start, window)
        for index, chunk in enumerate(checksum.chunks_of(window), start // CHUNK_BYTES):
            if checksum.digest(chunk) != part.chunks[index]:
                read(index * CHUNK_BYTES, chunk)
                _check(chunk, part, index, tier, key)
            yield chunk


def _check(chunk: memoryview, part: Part, index: int, tier: str, key: str) -> None:
    found = checksum.digest(chunk)
    if found != part.chunks[index]:
        raise CorruptPartError(f"chunk {index} has XXH3-128 {found}, recorded {part.chunks[index]}", tier=tier, key=key)
