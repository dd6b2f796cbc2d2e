"""Which checkpoints a tier keeps: each policy maps a sequence, oldest first, to a sequence of bools.

The newest is kept whatever the policy says, and callers protect more (pins, parents, what is in flight).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast, runtime_checkable

from sm_tiered.errors import PolicyError
from sm_tiered.policies.context import CommittedCheckpoint, check_count, check_metric, check_secs, describe
from sm_tiered.policies.when import check_steps

__all__ = [
    "AllOfKeep",
    "AnyOfKeep",
    "Best",
    "KeepAtSteps",
    "KeepEveryNSteps",
    "KeepPolicy",
    "Latest",
    "NewerThanSecs",
    "NotKeep",
    "ask_keep",
    "most_kept",
    "wanted_metrics",
]

_NO_ROOM = "That would delete every checkpoint; keep at least 1."


@runtime_checkable
class KeepPolicy(Protocol):
    """Decides which checkpoints stay. Anything with this member is one."""

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Return for each whether it stays, in the same order: by (attempt, step), the newest last."""
        ...


class _Composable:
    """``a | b``, ``a & b`` and ``~a``, with any other policy on either side."""

    __slots__ = ()

    def __or__(self, other: KeepPolicy) -> AnyOfKeep:
        return _joined(AnyOfKeep, self, other)

    def __ror__(self, other: KeepPolicy) -> AnyOfKeep:
        return _joined(AnyOfKeep, other, self)

    def __and__(self, other: KeepPolicy) -> AllOfKeep:
        return _joined(AllOfKeep, self, other)

    def __rand__(self, other: KeepPolicy) -> AllOfKeep:
        return _joined(AllOfKeep, other, self)

    def __invert__(self) -> NotKeep:
        return NotKeep(cast("KeepPolicy", self))


@dataclass(frozen=True, slots=True)
class Latest(_Composable):
    """Keep the *n* newest."""

    n: int

    def __post_init__(self) -> None:
        check_count("Latest", self.n, hint=_NO_ROOM)

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep the last *n*."""
        return [index >= len(checkpoints) - self.n for index in range(len(checkpoints))]


@dataclass(frozen=True, slots=True)
class KeepEveryNSteps(_Composable):
    """Keep those whose step is a multiple of *n*, for good. 0 is a multiple."""

    n: int

    def __post_init__(self) -> None:
        check_count("KeepEveryNSteps", self.n, hint="To keep every checkpoint give 1.")

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep the multiples."""
        return _with_newest([entry.checkpoint.step % self.n == 0 for entry in checkpoints])


@dataclass(frozen=True, slots=True)
class KeepAtSteps(_Composable):
    """Keep exactly these steps, for good."""

    steps: tuple[int, ...]

    def __init__(self, steps: Iterable[int]) -> None:
        object.__setattr__(self, "steps", check_steps("KeepAtSteps", steps))

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep those."""
        return _with_newest([entry.checkpoint.step in self.steps for entry in checkpoints])


@dataclass(frozen=True, slots=True)
class NewerThanSecs(_Composable):
    """Keep those saved less than *secs* before the newest one; no clock is asked, so a skewed one deletes nothing."""

    secs: float

    def __post_init__(self) -> None:
        check_secs("NewerThanSecs", self.secs)

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep the young; what claims to be from the future is young."""
        if not checkpoints:
            return []
        newest = checkpoints[-1].saved_at
        return _with_newest([newest - entry.saved_at < self.secs for entry in checkpoints])


@dataclass(frozen=True, slots=True)
class Best(_Composable):
    """Keep the *n* best by a metric; of equals the newer. One without that metric, or with NaN, is never best."""

    metric: str
    mode: str
    """``min`` or ``max``: which is better."""
    n: int = 1

    def __post_init__(self) -> None:
        check_metric("Best", self.metric, self.mode)
        check_count("Best", self.n, hint=_NO_ROOM)

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep the best."""
        sign = 1.0 if self.mode == "max" else -1.0
        scored = [
            (sign * entry.metrics[self.metric], index)
            for index, entry in enumerate(checkpoints)
            if math.isfinite(entry.metrics.get(self.metric, math.nan))
        ]
        best = {index for _, index in sorted(scored, reverse=True)[: self.n]}
        return _with_newest([index in best for index in range(len(checkpoints))])


@dataclass(frozen=True, slots=True)
class AnyOfKeep(_Composable):
    """Keep what at least one of *policies* keeps."""

    policies: tuple[KeepPolicy, ...]

    def __init__(self, policies: Iterable[KeepPolicy]) -> None:
        object.__setattr__(self, "policies", _checked_policies("AnyOfKeep", policies))

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep what one keeps."""
        answers = [ask_keep(policy, checkpoints) for policy in self.policies]
        return [any(row) for row in zip(*answers, strict=True)]


