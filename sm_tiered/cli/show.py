"""``sm-tiered show``: one checkpoint on every tier, with its parts, tensors and values, from records alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sm_tiered import layout
from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK, check_step, kind_of, open_recipe
from sm_tiered.cli.contents import Copy, Shown, grouped, parts_of, tensors_of, values_of
from sm_tiered.cli.ls import error_json
from sm_tiered.cli.output import note_error, print_json, render
from sm_tiered.cli.show_tables import blocks
from sm_tiered.cli.survey import Survey, TierView, newest_first, read_holding, survey
from sm_tiered.cli.views import checked_view
from sm_tiered.errors import CheckpointNotFoundError, TierError
from sm_tiered.records import Attempt, AttemptRecord

__all__ = ["run"]

_LOOKED_AT = 20
"""How many checkpoints a tier are looked at first for the newest complete one."""


def run(recipe: str, *, step: int | None, every: bool, as_json: bool) -> int:
    """Show the newest complete checkpoint, or that of *step*, on every tier; return the exit status."""
    check_step(step)
    settings = open_recipe(recipe)
    seen = survey(settings, newest=_LOOKED_AT if step is None else None, step=step)
    try:
        seen, copies = _find(seen, step)
        if step is None and any(len(tier.views) < len(tier.found) for tier in _open_question(seen, copies)):
            seen.close()
            seen = survey(settings)
            seen, copies = _find(seen, step)
        _check_found(seen, copies, step)
        shown = grouped(copies, seen.attempts)
        now = time.time()
        if as_json:
            print_json(_document(seen, shown, now))
        elif shown:
            render(*blocks(shown, now, every))
    finally:
        seen.close()
    silent = [tier for tier in seen.tiers if tier.error is not None]
    for tier in silent:
        if tier.error is not None and not as_json:
            note_error(tier.error)
    if any(one.damage for one in shown):
        return EXIT_CORRUPT
    return EXIT_FAILED if silent else EXIT_OK


def _find(seen: Survey, step: int | None) -> tuple[Survey, list[Copy]]:
    """Return, for each tier that has one, the copy to show."""
    copies: list[Copy] = []
    tiers: list[TierView] = []
    for tier in seen.tiers:
        try:
            copy = _copy(tier, step, seen.attempts) if tier.tier is not None else None
        except TierError as error:
            tiers.append(replace(tier, error=error))
            continue
        tiers.append(tier)
        if copy is not None:
            copies.append(copy)
    return replace(seen, tiers=tuple(tiers)), copies


def _open_question(seen: Survey, copies: Sequence[Copy]) -> list[TierView]:
    """The tiers that answered and of which there is nothing to show, or only what was left behind."""
    names = {copy.tier.settings.name for copy in copies if copy.view.checkpoint not in seen.left_behind}
    return [tier for tier in seen.tiers if tier.error is None and tier.settings.name not in names]


def _check_found(seen: Survey, copies: Sequence[Copy], step: int | None) -> None:
    """Raise CheckpointNotFoundError when every tier answered, and there is nothing to show."""
    if copies or any(tier.error is not None for tier in seen.tiers):
        return
    steps = sorted({checkpoint.step for tier in seen.tiers for checkpoint in tier.found}, reverse=True)
    have = f"There is something of steps {', '.join(map(str, steps[:10]))}." if steps else "There is nothing yet."
    what = "no tier holds a complete checkpoint" if step is None else f"step {step} is on no tier"
    raise CheckpointNotFoundError(what, hint=f"{have} `sm-tiered ls` lists what each tier has.")


def _copy(tier: TierView, step: int | None, attempts: Mapping[Attempt, AttemptRecord]) -> Copy | None:
    assert tier.tier is not None
    ordered = newest_first(tier.views, attempts)
    matching = [view for view in ordered if step is None or view.checkpoint.step == step]
    # A step that was asked for is shown however broken it is.
    for view in [view for view in matching if view.problem is None] + (matching[:1] if step is not None else []):
        holding = read_holding(tier.tier, tier.settings, view.checkpoint)
        shown = checked_view(tier.tier, tier.settings, view) if view.by_manifest else view
        if (holding.problem or shown.problem) is None or step is not None:
            return Copy(tier=tier, view=shown, holding=holding)
    return None


def _document(seen: Survey, shown: Sequence[Shown], now: float) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": seen.settings.namespace,
        "checkpoints": [_entry(one, now) for one in shown],
        "errors": {tier.settings.name: error_json(tier) for tier in seen.tiers if tier.error is not None},
    }


def _entry(one: Shown, now: float) -> dict[str, object]:
    first = one.records[0] if one.records else None
    parent = one.attempt.parent if one.attempt else None
    return {
        "step": one.checkpoint.step,
        "attempt": str(one.checkpoint.attempt),
        "parent": None if parent is None else {"step": parent.step, "attempt": str(parent.attempt)},
        "parent_known": one.attempt is not None,
        "parent_chosen": bool(one.attempt and one.attempt.chosen),
        "saved_at": first.saved_at if first else None,
        "age_secs": round(now - first.saved_at, 3) if first else None,
        "world": first.world if first else None,
        "metrics": first.metrics if first else {},
        "watermark": layout.checkpoint_dir(first.watermark) if first and first.watermark else None,
        "damage": one.damage,
        "tiers": [
            {
                "name": copy.tier.settings.name,
                "kind": kind_of(copy.tier.settings),
                "complete": copy.holding.problem is None,
                "problem": copy.holding.problem,
                "committed": copy.holding.manifest is not None and not copy.holding.manifest.tombstone,
                "pinned": copy.view.pinned,
                "bytes": copy.view.bytes,
                "files": copy.view.files,
            }
            for copy in one.copies
        ],
        "parts": [
            {"name": part.name, "rank": rank, "bytes": part.size, "replica": part.replica, "chunks": list(part.chunks)}
            for rank, part in parts_of(one)
        ],
        "tensors": [
            {"fqn": t.fqn, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.bytes, "chunks": t.chunks}
            for t in tensors_of(one)
        ],
        "values": values_of(one),
    }
