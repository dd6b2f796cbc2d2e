"""How far the drainer is with what it sends now, for whoever looks: small files in the queue, written now and then.

It is a hint. That it can't be written, or tells of what has long ended, does no harm.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from sm_tiered import layout
from sm_tiered.errors import TierError
from sm_tiered.queue import Entry
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.base import Tier

__all__ = ["DrainProgress", "Sending", "read_sending"]

_EVERY_SECS = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What a drainer said last."""

    checkpoint: CheckpointId
    rank: int
    tier: str
    bytes: int
    """So many of the rank's bytes were handed to the tier."""


class DrainProgress:
    """The drainer's side."""

    def __init__(self, memory: Tier, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory, self._clock = memory, clock
        self._next_at = clock() + _EVERY_SECS

    def tell(self, entry: Entry, sent: int) -> None:
        """Say that *sent* bytes of *entry* are handed to its tier, unless that was said a moment ago."""
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + _EVERY_SECS
        directory = layout.checkpoint_dir(entry.checkpoint)
        fields = {"checkpoint": directory, "rank": entry.rank, "tier": entry.tier, "bytes": sent}
        with suppress(TierError):
            self._memory.put(_key(entry.tier), json.dumps(fields).encode())


def _key(tier: str) -> str:
    return f"{layout.QUEUE}/sending-{tier}.json"


def read_sending(memory: Tier, tier: str) -> Sending | None:
    """Return what was said last of sending to *tier*, or None."""
    try:
        fields = cast("dict[str, object]", json.loads(memory.get(_key(tier), max_bytes=4096).data))
        checkpoint = layout.parse_checkpoint_dir(str(fields["checkpoint"]))
        if checkpoint is None:
            return None
        return Sending(
            checkpoint=checkpoint,
            rank=int(str(fields["rank"])),
            tier=str(fields["tier"]),
            bytes=int(str(fields["bytes"])),
        )
    except (TierError, ValueError, KeyError, TypeError):
        return None
