"""``sm-tiered why``: which checkpoint a restore would take now, why not a newer one, and what could be done."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK, check_step, open_recipe, parse_share
from sm_tiered.cli.ls import attempt_names, error_json
from sm_tiered.cli.output import age, marker, print_json, render, table, text
from sm_tiered.cli.reasons import Candidate, Walk, walk
from sm_tiered.cli.views import NOT_COMMITTED
from sm_tiered.errors import CheckpointNotFoundError, TierError
from sm_tiered.queue import Queue
from sm_tiered.records import CheckpointId

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run"]


def run(recipe: str, *, step: int | None, read_data: str | None, as_json: bool) -> int:
    """Explain what a restore of *recipe* would do; return the exit status."""
    check_step(step)
    share = None if read_data is None else parse_share(read_data)
    found = walk(open_recipe(recipe), step=step, share=share)
    try:
        _check_found(found, step)
        advice = _advice(found, step)
        if as_json:
            print_json(_document(found, step, advice))
        else:
            render(*_blocks(found, step, advice))
    finally:
        found.seen.close()
    return _status(found)


def _status(found: Walk) -> int:
    if found.errors.keys() - found.skipped or (found.stopped and (found.skipped or not found.seen.damaged)):
        return EXIT_FAILED
    return EXIT_OK if found.taken is not None or found.nothing_saved else EXIT_CORRUPT


def _check_found(found: Walk, step: int | None) -> None:
    """Raise CheckpointNotFoundError when no tier has *step*, and all of them answered."""
    if step is None or found.candidates or found.errors:
        return
    steps = sorted({checkpoint.step for tier in found.seen.tiers for checkpoint in tier.found}, reverse=True)
    have = f"There is something of steps {', '.join(map(str, steps[:10]))}." if steps else "There is nothing yet."
    raise CheckpointNotFoundError(f"step {step} is on no tier", hint=have, step=step)


# ---- what could be done


def _advice(found: Walk, step: int | None) -> list[str]:
    advice: list[str] = []
    for name, error in found.errors.items():
        without = "; a restore goes on without it" if name in found.skipped and found.taken is not None else ""
        advice.append(f"{name} did not answer{without}: {error.hint or 'see `sm-tiered doctor`'}")
    memory = found.seen.settings.memory
    if found.errors.keys() - found.skipped and memory is not None and memory.name not in found.errors:
        advice.append("`unreachable: use_memory` in the recipe takes the newest complete step in memory meanwhile")
    refused = [candidate for candidate in found.candidates if candidate.refused is not None]
    for candidate in refused[:3]:
        advice += [line for line in _about(found, candidate) if line not in advice]
    if found.left_behind and step is None:
        newest = found.left_behind[0]
        advice.append(f"restore(state, step={newest.step}) goes back to what was left behind, while it is kept")
    if found.seen.damaged:
        advice.append("`sm-tiered verify` looks at the attempts; with the damaged record removed the walk goes on")
    if found.taken is None and refused and not found.errors:
        advice.append("a fresh start needs a new namespace; nothing falls back to it silently")
    return advice


def _about(found: Walk, candidate: Candidate) -> list[str]:
    step, lines = candidate.checkpoint.step, list[str]()
    for copy in candidate.copies:
        problem = copy.problem or ""
        if problem == NOT_COMMITTED:
            draining = candidate.checkpoint in _queued(found, copy.tier)
            lines.append(
                f"step {step} is on its way to {copy.tier}: wait, or `sm-tiered drain`"
                if draining
                else f"step {step} was cut off on its way to {copy.tier}, and nothing is queued for it on this node"
            )
        elif "records of ranks" in problem:
            lines.append(f"other nodes may have the missing ranks of step {step}: a restore asks all nodes")
        elif problem:
            lines.append(f"`sm-tiered verify --step {step}` tells all that is wrong with it")
    return lines


def _queued(found: Walk, tier: str) -> set[CheckpointId]:
    """What this node's drainer has still to bring to *tier*."""
    memory = found.seen.settings.memory
    opened = next((view.tier for view in found.seen.tiers if memory is not None and view.settings is memory), None)
    if opened is None:
        return set()
    with suppress(TierError):
        return {entry.checkpoint for entry in Queue(opened).entries() if entry.tier == tier}
    return set()


# ---- for people


