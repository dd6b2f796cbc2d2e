"""Which checkpoint somebody means: a step, maybe with tier and attempt; opened where it is complete and nearest."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from sm_tiered import layout, lineage
from sm_tiered.cli.common import chosen_tiers, is_durable
from sm_tiered.cli.holdings import Held, Opened, opened
from sm_tiered.cli.output import clean, note_left_out
from sm_tiered.errors import CheckpointNotFoundError, ConfigError, CorruptPartError, TieredError
from sm_tiered.manifest import record_from_json
from sm_tiered.records import CheckpointId, Record
from sm_tiered.settings import Settings, TierSettings
from sm_tiered.tiers.base import Tier

__all__ = ["Chosen", "Which", "chosen", "parse_which"]

_WRITTEN = re.compile(
    r"(?:(?P<tier>[^:@]+):)?(?P<step>\d{1,10})(?:@(?P<attempt>\d{1,6}|a\d{1,6}(?:-\d{1,12})?(?:-[0-9a-f]{8})?))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """What was asked for; None: the nearest tier, the newest step, the newest attempt that has it complete."""

    tier: str | None = None
    step: int | None = None
    attempt: str | None = None
    """As `sm_tiered.cli.holdings.is_of` knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A complete checkpoint on one tier, which is open, with the records of all ranks."""

    settings: TierSettings
    tier: Tier
    checkpoint: CheckpointId
    records: tuple[Record, ...]

    @property
    def durable(self) -> bool:
        """Whether its tier needs a manifest."""
        return is_durable(self.settings)

    @property
    def label(self) -> str:
        """Tier and step, for people."""
        return f"{self.settings.name} step {self.checkpoint.step}"

    def as_json(self) -> dict[str, object]:
        """Return what it is, for programs."""
        return {
            "tier": self.settings.name,
            "step": self.checkpoint.step,
            "attempt": str(self.checkpoint.attempt),
            "world": self.records[0].world,
        }


def parse_which(text: str, *, name: str) -> Which:
    """Return the checkpoint that *text* means: ``STEP``, ``TIER:STEP``, ``STEP@ATTEMPT`` or ``TIER:STEP@ATTEMPT``.

    An attempt is its ordinal, what ``sm-tiered ls`` calls it, or its whole name.

    Raises:
        ConfigError: it means none; *name* is what the argument is called.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        hint = "Write STEP, TIER:STEP or TIER:STEP@ATTEMPT, e.g. 200, s3:200 or s3:200@2."
        raise ConfigError(f"{name}: {clean(text)[:80]!r} names no checkpoint", hint=hint)
    attempt = found["attempt"]
    if attempt is not None and attempt.isdecimal():
        attempt = f"a{int(attempt)}"
    return Which(tier=found["tier"], step=layout.check_step(int(found["step"]), name=name), attempt=attempt)


@contextmanager
def chosen(settings: Settings, which: Which) -> Generator[Chosen, None, None]:
    """Give the checkpoint that is meant, from the first tier of the recipe that has it complete.

    What a restore goes on without when it is silent, this does too, and says so.

    Raises:
        CheckpointNotFoundError: there is none, or it is not complete.
        CorruptPartError: what says that it is one is damaged.
        ConfigError: there is no such tier.
        TierError: a tier did not answer; naming another one goes without it.
    """
    with opened(settings, chosen_tiers(settings, which.tier)) as tiers:
        _check_answered(tiers)
        try:
            held = _newest(tiers) if which.step is None else tiers.find(which.step, which.attempt)
            _check_answered(tiers)
        finally:
            for silent, error in tiers.errors.items():
                note_left_out(silent, error)
        name = next(name for name in tiers.tiers if held.complete_on(name))
        tier_settings, tier = tiers.tiers[name]
        records = held.holdings[name].records
        yield Chosen(
            settings=tier_settings,
            tier=tier,
            checkpoint=held.checkpoint,
            records=tuple(record_from_json(data) for _, data in sorted(records.items())),
        )


def _check_answered(tiers: Opened) -> None:
    """Refuse to choose while a tier is silent, unless a restore goes on without it: it may hold what is meant."""
    for name, error in tiers.errors.items():
        if name in tiers.settings.optional and len(tiers.tiers) > 1:
            continue
        error.hint = error.hint or "Name a tier that answers: --tier, or TIER:STEP."
        raise error


def _newest(tiers: Opened) -> Held:
    """Return the first complete checkpoint in the order in which a restore tries them."""
    found = {checkpoint for listed in tiers.listed.values() for checkpoint in listed}
    refused: TieredError | None = None
    for checkpoint in lineage.candidates(found, tiers.attempts, tiers.damaged - set(tiers.attempts)):
        try:
            return tiers.find(checkpoint.step, str(checkpoint.attempt))
        except (CheckpointNotFoundError, CorruptPartError) as error:
            refused = refused or error
    for error in tiers.errors.values():
        raise error  # it may hold something: nobody can tell
    raise refused or CheckpointNotFoundError("nothing was saved yet", hint="`sm-tiered ls` lists what each tier has.")
