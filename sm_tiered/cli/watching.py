"""One look at a running job from outside: who is alive, how far the training is, what each tier has and waits for."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from sm_tiered import layout
from sm_tiered.cli.common import open_for_looking
from sm_tiered.cli.event_tail import Commit, EventTail, Heard
from sm_tiered.cli.survey import Survey, TierView, survey
from sm_tiered.drain_progress import Sending, read_sending
from sm_tiered.errors import FormatError, KeyNotFoundError, TieredError, TierError
from sm_tiered.locks import probe
from sm_tiered.manifest import MAX_BYTES, record_from_json
from sm_tiered.queue import Entry, Queue
from sm_tiered.records import CheckpointId
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Look", "OnItsWay", "Seen", "Watcher"]

_TRAINER = re.compile(r"trainer-([A-Za-z0-9_-]{1,100})-(\d{1,6})", re.ASCII)
_SURVEY_SECS = 10.0
"""Between two looks at the tiers themselves; the events of this node tell more often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnItsWay:
    """One checkpoint that this node's drainer brings to a durable tier."""

    step: int
    done: int
    """Bytes of this node's share that are there."""
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One tier."""

    settings: TierSettings
    newest: int | None
    """The newest complete step, as far as is known; None: there is none, or it is not known."""
    saved_at: float | None
    """When that was saved, in UTC seconds."""
    on_its_way: tuple[OnItsWay, ...] = ()
    """In the order in which they go."""
    skipped: int = 0
    """Due saves that gave way to newer ones, in this launch, as far as events tell."""
    bytes_per_sec: float | None = None
    """Of what this node sends now, or of its last commit."""
    error: TieredError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen at one time."""

    at: float
    """UTC seconds."""
    pids: tuple[int, ...]
    """Of the trainers that are alive on this node; 0 for one that has just begun."""
    drainer: int | None
    """Its pid; None: none is alive."""
    heard: Heard
    tiers: tuple[Seen, ...]
    """In recipe order."""

    @property
    def step(self) -> int | None:
        """How far the training is, as far as is known."""
        newest = [tier.newest for tier in self.tiers if tier.newest is not None]
        return self.heard.step if self.heard.step is not None else max(newest, default=None)

    def behind(self, tier: Seen) -> int | None:
        """By how many steps *tier* is behind the training."""
        return None if self.step is None or tier.newest is None else max(0, self.step - tier.newest)


