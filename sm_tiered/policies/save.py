"""When to save to a tier: each policy answers from a `SaveContext` alone; clocks and other ranks are never asked.

Step 0, the untrained state, is saved only where a policy names it (`AtSteps`, `OnEnd`, `OnPreemption`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

from sm_tiered.errors import ConfigError, PolicyError
from sm_tiered.layout import check_step
from sm_tiered.policies.context import Need, SaveContext, check_count, check_secs, describe

__all__ = [
    "AllOf",
    "AnyOf",
    "AtSteps",
    "EveryNEpochs",
    "EveryNSteps",
    "EverySecs",
    "OnEnd",
    "OnPreemption",
    "SavePolicy",
    "ask",
    "needs_of",
]

_STEP_ONLY: frozenset[Need] = frozenset()


@runtime_checkable
class SavePolicy(Protocol):
    """Decides when to save. Anything with these two members is one."""

    @property
    def needs(self) -> frozenset[Need]:
        """What the answer depends on beyond the step; empty: every rank comes to it alone."""
        ...

    def should_save(self, context: SaveContext) -> bool:
        """Whether to save now. Must depend on *context* only."""
        ...


class _Composable:
    """``a | b`` and ``a & b``, with any other policy on either side."""

    __slots__ = ()

    def __or__(self, other: SavePolicy) -> AnyOf:
        return _joined(AnyOf, self, other)

    def __ror__(self, other: SavePolicy) -> AnyOf:
        return _joined(AnyOf, other, self)

    def __and__(self, other: SavePolicy) -> AllOf:
        return _joined(AllOf, self, other)

    def __rand__(self, other: SavePolicy) -> AllOf:
        return _joined(AllOf, other, self)


@dataclass(frozen=True, slots=True)
class EveryNSteps(_Composable):
    """Save when the step is a multiple of *n*; step 0 never."""

    n: int

    def __post_init__(self) -> None:
        check_count("EveryNSteps", self.n, hint="Leave the save policy out (or None) to turn the tier's saves off.")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the step."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether the step is a multiple."""
        return context.step > 0 and context.step % self.n == 0


@dataclass(frozen=True, slots=True)
class EveryNEpochs(_Composable):
    """Save where an epoch ends, if as many are over as a multiple of *n*."""

    n: int

    def __post_init__(self) -> None:
        check_count("EveryNEpochs", self.n, hint="Leave the save policy out (or None) to turn the tier's saves off.")

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing to exchange: every rank's trainer says so itself."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether such an epoch ends with the step."""
        return bool(context.epochs_ended) and context.epochs_ended % self.n == 0


@dataclass(frozen=True, slots=True)
class EverySecs(_Composable):
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
        since = context.started_at if context.last_saved_at is None else context.last_saved_at
        return context.step > 0 and max(0.0, context.now - since) >= self.secs


@dataclass(frozen=True, slots=True)
class AtSteps(_Composable):
    """Save at exactly these steps; 0 may be one."""

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", _checked_steps(steps))

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing but the step."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether the step is one of them."""
        return context.step in self.steps


@dataclass(frozen=True, slots=True)
class OnEnd(_Composable):
    """Save when training is over."""

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing to exchange: every rank's trainer says so itself."""
        return _STEP_ONLY

    def should_save(self, context: SaveContext) -> bool:
        """Whether training is over."""
        return context.ending


@dataclass(frozen=True, slots=True)
class OnPreemption(_Composable):
    """Save once any rank was told to stop."""

    @property
    def needs(self) -> frozenset[Need]:
        """Signals: one rank may see one that the others do not."""
        return frozenset({Need.SIGNAL})

    def should_save(self, context: SaveContext) -> bool:
        """Whether a rank was told to stop."""
        return context.preempted


@dataclass(frozen=True, slots=True)
class AnyOf(_Composable):
    """Save when at least one of *policies* says so. All are asked, so that a broken one can't hide behind another."""

    policies: tuple[SavePolicy, ...]

    def __init__(self, policies: Iterable[SavePolicy]) -> None:
        object.__setattr__(self, "policies", _checked_policies("AnyOf", policies))

    @property
    def needs(self) -> frozenset[Need]:
        """What any of them needs."""
        return _union(self.policies)

    def should_save(self, context: SaveContext) -> bool:
        """Whether one says so."""
        answers = [ask(policy, context) for policy in self.policies]
        return any(answers)


