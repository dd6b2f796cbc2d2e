"""The commit of a checkpoint on a durable tier: by the tier alone, by whoever sees all records, exactly once.

`index.json` and `.metadata` first, `manifest.json` last, each put-if-absent. The manifest is a canonical function of
the records, so a second committer writes the same bytes: finding them there means success, whoever was first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from sm_tiered import layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import KeyExistsError, KeyNotFoundError, RankFailedError
from sm_tiered.inventory import read_manifest, read_records
from sm_tiered.manifest import MAX_BYTES, compose_manifest, manifest_from_json, manifest_to_json, record_from_json
from sm_tiered.records import Attempt, CheckpointId, Manifest
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.conditions import check_conditions
from sm_tiered.tiers.shares import ShareTier

__all__ = ["TAKEOVER_SECS", "Compose", "Outcome", "publish_attempt", "put_once", "try_commit"]

TAKEOVER_SECS = 20.0
"""How long those that have not rank 0 leave the commit to the one that has."""

Compose = Callable[[Mapping[int, bytes]], Mapping[str, bytes]]
"""Makes the files for other readers (`.metadata`, `index.json`), by name, from the record files by rank."""


class Outcome(Enum):
    """How an attempt to commit ended."""

    COMMITTED = "committed"
    WAITING = "waiting"
    """Records are missing."""
    DELETED = "deleted"
    """Retention was faster: a tombstone stands there."""


def try_commit(tier: Tier, checkpoint: CheckpointId, *, world: int, compose: Compose, lead: bool = True) -> Outcome:
    """Commit *checkpoint* if all *world* records are there. Without *lead*, only look whether somebody else did.

    Raises:
        RankFailedError: a record tells that its rank failed: this checkpoint will never be whole.
    """
    standing = _standing(tier, checkpoint, anew=lead)
    if standing is not None:
        return standing
    if not lead:
        return Outcome.WAITING
    records = read_records(tier, checkpoint)
    for rank, data in records.items():
        failed = record_from_json(data).failed
        if failed:
            raise RankFailedError(f"rank {rank} failed: {failed}", step=checkpoint.step, tier=tier.name, rank=rank)
    if set(records) != set(range(world)) or isinstance(tier, ShareTier):
        return Outcome.WAITING
    try:
        return _commit(tier, compose_manifest(records), compose(records))
    except KeyNotFoundError:
        # What stood in the way is gone again: only a deletion takes keys away, and it leaves its tombstone first.
        return _standing(tier, checkpoint) or Outcome.WAITING


def _standing(tier: Tier, checkpoint: CheckpointId, *, anew: bool = False) -> Outcome | None:
    if anew and isinstance(tier, ShareTier):
        # The shares are the commit there, and a manifest only tells of it: what was seen a while ago may be gone.
        return Outcome.COMMITTED if tier.confirm(checkpoint) else None
    manifest = read_manifest(tier, checkpoint)
    if manifest is None:
        return None
    return Outcome.DELETED if manifest.tombstone else Outcome.COMMITTED


def _commit(tier: Tier, manifest: Manifest, derived: Mapping[str, bytes]) -> Outcome:
    crashpoint("commit.before_metadata")
    for name, data in sorted(derived.items()):
        put_once(tier, layout.in_dir(manifest.checkpoint, name), data)
    crashpoint("commit.before_manifest")
    outcome = _put_manifest(tier, manifest)
    crashpoint("commit.after_manifest")
    return outcome


def put_once(tier: Tier, key: str, data: bytes) -> bool:
    """Write *data* unless something stands under *key*; return whether those very bytes stand there now.

    Raises:
        KeyNotFoundError: what stood there was deleted before it could be compared.
    """
    try:
        tier.put_if_absent(key, data)
    except KeyExistsError:
        return tier.get(key, max_bytes=MAX_BYTES).data == data
    return True


def publish_attempt(tier: Tier, attempt: Attempt, data: bytes) -> None:
    """Bring an attempt's record, *data*, to *tier*, before anything of the attempt is committed there.

    Raises:
        TierRefusedError: the tier ignores conditions, so a commit there would mean nothing.
    """
    put_once(tier, layout.attempt_key(attempt), data)
    if not isinstance(tier, ShareTier):  # that needs none: see there
        check_conditions(tier, layout.CONDITIONS)


def _put_manifest(tier: Tier, manifest: Manifest) -> Outcome:
    key = layout.in_dir(manifest.checkpoint, layout.MANIFEST)
    data = manifest_to_json(manifest)
    try:
        tier.put_if_absent(key, data)
    except KeyExistsError as error:
        standing = tier.get(key, max_bytes=MAX_BYTES).data
        if standing == data:
            return Outcome.COMMITTED
        if manifest_from_json(standing).tombstone:
            return Outcome.DELETED
        raise KeyExistsError(
            "another manifest was committed for the same records",
            hint="Two different programs wrote this checkpoint: run `sm-tiered verify`.",
            step=manifest.checkpoint.step,
            tier=tier.name,
            key=key,
        ) from error
    return Outcome.COMMITTED
