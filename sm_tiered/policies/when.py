"""When to save: at steps, epochs and times, on what happens, and where a metric has improved.

Step 0, the untrained state, is saved only where a policy names it (`AtSteps`, `OnEnd`, `OnPreemption`, `OnRequest`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from sm_tiered.errors import ConfigError, PolicyError
from sm_tiered.layout import MAX_STEP, check_step
from sm_tiered.policies.context import Need, SaveContext, check_count, check_metric, check_secs, describe
from sm_tiered.policies.save import Composable

__all__ = [
    "AtSteps",
    "EveryNEpochs",
    "EveryNSteps",
    "EverySecs",
    "OnEnd",
    "OnException",
    "OnPreemption",
    "OnRequest",
    "WhenImproved",
]

_STEP_ONLY: frozenset[Need] = frozenset()
_TURN_OFF = "Leave the save policy out (or None) to turn the tier's saves off."


@dataclass(frozen=True, slots=True)
class EveryNSteps(Composable):
    """Save when the step is *offset* more than a multiple of *n*, from *start* to *stop*, both included; 0 never."""

    n: int
    offset: int = 0
    """0 <= offset < n."""
    start: int = 0
    stop: int | None = None
    """None: without an end."""

    def __post_init__(self) -> None:
        check_count("EveryNSteps", self.n, hint=_TURN_OFF)
        _check_step("EveryNSteps", "start", self.start)
        if not 0 <= _check_step("EveryNSteps", "offset", self.offset) < self.n:
            hint = f"Allowed: 0 <= offset < n, here up to {self.n - 1}."
            raise PolicyError(f"EveryNSteps: offset must be below n, got {self.offset}", hint=hint)
        if self.stop is not None and _check_step("EveryNSteps", "stop", self.stop) < self.start:
            text = f"EveryNSteps: stop {self.stop} is before start {self.start}: it never saves"
            raise PolicyError(text, hint="Allowed: start <= stop; both are included.")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the step."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether the step is one of them."""
        within = self.start <= context.step <= (MAX_STEP if self.stop is None else self.stop)
        return context.step > 0 and within and context.step % self.n == self.offset


@dataclass(frozen=True, slots=True)
class EveryNEpochs(Composable):
    """Save where an epoch ends, if as many are over as a multiple of *n*."""

    n: int

    def __post_init__(self) -> None:
        check_count("EveryNEpochs", self.n, hint=_TURN_OFF)

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing to exchange: every rank's trainer says so itself."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether such an epoch ends with the step."""
        return bool(context.epochs_ended) and context.epochs_ended % self.n == 0


@dataclass(frozen=True, slots=True)
class EverySecs(Composable):
    """Save when *secs* have passed since the last save to this tier, or since the start; step 0 never."""

    secs: float

    def __post_init__(self) -> None:
        check_secs("EverySecs", self.secs)

    @property
    def needs(self) -> frozenset[Need]:
        """The clock."""
        return frozenset({Need.CLOCK})

    def should_save(self, context: SaveContext) -> bool:
        """Whether the time has come; a clock that went back counts as no time."""
        return context.step > 0 and context.secs_since_saved >= self.secs


@dataclass(frozen=True, slots=True)
class AtSteps(Composable):
    """Save at exactly these steps; 0 may be one."""

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", check_steps("AtSteps", steps))

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the step."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether the step is one of them."""
        return context.step in self.steps


@dataclass(frozen=True, slots=True)
class WhenImproved(Composable):
    """Save where a metric is better, by more than *min_delta*, than in every checkpoint of this tier; the first counts.

    A step whose metrics lack it, and NaN and infinity, improve nothing.
    """

    metric: str
    mode: str
    """``min`` or ``max``: which is better."""
    min_delta: float = 0.0
    """In the metric's own unit, at least 0."""

    def __post_init__(self) -> None:
        check_metric("WhenImproved", self.metric, self.mode)
        delta = cast(object, self.min_delta)
        if isinstance(delta, bool) or not isinstance(delta, (int, float)) or not 0 <= delta < math.inf:
            text = f"WhenImproved: min_delta must be a number of at least 0, got {describe(delta)}"
            raise PolicyError(text, hint="0 takes any improvement.")

    @property
    def needs(self) -> frozenset[Need]:
        """The metrics."""
        return frozenset({Need.METRICS})

    def should_save(self, context: SaveContext) -> bool:
        """Whether it is better."""
        value = context.metrics.get(self.metric, math.nan)
        if not math.isfinite(value) or context.step == 0:
            return False
        if self.metric not in context.saved_metrics:
            return True
        lowest, highest = context.saved_metrics[self.metric]
        return (lowest - value if self.mode == "min" else value - highest) > self.min_delta


@dataclass(frozen=True, slots=True)
class OnEnd(Composable):
    """Save when training is over."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing to exchange: every rank's trainer says so itself."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether training is over."""
        return context.ending


@dataclass(frozen=True, slots=True)
class OnException(Composable):
    """Bring the newest step that is whole in memory here when an exception has left the training.

    Nothing is captured then, for the state may be half updated and other ranks may be gone: it is for durable tiers.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing to exchange: each rank brings what is its own."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether the training has failed."""
        return context.failed


@dataclass(frozen=True, slots=True)
class OnPreemption(Composable):
    """Save once any rank was told to stop."""

    @property
    def needs(self) -> frozenset[Need]:
        """Signals: one rank may see one that the others do not."""
        return frozenset({Need.SIGNAL})

    def should_save(self, context: SaveContext) -> bool:
        """Whether a rank was told to stop."""
        return context.preempted


@dataclass(frozen=True, slots=True)
class OnRequest(Composable):
    """Save when somebody asks the running job to: ``sm-tiered request``, or a file that appears on any rank's node."""

    file: str | None = None
    """An absolute path, looked for at each step and removed when its save begins; None: beside the checkpoints."""

    @property
    def needs(self) -> frozenset[Need]:
        """Requests: one rank may see one that the others do not."""
        return frozenset({Need.REQUEST})

    def should_save(self, context: SaveContext) -> bool:
        """Whether somebody has asked."""
        return context.requested


def check_steps(owner: str, steps: Iterable[object]) -> tuple[int, ...]:
    """Return *steps* in order, each once.

    Raises:
        PolicyError: one is none, or there are none.
    """
    try:
        found = {check_step(step) for step in steps}
    except (ConfigError, TypeError) as error:
        wrong = f"steps must be a list of ints, got {describe(steps)}"
        text = error.message if isinstance(error, ConfigError) else wrong
        raise PolicyError(f"{owner}: {text}", hint="Each must be an int, 0 <= step < 10**10.") from error
    if not found:
        raise PolicyError(f"{owner} of no steps never applies", hint="Name at least one step, or leave the policy out.")
    return tuple(sorted(found))


def _check_step(owner: str, name: str, value: object) -> int:
    try:
        return check_step(value, name=name)
    except ConfigError as error:
        raise PolicyError(f"{owner}: {error.message}", hint="An int, 0 <= step < 10**10.") from error
