"""Tombstones: how a checkpoint on a durable tier is given up, and how that is taken back before anything is deleted.

A deletion and a late commit race for one key: `manifest.json` becomes a tombstone first, then the rest is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.errors import FormatError, KeyExistsError, KeyNotFoundError
from sm_tiered.inventory import read_records
from sm_tiered.manifest import (
    MAX_BYTES,
    compose_manifest,
    manifest_from_json,
    manifest_to_json,
    record_from_json,
)
from sm_tiered.records import CheckpointId, Manifest
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.file_list import read_file_lists

__all__ = ["Grave", "delete_files", "entomb", "revive", "whole_below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grave:
    """A tombstone, and what stood in its place."""

    tombstone: Manifest
    """It names the parts, so that a deletion that was cut short can be finished by anybody."""
    before: bytes | None
    """The manifest that it replaced; None where there was none, or where the tombstone stood already."""


def entomb(tier: Tier, namespace: str, checkpoint: CheckpointId) -> Grave | None:
    """Turn the manifest of *checkpoint* into a tombstone; None when somebody else was there in between.

    Raises:
        FormatError: what stands there is no manifest: not ours to judge, so not ours to delete.
    """
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    try:
        standing = tier.get(key, max_bytes=MAX_BYTES)
    except KeyNotFoundError:
        grave = _tombstone(namespace, checkpoint, None, _recorded_parts(tier, checkpoint))
        try:
            tier.put_if_absent(key, manifest_to_json(grave))
        except KeyExistsError:
            return None
        return Grave(tombstone=grave, before=None)
    manifest = manifest_from_json(standing.data)
    if manifest.tombstone:
        return Grave(tombstone=manifest, before=None)
    grave = _tombstone(namespace, checkpoint, manifest, manifest.parts)
    try:
        tier.replace(key, manifest_to_json(grave), version=standing.version)
    except (KeyExistsError, KeyNotFoundError):
        return None
    return Grave(tombstone=grave, before=standing.data)


def revive(tier: Tier, checkpoint: CheckpointId, manifest: bytes) -> bool:
    """Put *manifest* back in the place of the tombstone; return False when that is not what stands there."""
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    try:
        standing = tier.get(key, max_bytes=MAX_BYTES)
        if not manifest_from_json(standing.data).tombstone:
            return standing.data == manifest
        tier.replace(key, manifest, version=standing.version)
    except (KeyExistsError, KeyNotFoundError):
        return False
    return True


def whole_below(tier: Tier, tombstone: Manifest) -> bytes | None:
    """Return the manifest that *tombstone* replaced, if nothing of the checkpoint was deleted yet; else None."""
    checkpoint = tombstone.checkpoint
    records = read_records(tier, checkpoint)
    try:
        manifest = compose_manifest(records)
    except FormatError:
        return None
    prefix = f"{layout.checkpoint_dir(checkpoint)}/"
    sizes = {entry.key.removeprefix(prefix): entry.size for entry in tier.list(prefix)}
    indexed = any(record_from_json(data).items for data in records.values())
    derived = {layout.INDEX, layout.METADATA} if indexed else set[str]()
    complete = manifest.parts == tombstone.parts and all(sizes.get(n) == size for n, size in manifest.parts.items())
    return manifest_to_json(manifest) if complete and derived <= set(sizes) else None


def delete_files(tier: Tier, tombstone: Manifest) -> None:
    """Delete all that is ours but the tombstone; a file that nothing recorded stays where it is."""
    directory = layout.checkpoint_dir(tombstone.checkpoint)
    names = [entry.key.removeprefix(f"{directory}/") for entry in tier.list(f"{directory}/")]
    tier.delete(f"{directory}/{name}" for name in names if name in tombstone.parts or _ours(name))


def _tombstone(
    namespace: str, checkpoint: CheckpointId, manifest: Manifest | None, parts: Mapping[str, int]
) -> Manifest:
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


def _ours(name: str) -> bool:
    return (
        name in (layout.METADATA, layout.INDEX)
        or layout.parse_record_name(name) is not None
        or layout.parse_file_list_name(name) is not None
        or layout.parse_part_name(name) is not None
    )