@dataclass(slots=True)
class Watcher:
    """Looks again and again; `close` when done."""

    settings: Settings
    _memory: Tier | None = None
    _tail: EventTail | None = None
    _seen: Survey | None = None
    _surveyed_at: float = 0.0
    _sent: dict[str, tuple[float, int]] = field(default_factory=dict[str, tuple[float, int]])
    """By tier: when so many bytes were there, of all that this watcher has seen go."""

    def __post_init__(self) -> None:
        memory = self.settings.memory
        if memory is not None:
            self._memory = open_for_looking(memory, self.settings.namespace)
            self._tail = EventTail(self._memory)

    def look(self) -> Look:
        """Look at everything once; what can't be read is told with its tier."""
        seen = self._survey()
        heard, trouble = self._hear()
        queued = self._queued()
        tiers = [self._tier(view, heard, queued) for view in seen.tiers]
        if trouble is not None and tiers and tiers[0].error is None:
            tiers[0] = replace(tiers[0], error=trouble)
        pids, drainer = self._alive()
        return Look(at=time.time(), pids=pids, drainer=drainer, heard=heard, tiers=tuple(tiers))

    def close(self) -> None:
        """Close the tiers."""
        if self._seen is not None:
            self._seen.close()
        if self._memory is not None:
            self._memory.close()

    def _survey(self) -> Survey:
        now = time.monotonic()
        if self._seen is None or now - self._surveyed_at >= _SURVEY_SECS:
            if self._seen is not None:
                self._seen.close()
            self._seen, self._surveyed_at = survey(self.settings, newest=3), now
        return self._seen

    def _hear(self) -> tuple[Heard, TieredError | None]:
        if self._tail is None:
            return Heard(), None
        try:
            return self._tail.look(), None
        except TierError as error:
            return self._tail.heard, error

    # ---- one tier

    def _tier(self, view: TierView, heard: Heard, queued: list[Entry]) -> Seen:
        name = view.settings.name
        complete = [each for each in view.views if each.problem is None]
        candidates = [(each.checkpoint.step, each.saved_at) for each in complete[:1]]
        commit = heard.commits.get(name)
        told = self._told(name, heard, commit)
        newest = max([*candidates, *told], key=lambda pair: pair[1] or 0.0, default=(None, None))
        on_its_way, done = self._on_its_way([entry for entry in queued if entry.tier == name])
        return Seen(
            settings=view.settings,
            newest=newest[0],
            saved_at=newest[1],
            on_its_way=on_its_way,
            skipped=heard.skipped.get(name, 0),
            bytes_per_sec=self._speed(name, done) or _of_last(commit),
            error=view.error,
        )

    def _told(self, name: str, heard: Heard, commit: Commit | None) -> list[tuple[int, float | None]]:
        """Steps that events tell of, with the time at which their state was copied."""
        memory = self.settings.memory
        if memory is not None and name == memory.name:
            return [heard.saved] if heard.saved is not None else []
        return [(commit.step, commit.time - commit.secs)] if commit is not None else []

    def _queued(self) -> list[Entry]:
        if self._memory is None:
            return []
        try:
            return Queue(self._memory).entries()
        except TierError:
            return []  # what is wrong with this tier is told where its events are read

    def _on_its_way(self, entries: list[Entry]) -> tuple[tuple[OnItsWay, ...], int]:
        """What is queued for one tier, by checkpoint, and how many bytes of it are there."""
        if self._memory is None or not entries:
            return (), 0
        sending = read_sending(self._memory, entries[0].tier)
        found: list[OnItsWay] = []
        for checkpoint in sorted({entry.checkpoint for entry in entries}):
            shares = [entry for entry in entries if entry.checkpoint == checkpoint]
            sizes = [self._share_bytes(checkpoint, entry.rank) for entry in shares]
            done = sum(_sent_of(entry, size, sending) for entry, size in zip(shares, sizes, strict=True))
            found.append(OnItsWay(step=checkpoint.step, done=done, total=sum(sizes)))
        return tuple(found), found[0].done

    def _share_bytes(self, checkpoint: CheckpointId, rank: int) -> int:
        if self._memory is None:
            return 0
        try:
            data = self._memory.get(layout.in_dir(checkpoint, layout.record_name(rank)), max_bytes=MAX_BYTES).data
            return sum(part.size for part in record_from_json(data).parts if not part.replica)
        except (KeyNotFoundError, FormatError, TierError):
            return 0

    def _speed(self, tier: str, done: int) -> float | None:
        """Bytes a second since the last look, of one and the same checkpoint."""
        now = time.monotonic()
        before, self._sent[tier] = self._sent.get(tier), (now, done)
        if before is None or done <= before[1] or now <= before[0]:
            return None
        return (done - before[1]) / (now - before[0])

    # ---- who is alive

    def _alive(self) -> tuple[tuple[int, ...], int | None]:
        memory = self.settings.memory
        if memory is None:
            return (), None
        locks = Path(memory.path) / self.settings.namespace / layout.LOCKS
        try:
            names = sorted(os.listdir(locks))
            holders = [probe(locks / name) for name in names if _TRAINER.fullmatch(name)]
            drainer = probe(locks / "drainer")
        except OSError:
            return (), None
        return tuple(h.pid or 0 for h in holders if h is not None), None if drainer is None else drainer.pid


def _sent_of(entry: Entry, size: int, sending: Sending | None) -> int:
    if entry.sent:
        return size
    here = sending is not None and (sending.checkpoint, sending.rank, sending.tier) == (
        entry.checkpoint,
        entry.rank,
        entry.tier,
    )
    return min(size, sending.bytes) if here and sending is not None else 0


def _of_last(commit: Commit | None) -> float | None:
    return commit.bytes / commit.secs if commit is not None and commit.secs > 0 and commit.bytes else None