def _blocks(found: Walk, step: int | None, advice: list[str]) -> list[RenderableType]:
    blocks: list[RenderableType] = [_verdict(found, step), text("")]
    names = attempt_names([*(c.checkpoint.attempt for c in found.candidates), *(c.attempt for c in found.left_behind)])
    now = time.time()
    if found.candidates:
        rows = table("", "step", "attempt", "age", "tier", "why", right=("step", "age"))
        for candidate in found.candidates:
            for place, (tier, word, style) in enumerate(_lines(candidate)):
                head = place == 0
                taken = candidate.refused is None
                rows.add_row(
                    text(marker() if head and taken else "", "bold green"),
                    text(candidate.checkpoint.step if head else "", "bold" if taken else ""),
                    text(names[candidate.checkpoint.attempt] if head else ""),
                    text(_age(found, candidate, now) if head else ""),
                    text(tier),
                    text(word, style),
                )
        blocks += [rows, text("")]
    if found.stopped:
        blocks += [text(f"here the walk ends: {found.stopped}", "red"), text("")]
    if found.left_behind:
        blocks += [text(_left_behind(found), "dim"), text("")]
    blocks += [text(f"- {line}", "yellow") for line in advice]
    return blocks if advice else blocks[:-1]


def _verdict(found: Walk, step: int | None) -> RenderableType:
    taken = found.taken
    if taken is not None:
        where = ", ".join(f"{_ranks(s.ranks, taken.world or 0)} from {s.tier}" for s in taken.sources)
        without = f"; without {', '.join(sorted(found.skipped))}" if found.skipped else ""
        return text(f"a restore takes step {taken.checkpoint.step} now: {where}{without}", "green")
    if found.stopped is not None and found.errors.keys() - found.skipped:
        return text("a restore would refuse to choose while a tier does not answer", "red")
    if found.skipped:
        return text("a restore would raise TierUnavailableError: what is left may be on a tier that is silent", "red")
    if found.nothing_saved:
        return text("nothing was ever saved: a restore returns None, and training starts from the beginning", "dim")
    what = "nothing" if step is None else f"nothing of step {step}"
    return text(f"{what} can be restored as seen from this node: a restore would raise NothingRestorableError", "red")


def _lines(candidate: Candidate) -> list[tuple[str, str, str]]:
    lines = [
        (copy.tier, copy.problem, "yellow")
        if copy.problem is not None
        else (copy.tier, "whole" + (f": {copy.note}" if copy.note else ""), "green")
        for copy in candidate.copies
    ]
    if candidate.refused is not None and candidate.world is not None:
        lines.append(("", candidate.refused.partition(":")[0], "red"))
    return lines


def _age(found: Walk, candidate: Candidate, now: float) -> str:
    views = [tier.view(candidate.checkpoint) for tier in found.seen.tiers]
    saved = next((view.saved_at for view in views if view is not None and view.saved_at is not None), None)
    return age(None if saved is None else now - saved)


def _left_behind(found: Walk) -> str:
    forks = [record for record in found.seen.attempts.values() if record.chosen and record.parent is not None]
    fork = max(forks, key=lambda record: record.attempt, default=None)
    why = "" if fork is None or fork.parent is None else f": a{fork.attempt.ordinal} went back to {fork.parent}"
    steps = [checkpoint.step for checkpoint in found.left_behind]
    shown = ", ".join(map(str, steps[:5])) + (f" and {len(steps) - 5:,} more" if len(steps) > 5 else "")
    return f"left behind, no candidates: step {shown}{why}"


def _ranks(ranks: tuple[int, ...], world: int) -> str:
    if len(ranks) == world:
        return "all ranks" if world > 1 else "its one rank"
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


# ---- for programs


def _document(found: Walk, step: int | None, advice: list[str]) -> dict[str, object]:
    taken = found.taken
    records = sorted(found.seen.attempts.items(), reverse=True)
    return {
        "version": 1,
        "namespace": found.seen.settings.namespace,
        "step": step,
        "next": None if taken is None else _named(taken.checkpoint),
        "nothing_saved": found.nothing_saved,
        "stopped": found.stopped,
        "attempts": [
            {"attempt": str(a), "parent": None if r.parent is None else _named(r.parent), "chosen": r.chosen}
            for a, r in records
        ],
        "candidates": [_entry(candidate) for candidate in found.candidates],
        "left_behind": [_named(checkpoint) for checkpoint in found.left_behind],
        "errors": {
            tier.settings.name: error_json(tier) for tier in found.seen.tiers if tier.settings.name in found.errors
        },
        "skipped": sorted(found.skipped),
        "advice": advice,
    }


def _named(checkpoint: CheckpointId) -> dict[str, object]:
    return {"step": checkpoint.step, "attempt": str(checkpoint.attempt)}


def _entry(candidate: Candidate) -> dict[str, object]:
    return {
        **_named(candidate.checkpoint),
        "taken": candidate.refused is None,
        "refused": candidate.refused,
        "world": candidate.world,
        "tiers": [
            {"tier": copy.tier, "problem": copy.problem, "note": copy.note, "ranks": sorted(copy.ranks)}
            for copy in candidate.copies
        ],
        "sources": [{"tier": source.tier, "ranks": list(source.ranks)} for source in candidate.sources],
    }
