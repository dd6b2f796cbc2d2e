"""What ``sm-tiered import`` says: what it took, what it refused, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK
from sm_tiered.cli.output import size, table, text
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, FormatError, TieredError, error_to_json
from sm_tiered.records import CheckpointId

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Found", "Listed", "Tried", "blocks", "document", "status_of"]


class Listed(Protocol):
    """A step as the importer lists it: `sm_tiered_dcp.predecessor.Listed`."""

    @property
    def step(self) -> int:
        """Its number."""
        ...

    @property
    def name(self) -> str:
        """Which of the copies of that step it is."""
        ...


class Found(Protocol):
    """What the importer made of a step: `sm_tiered_dcp.predecessor.Imported`."""

    @property
    def checkpoint(self) -> CheckpointId:
        """What it is called among ours."""
        ...

    @property
    def world(self) -> int:
        """How many ranks had saved it."""
        ...

    @property
    def tensors(self) -> int:
        """How many."""
        ...

    @property
    def values(self) -> int:
        """How many others."""
        ...

    @property
    def bytes(self) -> int:
        """As we store it."""
        ...

    @property
    def already(self) -> bool:
        """Whether it was there."""
        ...

    @property
    def pickled(self) -> tuple[str, ...]:
        """Names of values that only a pickle can load."""
        ...

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why it may be of two saves, a sentence each."""
        ...

    @property
    def compared(self) -> int:
        """How many of both were compared with a checksum that their save left."""
        ...

    @property
    def bare(self) -> int:
        """How many have none."""
        ...

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Their names."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One step that was tried."""

    listed: Listed
    found: Found | None
    """None: it was refused."""
    error: TieredError | None
    secs: float

    def state(self, *, dry_run: bool) -> str:
        """What came of it, in a few words."""
        if isinstance(self.error, CheckpointNotFoundError):
            return "its save never ended"
        if self.found is None:
            return "damaged" if isinstance(self.error, (CorruptPartError, FormatError)) else "refused"
        if self.found.already:
            return "there already"
        told = "metadata and sizes are complete; contents were not read"
        return told if dry_run else "imported, read back, committed"


def blocks(
    tries: Sequence[Tried], notes: Sequence[str], *, source: str, target: str, dry_run: bool
) -> list[RenderableType]:
    """Return it for people."""
    rows = table("step", "place", "ranks", "values", "size", "state", right=("step", "ranks", "values", "size"))
    for each in tries:
        found = each.found
        rows.add_row(
            text(each.listed.step),
            text(each.listed.name),
            text(found.world if found else ""),
            text(found.tensors + found.values if found else ""),
            text(size(found.bytes) if found else ""),
            text(each.state(dry_run=dry_run), _style(each)),
        )
    said = [text(_why(each, each.error), _style(each)) for each in tries if each.error is not None]
    good = [each for each in tries if each.error is None]
    if not dry_run:
        said += [text(_checked(each.found), "yellow" if each.found.bare else "") for each in good if each.found]
    if dry_run:
        line = f"{len(good)} of {len(tries)} from {source} can be imported to {target}; nothing was written"
    else:
        line = f"{len(good)} of {len(tries)} from {source} are on {target}"
    style = "green" if good and len(good) == len(tries) else "yellow" if good else "bold red"
    return [rows, text(""), *said, *(text(note, "yellow") for note in notes), text(line, style)]


def _style(each: Tried) -> str:
    return "green" if each.error is None else "yellow" if isinstance(each.error, CheckpointNotFoundError) else "red"


def _checked(found: Found) -> str:
    """What was compared with what: who reads "imported" would else take all of it for verified."""
    step, total = f"step {found.checkpoint.step}", found.tensors + found.values
    if found.already:
        return f"{step}: what is there was compared with our own digests; what it came from was not read again"
    earlier = total - found.compared - found.bare
    told = f"{step}: {found.compared} of {total} values were compared with checksums that their save left"
    if found.bare:
        names = ", ".join(found.unchecked[:8]) + (", …" if len(found.unchecked) > 8 else "")
        told += f"; {found.bare} have none, so nothing tells whether they are damaged: {names}"
    return told + (f"; {earlier} had been brought by an earlier try" if earlier else "")


def _why(each: Tried, error: TieredError) -> str:
    return f"step {each.listed.step}: {error.message}" + (f". {error.hint}" if error.hint else "")


def document(
    tries: Sequence[Tried], notes: Sequence[str], *, namespace: str, dry_run: bool, **facts: str
) -> dict[str, object]:
    """Return it for programs."""
    return {
        "version": 1,
        **facts,
        "namespace": namespace,
        "dry_run": dry_run,
        "ok": status_of(tries) == EXIT_OK,
        "notes": list(notes),
        "checkpoints": [_fields(each) for each in tries],
    }


def _fields(each: Tried) -> dict[str, object]:
    found = each.found
    return {
        "step": each.listed.step,
        "place": each.listed.name,
        "attempt": str(found.checkpoint.attempt) if found else None,
        "ok": each.error is None,
        "already": bool(found and found.already),
        "ranks": found.world if found else None,
        "tensors": found.tensors if found else None,
        "values": found.values if found else None,
        "bytes": found.bytes if found else None,
        "pickled": list(found.pickled) if found else [],
        "compared": found.compared if found else None,
        "unchecked": list(found.unchecked) if found else [],
        "secs": round(each.secs, 3),
        "error": None if each.error is None else error_to_json(each.error),
    }


def status_of(tries: Sequence[Tried]) -> int:
    """Return the exit status: 3 where something was damaged, 1 where something else was refused.

    A save that never ended is no failure of ours, where something else was taken.
    """
    errors = [each.error for each in tries if each.error is not None]
    if any(isinstance(error, (CorruptPartError, FormatError)) for error in errors):
        return EXIT_CORRUPT
    left = [error for error in errors if not isinstance(error, CheckpointNotFoundError)]
    return EXIT_FAILED if left or len(errors) == len(tries) else EXIT_OK
