"""What a running job has told since the last look: the new lines of its event files on this node."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError, KeyNotFoundError
from sm_tiered.event_files import telling
from sm_tiered.event_reading import Piece, Told, merge
from sm_tiered.tiers.base import Entry, Tier

__all__ = ["Commit", "EventTail", "Heard"]

_FIRST_BYTES = 1024 * 1024
"""Of each file so much is read at the first look: its end."""
_RATE_SECS = 60.0
"""The speed of the training is that of so many seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The newest commit on a durable tier that was told of here."""

    step: int
    time: float
    """UTC seconds."""
    secs: float
    """From the begin of the promotion."""
    bytes: int
    """That this node brought there."""


@dataclass(slots=True, kw_only=True)
class Heard:
    """What the events of one namespace say. Times are UTC seconds by this node's clock."""

    step: int | None = None
    """The newest step of the training that anything tells of."""
    step_time: float = 0.0
    launch: str = ""
    """Whose events these are: those of the newest launch."""
    saved: tuple[int, float] | None = None
    """Step and time of the newest save that was acknowledged in memory."""
    blocked_secs: float | None = None
    """Of the last save."""
    commits: dict[str, Commit] = field(default_factory=dict[str, Commit])
    skipped: dict[str, int] = field(default_factory=dict[str, int])
    """By durable tier: due saves that gave way to newer ones."""
    trouble: tuple[float, str] | None = None
    """Time and words of the last thing that went wrong."""
    ended: str | None = None
    """How the training let go; None: it has not."""
    _steps: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    @property
    def steps_per_sec(self) -> float | None:
        """Of the last minute; None where too little was told."""
        if len(self._steps) < 2:
            return None
        (begin, first), (end, last) = self._steps[0], self._steps[-1]
        return (last - first) / (end - begin) if end > begin and last > first else None

    def take(self, told: Told) -> None:
        """Take in one event; of another launch than the present one, what it says of the training is forgotten."""
        if told.rank is not None and told.launch != self.launch:
            self.launch, self.step, self.ended, self._steps = told.launch, None, None, []
        facts = told.facts
        step = _int(facts.get("step"))
        tier = str(facts.get("tier", ""))
        if told.rank is not None and step is not None and told.kind in _OF_TRAINING:
            self._progress(told.time, step)
        if told.kind == "SaveAcknowledged" and step is not None:
            self.saved = max(self.saved or (step, told.time), (step, told.time), key=lambda pair: pair[1])
        elif told.kind == "SaveStaged":
            self.blocked_secs = _float(facts.get("blocked_secs"))
        elif told.kind == "Committed" and step is not None:
            secs, size = _float(facts.get("secs")) or 0.0, _int(facts.get("bytes")) or 0
            self.commits[tier] = Commit(step=step, time=told.time, secs=secs, bytes=size)
        elif told.kind == "DurableSkipped":
            self.skipped[tier] = self.skipped.get(tier, 0) + 1
        elif told.kind == "TrainingEnded":
            self.ended = str(facts.get("how", "ended"))
        elif told.kind in _TROUBLE:
            reason = facts.get("error") or facts.get("reason") or ""
            self.trouble = (told.time, f"{told.kind} of step {step}: {reason}")

    def _progress(self, when: float, step: int) -> None:
        if self.step is None or step > self.step:
            self.step, self.step_time = step, when
            self._steps.append((when, step))
            self._steps = [pair for pair in self._steps if when - pair[0] <= _RATE_SECS]
        self.ended = None


_OF_TRAINING = frozenset({"Progress", "SaveStaged", "SaveAcknowledged", "SaveSkipped", "Preempted", "SaveRequested"})
_TROUBLE = frozenset({"SaveFailed", "PromoteFailed", "SaveSkipped", "SaveStreamed", "TierUnreachable"})


class EventTail:
    """Reads the event files of *memory* on and on. Lines that are no events, and half lines, are passed over."""

    def __init__(self, memory: Tier) -> None:
        self._memory = memory
        self._offsets: dict[str, int] = {}
        self.heard = Heard()

    def look(self) -> Heard:
        """Read what is new.

        Raises:
            TierError: the files can't be read.
        """
        pieces = [
            piece
            for entry, file in telling(self._memory.list(f"{layout.EVENTS}/"))
            if (piece := self._new(entry, file)) is not None
        ]
        for told in merge(pieces).events:
            self.heard.take(told)
        return self.heard

    def _new(self, entry: Entry, file: layout.EventFile) -> Piece | None:
        first = entry.key not in self._offsets
        start = max(0, entry.size - _FIRST_BYTES) if first else self._offsets[entry.key]
        if start > entry.size:
            start = 0  # what stood there was put aside, and this is a new file
        buffer = bytearray(entry.size - start)
        try:
            self._memory.read_into(entry.key, start, memoryview(buffer))
        except (KeyNotFoundError, CorruptPartError):
            return None  # put aside since; it is found under its new name
        end = buffer.rfind(b"\n") + 1
        self._offsets[entry.key] = start + end
        # From within a file the first line may be a half one; `merge` passes it over.
        return Piece(where=entry.key, file=file, data=bytes(buffer[:end])) if end else None


def age_of(when: float) -> float:
    """Return how long ago that was, in seconds, at least 0."""
    return max(0.0, time.time() - when)


def facts_of(heard: Heard) -> Mapping[str, object]:
    """Return what was heard of the training, for programs."""
    return {
        "step": heard.step,
        "told_secs_ago": None if heard.step is None else round(age_of(heard.step_time), 3),
        "steps_per_sec": heard.steps_per_sec,
        "blocked_secs": heard.blocked_secs,
        "ended": heard.ended,
        "trouble": None if heard.trouble is None else {"time": heard.trouble[0], "text": heard.trouble[1]},
    }


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _float(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
