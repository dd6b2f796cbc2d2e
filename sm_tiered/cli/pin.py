"""``sm-tiered pin``: which checkpoints the durable tiers keep, whatever their keep policies say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sm_tiered import pins
from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK, check_step, chosen_tiers, is_durable, open_recipe
from sm_tiered.cli.holdings import Opened, check_attempt, errors_json, is_of, opened
from sm_tiered.cli.ls import attempt_names
from sm_tiered.cli.output import age, clean, note_error, print_json, render, table, text
from sm_tiered.errors import CheckpointNotFoundError, ConfigError, TieredError
from sm_tiered.inventory import read_manifest
from sm_tiered.settings import HyperPodSettings, MemorySettings, Settings, TierSettings
from sm_tiered.tiers.base import Tier

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["check_pinnable", "durable_tiers", "run"]

_MAX_REASON = 500
_RECYCLES = "memory recycles its files: what shall be kept belongs on a durable tier"
_DROPS = "the cluster's memory keeps a fixed number of checkpoints and no pins"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One pin, and what was done to it or stands below it."""

    tier: str
    pin: pins.Pin
    state: str


_Work = Callable[[str, Tier], list[_Row]]


def run(
    recipe: str,
    *,
    step: int | None,
    attempt: str | None,
    tier: str | None,
    reason: str | None,
    remove: bool,
    as_json: bool,
) -> int:
    """Pin the checkpoint of *step*, or take its pin away; without a step list the pins. Return the exit status."""
    check_step(step)
    check_attempt(attempt)
    _check_reason(reason, step, remove=remove, attempt=attempt)
    settings = open_recipe(recipe)
    with opened(settings, _pinnable(settings, tier)) as seen:
        if step is None:
            action, rows = "list", _each(seen, _listed)
        elif remove:
            action, rows = "remove", _removed(seen, step, attempt)
        else:
            action, rows = "pin", _pinned(seen, step, attempt, reason)
        errors = dict(seen.errors)
    if as_json:
        print_json(_document(settings, action, rows, errors))
    else:
        for error in errors.values():
            note_error(error)
        render(*_blocks(rows, incomplete=bool(errors)))
    return EXIT_FAILED if errors else EXIT_OK


def durable_tiers(settings: Settings, name: str | None) -> tuple[TierSettings, ...]:
    """Return the durable tier called *name*, or all.

    Raises:
        ConfigError: there is none of that name, it is the memory tier, or the recipe has no durable tier.
    """
    chosen = chosen_tiers(settings, name)
    durable = tuple(tier for tier in chosen if is_durable(tier))
    if not durable:
        names = ", ".join(tier.name for tier in settings.durable)
        what = f"--tier: {clean(name)} is the memory tier" if name else "the recipe has no durable tier"
        raise ConfigError(f"{what}; {_RECYCLES}", hint=f"It has: {names}." if names else "Add one, e.g. kind: s3.")
    return durable


def check_pinnable(settings: Settings, tier: TierSettings, *, option: str) -> None:
    """Refuse a *tier* that can't keep pins; *option* is what named it.

    Raises:
        ConfigError: it is the cluster's memory.
    """
    if isinstance(tier, HyperPodSettings):
        others = ", ".join(each.name for each in settings.durable if not isinstance(each, HyperPodSettings))
        hint = f"What shall stay belongs on {others}." if others else "Add a tier for what shall stay, e.g. kind: s3."
        raise ConfigError(f"{option}: {clean(tier.name)} can't keep a pin: {_DROPS}", hint=hint)


def _pinnable(settings: Settings, name: str | None) -> tuple[TierSettings, ...]:
    durable = durable_tiers(settings, name)
    found = tuple(tier for tier in durable if not isinstance(tier, HyperPodSettings))
    if not found:
        check_pinnable(settings, durable[0], option="--tier")
    return found


def _check_reason(reason: str | None, step: int | None, *, remove: bool, attempt: str | None) -> None:
    if step is None and (remove or reason is not None or attempt is not None):
        raise ConfigError("--step is missing", hint="Name the step, e.g. --step 200; `sm-tiered ls` lists them.")
    if reason is not None and remove:
        raise ConfigError("--reason and --remove don't go together", hint="A pin that goes needs no reason.")
    if reason is not None and not 0 < len(reason) <= _MAX_REASON:
        raise ConfigError(f"--reason has {len(reason)} characters", hint=f"Allowed: 1 to {_MAX_REASON}.")


# ---- what is done


