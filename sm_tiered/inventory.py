"""What a tier holds: checkpoints by name, and one of them whole. Used by restore, retention and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sm_tiered import checksum, layout
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.manifest import MAX_BYTES, attempt_record_from_json, manifest_from_json, record_from_json
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Manifest, Record
from sm_tiered.tiers.base import Tier

__all__ = [
    "Holding",
    "list_attempts",
    "list_checkpoints",
    "parsed_problem",
    "read_attempts",
    "read_holding",
    "read_manifest",
    "read_records",
    "records_problem",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One checkpoint on one tier, as far as names and records tell."""

    checkpoint: CheckpointId
    records: Mapping[int, bytes]
    """The record files that are there, by rank."""
    manifest: Manifest | None
    """Durable tiers; a tombstone counts as one."""
    problem: str | None
    """Why it is not complete; None when it is."""
    damaged: bool = False
    """Whether something stands there that is no record or manifest: then it is not that nothing was ever saved."""


def list_checkpoints(tier: Tier) -> list[CheckpointId]:
    """Return every checkpoint that has a directory on *tier*, complete or not, oldest first."""
    return sorted(c for c in map(layout.parse_checkpoint_dir, tier.list_dirs("")) if c is not None)


def list_attempts(tier: Tier) -> list[Attempt]:
    """Return every attempt that has a record on *tier*, oldest first."""
    entries = tier.list(f"{layout.ATTEMPTS}/")
    return sorted(a for a in (layout.parse_attempt_key(entry.key) for entry in entries) if a is not None)


def read_attempts(tier: Tier) -> tuple[dict[Attempt, AttemptRecord], set[Attempt]]:
    """Return the attempt records on *tier*, and the attempts whose record is there and damaged."""
    found: dict[Attempt, AttemptRecord] = {}
    damaged: set[Attempt] = set()
    for attempt in list_attempts(tier):
        try:
            record = attempt_record_from_json(tier.get(layout.attempt_key(attempt), max_bytes=MAX_BYTES).data)
        except KeyNotFoundError:
            continue
        except (FormatError, CorruptPartError):
            damaged.add(attempt)
            continue
        if record.attempt == attempt:
            found[attempt] = record
        else:
            damaged.add(attempt)
    return found, damaged


def read_manifest(tier: Tier, checkpoint: CheckpointId) -> Manifest | None:
    """Return the manifest or tombstone of *checkpoint*, or None when there is none.

    Raises:
        FormatError: what stands there is none, or that of something else.
    """
    try:
        blob = tier.get(layout.in_dir(checkpoint, layout.MANIFEST), max_bytes=MAX_BYTES)
    except KeyNotFoundError:
        return None
    manifest = manifest_from_json(blob.data)
    if manifest.checkpoint != checkpoint:
        raise FormatError(f"the manifest of {checkpoint} is that of {manifest.checkpoint}")
    return manifest


def read_records(tier: Tier, checkpoint: CheckpointId, ranks: range | None = None) -> dict[int, bytes]:
    """Return the record files of *checkpoint* by rank: those of *ranks* that are there, or all."""
    if ranks is None:
        entries = tier.list(f"{layout.checkpoint_dir(checkpoint)}/record-")
        names = [layout.parse_record_name(entry.key.rsplit("/", 1)[-1]) for entry in entries]
        wanted = [rank for rank in names if rank is not None]
    else:
        wanted = list(ranks)
    found: dict[int, bytes] = {}
    for rank in wanted:
        try:
            found[rank] = tier.get(layout.in_dir(checkpoint, layout.record_name(rank)), max_bytes=MAX_BYTES).data
        except KeyNotFoundError:
            continue
    return found


def read_holding(tier: Tier, checkpoint: CheckpointId, *, durable: bool) -> Holding:
    """Return what *tier* holds of *checkpoint*, and why that is not a complete checkpoint, if it is not one."""
    records: dict[int, bytes] = {}
    manifest: Manifest | None = None
    damaged = False
    try:
        if durable:
            manifest = read_manifest(tier, checkpoint)
            if manifest is None or manifest.tombstone:
                problem = "no manifest" if manifest is None else "deleted"
                return Holding(checkpoint=checkpoint, records={}, manifest=manifest, problem=problem)
            records = read_records(tier, checkpoint, range(manifest.world))
        else:
            records = read_records(tier, checkpoint)
        problem = records_problem(checkpoint, records, manifest)
    except (FormatError, CorruptPartError) as error:
        problem, damaged = error.message, True
    return Holding(checkpoint=checkpoint, records=records, manifest=manifest, problem=problem, damaged=damaged)


def records_problem(checkpoint: CheckpointId, records: Mapping[int, bytes], manifest: Manifest | None) -> str | None:
    """Return why *records* are not the complete set of *checkpoint*, or None when they are."""
    for rank, data in records.items():
        if manifest is not None and checksum.digest(data) != manifest.records.get(rank):
            return f"the record of rank {rank} is not the one that was committed"
    return parsed_problem(checkpoint, {rank: record_from_json(data) for rank, data in records.items()})


def parsed_problem(checkpoint: CheckpointId, records: Mapping[int, Record]) -> str | None:
    """Return why *records* are not the complete set of *checkpoint*, or None when they are."""
    for rank, record in records.items():
        if record.rank != rank or record.checkpoint != checkpoint:
            return f"the record of rank {rank} is that of {record.checkpoint}, rank {record.rank}"
        if record.failed:
            return f"rank {rank} failed: {record.failed}"
    if not records:
        return "no record"
    worlds = {record.world for record in records.values()}
    world = max(worlds)
    missing = sorted(set(range(world)) - set(records))
    if missing or len(worlds) > 1:
        return (
            f"records of ranks {missing[:8]} of {world} are missing"
            if missing
            else f"records disagree: worlds {worlds}"
        )
    return None
