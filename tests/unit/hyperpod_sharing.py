"""Shares for tests of the HyperPod tier: bytes that a step, a rank and a number decide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from sm_tiered import checksum, layout
from sm_tiered.inventory import read_holding
from sm_tiered.manifest import attempt_record_to_json, compose_manifest, manifest_to_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Part, Record
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.contract import payload
from sm_tiered.testing.daemon_memory import StoredBlob, shard_meta
from sm_tiered.tiers.base import Chunks
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.shares import Share, ShareTier

MIB = 1024 * 1024
WIRE = 10**10
"""An attempt on the wire."""
KEPT = 5
"""`Latest(2)` and three more."""
FIRST = Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="0123abcd")
SECOND = Attempt(ordinal=2, utc_secs=1_700_000_100, nonce="89abcdef")
THIRD = Attempt(ordinal=3, utc_secs=1_700_000_200, nonce="fedc0000")


def settings(url: str, **changes: object) -> HyperPodSettings:
    """Return settings of a tier at *url* that keeps two checkpoints and gives up soon."""
    given: dict[str, object] = {
        "name": "cluster",
        "save": None,
        "keep": Latest(2),
        "url": url,
        "connect_timeout_secs": 1.0,
        "request_timeout_secs": 5.0,
        "retry_attempts": 3,
        "retry_deadline_secs": 10.0,
    }
    return HyperPodSettings(**{**given, **changes})  # type: ignore[arg-type]


def bare(url: str, namespace: str = "run", **changes: object) -> HyperPodTier:
    """Return a tier that repeats nothing."""
    return HyperPodTier(settings(url, **changes), namespace)


def pieces(data: bytes, lengths: Sequence[int]) -> Chunks:
    """Return a source of *data* in pieces of these lengths in turn, each made useless once the next is asked for."""

    def chunks() -> Iterator[memoryview]:
        at = 0
        for length in cycle(lengths):
            if at >= len(data):
                return
            piece = bytearray(data[at : at + length])
            yield memoryview(piece)
            piece[:] = b"\xee" * len(piece)
            at += length

    return chunks


def data_of(step: int, rank: int, number: int, size: int) -> bytes:
    """Return what the part holds."""
    return payload(size, seed=step * 10_000 + rank * 100 + number)


def share(
    checkpoint: CheckpointId,
    rank: int,
    world: int,
    *sizes: int,
    lengths: Sequence[int] = (3 * MIB + 1, 10, 8 * MIB),
    failed: str | None = None,
    namespace: str = "run",
) -> Share:
    """Return what *rank* wrote: one part for each of *sizes*."""
    parts: list[tuple[Part, Chunks]] = []
    for number, size in enumerate(sizes):
        data = data_of(checkpoint.step, rank, number, size)
        digests = checksum.digest_chunks(memoryview(data))
        parts.append((Part(name=layout.part_name(rank, number), size=size, chunks=digests), pieces(data, lengths)))
    record = Record(
        namespace=namespace,
        checkpoint=checkpoint,
        rank=rank,
        world=world,
        saved_at=1_700_000_000.0 + checkpoint.step,
        parts=tuple(part for part, _ in parts),
        failed=failed,
    )
    return Share(checkpoint=checkpoint, rank=rank, world=world, record=record_to_json(record), parts=tuple(parts))


def save(tier: ShareTier, checkpoint: CheckpointId, world: int, *sizes: int) -> dict[int, bytes]:
    """Write a whole checkpoint; return its records."""
    made = [share(checkpoint, rank, world, *sizes) for rank in range(world)]
    for one in made:
        tier.put_share(one)
    return {one.rank: one.record for one in made}


def manifest_of(records: dict[int, bytes]) -> bytes:
    """Return the manifest that a durable tier would have."""
    return manifest_to_json(compose_manifest(records))


def attempt_record(attempt: Attempt, parent: CheckpointId | None = None, *, chosen: bool = False) -> bytes:
    """Return the record of *attempt*."""
    return attempt_record_to_json(AttemptRecord(namespace="run", attempt=attempt, parent=parent, chosen=chosen))


def at(attempt: Attempt, step: int) -> CheckpointId:
    """Return a checkpoint."""
    return CheckpointId(attempt=attempt, step=step)


def read(tier: ShareTier, checkpoint: CheckpointId, name: str, size: int, offset: int = 0) -> bytes:
    """Return bytes of a part."""
    buffer = bytearray(size)
    tier.read_into(layout.in_dir(checkpoint, name), offset, memoryview(buffer))
    return bytes(buffer)


def whole(tier: HyperPodTier, checkpoint: CheckpointId) -> bool:
    """Whether *checkpoint* is committed and complete."""
    return read_holding(tier, checkpoint, durable=True).problem is None


def foreign(data: bytes = b"\x80\x04another program's") -> StoredBlob:
    """Return a blob that is no share of ours."""
    return StoredBlob(data=bytearray(data), size=len(data), meta=shard_meta(data))
