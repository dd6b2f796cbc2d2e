"""``sm-tiered import``: takes over checkpoints that amzn-sagemaker-checkpointing wrote, or says why it does not."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

from sm_tiered import pins
from sm_tiered.cli.common import check_step, chosen_tiers, is_durable, location_of, open_for_looking, open_recipe
from sm_tiered.cli.import_tables import Outcome, blocks, document, status_of
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.output import clean, note_error, print_json, render
from sm_tiered.cli.pin import check_pinnable, durable_tiers
from sm_tiered.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptPartError,
    FormatError,
    TieredError,
)
from sm_tiered.inventory import list_attempts, read_manifest
from sm_tiered.policies.context import CommittedCheckpoint
from sm_tiered.records import CheckpointId
from sm_tiered.retention import would_keep
from sm_tiered.settings import HyperPodSettings, Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Asked", "run"]

_IMPORTER = "sm_tiered_dcp.predecessor"
"""The module of this distribution that reads the other library's checkpoints: it needs torch, which core has not."""

_PREFERS_OLDER = (CheckpointNotFoundError, CorruptPartError, FormatError)
"""Why the latest step is passed over for the one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says."""

    origin: str
    namespace: str | None
    """The other library's; None: as the recipe's."""
    step: int | None
    latest: bool
    every: bool
    to: str | None
    pin: bool
    dry_run: bool
    allow_pickle: bool


def run(recipe: str, asked: Asked, *, as_json: bool) -> int:
    """Import what is *asked* for; return the exit status."""
    check_step(asked.step)
    if (asked.step is not None) + asked.latest + asked.every > 1:
        raise ConfigError("--step, --latest and --all don't go together", hint="Without any, the latest is taken.")
    settings = open_recipe(recipe)
    target = _target(settings, asked.to)
    if asked.pin:
        check_pinnable(settings, target, option="--pin")
    importer: Any = importlib.import_module(_IMPORTER)
    source = importer.open_origin(asked.origin, asked.namespace or settings.namespace, settings)
    with closing(source), closing(open_for_looking(target, settings.namespace, patient=True)) as receiver:
        job = _Job(importer=importer, source=source, receiver=receiver, settings=settings, target=target, asked=asked)
        outcomes = job.run(Meter(quiet=as_json))
        notes = job.notes(outcomes)
    if as_json:
        facts = {"from": source.title, "to": target.name, "location": location_of(target)}
        print_json(document(outcomes, notes, namespace=settings.namespace, dry_run=asked.dry_run, **facts))
    else:
        for each in outcomes:
            if each.error is not None:
                note_error(each.error)
        title = f"{target.name} ({location_of(target)}/{settings.namespace})"
        render(*blocks(outcomes, notes, source=source.title, target=title, dry_run=asked.dry_run))
    return status_of(outcomes)


def _target(settings: Settings, to: str | None) -> TierSettings:
    durable = durable_tiers(settings, None)
    names = ", ".join(tier.name for tier in durable)
    if to is None:
        lasting = [tier for tier in durable if not isinstance(tier, HyperPodSettings)] or list(durable)
        if len(lasting) > 1:
            raise ConfigError("--to is missing: there are several durable tiers", hint=f"Name one of {names}.")
        return lasting[0]
    try:
        chosen = chosen_tiers(settings, to)[0]
    except ConfigError as error:
        raise ConfigError(f"--to: the recipe has no tier {clean(to)!r}", hint=error.hint) from error
    if not is_durable(chosen):
        raise ConfigError(f"--to: {chosen.name} is the memory tier", hint=f"Durable are: {names}.")
    return chosen


