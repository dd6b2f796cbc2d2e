"""``sm-tiered import``: takes over checkpoints that amzn-sagemaker-checkpointing wrote, or says why it does not."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from sm_tiered import pins
from sm_tiered.cli import import_notes
from sm_tiered.cli.common import check_step, chosen_tiers, is_durable, location_of, open_for_looking, open_recipe
from sm_tiered.cli.import_tables import Found, Listed, Tried, blocks, document, status_of
from sm_tiered.cli.meter import Meter
from sm_tiered.cli.output import clean, print_json, render
from sm_tiered.cli.pin import check_pinnable, durable_tiers
from sm_tiered.errors import CheckpointNotFoundError, ConfigError, TieredError
from sm_tiered.settings import HyperPodSettings, Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Asked", "run"]

_IMPORTER = "sm_tiered_dcp.predecessor"
"""The module of this distribution that reads the other library's checkpoints: it needs torch, which core has not."""


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
        tries = job.run(Meter(quiet=as_json))
        notes = job.notes(tries)
    if as_json:
        facts = {"from": source.title, "to": target.name, "location": location_of(target)}
        print_json(document(tries, notes, namespace=settings.namespace, dry_run=asked.dry_run, **facts))
    else:
        title = f"{target.name} ({location_of(target)}/{settings.namespace})"
        render(*blocks(tries, notes, source=source.title, target=title, dry_run=asked.dry_run))
    return status_of(tries)


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


class _Source(Protocol):
    """A `sm_tiered_dcp.predecessor.Source`."""

    @property
    def title(self) -> str: ...

    def listed(self) -> Sequence[Listed]: ...


@dataclass(slots=True, kw_only=True)
class _Job:
    """One run of the command."""

    importer: Any
    """The module: nothing of it can be named here."""
    source: _Source
    receiver: Tier
    settings: Settings
    target: TierSettings
    asked: Asked
    copies: list[str] = field(default_factory=list[str])
    """What is told of copies of steps that were taken from another place."""

    def run(self, meter: Meter) -> list[Tried]:
        """Import step after step; what can't be used is told with the others, a place that does not answer is not."""
        wanted = self._wanted(self.source.listed())
        tries: list[Tried] = []
        taken: dict[int, str] = {}
        for listed in wanted:
            if listed.step in taken:
                self.copies.append(f"step {listed.step}: {listed.name} was left alone: {taken[listed.step]} was taken")
                continue
            each = self._one(listed, meter)
            tries.append(each)
            if each.error is None:
                taken[listed.step] = listed.name
            if self.asked.every or isinstance(each.error, self.importer.OLDER):
                continue
            break
        if not taken and all(isinstance(each.error, CheckpointNotFoundError) for each in tries):
            reasons = "; ".join(each.error.message for each in tries if each.error is not None)
            raise CheckpointNotFoundError(
                f"no checkpoint there is complete: {reasons}", hint="A save that never ended can't be taken over."
            )
        return tries

    def _wanted(self, listed: Sequence[Listed]) -> Sequence[Listed]:
        """In the order in which they are tried; of copies of one step, the one that the source names first."""
        if not listed:
            raise CheckpointNotFoundError(
                f"{self.source.title} holds no checkpoint of amzn-sagemaker-checkpointing",
                hint="Is that its namespace (--from-namespace) and its s3_tier_base_path (--from)?",
            )
        if self.asked.every:
            return sorted(listed, key=lambda each: each.step)
        if self.asked.step is None:
            return listed
        chosen = [each for each in listed if each.step == self.asked.step]
        if not chosen:
            steps = ", ".join(str(step) for step in list(dict.fromkeys(each.step for each in listed))[:10])
            raise CheckpointNotFoundError(
                f"{self.source.title} has no step {self.asked.step}", hint=f"It has {steps}.", step=self.asked.step
            )
        return chosen

    def _one(self, listed: Listed, meter: Meter) -> Tried:
        began, label = time.monotonic(), f"step {listed.step}: {self.source.title} to {self.target.name}"
        meter.begin(label)
        found: Found | None = None
        failure: TieredError | None = None
        try:
            found = self._work(listed, meter)
        except (*self.importer.OLDER, *self.importer.REFUSALS) as error:
            failure = cast("TieredError", error)
        finally:
            meter.end()
        made = Tried(listed=listed, found=found, error=failure, secs=time.monotonic() - began)
        meter.note(f"{label}: {made.state(dry_run=self.asked.dry_run)}")
        return made

    def _work(self, listed: Listed, meter: Meter) -> Found:
        namespace = self.settings.namespace
        asked = self.asked.step is not None
        if self.asked.dry_run:
            return self.importer.look_at(self.source, listed, self.receiver, namespace=namespace, asked=asked)
        found: Found = self.importer.import_step(
            self.source,
            listed,
            self.receiver,
            namespace=namespace,
            allow_pickle=self.asked.allow_pickle or self.settings.allow_pickle,
            asked=asked,
            progress=meter.tell,
        )
        if self.asked.pin:
            pins.pin(self.receiver, namespace, found.checkpoint, reason="imported", now=time.time())
        return found

    def notes(self, tries: Sequence[Tried]) -> list[str]:
        """Return what somebody who imports should know, a sentence each."""
        taken = [each.found for each in tries if each.found is not None]
        said = [*self.copies, *(doubt for found in taken for doubt in found.doubts)]
        for found in taken:
            said += import_notes.pickled(found)
        if not taken:
            return said
        checkpoints = [found.checkpoint for found in taken]
        said += import_notes.order(self.settings, max(checkpoints).step)
        if not self.asked.dry_run and not self.asked.pin:
            said += import_notes.given_up(self.receiver, self.target, checkpoints)
        return said
