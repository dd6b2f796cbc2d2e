"""Checkpoints moved by this very process, for `copy` and `promote`: the outcome of each, told and counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK
from sm_tiered.cli.ls import attempt_names
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.output import rate, size, table, text
from sm_tiered.commit import Compose
from sm_tiered.errors import CorruptPartError, FormatError, TieredError, error_to_json
from sm_tiered.finish import finisher
from sm_tiered.records import CheckpointId
from sm_tiered.settings import HyperPodSettings, MemorySettings, TierSettings
from sm_tiered.transfer import Copied, Progress

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["FINISHER", "Moved", "composer", "move", "moved_json", "moved_table", "status_of"]

FINISHER = "sm_tiered_dcp.finisher"
"""The module of this distribution that makes the files for other readers where a job has not made them yet."""


def composer(source: TierSettings) -> Compose | None:
    """Return what makes the files for other readers; None where the tier *source* has them with each checkpoint."""
    return finisher(FINISHER) if isinstance(source, (MemorySettings, HyperPodSettings)) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What came of one checkpoint."""

    checkpoint: CheckpointId
    copied: Copied | None
    error: TieredError | None
    secs: float

    @property
    def state(self) -> str:
        """That in a few words."""
        if self.copied is None:
            return "failed" if self.error is None else self.error.message
        if self.copied.already:
            return "there already"
        found = f", {size(self.copied.found)} were there from an earlier try" if self.copied.found else ""
        return f"copied, verified, committed{found}"


def move(checkpoint: CheckpointId, work: Callable[[Progress], Copied], meter: Meter, label: str) -> Moved:
    """Do *work*, which moves *checkpoint*; what can't be used is an outcome, an interrupt is not."""
    began = time.monotonic()
    meter.begin(label)
    copied: Copied | None = None
    failure: TieredError | None = None
    try:
        copied = work(meter.tell)
    except TieredError as error:
        failure = error
    finally:
        meter.end()
    made = Moved(checkpoint=checkpoint, copied=copied, error=failure, secs=time.monotonic() - began)
    speed = rate(copied.bytes, made.secs) if copied else ""
    meter.note(f"{label}: {made.state}" + (f", {size(copied.bytes)}, {speed}" if copied and speed else ""))
    return made


def moved_table(moved: Sequence[Moved]) -> RenderableType:
    """Return what came of each, for people."""
    names = attempt_names(each.checkpoint.attempt for each in moved)
    rows = table("step", "attempt", "sent", "rate", "state", right=("step", "sent", "rate"))
    for each in moved:
        sent = each.copied.bytes if each.copied else 0
        rows.add_row(
            text(each.checkpoint.step),
            text(names[each.checkpoint.attempt]),
            text(size(sent) if sent else ""),
            text(rate(sent, each.secs)),
            text(each.state, "red" if each.error else "green"),
        )
    return rows


def moved_json(each: Moved) -> dict[str, object]:
    """Return what came of it, for programs."""
    copied = each.copied
    return {
        "step": each.checkpoint.step,
        "attempt": str(each.checkpoint.attempt),
        "ok": each.error is None,
        "already": bool(copied and copied.already),
        "bytes_sent": copied.bytes if copied else 0,
        "bytes_found": copied.found if copied else 0,
        "secs": round(each.secs, 3),
        "error": None if each.error is None else error_to_json(each.error),
    }


def status_of(moved: Sequence[Moved]) -> int:
    """Return the exit status: 3 where something was damaged, 1 where something failed."""
    if any(isinstance(each.error, (CorruptPartError, FormatError)) for each in moved):
        return EXIT_CORRUPT
    return EXIT_FAILED if any(each.error for each in moved) else EXIT_OK
