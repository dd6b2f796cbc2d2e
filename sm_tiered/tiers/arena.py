"""The arena: a rank's large files in memory, which stay mapped and are recycled from checkpoint to checkpoint.

Copying into pages that are mapped already is an order of magnitude faster than into fresh ones. The price is that
recycling overwrites bytes in place, so a file is recycled only while nobody else has it open, mapped, locked or linked.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterator

from sm_tiered.errors import TieredError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.records import CheckpointId
from sm_tiered.tiers import safeio
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.tiers.shelf import Shelf
from sm_tiered.tiers.slot import Claim, OnMap, Slot, State
from sm_tiered.tiers.warmer import Warmer

__all__ = ["Arena", "OnMap", "Slot"]

_STALE_TAKES = 8
"""A free file of a size that the last takes did not ask for is made into what is asked for."""
_WARM_WAIT_SECS = 120.0


class Arena:
    """One rank's files. Threads may share it; forked children can't use it.

    Sizes are pools of their own: *limit_slots* counts files of about the size that is asked for. Where a checkpoint
    holds several of about that size, it counts checkpoints.
    """

    def __init__(self, tier: MemoryTier, *, rank: int, on_map: OnMap | None = None) -> None:
        self._tier, self._on_map, self._pid = tier, on_map, os.getpid()
        self._shelf = Shelf(tier, rank)
        self._changed = threading.Condition()
        self._slots: list[Slot] = []
        self._takes = 0
        self._closed = False
        self._warmer = Warmer(self._changed, self._next_cold, self._warmed, on_map)
        _live.add(self)

    @property
    def allocated_bytes(self) -> int:
        """How many bytes all files together have."""
        with self._changed:
            return sum(slot.size for slot in self._slots)

    def adopt(self, *, also: Collection[int] = ()) -> None:
        """Take over what earlier processes of this rank left; what lacks its record becomes free.

        *also* are ranks that no longer exist in a job that shrank, whose files this rank shall take over too.
        """
        with self._entered("adopt"), safeio.translated(self._tier.name, "arena"):
            for file, checkpoint in self._shelf.left_behind(also):
                slot = Slot(file, file.size, wanted_at=self._takes - 2 * _STALE_TAKES)
                self._slots.append(slot)
                if checkpoint is not None:
                    slot.state, slot.checkpoint = State.PUBLISHED, checkpoint
            for checkpoint in {c for s in self._slots if (c := s.checkpoint) is not None}:
                slots = self._of(checkpoint)
                if not any(self._shelf.has_record(checkpoint, slot.file.path) for slot in slots):
                    self._withdraw(checkpoint)

    def can_take(self, size: int, releasable: Collection[CheckpointId], limit_slots: int) -> bool:
        """Return what `take` would most likely find, without changing anything."""
        with self._entered("ask"):
            self._purge()
            if any(s.near(size) and (s.warming or s.file.ask() is Claim.OURS) for s in self._free()):
                return True
            room, below = self._room_bytes(), self._below_limit(size, limit_slots)
            idle = [s for s in self._free() if self._stale(s) and not s.warming and s.file.ask() is Claim.OURS]
            if below and room + sum(s.size for s in idle) >= size:
                return True
            pool = [s for c in set(releasable) for s in self._of(c) if s.near(size)]
            answers = {s.file.ask() for s in pool}
            return Claim.OURS in answers or (Claim.LOST in answers and room >= size)

    def take(self, size: int, releasable: Collection[CheckpointId], limit_slots: int) -> Slot | None:
        """Return a file of exactly *size* bytes to write into; None when all are in use.

        A free one, else a new one while fewer than *limit_slots* exist, else the oldest of *releasable* that
        nobody reads: its record goes first.

        Raises:
            TierFullError: no room for a new one.
        """
        with self._entered("take"):
            self._warmer.check()
            self._want(size)
            self._purge()
            self._await_warm(size)
            refused: list[OSError] = []
            for slot in self._ways(size, releasable, limit_slots, refused):
                try:
                    slot.prepare(size, self._on_map)
                except OSError as error:
                    refused.append(error)
                    self._give_up(slot)
                    continue
                except BaseException:
                    self._give_up(slot)
                    raise
                slot.state = State.TAKEN
                return slot
            if refused:
                raise self._full(size, refused[0]) from refused[0]
            return None

    def publish(self, slot: Slot, checkpoint: CheckpointId, name: str) -> None:
        """Let *slot* appear as the part *name* of *checkpoint*. It stays mapped; readers may open it.

        Raises:
            TierUnavailableError: the file is gone; the slot is released.
        """
        with self._entered("publish"):
            if slot.state is not State.TAKEN:
                raise TierRefusedError(f"a slot that is {slot.state.value} can't be published", tier=self._tier.name)
            try:
                if not slot.file.share():
                    raise TierUnavailableError(f"another process took {slot.file.path}", tier=self._tier.name)
                with safeio.translated(self._tier.name, name):
                    self._shelf.publish(slot.file, checkpoint, name)
            except BaseException:
                self._give_up(slot)
                raise
            slot.state, slot.checkpoint = State.PUBLISHED, checkpoint

    def release(self, slot: Slot) -> None:
        """Give *slot* back unpublished; nothing happens when it was published or given back before."""
        with self._changed:
            if slot.state is State.TAKEN and slot in self._slots:
                self._give_up(slot)

    def published(self) -> list[CheckpointId]:
        """Return the checkpoints that hold files of this arena, oldest first."""
        with self._changed:
            return sorted({slot.checkpoint for slot in self._slots if slot.checkpoint is not None})

    def drop(self, checkpoints: Collection[CheckpointId]) -> None:
        """Take *checkpoints* out of memory; their files are free, once nobody reads them."""
        with self._entered("drop"):
            for checkpoint in sorted(set(checkpoints)):
                self._withdraw(checkpoint)

    def prepare(self, size: int, count: int) -> None:
        """In the background, see to *count* files of *size* bytes, their pages mapped. `take` waits for it."""
        with self._entered("prepare"):
            self._want(size)
            self._warmer.ask(size, count)

    def wait(self, timeout_secs: float) -> bool:
        """Return whether all that was to be prepared is, within that time."""
        return self._warmer.wait(timeout_secs)

    def close(self) -> None:
        """Unmap and let go of all files, which stay where they are. Can be called many times."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._closed = True
        self._warmer.close()
        with self._changed:
            while self._slots:
                self._slots.pop().close()

    # ---- all below with the lock held

    def _entered(self, what: str) -> threading.Condition:
        if self._closed or os.getpid() != self._pid:
            state = "closed" if os.getpid() == self._pid else f"that of process {self._pid}"
            raise TierRefusedError(f"can't {what}: the arena is {state}", tier=self._tier.name)
        return self._changed

    def _free(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.state is State.FREE]

    def _of(self, checkpoint: CheckpointId) -> list[Slot]:
        return [slot for slot in self._slots if slot.checkpoint == checkpoint]

    def _want(self, size: int) -> None:
        self._takes += 1
        for slot in self._slots:
            if slot.near(size):
                slot.wanted_at = self._takes

    def _stale(self, slot: Slot) -> bool:
        return self._takes - slot.wanted_at > _STALE_TAKES

    def _below_limit(self, size: int, limit_slots: int) -> bool:
        near = [slot for slot in self._slots if slot.near(size)]
        together = Counter(slot.checkpoint for slot in near if slot.checkpoint is not None)
        return len(near) < limit_slots * max(together.values(), default=1)

    def _ways(
        self, size: int, releasable: Collection[CheckpointId], limit_slots: int, refused: list[OSError]
    ) -> Iterator[Slot]:
        """Yield files, claimed, that could be used, the best first."""
        exact = sorted((s for s in self._free() if s.size == size), key=lambda s: not s.mapped)
        yield from self._claimed(exact)
        if self._below_limit(size, limit_slots):
            yield from self._claimed([s for s in self._free() if self._stale(s)])
            yield from self._created(refused)
        yield from self._claimed([s for s in self._free() if s.near(size) and s.size != size])
        yield from self._recycled(size, releasable)
        if self._below_limit(size, limit_slots):
            yield from self._created(refused)  # a file that got a second name no longer counts
            for checkpoint in set(releasable) & set(self.published()):
                self._withdraw(checkpoint)
            for slot in self._claimed(self._free()):
                self._forget(slot)  # what other sizes have to spare makes room
            yield from self._created(refused)

    def _created(self, refused: list[OSError]) -> Iterator[Slot]:
        try:
            slot = self._create()
        except TieredError:
            raise
        except OSError as error:
            refused.append(error)
        else:
            yield from self._claimed([slot])

    def _claimed(self, slots: list[Slot]) -> Iterator[Slot]:
        for slot in slots:
            if slot.warming:
                continue
            answer = slot.file.claim()
            if answer is Claim.OURS:
                yield slot
            elif answer is Claim.LOST:
                self._forget(slot, keep_name=slot.file.links == 1)

    def _recycled(self, size: int, releasable: Collection[CheckpointId]) -> Iterator[Slot]:
        for checkpoint in sorted(set(releasable)):
            slots = [s for s in self._of(checkpoint) if s.near(size) and not s.warming]
            # Asked before anything is taken away: a checkpoint that is being read is worth more than half of one.
            if any(slot.file.ask() is not Claim.BUSY for slot in slots):
                self._withdraw(checkpoint)
                yield from self._claimed(slots)

    def _create(self) -> Slot:
        slot = Slot(self._shelf.create(), 0, wanted_at=self._takes)
        self._slots.append(slot)
        return slot

    def _withdraw(self, checkpoint: CheckpointId) -> None:
        slots = self._of(checkpoint)
        with safeio.translated(self._tier.name, str(checkpoint)):
            self._shelf.withdraw(checkpoint, [slot.file for slot in slots])
        for slot in slots:
            slot.state, slot.checkpoint = State.FREE, None

    def _give_up(self, slot: Slot) -> None:
        """Make a claimed slot free again, or let it go when it is worth nothing."""
        slot.state = State.FREE
        if slot.size == 0 or slot.file.links != 1:
            self._forget(slot)
        elif not slot.file.share():
            self._forget(slot, keep_name=True)

    def _forget(self, slot: Slot, *, keep_name: bool = False) -> None:
        """Let a file go; *keep_name*: it is another process's now."""
        if not keep_name:
            self._shelf.remove(slot.file)
        self._slots.remove(slot)
        slot.close()

    def _purge(self) -> None:
        """Forget files that somebody deleted."""
        for slot in [s for s in self._slots if s.state is not State.TAKEN and not s.warming and not s.file.links]:
            self._forget(slot)

    def _room_bytes(self) -> float:
        try:
            found = os.statvfs(self._tier.root)
        except OSError:
            return float("inf")
        return found.f_bavail * found.f_frsize if found.f_blocks else float("inf")

    def _full(self, size: int, error: OSError) -> TierError:
        meant = safeio.tier_error(error, tier=self._tier.name, key="arena")
        room = self._room_bytes()
        meant.message = f"no room for {size} bytes: {room:.0f} are free in {self._tier.root} ({error.strerror})"
        meant.hint = "Enlarge it (`docker run --shm-size=…`, a larger emptyDir), or lower keep.latest."
        return meant

    # ---- for the background

    def _await_warm(self, size: int) -> None:
        end = time.monotonic() + _WARM_WAIT_SECS
        while self._warmer.busy_with(size) and not any(
            s.size == size and s.mapped and not s.warming for s in self._free()
        ):
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _next_cold(self, size: int, count: int) -> Slot | None:
        """Return the next file that is to be mapped, claimed if it is free, or None when there is none."""
        cold = [s for s in self._free() if s.near(size) and not (s.mapped and s.size == size)]
        slot = next(self._claimed(cold), None)
        if slot is None and sum(s.near(size) for s in self._slots) < count:
            stale = [s for s in self._free() if self._stale(s)]
            slot = next(self._claimed(stale), None) or next(self._claimed([self._create()]), None)
        if slot is None:
            cold = [s for s in self._slots if s.state is State.PUBLISHED and s.near(size) and not s.mapped]
            slot = min(cold, key=lambda s: str(s.checkpoint), default=None)
        if slot is not None:
            slot.warming, slot.wanted_at = True, self._takes
        return slot

    def _warmed(self, slot: Slot) -> None:
        slot.warming = False
        if slot.state is State.FREE:
            self._give_up(slot)

    def abandon(self) -> None:
        """In a forked child: let go of what belongs to the parent, without a trace there."""
        self._closed, self._changed = True, threading.Condition()
        self._warmer.abandon()
        while self._slots:
            self._slots.pop().abandon()


_live: weakref.WeakSet[Arena] = weakref.WeakSet()


def _after_fork() -> None:
    for arena in list(_live):
        arena.abandon()


os.register_at_fork(after_in_child=_after_fork)
