"""What happened, as typed values; `sm_tiered.event_log` tells them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, cast

__all__ = [
    "AttemptOpened",
    "CandidateRefused",
    "Committed",
    "CopyRefused",
    "DrainerStarted",
    "DurableSkipped",
    "Event",
    "MemoryTight",
    "NewerAttemptSeen",
    "NothingSaved",
    "Preempted",
    "Progress",
    "PromoteFailed",
    "PromoteStarted",
    "Pruned",
    "RestoreStarted",
    "Restored",
    "SaveAcknowledged",
    "SaveDurable",
    "SaveFailed",
    "SaveRequested",
    "SaveSkipped",
    "SaveStaged",
    "SaveStreamed",
    "StructureReplanned",
    "TierUnreachable",
    "TrainingEnded",
    "plain",
]

MAX_TEXT = 500
"""Longer text in an event is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened. *text* is filled in with the fields."""

    level: ClassVar[int] = logging.INFO
    text: ClassVar[str] = ""
    alike: ClassVar[bool] = False
    """Whether every rank tells the same: then the logs of all but rank 0 have it at DEBUG only."""

    def facts(self) -> dict[str, object]:
        """The fields as JSON values; outside text is cut and can't forge a line or steer a terminal."""
        return {entry.name: plain(getattr(self, entry.name)) for entry in fields(self)}

    def message(self) -> str:
        """One line for a person."""
        facts = self.facts()
        try:
            return self.text.format_map(facts)
        except (TypeError, ValueError, LookupError):  # a field of another type than promised must not stop training
            return f"{type(self).__name__} {facts}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStaged(Event):
    """This rank's bytes are copied; training goes on."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "step {step}: staged {bytes} bytes for {tiers}, training was blocked for {blocked_secs:.3f} s"
    step: int
    tiers: tuple[str, ...]
    blocked_secs: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveAcknowledged(Event):
    """All ranks' records are written in memory."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "step {step}: acknowledged in memory after {secs:.3f} s"
    step: int
    secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(Event):
    """A due save was left out, on all ranks alike."""

    alike: ClassVar[bool] = True
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step}: save skipped: {reason}"
    step: int
    reason: str
    tier: str | None = None
    """The tier that does without; None: it is not known which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """A save did not happen on one tier."""

    level: ClassVar[int] = logging.ERROR
    text: ClassVar[str] = "step {step}: save to {tier} failed: {error}"
    step: int
    tier: str
    error: BaseException | str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStreamed(Event):
    """The trainer wrote to a durable tier itself, because memory could not be used."""

    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step}: streamed to {tier} by the trainer in {secs:.3f} s: {reason}"
    step: int
    tier: str
    reason: str
    secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDurable(Event):
    """A durable tier has the save, as the trainer learns it: at its next save, or where it waits."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "step {step}: durable on {tier} after {secs:.3f} s, {lag_steps} steps behind the newest save"
    step: int
    tier: str
    secs: float
    """Since the save began, until it was seen."""
    lag_steps: int
    """How far the newest save is beyond it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DurableSkipped(Event):
    """A due durable save gave way to a newer one."""

    alike: ClassVar[bool] = True
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step}: not promoted to {tier}: {reason}"
    step: int
    tier: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteStarted(Event):
    """Upload began."""

    text: ClassVar[str] = "step {step}: promoting to {tier}"
    step: int
    tier: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed(Event):
    """A durable tier shows the checkpoint."""

    text: ClassVar[str] = "step {step}: committed on {tier}, {bytes} bytes in {secs:.3f} s"
    step: int
    tier: str
    secs: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteFailed(Event):
    """A durable save ended without a commit."""

    level: ClassVar[int] = logging.ERROR
    text: ClassVar[str] = "step {step}: promotion to {tier} failed: {error}"
    step: int
    tier: str
    error: BaseException | str


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateRefused(Event):
    """A newer checkpoint was passed over."""

    alike: ClassVar[bool] = True
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step} of {attempt} is not restored: {reason}"
    step: int
    attempt: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyRefused(Event):
    """The nearest copy of what is restored was missing or damaged: another tier's was used."""

    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step}: not from the nearest copy, {reason}"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreStarted(Event):
    """A restore began; *step* None: of the latest."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "restoring step {step} (None: the latest)"
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """The state is that of the checkpoint."""

    text: ClassVar[str] = "restored step {step} of {attempt} from {tier}, {bytes} bytes in {secs:.3f} s"
    step: int
    attempt: str
    tier: str
    secs: float
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NothingSaved(Event):
    """All tiers answered, and nothing was ever saved."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "nothing was ever saved in this namespace: training starts from the beginning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned(Event):
    """The keep policy gave these up."""

    text: ClassVar[str] = "pruned from {tier}: steps {steps}"
    tier: str
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTight(Event):
    """The memory tier fits, and the machine's limits may not allow it to be filled."""

    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{warning}"
    warning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewerAttemptSeen(Event):
    """Another launch took the namespace over; this one deletes nothing any more."""

    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "a newer attempt uses this namespace: {attempt}; nothing is deleted from here on"
    attempt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptOpened(Event):
    """A lineage of saves begins."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "opened {attempt}, parent step {parent_step}, chosen by the user: {chosen}"
    attempt: str
    parent_step: int | None
    chosen: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainerStarted(Event):
    """The node's drainer runs."""

    text: ClassVar[str] = "drainer started, pid {pid}"
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StructureReplanned(Event):
    """The state's structure changed, so all ranks planned again."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "step {step}: planned again: {reason}"
    step: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """A rank was told to stop."""

    alike: ClassVar[bool] = True
    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "step {step}: told to stop"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRequested(Event):
    """Somebody asked the running job for a save; it is taken with this step."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "step {step}: a save was asked for"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(Event):
    """The training has come to this step. Told by rank 0 now and then, so that a ledger sees where a failure struck."""

    level: ClassVar[int] = logging.DEBUG
    text: ClassVar[str] = "step {step}: training goes on"
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEnded(Event):
    """The training let go of its checkpoints in good order, after this step (None: none was seen)."""

    alike: ClassVar[bool] = True
    text: ClassVar[str] = "training ended after step {step}: {how}"
    step: int | None
    how: str
    """``finished``, ``closed`` or ``failed`` (an exception left the loop). A kill tells nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierUnreachable(Event):
    """A tier did not answer."""

    level: ClassVar[int] = logging.WARNING
    text: ClassVar[str] = "{tier} does not answer: {error}"
    tier: str
    error: BaseException | str


def plain(value: object) -> object:
    """Return *value* as JSON; text is cut and its control characters are escaped."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in cast("list[object]", value)]
    if isinstance(value, Mapping):
        entries = cast("Mapping[object, object]", value)
        return {str(plain(str(key))): plain(entry) for key, entry in entries.items()}
    text = f"{type(value).__name__}: {value}" if isinstance(value, BaseException) else str(value)
    text = text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
