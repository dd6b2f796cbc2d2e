"""``sm-tiered prune``: what retention would give up now and why the rest stays; with ``--yes`` it does so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sm_tiered import layout, retention
from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK, open_for_looking, open_recipe
from sm_tiered.cli.holdings import Opened, errors_json, opened
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.output import note_error, print_json, render
from sm_tiered.cli.pin import durable_tiers
from sm_tiered.cli.prune_tables import blocks, why
from sm_tiered.drainer import STALE_UPLOAD_SECS
from sm_tiered.errors import FormatError, TieredError
from sm_tiered.queue import Queue
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers import abort_stale_uploads
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import trainers_at

__all__ = ["TierPlan", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """What retention does on one tier."""

    name: str
    plan: retention.Plan
    sizes: dict[CheckpointId, int] = field(default_factory=dict[CheckpointId, int])
    """Bytes that each deletion frees."""
    uploads: int = 0
    """Unfinished uploads that belong to nobody any more."""
    done: tuple[CheckpointId, ...] | None = None
    """What was deleted; None: this was a dry run."""

    @property
    def freed(self) -> int:
        """Bytes of what is, or would be, deleted."""
        return sum(self.sizes[c] for c in (self.plan.delete if self.done is None else self.done))

    @property
    def blocked(self) -> str | None:
        """Why nothing at all is given up there; None when that is not so."""
        if self.plan.newer is not None:
            return f"{self.plan.newer} is newer than what this tier knows of: only its own job gives anything up"
        if self.plan.waits:
            return f"the newest attempt, {self.plan.attempt}, has nothing committed here yet: until then all stays"
        return None


def run(recipe: str, *, tier: str | None, yes: bool, as_json: bool) -> int:
    """Tell what the keep policies give up, and with *yes* delete it; return the exit status."""
    settings = open_recipe(recipe)
    chosen = durable_tiers(settings, tier)
    meter = Meter(quiet=as_json)
    plans: list[TierPlan] = []
    # All tiers are asked for the newest attempt: one that lives elsewhere may have begun from what is old here.
    with opened(settings, settings.tiers) as seen:
        newest, busy = _newest(seen), _in_flight(settings)
        for each in chosen:
            if each.name in seen.errors:
                continue
            try:
                found = _planned(seen.tiers[each.name][1], each, settings, newest, busy)
                plans.append(_applied(seen.tiers[each.name][1], settings, found, meter.note) if yes else found)
            except TieredError as error:
                error.tier = error.tier or each.name
                seen.errors[each.name] = error
    errors = {name: error for name, error in seen.errors.items() if tier in (None, name)}
    pids = _live(settings)
    if as_json:
        print_json(_document(settings, plans, errors, pids, yes=yes))
    else:
        for error in errors.values():
            note_error(error)
        render(*blocks(plans, pids, yes=yes))
    if any(isinstance(error, FormatError) for error in errors.values()):
        return EXIT_CORRUPT
    return EXIT_FAILED if errors else EXIT_OK


def _newest(seen: Opened) -> Attempt | None:
    attempts = {*seen.attempts, *seen.damaged, *(c.attempt for c in seen.in_order())}
    return max(attempts, default=None)


def _in_flight(settings: Settings) -> frozenset[CheckpointId]:
    """What this node's queue is about to promote, however long that has been waiting."""
    if settings.memory is None:
        return frozenset()
    queue = Queue(open_for_looking(settings.memory, settings.namespace))
    return frozenset(entry.checkpoint for entry in queue.entries())


def _live(settings: Settings) -> tuple[int, ...]:
    """Pids of the job's trainers on this node."""
    if settings.memory is None:
        return ()
    holders = trainers_at(Path(settings.memory.path) / settings.namespace)
    return tuple(holder.pid for holder in holders if holder.pid is not None)


def _planned(
    tier: Tier, chosen: TierSettings, settings: Settings, newest: Attempt | None, busy: frozenset[CheckpointId]
) -> TierPlan:
    if newest is None:
        return TierPlan(name=chosen.name, plan=retention.Plan())
    secs = chosen.in_flight_secs(settings.commit_deadline_secs)
    plan = retention.plan(tier, chosen.keep, attempt=newest, in_flight_secs=secs, in_flight=busy)
    sizes = {c: _bytes(tier, c) for c in plan.delete}
    uploads = abort_stale_uploads(tier, max(STALE_UPLOAD_SECS, secs), count_only=True)
    return TierPlan(name=chosen.name, plan=plan, sizes=sizes, uploads=uploads)


def _bytes(tier: Tier, checkpoint: CheckpointId) -> int:
    return sum(entry.size for entry in tier.list(f"{layout.checkpoint_dir(checkpoint)}/"))


def _applied(tier: Tier, settings: Settings, found: TierPlan, note: Callable[[str], None]) -> TierPlan:
    def told(checkpoint: CheckpointId) -> None:
        note(f"{found.name} step {checkpoint.step}: deleted")

    done = retention.apply(tier, settings.namespace, found.plan, told=told)
    uploads = abort_stale_uploads(tier, max(STALE_UPLOAD_SECS, settings.commit_deadline_secs)) if found.uploads else 0
    return replace(found, done=tuple(done), uploads=uploads)


# ---- for programs


def _document(
    settings: Settings, plans: Sequence[TierPlan], errors: dict[str, TieredError], pids: tuple[int, ...], *, yes: bool
) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": settings.namespace,
        "dry_run": not yes,
        "live_pids": list(pids),
        "freed_bytes": sum(each.freed for each in plans),
        "tiers": [_tier_json(each) for each in plans],
        "errors": errors_json(errors),
    }


def _tier_json(each: TierPlan) -> dict[str, object]:
    plan = each.plan
    return {
        "name": each.name,
        "blocked": each.blocked,
        "freed_bytes": each.freed,
        "delete": [
            {**_named(c), "bytes": each.sizes[c], "committed": c in plan.committed, "why": why(plan, c)}
            for c in plan.delete
        ],
        "deleted": None if each.done is None else [_named(c) for c in each.done],
        "kept": [{**_named(c), "reasons": sorted(r.value for r in plan.kept[c])} for c in sorted(plan.kept)],
        "tombstones": [_named(c) for c in plan.bury],
        "attempt_records": [str(attempt) for attempt in plan.forget],
        "unfinished_uploads": each.uploads,
    }


def _named(checkpoint: CheckpointId) -> dict[str, object]:
    return {"step": checkpoint.step, "attempt": str(checkpoint.attempt)}
