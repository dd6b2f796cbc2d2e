"""The facts that policies decide on, and the checks that their fields have in common."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import cast

from sm_tiered.errors import PolicyError
from sm_tiered.records import CheckpointId

__all__ = [
    "CommittedCheckpoint",
    "Need",
    "SaveContext",
    "check_count",
    "check_metric",
    "check_metrics",
    "check_secs",
    "describe",
]

_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxother = 60, 200


class Need(Enum):
    """What a save policy looks at beyond the step: facts that ranks must exchange before they can agree."""

    CLOCK = "clock"
    """Time; rank 0's clock decides."""
    METRICS = "metrics"
    """Metrics; rank 0's decide."""
    SIGNAL = "signal"
    """Signals, by whichever rank saw them."""
    REQUEST = "request"
    """Requests, by whichever rank saw them."""
    COST = "cost"
    """How long saves block training; the slowest rank's counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveContext:
    """All that a save policy may look at, for one tier at one step."""

    step: int
    now: float
    """Seconds by rank 0's clock."""
    started_at: float
    """When training began, by the same clock."""
    last_saved_step: int | None = None
    """The newest step that was saved to this tier; None: none yet."""
    last_saved_at: float | None = None
    """When that was, by the same clock."""
    preempted: bool = False
    """Whether any rank was told to stop."""
    requested: bool = False
    """Whether somebody has asked for a save, as any rank saw."""
    failed: bool = False
    """Whether an exception has left the training."""
    epochs_ended: int | None = None
    """How many epochs are over, where one ends with this step; None within one. Every rank's own trainer says so."""
    ending: bool = False
    """Whether training is over; every rank is told so by its own trainer."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    saved_metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Lowest and highest value of each metric over the checkpoints that were saved to this tier."""
    cost_secs: float | None = None
    """How long a save blocks training on the slowest rank, typical of the last ones; None: none was measured yet."""
    failures: int = 0
    """How many failures have been seen in this namespace that this tier is there for."""
    observed_secs: float = 0.0
    """For how long they have been counted: since the first attempt began."""

    @property
    def secs_since_saved(self) -> float:
        """Seconds since the last save to this tier, or since the start; a clock that went back counts as no time."""
        return max(0.0, self.now - (self.started_at if self.last_saved_at is None else self.last_saved_at))


@dataclass(frozen=True, slots=True, kw_only=True)
class CommittedCheckpoint:
    """All that a keep policy may know of a checkpoint."""

    checkpoint: CheckpointId
    saved_at: float
    """UTC seconds since the epoch, by the clock of rank 0 at that time."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


def check_count(owner: str, value: object, *, hint: str) -> int:
    """Return *value* as an integer of at least 1.

    Raises:
        PolicyError: otherwise; *hint* says what to do about a value below 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        did_you_mean = f"Did you mean {value}?" if isinstance(value, str) and value.isdigit() else "Give an integer."
        raise PolicyError(f"{owner}: n must be an int, got {describe(value)}", hint=did_you_mean)
    if value < 1:
        raise PolicyError(f"{owner}: n must be at least 1, got {value}", hint=hint)
    return value


def check_metric(owner: str, metric: object, mode: object) -> None:
    """See that *metric* is a name and *mode* one of ``min`` and ``max``.

    Raises:
        PolicyError: otherwise.
    """
    if not isinstance(metric, str) or not metric:
        raise PolicyError(f"{owner} needs metric, a name; got {describe(metric)}", hint="E.g. metric: val_loss.")
    if mode not in ("min", "max"):
        raise PolicyError(f"{owner}: mode is {describe(mode)}", hint="Choose min or max: which value is better.")


def check_secs(owner: str, value: object, *, name: str = "secs") -> float:
    """Return *value* as a duration in seconds, above 0 and finite.

    Raises:
        PolicyError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        hint = "Seconds, without a unit, e.g. 1800."
        raise PolicyError(f"{owner}: {name} must be a number, got {describe(value)}", hint=hint)
    if not (math.isfinite(value) and value > 0):
        raise PolicyError(f"{owner}: {name} must be above 0 and finite, got {value}", hint="Seconds, e.g. 1800.")
    return float(value)


def check_metrics(metrics: Mapping[str, object], *, wanted: Iterable[str] = ()) -> dict[str, float]:
    """Return *metrics* as floats. NaN and infinity pass: a diverged run is still saved, it is only never the best.

    Raises:
        PolicyError: a value is no number, or metrics are given and one that a keep policy wants is not among them.
    """
    given = cast(object, metrics)
    if not isinstance(given, Mapping):
        raise PolicyError(f"metrics must be a mapping, got {describe(metrics)}", hint="Pass {'val_loss': 0.5}.")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(cast(object, name), str):
            raise PolicyError(f"the name of a metric must be text, got {describe(name)}", hint="Pass a str.")
        number = _number(value)
        if number is None:
            raise PolicyError(
                f"metric {_SHORT.repr(name)} must be a number, got {describe(value)}", hint="Pass float(value)."
            )
        found[name] = number
    missing = sorted(set(wanted) - set(found))
    if found and missing:
        raise PolicyError(
            f"metric {missing[0]!r} not in metrics; have {_SHORT.repr(sorted(found))}",
            hint="keep: best ranks checkpoints by it: pass it with the save, or correct its name in the policy.",
        )
    return found


def _number(value: object) -> float | None:
    """A float of anything that says it is one number: NumPy's and torch's 0-dim values too."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def describe(value: object) -> str:
    """Return type and value for a message: short, on one line, and without failing whatever *value* is."""
    if value is None:
        return "None"
    return f"{type(value).__name__} {_SHORT.repr(value)}"
