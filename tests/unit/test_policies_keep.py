"""What to keep: every policy against what it promises, and the newest always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sm_tiered.errors import PolicyError
from sm_tiered.policies import (
    AllOfKeep,
    AnyOfKeep,
    Best,
    CommittedCheckpoint,
    KeepAtSteps,
    KeepEveryNSteps,
    KeepPolicy,
    Latest,
    NewerThanSecs,
    NotKeep,
    ask_keep,
    wanted_metrics,
)
from sm_tiered.records import Attempt, CheckpointId

ATTEMPTS = [Attempt(ordinal=n, utc_secs=100 + n, nonce="0123abcd") for n in range(3)]


def saved(step: int, *, at: float | None = None, attempt: int = 0, **metrics: float) -> CommittedCheckpoint:
    checkpoint = CheckpointId(attempt=ATTEMPTS[attempt], step=step)
    return CommittedCheckpoint(checkpoint=checkpoint, saved_at=float(step) if at is None else at, metrics=metrics)


def kept(policy: KeepPolicy, checkpoints: Sequence[CommittedCheckpoint]) -> list[int]:
    flags = ask_keep(policy, checkpoints)
    return [entry.checkpoint.step for entry, flag in zip(checkpoints, flags, strict=True) if flag]


@dataclass
class Own:
    answer: object

    def keep(self, checkpoints: Sequence[CommittedCheckpoint]) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


TEN = [saved(step) for step in range(10, 110, 10)]

POLICIES = st.recursive(
    st.one_of(
        st.builds(Latest, st.integers(1, 6)),
        st.builds(KeepEveryNSteps, st.integers(1, 40)),
        st.builds(NewerThanSecs, st.floats(0.1, 100)),
        st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 4)),
        st.builds(KeepAtSteps, st.lists(st.integers(0, 60), min_size=1, max_size=3)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(AnyOfKeep),
        st.lists(inner, min_size=1, max_size=3).map(AllOfKeep),
        inner.map(NotKeep),
    ),
    max_leaves=4,
)
CHECKPOINTS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 60), st.floats(-1e9, 1e9), st.sampled_from([None, math.nan, -1.0, 0.0, 2.5])
    ),
    max_size=12,
    unique_by=lambda row: row[:2],
).map(
    lambda rows: [
        saved(step, at=at, attempt=attempt, **({} if loss is None else {"loss": loss}))
        for attempt, step, at, loss in sorted(rows, key=lambda row: row[:2])
    ]
)


@given(POLICIES, CHECKPOINTS)
def test_the_newest_is_kept_whatever_the_policy(policy: KeepPolicy, checkpoints: list[CommittedCheckpoint]) -> None:
    flags = policy.keep(checkpoints)
    assert len(flags) == len(checkpoints)
    assert all(flags[-1:])
    assert flags == ask_keep(policy, checkpoints)


def test_latest_keeps_the_n_newest() -> None:
    assert kept(Latest(3), TEN) == [80, 90, 100]
    assert kept(Latest(30), TEN) == [entry.checkpoint.step for entry in TEN]
    assert Latest(3).keep([]) == []


def test_latest_means_the_newest_attempt_even_at_a_lower_step() -> None:
    assert kept(Latest(1), [saved(300), saved(110, attempt=1)]) == [110]


def test_every_n_steps_keeps_multiples_and_step_0() -> None:
    assert kept(KeepEveryNSteps(30), [saved(0), *TEN]) == [0, 30, 60, 90, 100]


def test_ages_are_counted_from_the_newest_checkpoint() -> None:
    assert kept(NewerThanSecs(20), TEN) == [90, 100]
    assert kept(NewerThanSecs(20.5), TEN) == [80, 90, 100]


def test_a_checkpoint_that_claims_to_be_from_the_future_is_young() -> None:
    assert kept(NewerThanSecs(20), [saved(10, at=1e9), saved(20, at=0.0), saved(30, at=100.0)]) == [10, 30]


def test_best_keeps_the_lowest_or_the_highest() -> None:
    scores = [saved(step, loss=loss) for step, loss in [(1, 0.5), (2, 0.1), (3, 0.9), (4, 0.3), (5, 0.7)]]
    assert kept(Best("loss", "min", 2), scores) == [2, 4, 5]
    assert kept(Best("loss", "max", 1), scores) == [3, 5]


def test_of_equally_good_ones_the_newer_is_kept() -> None:
    assert kept(Best("loss", "min", 1), [saved(1, loss=0.5), saved(2, loss=0.5), saved(3)]) == [2, 3]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_one_without_the_metric_or_with_nan_is_never_best(mode: str) -> None:
    odd = [saved(1), saved(2, loss=math.nan), saved(3, loss=math.inf), saved(4, loss=-math.inf), saved(5, loss=7.0)]
    assert kept(Best("loss", mode, 4), [*odd, saved(6, other=1.0)]) == [5, 6]


def test_any_keeps_what_one_of_them_keeps_and_joins_flat() -> None:
    policy = Latest(1) | KeepEveryNSteps(50) | Best("loss", "min")
    assert policy == AnyOfKeep((Latest(1), KeepEveryNSteps(50), Best("loss", "min")))
    assert kept(policy, TEN) == [50, 100]


def test_exactly_those_steps_are_kept() -> None:
    assert kept(KeepAtSteps([50, 20, 999]), TEN) == [20, 50, 100]


def test_all_keeps_what_every_one_keeps_and_not_the_others() -> None:
    assert kept(KeepEveryNSteps(20) & Latest(5), TEN) == [60, 80, 100]
    assert kept(~Latest(8), TEN) == [10, 20, 100], "and the newest, as ever"
    assert kept(KeepEveryNSteps(20) & ~KeepAtSteps([40, 60]), TEN) == [20, 80, 100]
    assert kept(~~Latest(3), TEN) == kept(Latest(3), TEN)
    assert Latest(1) & Latest(2) & Latest(3) == AllOfKeep((Latest(1), Latest(2), Latest(3)))


def test_a_users_policy_joins_on_either_side() -> None:
    own = Own([True, *[False] * 9])
    assert kept(own | Latest(1), TEN) == [10, 100]  # type: ignore[operator, arg-type]
    assert kept(Latest(2) | own, TEN) == [10, 90, 100]  # type: ignore[operator]


def test_a_users_policy_that_drops_everything_still_keeps_the_newest() -> None:
    assert kept(Own([False] * 10), TEN) == [100]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "answer", [None, [True] * 9, [True] * 11, [1] * 10, "x" * 10, [None, *[True] * 9], KeyError("k")]
)
def test_a_broken_policy_deletes_nothing(answer: object) -> None:
    with pytest.raises(PolicyError, match=r"Own.*othing was deleted"):
        ask_keep(Own(answer), TEN)  # type: ignore[arg-type]


def test_the_metrics_that_policies_want_are_known() -> None:
    policy = Latest(1) | Best("a", "min") | ~(Latest(3) & Best("b", "max"))
    assert wanted_metrics(policy) == {"a", "b"}
    assert wanted_metrics(Latest(1)) == set()