@dataclass(frozen=True, slots=True)
class AllOf(_Composable):
    """Save when every one of *policies* says so. All are asked."""

    policies: tuple[SavePolicy, ...]

    def __init__(self, policies: Iterable[SavePolicy]) -> None:
        object.__setattr__(self, "policies", _checked_policies("AllOf", policies))

    @property
    def needs(self) -> frozenset[Need]:
        """What any of them needs."""
        return _union(self.policies)

    def should_save(self, context: SaveContext) -> bool:
        """Whether all say so."""
        answers = [ask(policy, context) for policy in self.policies]
        return all(answers)


_Joint = TypeVar("_Joint", AnyOf, AllOf)


def ask(policy: SavePolicy, context: SaveContext) -> bool:
    """Return the answer of *policy*, which may be a user's.

    Raises:
        PolicyError: it raised, or answered with something else than True or False; names the policy and the step.
    """
    try:
        answer = cast(object, policy.should_save(context))
    except PolicyError:
        raise
    except Exception as error:
        text = f"policy {describe(policy)} raised {type(error).__name__}: {str(error)[:500]!r}"
        raise PolicyError(text, hint="Nothing was decided: correct the policy.", step=context.step) from error
    if not isinstance(answer, bool):
        text = f"policy {describe(policy)} answered {describe(answer)}"
        raise PolicyError(text, hint="should_save must return True or False.", step=context.step)
    return answer


def needs_of(policy: SavePolicy) -> frozenset[Need]:
    """Return what *policy*, which may be a user's, needs beyond the step.

    Raises:
        PolicyError: it does not say, or says something else than a set of `Need`.
    """
    hint = "needs must be a frozenset of Need."
    try:
        needs = cast(object, policy.needs)
        found = frozenset(cast("Iterable[object]", needs))
    except Exception as error:
        text = f"policy {describe(policy)} does not say what it needs: {type(error).__name__}: {str(error)[:500]!r}"
        raise PolicyError(text, hint=hint) from error
    if not all(isinstance(need, Need) for need in found):
        raise PolicyError(f"policy {describe(policy)} needs {describe(needs)}", hint=hint)
    return cast("frozenset[Need]", found)


def _joined(kind: type[_Joint], left: object, right: object) -> _Joint:
    if not (isinstance(left, SavePolicy) and isinstance(right, SavePolicy)):
        return NotImplemented
    members: list[SavePolicy] = []
    for side in (left, right):
        members += side.policies if isinstance(side, kind) else (side,)
    return kind(members)


def _checked_policies(owner: str, policies: Iterable[object]) -> tuple[SavePolicy, ...]:
    found = tuple(policies)
    if not found:
        raise PolicyError(f"{owner} of no policies can't decide anything", hint="Name at least one policy.")
    for policy in found:
        if not isinstance(policy, SavePolicy):
            hint = "A save policy has should_save(context) and needs."
            raise PolicyError(f"{owner}: {describe(policy)} is no save policy", hint=hint)
    return cast("tuple[SavePolicy, ...]", found)


def _checked_steps(steps: Iterable[object]) -> tuple[int, ...]:
    try:
        found = {check_step(step) for step in steps}
    except (ConfigError, TypeError) as error:
        wrong = f"steps must be a list of ints, got {describe(steps)}"
        text = error.message if isinstance(error, ConfigError) else wrong
        raise PolicyError(f"AtSteps: {text}", hint="Each must be an int, 0 <= step < 10**10.") from error
    if not found:
        raise PolicyError("AtSteps of no steps never saves", hint="Name at least one step, or leave the policy out.")
    return tuple(sorted(found))


def _union(policies: Iterable[SavePolicy]) -> frozenset[Need]:
    return frozenset[Need]().union(*(needs_of(policy) for policy in policies))
