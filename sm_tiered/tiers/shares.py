"""Tiers whose unit is a share: all that one rank wrote of a checkpoint, in one piece.

Such a tier has no conditional writes, so nothing it keeps beside the shares can decide what is committed: a share
appears whole or not at all, and a checkpoint is committed once the shares of all its ranks stand there. A manifest that
stands there by itself says that it was, and spares the looks at the shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from sm_tiered.records import CheckpointId, Part, Record
from sm_tiered.tiers.base import Chunks, Tier

__all__ = ["Share", "ShareTier", "one_pass", "share_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank wrote of one checkpoint."""

    checkpoint: CheckpointId
    rank: int
    world: int
    """How many ranks wrote it."""
    record: bytes
    """The record as it stands on every tier: `sm_tiered.manifest.record_to_json`."""
    parts: tuple[tuple[Part, Chunks], ...] = ()
    """What the record tells of, replicas left out, and where their bytes come from: each is asked for them twice, and
    the tier compares them with their digests."""


def share_of(record: Record, data: bytes, parts: Iterable[tuple[Part, Chunks]]) -> Share:
    """Return the share that *record*, which is *data* as it is stored, tells of."""
    return Share(checkpoint=record.checkpoint, rank=record.rank, world=record.world, record=data, parts=tuple(parts))


@runtime_checkable
class ShareTier(Tier, Protocol):
    """A tier that keeps shares.

    Read, it is a tier like any other: it shows the keys that a directory would have, and the manifest, as it was
    written when all shares had been seen, or as it follows from the records once all of them are there. Written, it
    takes shares (`put_share`), the records of attempts and records of ranks that failed (`put_if_absent`); it refuses
    everything else with `TierRefusedError`.
    """

    def put_share(self, share: Share) -> None:
        """Write *share*, in the place of what stood there; it appears whole or not at all.

        The record of its attempt should have been put before: it goes into the share too.

        Raises:
            CorruptPartError: a part gave other bytes than its digests say, or another number of them.
            TierFullError: the tier would have to drop something to take it.
        """
        ...

    def confirm(self, checkpoint: CheckpointId, *, tell: bool = True) -> bool:
        """Ask anew for the shares of all ranks; return whether all stand there whole, so that it is committed.

        What was learnt before is believed of none, nor that what this process wrote still stands: the tier may have
        lost a share since. One whose record tells of a failure is not whole. Unless not to *tell*, a manifest is
        written where all stand and the tier has a place for it, and deleted where one is missing.

        Raises:
            CorruptPartError: a share is damaged, or they do not make one checkpoint.
        """
        ...

    def drop(self, checkpoint: CheckpointId) -> None:
        """Delete *checkpoint*: its manifest, then rank 0's share: then it is none any more, and then the others.

        What is gone is no error.
        """
        ...

    def let_go(self) -> None:
        """Let go of connections to shares that were looked at and not read: their service holds each whole."""
        ...

    def asking_once(self) -> AbstractContextManager[None]:
        """Within it, the calls of this thread ask for the same thing once: they are one pass over what stands there.

        A call that asks anew does so in each pass: what was learnt before it began is not believed there either.
        """
        ...


def one_pass(tier: Tier) -> AbstractContextManager[None]:
    """Return what makes the calls within it one pass over *tier*: see `ShareTier.asking_once`; others ask as ever."""
    return tier.asking_once() if isinstance(tier, ShareTier) else nullcontext()