@dataclass(slots=True, kw_only=True)
class _Job:
    """One run of the command."""

    importer: Any
    source: Any
    """A `sm_tiered_dcp.predecessor.Source`."""
    receiver: Tier
    settings: Settings
    target: TierSettings
    asked: Asked

    def run(self, meter: Meter) -> list[Outcome]:
        """Import step after step; what can't be used is an outcome, a place that does not answer is not."""
        wanted = self._wanted(self.source.listed())
        outcomes: list[Outcome] = []
        for listed in wanted:
            found = self._one(listed, meter)
            outcomes.append(found)
            if not self.asked.every and (found.error is None or not isinstance(found.error, _PREFERS_OLDER)):
                break
        taken = [each for each in outcomes if each.error is None]
        if not taken and all(isinstance(each.error, CheckpointNotFoundError) for each in outcomes):
            reasons = "; ".join(each.error.message for each in outcomes if each.error is not None)
            raise CheckpointNotFoundError(
                f"no checkpoint there is complete: {reasons}", hint="A save that never ended can't be taken over."
            )
        return outcomes

    def _wanted(self, listed: Sequence[Any]) -> Sequence[Any]:
        """In the order in which they are tried."""
        if not listed:
            raise CheckpointNotFoundError(
                f"{self.source.title} holds no checkpoint of amzn-sagemaker-checkpointing",
                hint="Is that its namespace (--from-namespace) and its s3_tier_base_path (--from)?",
            )
        if self.asked.every:
            return list(reversed(listed))
        if self.asked.step is None:
            return listed
        chosen = [each for each in listed if each.step == self.asked.step]
        if not chosen:
            steps = ", ".join(str(each.step) for each in listed[:10])
            raise CheckpointNotFoundError(
                f"{self.source.title} has no step {self.asked.step}", hint=f"It has {steps}.", step=self.asked.step
            )
        return chosen

    def _one(self, listed: Any, meter: Meter) -> Outcome:
        began, label = time.monotonic(), f"step {listed.step}: {self.source.title} to {self.target.name}"
        meter.begin(label)
        imported: Any = None
        failure: TieredError | None = None
        try:
            imported = self._work(listed, meter)
        except (*_PREFERS_OLDER, *self.importer.REFUSALS) as error:
            failure = cast("TieredError", error)
        finally:
            meter.end()
        made = Outcome(listed=listed, imported=imported, error=failure, secs=time.monotonic() - began)
        meter.note(f"{label}: {made.state(dry_run=self.asked.dry_run)}")
        return made

    def _work(self, listed: Any, meter: Meter) -> Any:
        if self.asked.dry_run:
            return self.importer.look_at(self.source, listed)
        found = self.importer.import_step(
            self.source,
            listed,
            self.receiver,
            namespace=self.settings.namespace,
            allow_pickle=self.asked.allow_pickle or self.settings.allow_pickle,
            progress=meter.tell,
        )
        if self.asked.pin:
            pins.pin(self.receiver, self.settings.namespace, found.checkpoint, reason="imported", now=time.time())
        return found

    # ---- what somebody who imports should know

    def notes(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Return it, a sentence each."""
        taken = [each for each in outcomes if each.imported is not None]
        doubts = [self.importer.doubt_about(each.listed) for each in taken]
        said: list[str] = [doubt for doubt in doubts if doubt is not None]
        said += [_pickled(each.imported) for each in taken if each.imported.pickled]
        if not taken:
            return said
        said += self._order(taken[-1].imported.checkpoint)
        if not self.asked.dry_run and not self.asked.pin:
            said += self._given_up([each.imported.checkpoint for each in taken])
        return said

    def _order(self, checkpoint: CheckpointId) -> list[str]:
        own = [attempt for attempt in list_attempts(self.receiver) if attempt > checkpoint.attempt]
        if not own:
            return []
        return [
            f"{self.settings.namespace} has saves of its own, of attempts up to a{max(own).ordinal}: a restore takes "
            f"those first. To go on from here, restore step {checkpoint.step} by its number"
        ]

    def _given_up(self, checkpoints: Sequence[CheckpointId]) -> list[str]:
        lost: list[str] = []
        for checkpoint in checkpoints:
            manifest = read_manifest(self.receiver, checkpoint)
            if manifest is None or manifest.tombstone:
                continue
            facts = CommittedCheckpoint(checkpoint=checkpoint, saved_at=manifest.saved_at, metrics=manifest.metrics)
            if not would_keep(self.receiver, self.target.keep, facts):
                lost.append(str(checkpoint.step))
        if not lost:
            return []
        which = f"step {lost[0]}" if len(lost) == 1 else f"steps {', '.join(lost)}"
        return [f"the keep policy of {self.target.name} gives {which} up at the next save there; --pin keeps them"]


def _pickled(imported: Any) -> str:
    names = ", ".join(imported.pickled[:8])
    return f"step {imported.checkpoint.step}: {names}: only a pickle can load it; restore with `allow_pickle: true`"
