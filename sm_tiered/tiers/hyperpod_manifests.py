"""The manifest of a checkpoint as one blob on the HyperPod service, in a slot behind those of its ranks. Pure.

It is a magic, the length of a header, the header and the manifest as every tier has it. The header ends with its own
digest and says what the manifest does not: the record of the attempt, and what a listing tells of the shares.
Whoever saw the same shares makes the same blob.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from sm_tiered import checksum, layout
from sm_tiered.errors import FormatError
from sm_tiered.manifest import manifest_from_json
from sm_tiered.records import CheckpointId, Manifest
from sm_tiered.sealed_json import FORMAT, Json, digest_of, dump, integer, list_of, mapping, number, parsed, sealed, text
from sm_tiered.tiers.hyperpod_service import Namespace
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES, Head, attempt_text, header_length

__all__ = [
    "MANIFEST_MAGIC",
    "MAX_MANIFEST_BYTES",
    "Commit",
    "CommitHead",
    "commit_blob",
    "manifest_rank",
    "parse_commit",
    "parse_commit_head",
    "read_blob",
]

MANIFEST_MAGIC = b"SMTMANI1"
"""As long as that of a share, and its header's length stands behind it as there."""

MAX_MANIFEST_BYTES = 16 * 1024 * 1024
"""Longer manifests are written nowhere: reading one would take longer than a look may."""

_LENGTH = struct.Struct(">Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitHead:
    """What the header of a manifest blob says."""

    namespace: str
    checkpoint: CheckpointId
    rank: int
    """The slot it was written to."""
    sent_at: float
    """When the last of the shares was sent, by the clock of who sent it."""
    records: tuple[int, ...]
    """How long the records are, by rank."""
    attempt: str | None
    """The record of the attempt, as rank 0's share holds it."""
    size: int
    """How long the manifest is."""
    digest: str
    """That of the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A manifest blob."""

    head: CommitHead
    manifest: Manifest
    data: bytes
    """The manifest as it is stored on every tier."""

    @property
    def checkpoint(self) -> CheckpointId:
        """Whose manifest it is."""
        return self.head.checkpoint


def manifest_rank(member: Namespace) -> int | None:
    """Return the slot of *member* that manifests stand in, or None where it has none.

    The last slot is that of records of attempts, and this is the one before it. A namespace without a slot to spare
    has the share of its last rank there: what stands in the slot tells which.
    """
    return member.ranks - 2 if member.ranks > 2 else None


def commit_blob(heads: Sequence[Head], manifest: bytes, rank: int) -> bytes:
    """Return the blob for slot *rank* that tells of *manifest*, which follows from the shares of all ranks, *heads*."""
    fields = {
        "format": FORMAT,
        "kind": "commit",
        "namespace": heads[0].namespace,
        "checkpoint": layout.checkpoint_dir(heads[0].checkpoint),
        "rank": rank,
        "sent_at": max(head.sent_at for head in heads),
        "records": [head.record.size for head in heads],
        "attempt": heads[0].attempt,
        "manifest": {"size": len(manifest), "digest": checksum.digest(manifest)},
    }
    header = sealed(dump(fields))
    return MANIFEST_MAGIC + _LENGTH.pack(len(header)) + header + manifest


def parse_commit_head(header: bytes) -> CommitHead:
    """Return what *header* says.

    Raises:
        FormatError: it is damaged, is none, or is of a newer release.
    """
    return parsed(header, "commit", _head)


def _head(fields: Json) -> CommitHead:
    checkpoint = layout.parse_checkpoint_dir(text(fields["checkpoint"]))
    if checkpoint is None:
        raise FormatError(f"{str(fields['checkpoint'])[:80]!r} is no checkpoint")
    told, records = mapping(fields["manifest"]), list_of(fields, "records")
    return CommitHead(
        namespace=layout.check_namespace(fields["namespace"]),
        checkpoint=checkpoint,
        rank=integer(fields, "rank", below=layout.MAX_WORLD + 1),
        sent_at=number(fields["sent_at"]),
        records=tuple(integer({"record": size}, "record") for size in records),
        attempt=None if fields["attempt"] is None else attempt_text(text(fields["attempt"]), checkpoint),
        size=integer(told, "size", below=MAX_MANIFEST_BYTES + 1),
        digest=digest_of(told["digest"]),
    )


def parse_commit(head: CommitHead, data: bytes) -> Commit:
    """Return the blob that *head* was read of, with *data* behind it.

    Raises:
        FormatError: *data* is not the manifest that *head* tells of.
    """
    if checksum.digest(data) != head.digest:
        raise FormatError(f"its manifest differs from its digest, or ends after {len(data)} bytes")
    manifest = manifest_from_json(data)
    if (manifest.namespace, manifest.checkpoint) != (head.namespace, head.checkpoint) or manifest.tombstone:
        raise FormatError(f"its manifest is that of {manifest.checkpoint}")
    if len(head.records) != manifest.world:
        raise FormatError(f"it tells of {len(head.records)} records, its manifest of {manifest.world}")
    return Commit(head=head, manifest=manifest, data=data)


def read_blob(blob: bytes) -> Commit:
    """Return what *blob* tells, which is whole.

    Raises:
        FormatError: it is damaged all the same.
    """
    end = FIRST_BYTES + header_length(blob[:FIRST_BYTES])
    return parse_commit(parse_commit_head(blob[FIRST_BYTES:end]), blob[end:])
