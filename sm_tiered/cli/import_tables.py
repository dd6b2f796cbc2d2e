"""What ``sm-tiered import`` says: what it took, what it refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK
from sm_tiered.cli.output import size, table, text
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, FormatError, TieredError, error_to_json

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Outcome", "blocks", "document", "status_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one step."""

    listed: Any
    """A `sm_tiered_dcp.predecessor.Listed`."""
    imported: Any
    """A `sm_tiered_dcp.predecessor.Imported`; None: it was refused."""
    error: TieredError | None
    secs: float

    def state(self, *, dry_run: bool) -> str:
        """That in a few words."""
        if self.imported is None:
            return "refused" if self.error is None else self.error.message
        if dry_run:
            return "complete: it would be imported"
        return "there already" if self.imported.already else "imported, read back, committed"


def blocks(
    outcomes: Sequence[Outcome], notes: Sequence[str], *, source: str, target: str, dry_run: bool
) -> list[RenderableType]:
    """Return it for people."""
    rows = table("step", "ranks", "values", "size", "state", right=("step", "ranks", "values", "size"))
    for each in outcomes:
        found = each.imported
        rows.add_row(
            text(each.listed.step),
            text(found.world if found else ""),
            text(found.tensors + found.values if found else ""),
            text(size(found.bytes) if found else ""),
            text(each.state(dry_run=dry_run), "red" if each.error else "green"),
        )
    good = [each for each in outcomes if each.error is None]
    if dry_run:
        line = f"{len(good)} of {len(outcomes)} from {source} can be imported to {target}; nothing was written"
    else:
        line = f"{len(good)} of {len(outcomes)} from {source} are on {target}"
    style = "green" if good and len(good) == len(outcomes) else "yellow" if good else "bold red"
    return [rows, text(""), *(text(note, "yellow") for note in notes), text(line, style)]


def document(
    outcomes: Sequence[Outcome], notes: Sequence[str], *, namespace: str, dry_run: bool, **facts: str
) -> dict[str, object]:
    """Return it for programs."""
    return {
        "version": 1,
        **facts,
        "namespace": namespace,
        "dry_run": dry_run,
        "ok": status_of(outcomes) == EXIT_OK,
        "notes": list(notes),
        "checkpoints": [_fields(each) for each in outcomes],
    }


def _fields(each: Outcome) -> dict[str, object]:
    found = each.imported
    return {
        "step": each.listed.step,
        "attempt": str(found.checkpoint.attempt) if found else None,
        "ok": each.error is None,
        "already": bool(found and found.already),
        "ranks": found.world if found else None,
        "tensors": found.tensors if found else None,
        "values": found.values if found else None,
        "bytes": found.bytes if found else None,
        "secs": round(each.secs, 3),
        "error": None if each.error is None else error_to_json(each.error),
    }


def status_of(outcomes: Sequence[Outcome]) -> int:
    """Return the exit status: 3 where something was damaged, 1 where something else was refused.

    A save that never ended is no failure of ours, where something else was taken.
    """
    errors = [each.error for each in outcomes if each.error is not None]
    if any(isinstance(error, (CorruptPartError, FormatError)) for error in errors):
        return EXIT_CORRUPT
    left = [error for error in errors if not isinstance(error, CheckpointNotFoundError)]
    return EXIT_FAILED if left or len(errors) == len(outcomes) else EXIT_OK
