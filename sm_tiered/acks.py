"""Which ranks have a save in their memory: one counter for each save, in the store that the whole job shares.

Its low half counts the records that are written; a rank whose record never will be adds its number to the high half.
"""

from __future__ import annotations

from sm_tiered import layout
from sm_tiered.errors import DeadlineExceededError, RankFailedError, TieredError
from sm_tiered.group import Group
from sm_tiered.records import CheckpointId

__all__ = ["Acks"]

_FAILED = 1 << 32


class Acks:
    """The acknowledgements of all saves. Nothing here is collective, and any thread may ask."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def give(self, checkpoint: CheckpointId) -> None:
        """Say that this rank's record is written."""
        self._group.add(layout.ack_counter(checkpoint), 1)

    def refuse(self, checkpoint: CheckpointId) -> None:
        """Say that this rank's record will never be."""
        self._group.add(layout.ack_counter(checkpoint), _FAILED * (self._group.rank + 1))

    def complete(self, checkpoint: CheckpointId) -> bool:
        """Return whether every rank's record is written."""
        return self._group.add(layout.ack_counter(checkpoint), 0) % _FAILED >= self._group.world

    def look(self, checkpoint: CheckpointId) -> tuple[bool, TieredError | None]:
        """Return whether the save has ended in memory, and why it failed there; see `TierState`."""
        world = self._group.world
        try:
            failed, written = divmod(self._group.add(layout.ack_counter(checkpoint), 0), _FAILED)
        except DeadlineExceededError:
            return False, None
        except TieredError as error:
            return True, error
        if failed:
            rank = min(failed, world) - 1
            return True, RankFailedError("a rank could not write its share", step=checkpoint.step, rank=rank)
        return written >= world, None

    def forget(self, checkpoint: CheckpointId) -> None:
        """Drop the counter; one rank does it for all."""
        if self._group.rank == 0:
            self._group.drop(layout.ack_counter(checkpoint))
