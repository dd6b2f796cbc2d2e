"""Pins: checkpoints that somebody wants kept on a durable tier, whatever its keep policy says.

A pin is its name, ``pins/<checkpoint>.json``; what stands in it is only told, so a damaged one pins all the same.
Pinning races with retention, and whoever writes first wins: `pin` writes the pin and then looks for a tombstone,
retention writes the tombstone and then looks for a pin. One of the two always sees the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.inventory import read_manifest
from sm_tiered.records import CheckpointId
from sm_tiered.sealed_json import FORMAT, MAX_BYTES, Json, dump, number, parsed, sealed, text
from sm_tiered.tiers.base import Tier

__all__ = ["Pin", "is_pinned", "pin", "pinned", "put_pin", "read_pins", "unpin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """One pin, as it is told."""

    checkpoint: CheckpointId
    reason: str | None
    """Why, in the words of who pinned it; None where nothing was said or it can't be read."""
    pinned_at: float | None
    """UTC seconds since the epoch by the clock of who pinned it; None where it can't be read."""


def pinned(tier: Tier) -> frozenset[CheckpointId]:
    """Return every checkpoint that has a pin on *tier*, whether or not it is there."""
    found = (layout.parse_pin_key(entry.key) for entry in tier.list(f"{layout.PINS}/"))
    return frozenset(checkpoint for checkpoint in found if checkpoint is not None)


def is_pinned(tier: Tier, checkpoint: CheckpointId) -> bool:
    """Return whether *checkpoint* has a pin on *tier*."""
    try:
        tier.get(layout.pin_key(checkpoint), max_bytes=MAX_BYTES)
    except KeyNotFoundError:
        return False
    except CorruptPartError:  # longer than any pin: its name is what counts
        return True
    return True


def read_pins(tier: Tier) -> list[Pin]:
    """Return the pins on *tier*, oldest checkpoint first."""
    return [_read(tier, checkpoint) for checkpoint in sorted(pinned(tier))]


def pin(tier: Tier, namespace: str, checkpoint: CheckpointId, *, reason: str | None, now: float) -> bool:
    """Pin *checkpoint*, which is committed on *tier*; return False when it was pinned already.

    A pin that stands is written anew only for another *reason*.

    Raises:
        CheckpointNotFoundError: it is not committed there, or retention is just giving it up.
    """
    _check_committed(tier, checkpoint)
    new = put_pin(tier, namespace, checkpoint, reason=reason, now=now)
    try:
        _check_committed(tier, checkpoint)
    except CheckpointNotFoundError:
        if new:
            unpin(tier, checkpoint)
        raise
    return new


def put_pin(tier: Tier, namespace: str, checkpoint: CheckpointId, *, reason: str | None, now: float) -> bool:
    """Pin *checkpoint*, which may still be on its way to *tier*; return False when it was pinned already."""
    new = not is_pinned(tier, checkpoint)
    if new or (reason is not None and _read(tier, checkpoint).reason != reason):
        fields = {
            "format": FORMAT,
            "kind": "pin",
            "namespace": namespace,
            "checkpoint": layout.checkpoint_dir(checkpoint),
            "reason": reason,
            "pinned_at": now,
        }
        tier.put(layout.pin_key(checkpoint), sealed(dump(fields)))
    return new


def unpin(tier: Tier, checkpoint: CheckpointId) -> bool:
    """Take the pin of *checkpoint* away; return whether there was one."""
    found = is_pinned(tier, checkpoint)
    tier.delete([layout.pin_key(checkpoint)])
    return found


def _check_committed(tier: Tier, checkpoint: CheckpointId) -> None:
    manifest = read_manifest(tier, checkpoint)
    if manifest is None or manifest.tombstone:
        what = "is not committed there" if manifest is None else "is just being given up there"
        raise CheckpointNotFoundError(f"{checkpoint} {what}", step=checkpoint.step, tier=tier.name)


def _read(tier: Tier, checkpoint: CheckpointId) -> Pin:
    def build(fields: Json) -> Pin:
        reason = fields["reason"]
        return Pin(
            checkpoint=checkpoint,
            reason=None if reason is None else text(reason),
            pinned_at=number(fields["pinned_at"]),
        )

    try:
        return parsed(tier.get(layout.pin_key(checkpoint), max_bytes=MAX_BYTES).data, "pin", build)
    except (FormatError, CorruptPartError, KeyNotFoundError):
        return Pin(checkpoint=checkpoint, reason=None, pinned_at=None)
