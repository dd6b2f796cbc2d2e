"""The drainer used from outside of a job: what stands in memory is handed to it, and somebody follows how that goes on.

The drainer is the one process that promotes (see `sm_tiered.drainer`): one that lives is waited for, else one is
started, in a session of its own. So whoever follows may be killed, and the drain goes on.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.drain_progress import read_sending
from sm_tiered.drainer import DRAINER_LOCK, QUEUE_LOCK, ensure_drainer
from sm_tiered.errors import FormatError, KeyNotFoundError, SaveError, TieredError, TierUnavailableError
from sm_tiered.locks import FileLock, probe
from sm_tiered.manifest import MAX_BYTES, record_from_json
from sm_tiered.queue import Entry, Queue
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.memory import MemoryTier

__all__ = ["Follower", "Promotion", "Standing", "drainer_pid", "hand_over"]

Promotion = tuple[CheckpointId, str]
"""A checkpoint, and the durable tier that it is on the way to."""

_LOCK_SECS = 60.0
_LEAVE_SECS = 60.0
_DEATHS = 3
"""So many drainers in a row may die over the same entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How far what is followed has come."""

    waiting: tuple[Entry, ...]
    """What is still in the queue."""
    ended: Mapping[Promotion, TieredError | None]
    """What has left the queue since it was followed: committed (None), or why not."""
    done: int
    """Bytes that are on their tiers."""
    total: int
    """Bytes of all that was followed."""


def drainer_pid(memory: MemoryTier) -> int | None:
    """Return the process that drains *memory* now, or None."""
    holder = probe(memory.lock_path(DRAINER_LOCK))
    return holder.pid if holder else None


def hand_over(memory: MemoryTier, queue: Queue, recipe: str, make: Callable[[str], Iterable[Entry]]) -> None:
    """Add the entries that *make* makes of the digest of the *recipe* text; `Follower` sees that they are drained.

    Raises:
        TierUnavailableError: the queue's lock was not to be had.
    """
    guard = FileLock(memory.lock_path(QUEUE_LOCK))
    if not guard.acquire(exclusive=True, timeout_secs=_LOCK_SECS):
        raise TierUnavailableError(f"the queue's lock was not to be had in {_LOCK_SECS:.0f} s", tier=memory.name)
    with guard:
        for entry in make(queue.put_recipe(recipe)):
            queue.put(entry)


class Follower:
    """Follows the queue of *memory*, or only one *promotion*, and keeps a drainer alive until all has left it."""

    def __init__(self, memory: MemoryTier, queue: Queue, *, promotion: Promotion | None = None) -> None:
        self._memory, self._queue, self._promotion = memory, queue, promotion
        self._sizes: dict[tuple[CheckpointId, int, str], int] = {}
        self._ended: dict[Promotion, TieredError | None] = {}
        self._drainer: subprocess.Popen[bytes] | None = None
        self._deaths = 0

    def look(self) -> Standing:
        """Return how it stands now.

        Raises:
            SaveError: drainers die as soon as they are started.
        """
        entries = [e for e in self._queue.entries() if self._promotion in (None, (e.checkpoint, e.tier))]
        waiting = {(entry.checkpoint, entry.tier) for entry in entries}
        for entry in entries:
            self._sizes.setdefault(_share(entry), self._size(entry))
        followed = {(checkpoint, tier) for checkpoint, _, tier in self._sizes}
        for promotion in followed - waiting - set(self._ended):
            self._ended[promotion] = self._result(promotion)
            self._deaths = 0
        for promotion in waiting & set(self._ended):
            del self._ended[promotion]  # it was asked for again
        if entries:
            self._keep_draining()
        return Standing(
            waiting=tuple(entries), ended=dict(self._ended), done=self._done(entries), total=sum(self._sizes.values())
        )

    def leave(self) -> None:
        """Let a drainer that was started here, and has nothing to do, end now; wait for its last words."""
        process = self._drainer
        if process is None or process.poll() is not None or self._queue.entries():
            return
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_SECS)

    def _keep_draining(self) -> None:
        if self._drainer is not None and self._drainer.poll() is not None:
            self._deaths += 1
            if self._deaths >= _DEATHS:
                log = self._memory.root / layout.QUEUE / "drainer.log"
                raise SaveError(
                    f"the drainer died {self._deaths} times, at last with status {self._drainer.returncode}",
                    hint=f"{log} has its last words; what is queued stays queued.",
                )
            self._drainer = None
        if self._drainer is None and probe(self._memory.lock_path(DRAINER_LOCK)) is None:
            self._drainer = ensure_drainer(self._memory)

    def _size(self, entry: Entry) -> int:
        key = layout.in_dir(entry.checkpoint, layout.record_name(entry.rank))
        try:
            record = record_from_json(self._memory.get(key, max_bytes=MAX_BYTES).data)
        except (KeyNotFoundError, FormatError):
            return 0
        return sum(part.size for part in record.parts if not part.replica)

    def _done(self, entries: Iterable[Entry]) -> int:
        """What has left the queue or is sent counts whole, what is just being sent as far as the drainer told."""
        left = {_share(entry): self._sizes[_share(entry)] for entry in entries if not entry.sent}
        for tier in {tier for _, _, tier in left}:
            sending = read_sending(self._memory, tier)
            share = (sending.checkpoint, sending.rank, sending.tier) if sending is not None else None
            if sending is not None and share in left:
                left[share] = max(0, left[share] - sending.bytes)
        return sum(self._sizes.values()) - sum(left.values())

    def _result(self, promotion: Promotion) -> TieredError | None:
        checkpoint, tier = promotion
        found = self._queue.result(checkpoint, tier)
        if found is not None:
            return found.error
        return SaveError(
            "it left the queue without a word",
            hint="Was the memory tier's directory deleted, or did its job bring it there itself? See `sm-tiered ls`.",
            step=checkpoint.step,
            tier=tier,
        )


def _share(entry: Entry) -> tuple[CheckpointId, int, str]:
    return (entry.checkpoint, entry.rank, entry.tier)
