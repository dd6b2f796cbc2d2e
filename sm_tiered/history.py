"""What policies may know of the past: failures, what saves cost, and how good what was saved is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from sm_tiered.errors import FormatError, TierError
from sm_tiered.event_log import Events
from sm_tiered.events import TierUnreachable
from sm_tiered.inventory import read_manifest, read_records
from sm_tiered.manifest import record_from_json
from sm_tiered.records import AttemptRecord, CheckpointId
from sm_tiered.resolve import Survey, Tiers
from sm_tiered.tiers.base import Tier

__all__ = ["Extremes", "History", "TypicalCost", "count_failures", "extremes_of"]

_COSTS_KEPT = 8
_CHECKPOINTS_ASKED = 200


@dataclass(slots=True)
class TypicalCost:
    """How long a save blocks training: the median of the last ones, without the first, which plans and maps pages."""

    _secs: deque[float] = field(default_factory=lambda: deque[float](maxlen=_COSTS_KEPT))
    _only_first: bool = True

    def take(self, secs: float) -> None:
        """Note one save, in seconds."""
        if self._only_first and self._secs:
            self._secs.clear()
            self._only_first = False
        self._secs.append(secs)

    @property
    def secs(self) -> float | None:
        """In seconds; None before any save."""
        return median(self._secs) if self._secs else None


@dataclass(slots=True)
class Extremes:
    """The lowest and the highest value of each metric; NaN and infinity count as not given."""

    found: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])

    def take(self, metrics: Mapping[str, float]) -> None:
        """Note the metrics of one checkpoint."""
        for name, value in metrics.items():
            if math.isfinite(value):
                lowest, highest = self.found.get(name, (value, value))
                self.found[name] = (min(lowest, value), max(highest, value))


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What went before in a namespace."""

    began_at: float | None = None
    """When its first attempt began, in UTC seconds; None: this one is the first."""
    failures: Mapping[str, int] = field(default_factory=dict[str, int])
    """By tier: failures that it is there for."""
    extremes: Mapping[str, Extremes] = field(default_factory=dict[str, Extremes])
    """By tier: of the checkpoints that are there, as far as they were asked for."""

    def observed_secs(self, now: float) -> float:
        """Return for how long failures have been counted; a clock that went back counts as no time."""
        return 0.0 if self.began_at is None else max(0.0, now - self.began_at)


def count_failures(attempts: Iterable[AttemptRecord], *, memory: str | None, durable: Iterable[str]) -> dict[str, int]:
    """Return by tier how many of *attempts* began after a failure that the tier is there for.

    An attempt that goes on from a step nobody chose counts for the memory tier, since processes were gone; for the
    durable tiers only where something had to be read from one.
    """
    restarts = [attempt for attempt in attempts if attempt.parent is not None and not attempt.chosen]
    lost = sum(any(tier != memory for tier in (attempt.source or "").split("+") if tier) for attempt in restarts)
    found = dict.fromkeys(durable, lost)
    return found if memory is None else {memory: len(restarts), **found}


def extremes_of(tiers: Tiers, seen: Survey, restored: CheckpointId | None, *, events: Events) -> dict[str, Extremes]:
    """Return by tier the lowest and the highest metrics of the newest checkpoints that training goes on from.

    A tier that does not answer is left out, and that is told.
    """
    order = seen.candidates
    if restored in order:
        order = order[order.index(restored) :]
    near = {tiers.memory.name: tiers.memory} if tiers.memory is not None else {}
    found: dict[str, Extremes] = {}
    for name, tier in {**near, **tiers.durable}.items():
        extremes = Extremes()
        try:
            for checkpoint in [held for held in order if name in seen.found[held]][:_CHECKPOINTS_ASKED]:
                extremes.take(_metrics_of(tier, checkpoint, durable=name not in near))
            found[name] = extremes
        except TierError as error:
            events.emit(TierUnreachable(tier=name, error=error))
    return found


def _metrics_of(tier: Tier, checkpoint: CheckpointId, *, durable: bool) -> Mapping[str, float]:
    """None where it is not whole there."""
    try:
        if durable:
            manifest = read_manifest(tier, checkpoint)
            return {} if manifest is None or manifest.tombstone else manifest.metrics
        records = read_records(tier, checkpoint)
        return record_from_json(records[min(records)]).metrics if records else {}
    except FormatError:
        return {}
