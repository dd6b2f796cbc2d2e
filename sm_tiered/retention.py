"""Retention on a durable tier: what the keep policy does not want goes, and never what a restore could need.

A deletion and a late commit race for one key: `manifest.json` becomes a tombstone first, then the rest is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import FormatError, KeyExistsError, KeyNotFoundError
from sm_tiered.inventory import list_attempts, list_checkpoints, read_attempts, read_manifest, read_records
from sm_tiered.manifest import MAX_BYTES, manifest_from_json, manifest_to_json, record_from_json
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.policies.keep import KeepPolicy, ask_keep
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Manifest
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.file_list import read_file_lists

__all__ = ["TOMBSTONE_SECS", "Plan", "apply", "plan"]

TOMBSTONE_SECS = 86400.0
"""How long a tombstone stays: longer than any committer may still try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What retention is about to do; checkpoints oldest first."""

    delete: tuple[CheckpointId, ...] = ()
    bury: tuple[CheckpointId, ...] = ()
    """Tombstones that are old enough to go themselves."""
    forget: tuple[Attempt, ...] = ()
    """Attempts that hold nothing here and chose nothing: every launch begins one, and every restore reads them all."""
    newer: Attempt | None = None
    """An attempt that began after the one that asks: then nothing is deleted."""


def plan(tier: Tier, keep: KeepPolicy, *, attempt: Attempt, in_flight_secs: float) -> Plan:
    """Return what may be deleted by a drainer of *attempt*: nothing unless that is the newest attempt on the tier.

    Never deleted are pinned checkpoints, the parent of any attempt, the newest committed one, and what was never
    committed and was written to less than *in_flight_secs* before the newest, by the tier's own clock.
    """
    listed = list_checkpoints(tier)
    manifests = {checkpoint: _manifest(tier, checkpoint) for checkpoint in listed}
    attempts, damaged = read_attempts(tier)
    newest_attempt = max([*list_attempts(tier), *(c.attempt for c in listed), attempt])
    committed = [c for c in listed if (m := manifests[c]) is not None and not m.tombstone]
    if newest_attempt != attempt:
        return Plan(newer=newest_attempt)
    if not any(c.attempt == attempt for c in committed):
        return Plan()
    if damaged:
        raise FormatError(
            f"the record of {min(damaged)} is damaged: what it continues must not be deleted, and can't be told",
            hint="Look with `sm-tiered verify`; with that record removed, retention goes on.",
        )
    wanted = _wanted(committed, manifests, keep) | _parents(attempts) | _pinned(tier, committed)
    clock = _modified_at(tier, max(c for c in committed if c.attempt == attempt))
    stale = _stale(tier, listed, manifests, committed, attempt, in_flight_secs)
    holding = {checkpoint.attempt for checkpoint in listed}
    tombs = [c for c in listed if (m := manifests[c]) is not None and m.tombstone]
    unfinished = [c for c in tombs if len(tier.list(f"{layout.checkpoint_dir(c)}/")) > 1]
    return Plan(
        delete=tuple(c for c in sorted([*committed, *stale]) if c not in wanted) + tuple(unfinished),
        bury=tuple(c for c in tombs if c not in unfinished and clock - _modified_at(tier, c) > TOMBSTONE_SECS),
        forget=tuple(sorted(a for a, r in attempts.items() if a < attempt and not r.chosen and a not in holding)),
    )


def apply(tier: Tier, namespace: str, chosen: Plan) -> list[CheckpointId]:
    """Carry *chosen* out; return the checkpoints that were deleted."""
    done: list[CheckpointId] = []
    for checkpoint in chosen.delete:
        grave = _entomb(tier, namespace, checkpoint)
        if grave is None:
            continue
        crashpoint("retention.after_tombstone")
        _delete_files(tier, grave)
        done.append(checkpoint)
        crashpoint("retention.after_delete")
    for checkpoint in chosen.bury:
        tier.delete([layout.in_dir(checkpoint, layout.MANIFEST)])
    tier.delete(layout.attempt_key(attempt) for attempt in chosen.forget)
    return done


def _manifest(tier: Tier, checkpoint: CheckpointId) -> Manifest | None:
    try:
        return read_manifest(tier, checkpoint)
    except FormatError:
        # Damaged or newer than this release: not ours to judge, so not ours to delete.
        return None


def _wanted(
    committed: Iterable[CheckpointId], manifests: Mapping[CheckpointId, Manifest | None], keep: KeepPolicy
) -> set[CheckpointId]:
    ordered = sorted(committed)
    facts = [
        CommittedCheckpoint(checkpoint=c, saved_at=m.saved_at, metrics=m.metrics)
        for c in ordered
        if (m := manifests[c]) is not None
    ]
    return {c for c, wanted in zip(ordered, ask_keep(keep, facts), strict=True) if wanted}


def _parents(attempts: Mapping[Attempt, AttemptRecord]) -> set[CheckpointId]:
    return {record.parent for record in attempts.values() if record.parent is not None}


def _pinned(tier: Tier, committed: Iterable[CheckpointId]) -> set[CheckpointId]:
    pins = {entry.key.removeprefix("pins/").removesuffix(".json") for entry in tier.list("pins/")}
    return {c for c in committed if layout.checkpoint_dir(c) in pins}


def _stale(
    tier: Tier,
    listed: Iterable[CheckpointId],
    manifests: Mapping[CheckpointId, Manifest | None],
    committed: list[CheckpointId],
    attempt: Attempt,
    in_flight_secs: float,
) -> list[CheckpointId]:
    """Checkpoints that were never committed and never will be."""
    newest = max(c for c in committed if c.attempt == attempt)
    clock = _modified_at(tier, newest)
    stale: list[CheckpointId] = []
    for checkpoint in listed:
        if checkpoint in committed or checkpoint >= newest or (m := manifests[checkpoint]) is not None and m.tombstone:
            continue
        if _has_manifest(tier, checkpoint):
            continue
        if clock - _modified_at(tier, checkpoint) > in_flight_secs:
            stale.append(checkpoint)
    return stale


def _modified_at(tier: Tier, checkpoint: CheckpointId) -> float:
    """When its newest object was written, by the tier's own clock."""
    return max((entry.modified_at for entry in tier.list(f"{layout.checkpoint_dir(checkpoint)}/")), default=0.0)


