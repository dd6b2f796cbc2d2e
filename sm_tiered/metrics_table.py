"""What the metrics are: one table of instruments, what feeds them and what they mean. Pure; nothing here records.

`sm_tiered.metrics` makes OpenTelemetry instruments of it, and the README shows it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sm_tiered.events import (
    CandidateRefused,
    Committed,
    CopyRefused,
    Event,
    Progress,
    PromoteFailed,
    Restored,
    SaveAcknowledged,
    SaveDurable,
    SaveFailed,
    SaveSkipped,
    SaveStaged,
    SaveStreamed,
    TierUnreachable,
)

__all__ = [
    "FED",
    "INSTRUMENTS",
    "NAMESPACE",
    "RANK",
    "TIER",
    "Instrument",
    "Measurement",
    "Source",
    "markdown",
    "measurements",
]

NAMESPACE = "sm_tiered.namespace"
RANK = "sm_tiered.rank"
TIER = "sm_tiered.tier"
_MEMORY = "memory"

Kind = Literal["histogram", "counter", "gauge"]
By = Literal["each rank", "rank 0", "drainer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An event that feeds an instrument."""

    event: type[Event]
    value: str | None = None
    """The event's field that is recorded; None: the event is counted."""
    tier: str | None = None
    """What the tier's name is where the event does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Instrument:
    """One row of the table."""

    name: str
    kind: Kind
    unit: str
    """In UCUM."""
    by: By
    """Who records it. What all ranks know alike is recorded by rank 0 alone, so that sums over ranks are right."""
    meaning: str
    sources: tuple[Source, ...]
    tiers: bool = False
    """Whether each tier has a series of its own."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes of its series: as many as there are ranks and tiers, and never one a step."""
        return (NAMESPACE, *((RANK,) if self.by == "each rank" else ()), *((TIER,) if self.tiers else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One value for one instrument."""

    instrument: Instrument
    value: float
    tier: str | None = None


INSTRUMENTS: tuple[Instrument, ...] = (
    Instrument(
        name="sm_tiered.save.blocked.duration",
        kind="histogram",
        unit="s",
        by="each rank",
        meaning="How long a save held up the training",
        sources=(Source(event=SaveStaged, value="blocked_secs"),),
    ),
    Instrument(
        name="sm_tiered.save.acknowledged.duration",
        kind="histogram",
        unit="s",
        by="each rank",
        meaning="From the end of the copy until the save is acknowledged in memory",
        sources=(Source(event=SaveAcknowledged, value="secs"),),
    ),
    Instrument(
        name="sm_tiered.save.size",
        kind="histogram",
        unit="By",
        by="each rank",
        meaning="Bytes of one rank's share of a save",
        sources=(Source(event=SaveStaged, value="bytes"),),
    ),
    Instrument(
        name="sm_tiered.save.skipped",
        kind="counter",
        unit="{save}",
        by="rank 0",
        tiers=True,
        meaning="Due saves that were left out on a tier",
        sources=(Source(event=SaveSkipped),),
    ),
    Instrument(
        name="sm_tiered.save.failed",
        kind="counter",
        unit="{failure}",
        by="each rank",
        tiers=True,
        meaning="Failures of saves as ranks report them; one lost save may be several",
        sources=(Source(event=SaveFailed),),
    ),
    Instrument(
        name="sm_tiered.save.streamed.duration",
        kind="histogram",
        unit="s",
        by="each rank",
        tiers=True,
        meaning="How long the trainer itself wrote to a durable tier, because memory could not be used",
        sources=(Source(event=SaveStreamed, value="secs"),),
    ),
    Instrument(
        name="sm_tiered.training.step",
        kind="gauge",
        unit="{step}",
        by="rank 0",
        meaning="How far the training is",
        sources=(Source(event=Progress, value="step"), Source(event=SaveStaged, value="step")),
    ),
    Instrument(
        name="sm_tiered.checkpoint.step",
        kind="gauge",
        unit="{step}",
        by="rank 0",
        tiers=True,
        meaning="The step of the newest save that is complete on a tier (`memory`, or a durable one), as rank 0 knows",
        sources=(
            Source(event=SaveAcknowledged, value="step", tier=_MEMORY),
            Source(event=SaveDurable, value="step"),
        ),
    ),
    Instrument(
        name="sm_tiered.drain.duration",
        kind="histogram",
        unit="s",
        by="rank 0",
        tiers=True,
        meaning="From the begin of a save until rank 0 sees it on a durable tier, at its next save or wait",
        sources=(Source(event=SaveDurable, value="secs"),),
    ),
    Instrument(
        name="sm_tiered.drain.lag",
        kind="histogram",
        unit="{step}",
        by="rank 0",
        tiers=True,
        meaning="How many steps the newest save was beyond one that rank 0 sees become durable",
        sources=(Source(event=SaveDurable, value="lag_steps"),),
    ),
    Instrument(
        name="sm_tiered.commit.duration",
        kind="histogram",
        unit="s",
        by="drainer",
        tiers=True,
        meaning="From the begin of a promotion until its commit",
        sources=(Source(event=Committed, value="secs"),),
    ),
    Instrument(
        name="sm_tiered.commit.size",
        kind="histogram",
        unit="By",
        by="drainer",
        tiers=True,
        meaning="Bytes that one node's drainer sent for a commit",
        sources=(Source(event=Committed, value="bytes"),),
    ),
    Instrument(
        name="sm_tiered.commit.failed",
        kind="counter",
        unit="{failure}",
        by="drainer",
        tiers=True,
        meaning="Failures of promotions and of pruning; the ranks count those of saves too",
        sources=(Source(event=PromoteFailed),),
    ),
    Instrument(
        name="sm_tiered.restore.duration",
        kind="histogram",
        unit="s",
        by="each rank",
        tiers=True,
        meaning="How long a restore took, by the tier that it came from",
        sources=(Source(event=Restored, value="secs"),),
    ),
    Instrument(
        name="sm_tiered.restore.size",
        kind="histogram",
        unit="By",
        by="each rank",
        tiers=True,
        meaning="Bytes that a rank read for a restore",
        sources=(Source(event=Restored, value="bytes"),),
    ),
    Instrument(
        name="sm_tiered.restore.refused",
        kind="counter",
        unit="{checkpoint}",
        by="rank 0",
        meaning="Newer checkpoints that a restore passed over",
        sources=(Source(event=CandidateRefused),),
    ),
    Instrument(
        name="sm_tiered.restore.fallback",
        kind="counter",
        unit="{restore}",
        by="each rank",
        meaning="Restores for which the nearest copy was missing or damaged, and another was used",
        sources=(Source(event=CopyRefused),),
    ),
    Instrument(
        name="sm_tiered.tier.unreachable",
        kind="counter",
        unit="{failure}",
        by="each rank",
        tiers=True,
        meaning="Times that a tier did not answer",
        sources=(Source(event=TierUnreachable),),
    ),
)

FED: dict[type[Event], tuple[tuple[Instrument, Source], ...]] = {
    event: tuple((row, source) for row in INSTRUMENTS for source in row.sources if source.event is event)
    for event in {source.event for row in INSTRUMENTS for source in row.sources}
}
"""What each event feeds; no other event matters here."""


def measurements(event: Event, *, rank: int | None) -> list[Measurement]:
    """Return what *event*, told by *rank* (None: by the drainer), is for the instruments. Pure."""
    found: list[Measurement] = []
    for row, source in FED.get(type(event), ()):
        if not _is_theirs(row.by, rank):
            continue
        value: object = 1 if source.value is None else getattr(event, source.value)
        if isinstance(value, (int, float)) and math.isfinite(value):
            tier: object = (source.tier or getattr(event, "tier", None)) if row.tiers else None
            found.append(Measurement(instrument=row, value=value, tier=str(tier) if tier is not None else None))
    return found


def _is_theirs(by: By, rank: int | None) -> bool:
    """Whether *rank* (None: the drainer) is who records."""
    return {"each rank": rank is not None, "rank 0": rank == 0, "drainer": rank is None}[by]


def markdown() -> str:
    """Return the table for the README; of the attributes, those besides the namespace, without their prefix."""
    lines = ["| metric | kind | unit | recorded by | for each | means |", "|---|---|---|---|---|---|"]
    for row in INSTRUMENTS:
        series = ", ".join(name.rpartition(".")[2] for name in row.attributes[1:])
        lines.append(f"| `{row.name}` | {row.kind} | `{row.unit}` | {row.by} | {series} | {row.meaning} |")
    return "\n".join(lines) + "\n"
