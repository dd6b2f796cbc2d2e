"""What stands in the slot of a rank on the HyperPod service: its share, as one blob. Pure.

A share is a magic, the length of its header, the header, the rank's record, and the bytes of its parts, small ones
first. The header ends with its own digest and says whose the share is and how long: a cut, stale or swapped one is
found before a part of it is read; what parts hold is in the record's digests.
"""

from __future__ import annotations

import base64
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from sm_tiered import checksum, layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CorruptPartError, FormatError
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.records import CheckpointId, Part
from sm_tiered.sealed_json import FORMAT, Json, digest_of, dump, integer, list_of, mapping, number, parsed, sealed, text
from sm_tiered.tiers.base import Chunks
from sm_tiered.tiers.shares import Share

__all__ = [
    "ATTEMPT_MAGIC",
    "FIRST_BYTES",
    "SHARE_MAGIC",
    "Head",
    "Outgoing",
    "Place",
    "attempt_text",
    "header_length",
    "outgoing",
    "parse_head",
    "shard_meta",
]

SHARE_MAGIC = b"SMTSHAR1"
ATTEMPT_MAGIC = b"SMTATTM1"
"""An attempt's record stands behind it, and nothing else."""

_LENGTH = struct.Struct(">Q")
FIRST_BYTES = len(SHARE_MAGIC) + _LENGTH.size
"""How many bytes tell what it is and how long the header is."""

_MAX_HEADER_BYTES = 16 * 1024 * 1024
_SEND_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one part stands inside a share."""

    offset: int
    """From the share's first byte."""
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the header of a share says."""

    namespace: str
    checkpoint: CheckpointId
    rank: int
    world: int
    sent_at: float
    """UTC seconds by the clock of who sent it."""
    record: Place
    record_digest: str
    attempt: str | None
    """The record of its attempt."""
    parts: dict[str, Place] = field(default_factory=dict[str, Place])
    size: int
    """Of the whole share, in bytes."""
    seal: str
    """Digest of the header: another one, another share."""


def header_length(first: bytes) -> int:
    """Return how long the header of the share, or of the manifest, is whose first `FIRST_BYTES` are *first*.

    Raises:
        FormatError: no header is that long.
    """
    if len(first) < FIRST_BYTES:
        raise FormatError(f"it ends after {len(first)} bytes")
    length: int = _LENGTH.unpack_from(first, len(SHARE_MAGIC))[0]
    if not 0 < length <= _MAX_HEADER_BYTES:
        raise FormatError(f"a header of {length} bytes is none: at most {_MAX_HEADER_BYTES} are read")
    return length


def parse_head(header: bytes) -> Head:
    """Return what *header* says.

    Raises:
        FormatError: it is damaged, is none, or is of a newer release.
    """
    begin = FIRST_BYTES + len(header)
    return parsed(header, "share", lambda fields: _head(fields, begin, checksum.digest(header)))


def _head(fields: Json, begin: int, seal: str) -> Head:
    checkpoint = layout.parse_checkpoint_dir(text(fields["checkpoint"]))
    if checkpoint is None:
        raise FormatError(f"{str(fields['checkpoint'])[:80]!r} is no checkpoint")
    record = Place(offset=begin, size=integer(fields, "record"))
    at, parts = begin + record.size, dict[str, Place]()
    for entry in map(mapping, list_of(fields, "parts")):
        name, place = layout.check_part_name(text(entry["name"])), Place(offset=at, size=integer(entry, "size"))
        if name in parts or integer(entry, "offset") != at - begin:
            raise FormatError(f"part {name!r} stands twice, or not behind the one before it")
        parts[name], at = place, at + place.size
    return Head(
        namespace=layout.check_namespace(fields["namespace"]),
        checkpoint=checkpoint,
        rank=integer(fields, "rank", below=layout.MAX_WORLD),
        world=integer(fields, "world", low=1, below=layout.MAX_WORLD + 1),
        sent_at=number(fields["sent_at"]),
        record=record,
        record_digest=digest_of(fields["record_digest"]),
        attempt=None if fields["attempt"] is None else attempt_text(text(fields["attempt"]), checkpoint),
        parts=parts,
        size=at,
        seal=seal,
    )


def attempt_text(told: str, checkpoint: CheckpointId) -> str:
    """Return *told* where it is the record of the attempt of *checkpoint*.

    Raises:
        FormatError: it is not.
    """
    try:
        record = attempt_record_from_json(told.encode())
    except UnicodeEncodeError:
        raise FormatError("the record of its attempt is no text") from None
    if record.attempt != checkpoint.attempt:
        raise FormatError(f"the record of its attempt is that of {record.attempt}")
    return told


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A share that is ready to be sent."""

    head: Head
    first: bytes
    """Magic, header and record."""
    parts: tuple[tuple[Part, Chunks], ...]

    def chunks(self) -> Iterator[memoryview]:
        """Yield the whole share, each piece valid until the next.

        Raises:
            CorruptPartError: a part gave other bytes, or another number of them, than was recorded. The last piece was
                not yielded then.
        """
        yield from _pieces(memoryview(self.first))
        for part, chunks in self.parts:
            yield from _verified(part, chunks)

    def meta(self) -> str:
        """Return the ``Shard-Meta`` header, for which the whole share is read once."""
        whole = xxhash.xxh3_128()
        for piece in self.chunks():
            whole.update(piece)
        return _meta(whole.digest())


