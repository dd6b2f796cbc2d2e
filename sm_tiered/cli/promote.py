"""``sm-tiered promote``: brings a step to a durable tier now: from memory the drainer does, from a durable tier we."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sm_tiered import pins
from sm_tiered.cli.common import EXIT_CORRUPT, EXIT_FAILED, EXIT_OK, check_step, chosen_tiers, is_durable, open_recipe
from sm_tiered.cli.following import check_timeout, follow
from sm_tiered.cli.holdings import Held, Opened, check_attempt, is_of, open_memory, opened, ranks_text
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.moving import FINISHER, Moved, composer, move
from sm_tiered.cli.output import clean, note_error, print_json, render
from sm_tiered.cli.pin import check_pinnable, durable_tiers
from sm_tiered.cli.promote_tables import Found, Outcome, blocks, document
from sm_tiered.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptPartError,
    FormatError,
    SaveError,
)
from sm_tiered.handover import Follower, hand_over
from sm_tiered.inventory import Holding, read_holding
from sm_tiered.manifest import record_from_json
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.queue import Entry, Queue
from sm_tiered.retention import would_keep
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers.base import Tier
from sm_tiered.transfer import Copied, Progress, clear_failed, copy_checkpoint, is_indexed

__all__ = ["run"]


def run(
    recipe: str,
    *,
    step: int,
    attempt: str | None,
    to: str | None,
    pin: bool,
    timeout_secs: float | None,
    as_json: bool,
) -> int:
    """Bring *step* to a durable tier; return the exit status."""
    check_step(step)
    check_attempt(attempt)
    check_timeout(timeout_secs)
    settings = open_recipe(recipe)
    target = _target(settings, to)
    if pin:
        check_pinnable(settings, target, option="--pin")
    with opened(settings, settings.tiers) as seen:
        if target.name in seen.errors:
            raise seen.errors[target.name]
        found = _find(seen, step, attempt, target)
        outcome = _promoted(seen, found, target, Meter(quiet=as_json), pin=pin, timeout_secs=timeout_secs)
    error = outcome.moved.error
    if as_json:
        print_json(document(settings, outcome))
    else:
        if error is not None:
            note_error(error)
        render(*blocks(outcome))
    if isinstance(error, (CorruptPartError, FormatError)):
        return EXIT_CORRUPT
    return EXIT_OK if error is None else EXIT_FAILED


def _target(settings: Settings, to: str | None) -> TierSettings:
    durable = durable_tiers(settings, None)
    if to is None:
        if len(durable) > 1:
            names = ", ".join(tier.name for tier in durable)
            raise ConfigError("--to is missing: there are several durable tiers", hint=f"Name one of {names}.")
        return next(iter(durable))
    try:
        chosen = chosen_tiers(settings, to)[0]
    except ConfigError as error:
        raise ConfigError(f"--to: the recipe has no tier {clean(to)!r}", hint=error.hint) from error
    if not is_durable(chosen):
        names = ", ".join(tier.name for tier in durable)
        raise ConfigError(f"--to: {chosen.name} is the memory tier", hint=f"Durable are: {names}.")
    return chosen


# ---- which, and where from


def _find(seen: Opened, step: int, attempt: str | None, target: TierSettings) -> Found:
    """Take it from *target* itself if it is there, else from memory, else from the first durable tier that has it."""
    try:
        held = seen.find(step, attempt)
    except (CheckpointNotFoundError, CorruptPartError):
        partial = _partial(seen, step, attempt)
        if partial is None:
            raise
        return partial
    source = next(name for name in (target.name, *seen.tiers) if held.complete_on(name))
    return Found(checkpoint=held.checkpoint, source=source, records=_records(held, source))


def _records(held: Held, source: str) -> Mapping[int, bytes]:
    return held.holdings[source].records


def _partial(seen: Opened, step: int, attempt: str | None) -> Found | None:
    """This node's share of a step whose other shares are in the memory of other nodes."""
    memory = seen.settings.memory
    if memory is None:
        return None
    _, tier = seen.tiers[memory.name]
    for checkpoint in seen.in_order():
        mine = checkpoint.step == step and is_of(checkpoint.attempt, attempt)
        if not mine or checkpoint not in seen.listed.get(memory.name, ()):
            continue
        holding = read_holding(tier, checkpoint, durable=False)
        missing = _missing(holding)
        if missing:
            return Found(checkpoint=checkpoint, source=memory.name, records=holding.records, missing=missing)
    return None