def _pinned(seen: Opened, step: int, attempt: str | None, reason: str | None) -> list[_Row]:
    try:
        held = seen.find(step, attempt)
    except CheckpointNotFoundError as error:
        raise _explained(seen, error, step) from error
    rows: list[_Row] = []
    for name, (_, tier) in seen.tiers.items():
        if not held.complete_on(name):
            continue
        try:
            new = pins.pin(tier, seen.settings.namespace, held.checkpoint, reason=reason, now=time.time())
            found = next(each for each in pins.read_pins(tier) if each.checkpoint == held.checkpoint)
        except TieredError as error:
            seen.errors[name] = error
            continue
        rows.append(_Row(tier=name, pin=found, state="pinned" if new else "pinned already"))
    return rows


def _explained(seen: Opened, error: CheckpointNotFoundError, step: int) -> CheckpointNotFoundError:
    """Say so where the step is in this node's or the cluster's memory only."""
    near = [tier for tier in seen.settings.tiers if isinstance(tier, (MemorySettings, HyperPodSettings))]
    if not near:
        return error
    with opened(seen.settings, near) as looked:
        for tier in near:
            if any(checkpoint.step == step for checkpoint in looked.listed.get(tier.name, ())):
                hint = f"Bring it to one first: `sm-tiered promote … --step {step} --pin`."
                why = _DROPS if isinstance(tier, HyperPodSettings) else _RECYCLES
                what = f"step {step} is in {tier.name} and on no tier that keeps pins; {why}"
                return CheckpointNotFoundError(what, hint=hint)
    return error


def _removed(seen: Opened, step: int, attempt: str | None) -> list[_Row]:
    def remove(name: str, tier: Tier) -> list[_Row]:
        rows: list[_Row] = []
        for found in pins.read_pins(tier):
            mine = found.checkpoint.step == step and is_of(found.checkpoint.attempt, attempt)
            if mine and pins.unpin(tier, found.checkpoint):
                rows.append(_Row(tier=name, pin=found, state="pin removed"))
        return rows

    rows = _each(seen, remove)
    if not rows and not seen.errors:
        steps = sorted({row.pin.checkpoint.step for row in _each(seen, _listed)}, reverse=True)
        have = f"Pinned are steps {', '.join(map(str, steps[:10]))}." if steps else "Nothing is pinned."
        raise CheckpointNotFoundError(f"step {step} is not pinned", hint=have)
    return rows


def _listed(name: str, tier: Tier) -> list[_Row]:
    rows: list[_Row] = []
    for found in pins.read_pins(tier):
        try:
            manifest = read_manifest(tier, found.checkpoint)
            gone = manifest is None or manifest.tombstone
            state = "nothing is there" if gone else "kept"
        except TieredError as error:
            state = f"its manifest can't be read: {error.message}"
        rows.append(_Row(tier=name, pin=found, state=state))
    return rows


def _each(seen: Opened, work: _Work) -> list[_Row]:
    rows: list[_Row] = []
    for name, (_, tier) in seen.tiers.items():
        if name in seen.errors:
            continue
        try:
            rows += work(name, tier)
        except TieredError as error:
            seen.errors[name] = error
    return rows


# ---- what is said


def _blocks(rows: Sequence[_Row], *, incomplete: bool) -> list[RenderableType]:
    if not rows:
        return [] if incomplete else [text("nothing is pinned", "dim")]
    names = attempt_names(row.pin.checkpoint.attempt for row in rows)
    made = table("tier", "step", "attempt", "pinned", "state", "reason", right=("step", "pinned"))
    now = time.time()
    for row in rows:
        at = row.pin.pinned_at
        made.add_row(
            text(row.tier),
            text(row.pin.checkpoint.step),
            text(names[row.pin.checkpoint.attempt]),
            text("?" if at is None else age(now - at)),
            text(row.state, "yellow" if row.state.startswith(("nothing", "its")) else "green"),
            text(row.pin.reason or ""),
        )
    return [made]


def _document(
    settings: Settings, action: str, rows: Sequence[_Row], errors: dict[str, TieredError]
) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": settings.namespace,
        "action": action,
        "pins": [
            {
                "tier": row.tier,
                "step": row.pin.checkpoint.step,
                "attempt": str(row.pin.checkpoint.attempt),
                "state": row.state,
                "reason": row.pin.reason,
                "pinned_at": row.pin.pinned_at,
            }
            for row in rows
        ],
        "errors": errors_json(errors),
    }
