"""What ``sm-tiered promote`` says: what it found, where it brought that, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sm_tiered.cli.moving import Moved
from sm_tiered.cli.output import rate, size, text
from sm_tiered.errors import error_to_json
from sm_tiered.records import CheckpointId
from sm_tiered.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Found", "Outcome", "blocks", "document"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is to be promoted, and where from."""

    checkpoint: CheckpointId
    source: str
    """A tier."""
    records: Mapping[int, bytes]
    """Those that are there, by rank."""
    missing: tuple[int, ...] = ()
    """Ranks whose share is in the memory of other nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it."""

    found: Found
    target: str
    moved: Moved
    how: str
    """``drainer``, ``copy``, or ``nothing`` where it stood there already."""
    pinned: bool


def blocks(outcome: Outcome) -> list[RenderableType]:
    """Return it for people."""
    moved, found = outcome.moved, outcome.found
    which = f"step {found.checkpoint.step} of a{found.checkpoint.attempt.ordinal}"
    if moved.copied is None:
        return [text(f"{which} is not on {outcome.target}", "bold red")]
    pinned = ", pinned" if outcome.pinned else ""
    if outcome.how == "nothing":
        return [text(f"{which} is on {outcome.target} already, committed{pinned}", "green")]
    by = f"from {found.source}, by the drainer" if outcome.how == "drainer" else f"copied from {found.source}"
    speed = rate(moved.copied.bytes, moved.secs)
    figures = f"{size(moved.copied.bytes)} in {moved.secs:.1f} s" + (f" ({speed})" if speed else "")
    return [text(f"{which} is committed on {outcome.target}{pinned}: {by}, {figures}", "green")]


def document(settings: Settings, outcome: Outcome) -> dict[str, object]:
    """Return it for programs."""
    moved, found = outcome.moved, outcome.found
    return {
        "version": 1,
        "namespace": settings.namespace,
        "step": found.checkpoint.step,
        "attempt": str(found.checkpoint.attempt),
        "from": found.source,
        "to": outcome.target,
        "by": outcome.how,
        "ok": moved.error is None,
        "pinned": outcome.pinned,
        "ranks": sorted(found.records),
        "ranks_elsewhere": list(found.missing),
        "bytes": moved.copied.bytes if moved.copied else 0,
        "secs": round(moved.secs, 3),
        "error": None if moved.error is None else error_to_json(moved.error),
    }