def _missing(holding: Holding) -> tuple[int, ...]:
    """Ranks without a record, where those that are there are good and agree; else none."""
    if holding.damaged:
        return ()
    records = [record_from_json(data) for data in holding.records.values()]
    worlds = {record.world for record in records}
    if len(worlds) != 1 or any(record.failed is not None for record in records):
        return ()
    return tuple(sorted(set(range(worlds.pop())) - set(holding.records)))


# ---- doing it


def _promoted(
    seen: Opened, found: Found, target: TierSettings, meter: Meter, *, pin: bool, timeout_secs: float | None
) -> Outcome:
    receiver = seen.tiers[target.name][1]
    if not pin and found.source != target.name:
        _check_stays(receiver, target, found)
    memory = seen.settings.memory
    namespace, new = seen.settings.namespace, False
    if pin:
        new = pins.put_pin(receiver, namespace, found.checkpoint, reason=None, now=time.time())
    how = "copy"
    if memory is not None and found.source == memory.name:
        how, moved = "drainer", _by_drainer(seen.settings, found, target, receiver, meter, timeout_secs)
    else:
        moved = _by_copy(seen, found, target.name, meter)
        if moved.copied is not None and moved.copied.already:
            how = "nothing"
    if moved.error is not None and new:
        pins.unpin(receiver, found.checkpoint)
    return Outcome(found=found, target=target.name, moved=moved, how=how, pinned=pin and moved.error is None)


def _check_stays(receiver: Tier, target: TierSettings, found: Found) -> None:
    """Bringing there what retention takes away at the next commit is never what was meant."""
    first = record_from_json(found.records[min(found.records)])
    newcomer = CommittedCheckpoint(checkpoint=found.checkpoint, saved_at=first.saved_at, metrics=first.metrics)
    if not would_keep(receiver, target.keep, newcomer):
        raise SaveError(
            f"the keep policy of {target.name} would give step {found.checkpoint.step} up at once",
            hint="Add --pin: what is pinned stays.",
            step=found.checkpoint.step,
            tier=target.name,
        )


def _by_copy(seen: Opened, found: Found, target: str, meter: Meter) -> Moved:
    (settings, sender), (_, receiver) = seen.tiers[found.source], seen.tiers[target]
    namespace, checkpoint = seen.settings.namespace, found.checkpoint

    def work(progress: Progress) -> Copied:
        if sender is receiver:
            return Copied(found=0, already=True)
        compose = composer(settings)
        return copy_checkpoint(
            sender, receiver, checkpoint, durable=True, namespace=namespace, compose=compose, progress=progress
        )

    return move(checkpoint, work, meter, _label(found, target))


def _by_drainer(
    settings: Settings,
    found: Found,
    target: TierSettings,
    receiver: Tier,
    meter: Meter,
    timeout_secs: float | None,
) -> Moved:
    memory = open_memory(settings)
    assert memory is not None, "what was found there is there"
    began = time.monotonic()
    if found.missing:
        here = ranks_text(sorted(found.records))
        meter.note(
            f"this node's memory holds {here} of step {found.checkpoint.step}; "
            f"for {ranks_text(found.missing)} run the same command on their nodes"
        )
    clear_failed(receiver, found.checkpoint, found.records)
    queue = Queue(memory)
    hand_over(memory, queue, settings.text, lambda digest: _entries(settings, found, target, digest))
    follower = Follower(memory, queue, promotion=(found.checkpoint, target.name))
    ended, last = follow(memory, follower, settings, meter, label=_label(found, target.name), timeout_secs=timeout_secs)
    follower.leave()
    error = ended[0].error if ended else SaveError("it left the queue unseen", step=found.checkpoint.step)
    copied = Copied(bytes=last.done) if error is None else None
    return Moved(checkpoint=found.checkpoint, copied=copied, error=error, secs=time.monotonic() - began)


def _entries(settings: Settings, found: Found, target: TierSettings, recipe: str) -> list[Entry]:
    world = record_from_json(found.records[min(found.records)]).world
    return [
        Entry(
            checkpoint=found.checkpoint,
            rank=rank,
            tier=target.name,
            world=world,
            recipe=recipe,
            finisher=FINISHER if is_indexed(found.records) else "",
            deadline_at=time.time() + target.in_flight_secs(settings.commit_deadline_secs),
            patient=target.patient,
            place=settings.place_of(target.name),
        )
        for rank in sorted(found.records)
    ]


def _label(found: Found, target: str) -> str:
    return f"step {found.checkpoint.step}: {found.source} to {target}"
