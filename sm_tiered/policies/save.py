"""Save policies as such: what one is, how they combine, how they are asked. `when` and `costs` hold those we have.

Each answers from a `SaveContext` alone; clocks and other ranks are never asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

from sm_tiered.errors import PolicyError
from sm_tiered.policies.context import Need, SaveContext, describe

__all__ = ["AllOf", "AnyOf", "Composable", "Not", "SavePolicy", "ask", "members_of", "needs_of"]


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


class Composable:
    """``a | b``, ``a & b`` and ``~a``, with any other policy on either side."""

    __slots__ = ()

    def __or__(self, other: SavePolicy) -> AnyOf:
        return _joined(AnyOf, self, other)

    def __ror__(self, other: SavePolicy) -> AnyOf:
        return _joined(AnyOf, other, self)

    def __and__(self, other: SavePolicy) -> AllOf:
        return _joined(AllOf, self, other)

    def __rand__(self, other: SavePolicy) -> AllOf:
        return _joined(AllOf, other, self)

    def __invert__(self) -> Not:
        return Not(cast("SavePolicy", self))


@dataclass(frozen=True, slots=True)
class AnyOf(Composable):
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
class AllOf(Composable):
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


@dataclass(frozen=True, slots=True)
class Not(Composable):
    """Save when *policy* does not say so; step 0 never, for nobody names it by naming something else."""

    policy: SavePolicy

    def __post_init__(self) -> None:
        _checked_policies("Not", (self.policy,))

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs."""
        return needs_of(self.policy)

    def should_save(self, context: SaveContext) -> bool:
        """Whether it does not say so."""
        answer = ask(self.policy, context)
        return context.step > 0 and not answer


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


def members_of(policy: SavePolicy) -> Iterator[SavePolicy]:
    """Return *policy* or, where it is a combination, the single policies in it."""
    if isinstance(policy, (AnyOf, AllOf)):
        for member in policy.policies:
            yield from members_of(member)
    elif isinstance(policy, Not):
        yield from members_of(policy.policy)
    else:
        yield policy


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


def _union(policies: Iterable[SavePolicy]) -> frozenset[Need]:
    return frozenset[Need]().union(*(needs_of(policy) for policy in policies))