def outgoing(share: Share, *, namespace: str, attempt: str | None) -> Outgoing:
    """Return *share* as it is sent: small parts first, so that they are read without passing large ones."""
    parts = tuple(sorted(share.parts, key=lambda pair: (pair[0].size, pair[0].name)))
    at, placed = len(share.record), list[dict[str, object]]()
    for part, _ in parts:
        placed.append({"name": part.name, "offset": at, "size": part.size})
        at += part.size
    fields = {
        "format": FORMAT,
        "kind": "share",
        "namespace": namespace,
        "checkpoint": layout.checkpoint_dir(share.checkpoint),
        "rank": share.rank,
        "world": share.world,
        "sent_at": time.time(),
        "record": len(share.record),
        "record_digest": checksum.digest(share.record),
        "attempt": attempt,
        "parts": placed,
    }
    header = sealed(dump(fields))
    first = SHARE_MAGIC + _LENGTH.pack(len(header)) + header + share.record
    return Outgoing(head=parse_head(header), first=first, parts=parts)


def shard_meta(data: bytes) -> str:
    """Return the ``Shard-Meta`` header of the blob *data*."""
    return _meta(xxhash.xxh3_128_digest(data))


def _meta(found: bytes) -> str:
    return json.dumps({"checksum": base64.b64encode(found).decode(), "algorithm": "xxh3_128"})


def _pieces(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _SEND_BYTES):
        yield data[start : start + _SEND_BYTES]


def _verified(part: Part, chunks: Chunks) -> Iterator[memoryview]:
    """Yield the bytes of *part*; the piece that ends a chunk only after the chunk was found right."""
    done, hasher, held = 0, xxhash.xxh3_128(), b""
    for given in chunks():
        if held or done + len(given) > part.size:
            raise _wrong(part, f"more than {part.size} bytes were given")
        for piece in _split(given, done):
            hasher.update(piece)
            done += len(piece)
            if done == part.size or done % CHUNK_BYTES == 0:
                _check(part, (done - 1) // CHUNK_BYTES, hasher.hexdigest())
                hasher = xxhash.xxh3_128()
            if done < part.size:
                yield piece
            else:
                held = bytes(piece)  # until it is known that nothing comes behind it; asking ends the view
    if done != part.size:
        raise _wrong(part, f"{done} of {part.size} bytes were given")
    if held:
        yield memoryview(held)


def _split(given: memoryview, done: int) -> Iterator[memoryview]:
    view, at = given.cast("B"), 0
    while at < len(view):
        end = min(len(view), at + _SEND_BYTES, at + CHUNK_BYTES - (done + at) % CHUNK_BYTES)
        yield view[at:end]
        at = end


def _check(part: Part, index: int, found: str) -> None:
    if found != part.chunks[index]:
        raise _wrong(part, f"chunk {index} has XXH3-128 {found}, recorded {part.chunks[index]}")


def _wrong(part: Part, how: str) -> CorruptPartError:
    return CorruptPartError(f"{part.name}: {how}", key=part.name)