@dataclass(frozen=True, slots=True)
class AllOfKeep(_Composable):
    """Keep what every one of *policies* keeps."""

    policies: tuple[KeepPolicy, ...]

    def __init__(self, policies: Iterable[KeepPolicy]) -> None:
        object.__setattr__(self, "policies", _checked_policies("AllOfKeep", policies))

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep what all keep."""
        answers = [ask_keep(policy, checkpoints) for policy in self.policies]
        return [all(row) for row in zip(*answers, strict=True)]


@dataclass(frozen=True, slots=True)
class NotKeep(_Composable):
    """Keep what *policy* does not keep, and the newest."""

    policy: KeepPolicy

    def __post_init__(self) -> None:
        _checked_policies("NotKeep", (self.policy,))

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
        """Keep the others."""
        return _with_newest([not kept for kept in ask_keep(self.policy, checkpoints)])


_Joint = TypeVar("_Joint", AnyOfKeep, AllOfKeep)


def ask_keep(policy: KeepPolicy, checkpoints: Sequence[CommittedCheckpoint]) -> list[bool]:
    """Return the answer of *policy*, which may be a user's, with the newest always kept.

    Raises:
        PolicyError: it raised, or did not answer with one True or False for each; then nothing may be deleted.
    """
    try:
        answer = cast(object, policy.keep(checkpoints))
    except PolicyError:
        raise
    except Exception as error:
        text = f"policy {describe(policy)} raised {type(error).__name__}: {str(error)[:500]!r}"
        raise PolicyError(text, hint="Nothing was deleted: correct the policy.") from error
    flags = list(cast("list[object]", answer)) if isinstance(answer, list) else [None]
    if len(flags) != len(checkpoints) or not all(isinstance(flag, bool) for flag in flags):
        text = f"policy {describe(policy)} answered {describe(cast(object, answer))} for {len(checkpoints)} checkpoints"
        raise PolicyError(text, hint="keep must return a list with one True or False for each; nothing was deleted.")
    return _with_newest(cast("list[bool]", flags))


def wanted_metrics(policy: KeepPolicy) -> frozenset[str]:
    """Return the names of the metrics that *policy* ranks checkpoints by."""
    if isinstance(policy, Best):
        return frozenset({policy.metric})
    if isinstance(policy, (AnyOfKeep, AllOfKeep)):
        return frozenset[str]().union(*(wanted_metrics(member) for member in policy.policies))
    return wanted_metrics(policy.policy) if isinstance(policy, NotKeep) else frozenset()


def most_kept(policy: KeepPolicy) -> int | None:
    """Return how many checkpoints *policy* and the rule of the newest keep at most; None: as many as there are."""
    if isinstance(policy, Latest):
        return policy.n
    if isinstance(policy, Best):
        return policy.n + 1
    if isinstance(policy, KeepAtSteps):
        return len(policy.steps) + 1
    if isinstance(policy, (AnyOfKeep, AllOfKeep)):
        counts = [most_kept(member) for member in policy.policies]
        known = [count for count in counts if count is not None]
        if isinstance(policy, AllOfKeep):
            return min(known, default=None)
        return sum(known) if len(known) == len(counts) else None
    return None


def _with_newest(flags: list[bool]) -> list[bool]:
    return [*flags[:-1], True] if flags else []


def _joined(kind: type[_Joint], left: object, right: object) -> _Joint:
    if not (isinstance(left, KeepPolicy) and isinstance(right, KeepPolicy)):
        return NotImplemented
    members: list[KeepPolicy] = []
    for side in (left, right):
        members += side.policies if isinstance(side, kind) else (side,)
    return kind(members)


def _checked_policies(owner: str, policies: Iterable[object]) -> tuple[KeepPolicy, ...]:
    found = tuple(policies)
    if not found:
        raise PolicyError(f"{owner} of no policies keeps nothing", hint="Name at least one policy.")
    for policy in found:
        if not isinstance(policy, KeepPolicy):
            raise PolicyError(f"{owner}: {describe(policy)} is no keep policy", hint="It needs keep(checkpoints).")
    return cast("tuple[KeepPolicy, ...]", found)
