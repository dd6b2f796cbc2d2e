"""Which checkpoint a command is about: that of a step, as a restore would choose it, and the tiers that hold it."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sm_tiered import lineage
from sm_tiered.cli.common import is_durable, open_for_looking
from sm_tiered.cli.output import clean
from sm_tiered.errors import CheckpointNotFoundError, ConfigError, CorruptPartError, TieredError, TierError
from sm_tiered.inventory import Holding, list_checkpoints, read_attempts, read_holding
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId
from sm_tiered.settings import MemorySettings, Settings, TierSettings
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier

__all__ = [
    "Held",
    "Opened",
    "check_attempt",
    "errors_json",
    "is_damaged",
    "is_of",
    "open_memory",
    "opened",
    "ranks_text",
]

_ATTEMPT = re.compile(r"a\d{1,6}(-[0-9a-f]{8})?|a\d{6}-\d{1,12}-[0-9a-f]{8}", re.ASCII)
_SHOWN_STEPS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One checkpoint, and what each tier that answered holds of it."""

    checkpoint: CheckpointId
    holdings: Mapping[str, Holding]
    """By tier."""

    def complete_on(self, name: str) -> bool:
        """Return whether that tier holds it complete."""
        found = self.holdings.get(name)
        return found is not None and found.problem is None


@dataclass(slots=True, kw_only=True)
class Opened:
    """Tiers of a recipe, opened for looking."""

    settings: Settings
    tiers: dict[str, tuple[TierSettings, Tier]]
    errors: dict[str, TieredError] = field(default_factory=dict[str, TieredError])
    """Tiers that did not answer, and why."""
    listed: dict[str, list[CheckpointId]] = field(default_factory=dict[str, list[CheckpointId]])
    """By tier, oldest first."""
    attempts: dict[Attempt, AttemptRecord] = field(default_factory=dict[Attempt, AttemptRecord])
    damaged: set[Attempt] = field(default_factory=set[Attempt])

    def look(self) -> None:
        """List every tier; what does not answer is noted in `errors`."""
        for name, (_, tier) in self.tiers.items():
            try:
                self.listed[name] = list_checkpoints(tier)
                good, bad = read_attempts(tier)
            except TierError as error:
                self.errors[name] = error
                continue
            self.attempts |= good
            self.damaged |= bad

    def in_order(self) -> list[CheckpointId]:
        """Return all checkpoints as restore would try them; what is no candidate comes last, newest first."""
        found = {checkpoint for listed in self.listed.values() for checkpoint in listed}
        candidates = lineage.candidates(found, self.attempts, self.damaged - set(self.attempts))
        return candidates + sorted(found.difference(candidates), reverse=True)

    def find(self, step: int, attempt: str | None, *, needs: Iterable[str] | None = None) -> Held:
        """Return the first checkpoint of *step*, and of *attempt* if one is named, that a tier of *needs* has complete.

        *needs* None: any tier.

        Raises:
            CheckpointNotFoundError: there is none; the hint says which steps there are, or what is missing.
            CorruptPartError: what there is of it is damaged.
            TierError: none is found, and a tier did not answer.
        """
        wanted = set(self.listed if needs is None else needs) & set(self.listed)
        problems: list[str] = []
        damaged = False
        for checkpoint in self.in_order():
            if checkpoint.step != step or not is_of(checkpoint.attempt, attempt):
                continue
            held = Held(checkpoint=checkpoint, holdings=self._holdings(checkpoint))
            if any(held.complete_on(name) for name in wanted):
                return held
            problems += [f"{name}: {found.problem or 'complete'}" for name, found in held.holdings.items()]
            damaged |= any(map(is_damaged, held.holdings.values()))
        raise self._absent(step, attempt, problems, damaged=damaged)

    def _holdings(self, checkpoint: CheckpointId) -> dict[str, Holding]:
        found: dict[str, Holding] = {}
        for name, listed in self.listed.items():
            settings, tier = self.tiers[name]
            if checkpoint not in listed:
                continue
            try:
                found[name] = read_holding(tier, checkpoint, durable=is_durable(settings))
            except TierError as error:
                self.errors[name] = error
        return found

    def _absent(self, step: int, attempt: str | None, problems: list[str], *, damaged: bool) -> TieredError:
        which = f"step {step}" + (f" of {attempt}" if attempt else "")
        if problems:
            kind = CorruptPartError if damaged else CheckpointNotFoundError
            return kind(f"{which} is not complete where it is needed: {'; '.join(problems)}")
        for error in self.errors.values():
            return error  # it may be there: nobody can tell
        shown = [f"{name}: {_steps(listed)}" for name, listed in self.listed.items()]
        return CheckpointNotFoundError(f"{which} is on no tier", hint=f"There is: {'; '.join(shown)}.")


@contextmanager
def opened(settings: Settings, tiers: Iterable[TierSettings]) -> Generator[Opened, None, None]:
    """Open *tiers* of *settings* for looking, look, and close them again."""
    made: dict[str, tuple[TierSettings, Tier]] = {}
    try:
        for tier in tiers:
            made[tier.name] = (tier, open_for_looking(tier, settings.namespace, patient=True))
        found = Opened(settings=settings, tiers=made)
        found.look()
        yield found
    finally:
        for _, tier in made.values():
            tier.close()


def open_memory(settings: Settings) -> MemoryTier | None:
    """Return this node's memory tier, able to keep files from being recycled; None where nothing was ever saved.

    Raises:
        ConfigError: the recipe has none.
    """
    memory: MemorySettings | None = settings.memory
    if memory is None:
        names = ", ".join(tier.name for tier in settings.tiers)
        raise ConfigError("the recipe has no memory tier", hint=f"It has: {names}.")
    return MemoryTier(memory, settings.namespace) if (Path(memory.path) / settings.namespace).is_dir() else None


def check_attempt(value: str | None) -> str | None:
    """Return *value* when it can name an attempt, as `ls` shows it or in full.

    Raises:
        ConfigError: otherwise.
    """
    if value is not None and not _ATTEMPT.fullmatch(value):
        hint = "Write it as `sm-tiered ls` shows it, e.g. a2."
        raise ConfigError(f"--attempt: {clean(value)[:60]!r} is no attempt", hint=hint)
    return value


def is_damaged(held: Holding) -> bool:
    """Return whether it counts as a checkpoint and something is wrong with it."""
    committed = held.manifest is not None and not held.manifest.tombstone
    return held.damaged or (committed and held.problem is not None)


def is_of(attempt: Attempt, name: str | None) -> bool:
    """Return whether *name* means *attempt*; None means any."""
    short = f"a{attempt.ordinal}"
    return name is None or name in (short, f"{short}-{attempt.nonce}", str(attempt))


def errors_json(errors: Mapping[str, TieredError]) -> dict[str, object]:
    """Return *errors*, by tier, for programs."""
    return {
        name: {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        for name, error in errors.items()
    }


def ranks_text(ranks: Sequence[int]) -> str:
    """Return *ranks*, ascending, for people."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _steps(listed: list[CheckpointId]) -> str:
    steps = sorted({checkpoint.step for checkpoint in listed}, reverse=True)
    if not steps:
        return "nothing"
    more = f" and {len(steps) - _SHOWN_STEPS} more" if len(steps) > _SHOWN_STEPS else ""
    return f"steps {', '.join(map(str, steps[:_SHOWN_STEPS]))}{more}"
