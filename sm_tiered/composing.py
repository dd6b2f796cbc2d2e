"""The files for other readers, `.metadata` and `index.json`, made in memory once every rank has acknowledged a save."""

from __future__ import annotations

import time

from sm_tiered import layout
from sm_tiered.acks import Acks
from sm_tiered.errors import TieredError
from sm_tiered.events import SaveFailed
from sm_tiered.inventory import read_records, records_problem
from sm_tiered.records import CheckpointId
from sm_tiered.stager import Stager
from sm_tiered.store import Store

__all__ = ["Composer"]

_SHARE = 0.02
"""Share of the time that this may take: it holds the interpreter that the training needs."""


class Composer:
    """Rank 0's: makes those files of the checkpoints whose records all stand in its node's memory."""

    def __init__(self, store: Store, stager: Stager, acks: Acks) -> None:
        self._store, self._stager, self._acks = store, stager, acks
        self._next_at = 0.0
        self._newest: CheckpointId | None = None

    @property
    def needed(self) -> bool:
        """Whether this rank makes them."""
        return self._store.finisher.make is not None and self._store.group.rank == 0

    def hurry(self) -> None:
        """Whatever is left is made at once: the training has ended."""
        self._next_at = 0.0

    def compose(self, checkpoint: CheckpointId, *, at_once: bool, acknowledged: bool = False) -> bool:
        """Make those of *checkpoint*; False when that must wait. To be called from the worker, again and again.

        Where time allows only some, the newest has them; *at_once*: the drainer waits for them. *acknowledged*: it is
        known to be whole, though this job did not save it.
        """
        store, memory, begun = self._store, self._store.tiers.memory, time.monotonic()
        if self._newest is None or checkpoint > self._newest:
            self._newest = checkpoint
        passed_by = checkpoint < self._newest and not at_once
        if memory is None or passed_by or not self._in_memory(checkpoint):
            return True
        if begun < self._next_at and not at_once:
            return False
        if not (acknowledged or self._acks.complete(checkpoint)):
            return False
        try:
            records = read_records(memory, checkpoint)
            if records_problem(checkpoint, records, None) is None:
                made = store.finisher.compose(records)
                self._stager.put_derived(checkpoint, made)
                if not self._in_memory(checkpoint):
                    # Recycled meanwhile: nobody else would delete them, nor the directory that they brought back.
                    memory.delete(layout.in_dir(checkpoint, name) for name in made)
        except (TieredError, OSError) as error:
            store.events.emit(
                SaveFailed(step=checkpoint.step, tier="memory", error=f"files for other readers: {error}")
            )
        self._next_at = time.monotonic() + (time.monotonic() - begun) / _SHARE
        return True

    def _in_memory(self, checkpoint: CheckpointId) -> bool:
        return self._stager.holds(checkpoint)
