"""``sm-tiered copy``: checkpoints from one tier to another one, also of another run, verified on their way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sm_tiered.cli.common import check_step, chosen_tiers, is_durable, location_of, open_for_looking, open_recipe
from sm_tiered.cli.holdings import Opened, check_attempt, is_damaged, open_memory, opened
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.moving import Moved, composer, move, moved_json, moved_table, status_of
from sm_tiered.cli.output import clean, note_error, print_json, render, text
from sm_tiered.errors import CheckpointNotFoundError, ConfigError
from sm_tiered.inventory import list_attempts, read_holding
from sm_tiered.layout import check_namespace
from sm_tiered.records import CheckpointId
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings, TierSettings
from sm_tiered.tiers.base import Tier
from sm_tiered.transfer import copy_checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """One end of a copy."""

    tier: TierSettings
    namespace: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from other places."""
        tier = self.tier
        if isinstance(tier, S3Settings):
            return ("s3", tier.endpoint_url or "", tier.bucket, tier.prefix.strip("/"), self.namespace)
        if isinstance(tier, HyperPodSettings):
            return ("hyperpod", tier.url, self.namespace)
        return ("directory", os.path.realpath(location_of(tier)), self.namespace)

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.tier.name} ({location_of(self.tier)}/{self.namespace})"


def run(
    recipe: str,
    *,
    step: int | None,
    every: bool,
    attempt: str | None,
    source: str,
    target: str,
    to_recipe: str | None,
    namespace: str | None,
    as_json: bool,
) -> int:
    """Copy the checkpoint of *step*, or all complete ones; return the exit status."""
    check_step(step)
    check_attempt(attempt)
    if every == (step is not None):
        raise ConfigError("name one of --step N and --all", hint="`sm-tiered ls` lists what there is.")
    settings = open_recipe(recipe)
    other = settings if to_recipe is None else open_recipe(to_recipe)
    there = check_namespace(namespace) if namespace is not None else other.namespace
    begin = _Place(tier=_named(settings, source, "--from"), namespace=settings.namespace)
    end = _Place(tier=_named(other, target, "--to"), namespace=there)
    _check_ends(begin, end)
    with opened(settings, [begin.tier]) as seen:
        for error in seen.errors.values():
            raise error
        wanted = _all_complete(seen, begin.tier.name) if every else [_one(seen, step, attempt)]
        receiver = open_for_looking(end.tier, there, patient=True)
        try:
            notes = _notes(seen, receiver, begin, end)
            moved = _copied(seen, wanted, receiver, begin, end, Meter(quiet=as_json))
        finally:
            receiver.close()
    if as_json:
        print_json(_document(begin, end, moved, notes))
    else:
        for each in moved:
            if each.error is not None:
                note_error(each.error)
        render(*_blocks(begin, end, moved, notes))
    return status_of(moved)


def _named(settings: Settings, name: str, option: str) -> TierSettings:
    try:
        return chosen_tiers(settings, name)[0]
    except ConfigError as error:
        raise ConfigError(f"{option}: the recipe has no tier {clean(name)!r}", hint=error.hint) from error


def _check_ends(begin: _Place, end: _Place) -> None:
    if not is_durable(end.tier):
        raise ConfigError(
            f"--to: {end.tier.name} is the memory tier: only its own job saves there",
            hint="Name a durable tier; a restore brings what it takes into memory by itself.",
        )
    if begin.key == end.key:
        raise ConfigError(
            f"{begin.title} can't be copied onto itself",
            hint="Name another tier with --to, or another namespace with --namespace or --to-recipe.",
        )


def _one(seen: Opened, step: int | None, attempt: str | None) -> CheckpointId:
    assert step is not None
    return seen.find(step, attempt).checkpoint


def _all_complete(seen: Opened, name: str) -> list[CheckpointId]:
    """Everything that counts as a checkpoint, oldest first: what is missing of it is found on the way."""
    settings, tier = seen.tiers[name]
    durable = is_durable(settings)
    held = {c: read_holding(tier, c, durable=durable) for c in seen.listed[name]}
    found = [c for c, h in held.items() if h.problem is None or is_damaged(h)]
    if not found:
        raise CheckpointNotFoundError(f"{name} holds no complete checkpoint", hint="`sm-tiered ls` says what it has.")
    return found


def _copied(
    seen: Opened, wanted: Sequence[CheckpointId], receiver: Tier, begin: _Place, end: _Place, meter: Meter
) -> list[Moved]:
    durable = is_durable(begin.tier)
    # Only this one can keep a job from recycling what is being read.
    sender = seen.tiers[begin.tier.name][1] if durable else open_memory(seen.settings)
    assert sender is not None, "what was found there is there"
    moved: list[Moved] = []
    for checkpoint in wanted:
        label = f"step {checkpoint.step}: {begin.tier.name} to {end.tier.name}"
        moved.append(
            move(
                checkpoint,
                lambda progress, checkpoint=checkpoint: copy_checkpoint(
                    sender,
                    receiver,
                    checkpoint,
                    durable=durable,
                    namespace=end.namespace,
                    compose=composer(begin.tier),
                    progress=progress,
                ),
                meter,
                label,
            )
        )
    return moved


def _notes(seen: Opened, receiver: Tier, begin: _Place, end: _Place) -> list[str]:
    """What somebody who copies into another run's namespace should know."""
    if begin.namespace == end.namespace:
        return []
    own = [attempt for attempt in list_attempts(receiver) if attempt not in seen.attempts]
    if not own:
        return []
    newest = max(own)
    return [
        f"{end.namespace} has attempts of its own, up to a{newest.ordinal}: a restore there orders checkpoints by "
        "attempt, then by step"
    ]


def _blocks(begin: _Place, end: _Place, moved: Sequence[Moved], notes: Sequence[str]) -> list[RenderableType]:
    good = [each for each in moved if each.error is None]
    line = f"{len(good)} of {len(moved)} from {begin.title} are on {end.title}"
    return [
        moved_table(moved),
        text(""),
        *(text(note, "yellow") for note in notes),
        text(line, "green" if len(good) == len(moved) else "bold red"),
    ]


def _document(begin: _Place, end: _Place, moved: Sequence[Moved], notes: Sequence[str]) -> dict[str, object]:
    def place(found: _Place) -> dict[str, object]:
        return {"tier": found.tier.name, "location": location_of(found.tier), "namespace": found.namespace}

    return {
        "version": 1,
        "from": place(begin),
        "to": place(end),
        "ok": all(each.error is None for each in moved),
        "notes": list(notes),
        "checkpoints": [moved_json(each) for each in moved],
    }
