"""Sending: what one rank wrote goes from memory to a tier that outlives the node, its record last of all."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

from sm_tiered import checksum, layout
from sm_tiered.commit import put_once
from sm_tiered.crashpoints import crashpoint
from sm_tiered.drain_progress import DrainProgress
from sm_tiered.errors import CorruptPartError, KeyExistsError, KeyNotFoundError, SaveError
from sm_tiered.manifest import MAX_BYTES, record_from_json
from sm_tiered.queue import Entry
from sm_tiered.records import Part, Record
from sm_tiered.tiers.base import Chunks, Tier
from sm_tiered.tiers.memory import MemoryTier, OpenPart
from sm_tiered.tiers.shares import ShareTier, share_of

__all__ = ["Sender"]

_PIECE_BYTES = 1024 * 1024


class Sender:
    """Streams from the memory tier's files: it needs room for one chunk, and hashes the very bytes that it sends."""

    def __init__(self, memory: MemoryTier) -> None:
        self._memory = memory
        self._progress = DrainProgress(memory)

    def send(self, entry: Entry, tier: Tier) -> int:
        """Bring one rank's parts, then its record, to *tier*; return how many bytes that were.

        Raises:
            SaveError: the record is gone from memory.
            CorruptPartError: memory holds something else than was recorded.
            KeyExistsError: another record of the rank stands there. A share takes the place of one that failed.
            TierError: the tier did not take it.
        """
        key = layout.in_dir(entry.checkpoint, layout.record_name(entry.rank))
        data = self._record(entry, key)
        standing = _standing(tier, key)
        if standing == data:
            return 0  # it is written after the parts, so they are there too
        record = record_from_json(data)
        parts = [part for part in record.parts if not part.replica]
        if standing is not None and not (isinstance(tier, ShareTier) and record_from_json(standing).failed):
            raise _another(entry, key)
        if isinstance(tier, ShareTier):
            self._send_share(entry, record, data, tier)
        else:
            self._send_files(entry, key, data, parts, tier)
        crashpoint("promote.after_record")
        return sum(part.size for part in parts)

    def _record(self, entry: Entry, key: str) -> bytes:
        try:
            return self._memory.get(key, max_bytes=MAX_BYTES).data
        except KeyNotFoundError as error:
            raise SaveError(
                "its record is gone from memory", step=entry.checkpoint.step, tier=entry.tier, rank=entry.rank
            ) from error

    def _send_files(self, entry: Entry, key: str, data: bytes, parts: list[Part], tier: Tier) -> None:
        self._send_file_list(entry, tier)
        sent = 0
        for part in parts:
            crashpoint("promote.before_part")
            with self._open(entry, part) as source:
                chunks = partial(self._chunks, entry, part, sent, source)
                tier.put_part(layout.in_dir(entry.checkpoint, part.name), chunks, part.size)
            sent += part.size
            crashpoint("promote.after_part")
        if not put_once(tier, key, data):
            raise _another(entry, key)

    def _send_file_list(self, entry: Entry, tier: Tier) -> None:
        """Before the files that it tells of: should this never be committed, retention knows them by it."""
        key = layout.in_dir(entry.checkpoint, layout.file_list_name(entry.rank))
        with suppress(KeyNotFoundError):
            tier.put(key, self._memory.get(key, max_bytes=MAX_BYTES).data)

    def _send_share(self, entry: Entry, record: Record, data: bytes, tier: ShareTier) -> None:
        with ExitStack() as stack:
            opened: list[tuple[Part, Chunks]] = []
            sent = 0
            for part in (part for part in record.parts if not part.replica):
                source = stack.enter_context(self._open(entry, part))
                opened.append((part, partial(self._pieces, entry, part, sent, source)))
                sent += part.size
            crashpoint("promote.before_part")
            tier.put_share(share_of(record, data, opened))

    @contextmanager
    def _open(self, entry: Entry, part: Part) -> Generator[OpenPart, None, None]:
        key = layout.in_dir(entry.checkpoint, part.name)
        with self._memory.open_part(key) as source:
            if source.size != part.size:
                raise CorruptPartError(f"{key} has {source.size} bytes, recorded {part.size}", tier="memory", key=key)
            yield source

    def _chunks(self, entry: Entry, part: Part, before: int, source: OpenPart) -> Iterator[memoryview]:
        """Yield the bytes of *part* as whole chunks, verified; *before*: bytes of the rank's that come ahead of it."""

        def read() -> Iterator[memoryview]:
            for start in range(0, part.size, checksum.CHUNK_BYTES):
                self._progress.tell(entry, before + start)
                yield memoryview(source.pread(start, min(checksum.CHUNK_BYTES, part.size - start)))

        return checksum.verified(read(), part.chunks, layout.in_dir(entry.checkpoint, part.name))

    def _pieces(self, entry: Entry, part: Part, before: int, source: OpenPart) -> Iterator[memoryview]:
        """Yield the bytes of *part* in one buffer that stays in the CPU's cache; the tier verifies them."""
        buffer = memoryview(bytearray(min(_PIECE_BYTES, part.size)))
        for start in range(0, part.size, _PIECE_BYTES):
            self._progress.tell(entry, before + start)
            piece = buffer[: min(_PIECE_BYTES, part.size - start)]
            source.pread_into(start, piece)
            yield piece


def _standing(tier: Tier, key: str) -> bytes | None:
    try:
        return tier.get(key, max_bytes=MAX_BYTES).data
    except KeyNotFoundError:
        return None


def _another(entry: Entry, key: str) -> KeyExistsError:
    return KeyExistsError(f"another record of rank {entry.rank} stands there", tier=entry.tier, key=key)