def _has_manifest(tier: Tier, checkpoint: CheckpointId) -> bool:
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    return any(entry.key == key for entry in tier.list(key))


def _entomb(tier: Tier, namespace: str, checkpoint: CheckpointId) -> Manifest | None:
    """Turn the manifest into a tombstone and return it; None when somebody else was there in between."""
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    try:
        standing = tier.get(key, max_bytes=MAX_BYTES)
    except KeyNotFoundError:
        grave = _grave(namespace, checkpoint, None, _recorded_parts(tier, checkpoint))
        try:
            tier.put_if_absent(key, manifest_to_json(grave))
        except KeyExistsError:
            return None
        return grave
    manifest = manifest_from_json(standing.data)
    if manifest.tombstone:
        return manifest
    grave = _grave(namespace, checkpoint, manifest, manifest.parts)
    try:
        tier.replace(key, manifest_to_json(grave), version=standing.version)
    except (KeyExistsError, KeyNotFoundError):
        return None
    return grave


def _grave(namespace: str, checkpoint: CheckpointId, manifest: Manifest | None, parts: Mapping[str, int]) -> Manifest:
    """The tombstone names the parts, so that a deletion that was cut short can be finished by anybody."""
    return Manifest(
        namespace=namespace,
        checkpoint=checkpoint,
        world=manifest.world if manifest else 1,
        saved_at=manifest.saved_at if manifest else 0.0,
        parts=dict(parts),
        tombstone=True,
    )


def _recorded_parts(tier: Tier, checkpoint: CheckpointId) -> dict[str, int]:
    parts: dict[str, int] = {}
    for data in read_records(tier, checkpoint).values():
        with suppress(FormatError):
            parts.update({part.name: part.size for part in record_from_json(data).parts})
    for listed in read_file_lists(tier, checkpoint).values():
        parts.update({name: parts.get(name, 0) for name in listed.names})
    return parts


def _delete_files(tier: Tier, grave: Manifest) -> None:
    """Delete all that is ours but the tombstone; a file that nothing recorded stays where it is."""
    directory = layout.checkpoint_dir(grave.checkpoint)
    names = [entry.key.removeprefix(f"{directory}/") for entry in tier.list(f"{directory}/")]
    tier.delete(f"{directory}/{name}" for name in names if name in grave.parts or _ours(name))


def _ours(name: str) -> bool:
    return (
        name in (layout.METADATA, layout.INDEX)
        or layout.parse_record_name(name) is not None
        or layout.parse_file_list_name(name) is not None
        or layout.parse_part_name(name) is not None
    )
