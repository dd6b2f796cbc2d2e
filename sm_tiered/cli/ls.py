"""``sm-tiered ls``: what each tier holds, and which checkpoint a restore would take now."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, kind_of, location_of, open_recipe
from sm_tiered.cli.output import age, marker, metrics_text, print_json, render, size, table, text
from sm_tiered.cli.survey import Survey, TierView, View, survey
from sm_tiered.records import Attempt, CheckpointId

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["attempt_names", "error_json", "run", "tier_title"]


_SHOWN = 50


def run(recipe: str, *, every: bool = False, as_json: bool) -> int:
    """List *recipe*'s tiers, the newest 50 checkpoints of each or *every* one; return the exit status."""
    seen = survey(open_recipe(recipe), newest=None if every else _SHOWN)
    try:
        now = time.time()
        if as_json:
            print_json(_document(seen, now))
        else:
            render(*_blocks(seen, now))
    finally:
        seen.close()
    return EXIT_FAILED if any(tier.error is not None for tier in seen.tiers) else EXIT_OK


def attempt_names(attempts: Iterable[Attempt]) -> dict[Attempt, str]:
    """Return a short name for each attempt: its ordinal, with the random digits where two have the same."""
    every = set(attempts)
    times = Counter(attempt.ordinal for attempt in every)
    return {
        attempt: f"a{attempt.ordinal}" + (f"-{attempt.nonce}" if times[attempt.ordinal] > 1 else "")
        for attempt in every
    }


def tier_title(tier: TierView) -> RenderableType:
    """Return the line above what a tier holds."""
    from rich.text import Text

    name, kind = tier.settings.name, kind_of(tier.settings)
    line = Text.assemble(text(name, "bold"), "  ")
    if kind != name:
        line.append_text(text(f"{kind} ", "dim"))
    return line.append_text(text(location_of(tier.settings), "dim"))


def error_json(tier: TierView) -> dict[str, object] | None:
    """Return why a tier did not answer."""
    if tier.error is None:
        return None
    return {"kind": type(tier.error).__name__, "message": tier.error.message, "hint": tier.error.hint}


# ---- for people


def _blocks(seen: Survey, now: float) -> list[RenderableType]:
    names = attempt_names(view.checkpoint.attempt for tier in seen.tiers for view in tier.views)
    left_behind = seen.left_behind
    blocks: list[RenderableType] = []
    for tier in seen.tiers:
        blocks += [tier_title(tier), *_tier(seen, tier, names, left_behind, now), text("")]
    blocks.append(_verdict(seen))
    return blocks


def _tier(
    seen: Survey, tier: TierView, names: dict[Attempt, str], left_behind: Collection[CheckpointId], now: float
) -> list[RenderableType]:
    from rich.padding import Padding

    lines: list[RenderableType] = []
    if tier.views:
        rows = table("", "step", "attempt", "age", "size", "ranks", "state", right=("step", "age", "size", "ranks"))
        for view in tier.views:
            taken = view.checkpoint == seen.next and view.restorable
            rows.add_row(
                text(marker() if taken else "", "bold green"),
                text(view.checkpoint.step, "bold" if taken else ""),
                text(names[view.checkpoint.attempt]),
                text(age(None if view.saved_at is None else now - view.saved_at)),
                text(size(view.bytes)),
                text(_ranks(view)),
                _state(view, left_behind=view.checkpoint in left_behind),
            )
        lines += [rows, *(Padding(text(note, "dim"), (0, 0, 0, 2)) for note in _notes(seen, tier))]
    elif tier.error is None:
        lines.append(Padding(text("nothing", "dim"), (0, 0, 0, 2)))
    if tier.error is not None:
        lines.append(Padding(text(f"did not answer: {tier.error}", "red"), (0, 0, 0, 2)))
    return lines


def _notes(seen: Survey, tier: TierView) -> list[str]:
    notes = [f"… and {more:,} more: --all lists them"] if (more := _more(seen, tier)) else []
    if any(view.by_manifest for view in tier.views):
        notes.append("committed: told by the manifest alone; --all looks at the files too, `verify` at the bytes")
    return notes


def _more(seen: Survey, tier: TierView) -> int:
    """How many checkpoints there may be without a row; of some only a tombstone is left."""
    if seen.newest is None or len(tier.views) < seen.newest:
        return 0
    return len(set(tier.found) - {view.checkpoint for view in tier.views})


def _ranks(view: View) -> str:
    if view.world is None:
        return str(view.ranks) if view.ranks else "?"
    return str(view.world) if view.ranks == view.world else f"{view.ranks}/{view.world}"


def _state(view: View, *, left_behind: bool) -> RenderableType:
    from rich.text import Text

    right = "committed" if view.by_manifest else "complete"
    line = text(right, "green") if view.problem is None else text(view.problem, "yellow")
    facts = ["whole: a restore commits it"] if view.late else []
    facts += [word for word, known in (("left behind", left_behind), ("pinned", view.pinned)) if known]
    facts += [metrics_text(view.metrics)] if view.metrics else []
    return Text.assemble(line, *(text(f" · {fact}", "dim") for fact in facts))


def _verdict(seen: Survey) -> RenderableType:
    if seen.next is not None:
        where = [tier.settings.name for tier in seen.tiers if _complete(tier, seen)]
        without = f", without {', '.join(seen.skipped)}" if seen.skipped else ""
        line = f"{marker()} a restore takes step {seen.next.step} now{without} (complete on {', '.join(where)})"
        return text(line, "green")
    if seen.silent:
        return text("a restore would refuse to choose while a tier does not answer", "red")
    if seen.skipped:
        silent = ", ".join(seen.skipped)
        return text(f"a restore would raise: nothing complete is here, and {silent} did not answer", "red")
    if any(tier.views for tier in seen.tiers):
        return text("nothing here is complete as seen from this node", "yellow")
    return text(f"namespace {seen.settings.namespace}: nothing was saved yet", "dim")


def _complete(tier: TierView, seen: Survey) -> bool:
    view = tier.view(seen.next) if seen.next is not None and tier.error is None else None
    return view is not None and view.restorable


# ---- for programs


def _document(seen: Survey, now: float) -> dict[str, object]:
    left_behind = seen.left_behind
    return {
        "version": 1,
        "namespace": seen.settings.namespace,
        "next": None if seen.next is None else {"step": seen.next.step, "attempt": str(seen.next.attempt)},
        "tiers": [
            {
                "name": tier.settings.name,
                "kind": kind_of(tier.settings),
                "location": location_of(tier.settings),
                "error": error_json(tier),
                "more": _more(seen, tier),
                "checkpoints": [_entry(view, seen, left_behind, now) for view in tier.views],
            }
            for tier in seen.tiers
        ],
    }


def _entry(view: View, seen: Survey, left_behind: Collection[CheckpointId], now: float) -> dict[str, object]:
    return {
        "step": view.checkpoint.step,
        "attempt": str(view.checkpoint.attempt),
        "complete": view.problem is None,
        "problem": view.problem,
        "next": view.restorable and view.checkpoint == seen.next,
        "saved_at": view.saved_at,
        "age_secs": None if view.saved_at is None else round(now - view.saved_at, 3),
        "bytes": view.bytes,
        "world": view.world,
        "records": view.ranks,
        "metrics": dict(view.metrics),
        "pinned": view.pinned,
        "left_behind": view.checkpoint in left_behind,
        "looked_at": "manifest" if view.by_manifest else "files",
    }
