"""When to save: every policy by itself, combined, and when a user's own one is broken."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sm_tiered.errors import PolicyError
from sm_tiered.policies import (
    AllOf,
    AnyOf,
    AtSteps,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    Need,
    Not,
    OnEnd,
    OnException,
    OnPreemption,
    OnRequest,
    SaveContext,
    SavePolicy,
    WhenImproved,
    ask,
    check_metrics,
    members_of,
    needs_of,
)

CLOCK, SIGNAL, METRICS = Need.CLOCK, Need.SIGNAL, Need.METRICS


def at(step: int, **facts: object) -> SaveContext:
    return SaveContext(**{"step": step, "now": 0.0, "started_at": 0.0, **facts})


@dataclass
class Own:
    """A user's policy that knows nothing of ours."""

    answer: object = True
    needs: object = frozenset({METRICS})

    def should_save(self, context: SaveContext) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def saved_steps(policy: SavePolicy, steps: range) -> list[int]:
    return [step for step in steps if ask(policy, at(step))]


def test_every_n_steps_saves_the_multiples_and_never_step_0() -> None:
    assert saved_steps(EveryNSteps(3), range(10)) == [3, 6, 9]


def test_every_n_steps_of_1_saves_every_step_but_0() -> None:
    assert saved_steps(EveryNSteps(1), range(4)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("policy", "steps"),
    [
        (EveryNSteps(5, offset=2), [2, 7, 12, 17]),
        (EveryNSteps(5, start=7), [10, 15]),
        (EveryNSteps(5, stop=10), [5, 10]),
        (EveryNSteps(4, offset=1, start=5, stop=13), [5, 9, 13]),
        (EveryNSteps(1, start=18), [18, 19]),
    ],
)
def test_an_offset_moves_the_multiples_and_start_and_stop_are_included(policy: EveryNSteps, steps: list[int]) -> None:
    assert saved_steps(policy, range(20)) == steps


def test_at_steps_saves_exactly_those_and_may_name_step_0() -> None:
    assert saved_steps(AtSteps([7, 0, 7, 2]), range(10)) == [0, 2, 7]
    assert AtSteps([7, 0, 7, 2]) == AtSteps((0, 2, 7))


@pytest.mark.parametrize(
    ("now", "last", "due"),
    [(59.9, None, False), (60.0, None, True), (100.0, 50.0, False), (110.0, 50.0, True)],
)
def test_every_secs_counts_from_the_last_save_or_the_start(now: float, last: float | None, due: bool) -> None:
    assert ask(EverySecs(60), at(5, now=now, last_saved_at=last)) is due


def test_a_clock_that_went_back_counts_as_no_time() -> None:
    context = at(5, now=-100_000.0, last_saved_at=50.0)
    assert ask(EverySecs(0.001), context) is False


@pytest.mark.parametrize(("over", "due"), [(None, False), (0, False), (1, False), (2, True), (3, False), (4, True)])
def test_every_n_epochs_saves_where_such_an_epoch_ends(over: int | None, due: bool) -> None:
    assert ask(EveryNEpochs(2), at(7, epochs_ended=over)) is due


def test_every_secs_never_saves_step_0() -> None:
    assert ask(EverySecs(1), at(0, now=1e9)) is False


def test_the_end_and_a_preemption_save_whatever_the_step() -> None:
    assert [ask(OnEnd(), at(0)), ask(OnEnd(), at(0, ending=True))] == [False, True]
    assert [ask(OnPreemption(), at(0)), ask(OnPreemption(), at(0, preempted=True))] == [False, True]


def test_an_exception_and_a_request_save_whatever_the_step() -> None:
    assert [ask(OnException(), at(0)), ask(OnException(), at(0, failed=True))] == [False, True]
    assert [ask(OnRequest(), at(0)), ask(OnRequest("/x"), at(0, requested=True))] == [False, True]


@pytest.mark.parametrize(
    ("mode", "value", "due"),
    [
        ("min", 0.4, False),
        ("min", 0.31, False),
        ("min", 0.29, True),
        ("max", 0.9, False),
        ("max", 0.99, False),
        ("max", 1.01, True),
        ("min", float("nan"), False),
        ("min", float("-inf"), False),
    ],
)
def test_an_improvement_is_more_than_delta_beyond_the_best_that_was_saved(mode: str, value: float, due: bool) -> None:
    seen = {"loss": (0.4, 0.9)}
    assert ask(WhenImproved("loss", mode, 0.1), at(9, metrics={"loss": value}, saved_metrics=seen)) is due


def test_the_first_value_is_an_improvement_and_none_at_all_is_not() -> None:
    policy = WhenImproved("loss", "min")
    assert ask(policy, at(9, metrics={"loss": 5.0})) is True
    assert ask(policy, at(9, metrics={"acc": 5.0})) is False
    assert ask(policy, at(0, metrics={"loss": 5.0})) is False
    assert ask(policy, at(9, metrics={"loss": 5.0}, saved_metrics={"loss": (5.0, 5.0)})) is False, (
        "as good is no better"
    )


@given(st.integers(1, 50), st.integers(1, 5000))
def test_not_is_not_and_twice_not_is_as_before(n: int, step: int) -> None:
    policy = EveryNSteps(n)
    assert ask(~policy, at(step)) is not ask(policy, at(step))
    assert ask(~~policy, at(step)) is ask(policy, at(step))
    assert ask(~(policy | EverySecs(1)), at(step)) is ask(~policy & ~EverySecs(1), at(step))


def test_not_names_no_step_so_it_never_saves_step_0() -> None:
    assert ask(~EveryNSteps(5), at(0)) is False
    assert needs_of(~(OnPreemption() | EverySecs(1))) == {CLOCK, SIGNAL}


def test_the_single_policies_of_a_combination_are_found() -> None:
    one, two, three = EveryNSteps(1), OnEnd(), OnRequest()
    assert list(members_of((one & ~(two | three)) | one)) == [one, two, three, one]


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 5000))
def test_any_is_or_and_all_is_and(n: int, m: int, step: int) -> None:
    by_n, by_m = EveryNSteps(n), EveryNSteps(m)
    one, two = ask(by_n, at(step)), ask(by_m, at(step))
    assert ask(by_n | by_m, at(step)) is (one or two)
    assert ask(by_n & by_m, at(step)) is (one and two)


def test_chains_of_one_operator_are_flat_and_mixed_ones_nest() -> None:
    one, two, three = EveryNSteps(1), EveryNSteps(2), EveryNSteps(3)
    assert one | two | three == AnyOf((one, two, three))
    assert one & two & three == AllOf((one, two, three))
    assert (one | two) & three == AllOf((AnyOf((one, two)), three))


def test_a_users_policy_joins_on_either_side() -> None:
    own = Own(answer=True)
    assert ask(EveryNSteps(5) | own, at(1)) is True  # type: ignore[operator]
    assert ask(own & EveryNSteps(5), at(1)) is False  # type: ignore[operator]


def test_what_is_no_policy_can_not_be_joined() -> None:
    with pytest.raises(TypeError):
        _ = EveryNSteps(5) | 7  # type: ignore[operator]
    with pytest.raises(PolicyError, match="no save policy"):
        AnyOf([EveryNSteps(5), "on_end"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("policy", "needs"),
    [
        (EveryNSteps(2), set()),
        (AtSteps([2]), set()),
        (EveryNEpochs(2), set()),
        (OnEnd(), set()),
        (EverySecs(2), {CLOCK}),
        (OnPreemption(), {SIGNAL}),
        (OnRequest(), {Need.REQUEST}),
        (OnException(), set()),
        (WhenImproved("loss", "min"), {METRICS}),
        (EveryNSteps(2) | EverySecs(2) | OnPreemption(), {CLOCK, SIGNAL}),
        (AllOf([EveryNSteps(2), EverySecs(2) | OnEnd()]), {CLOCK}),
        (AnyOf([EveryNSteps(2), Own()]), {METRICS}),  # type: ignore[list-item]
    ],
)
def test_needs_tell_what_must_be_exchanged(policy: SavePolicy, needs: set[Need]) -> None:
    assert needs_of(policy) == needs


def test_an_exception_of_a_policy_names_policy_and_step_and_keeps_the_cause() -> None:
    cause = ZeroDivisionError("by zero")
    with pytest.raises(PolicyError, match=r"Own\(.*raised ZeroDivisionError.*by zero.*step 120") as caught:
        ask(Own(answer=cause), at(120))  # type: ignore[arg-type]
    assert caught.value.__cause__ is cause
    assert caught.value.step == 120


@pytest.mark.parametrize("answer", [None, 1, 0, "yes", [True]])
def test_an_answer_that_is_no_bool_is_an_error_not_a_skipped_save(answer: object) -> None:
    with pytest.raises(PolicyError, match=r"answered .*should_save must return True or False"):
        ask(Own(answer=answer), at(3))  # type: ignore[arg-type]


def test_a_broken_policy_can_not_hide_behind_another_one() -> None:
    broken = Own(answer=None)
    for joined in (AnyOf([EveryNSteps(1), broken]), AllOf([EveryNSteps(5), broken]), Not(broken)):  # type: ignore[list-item, arg-type]
        with pytest.raises(PolicyError, match="Own"):
            ask(joined, at(3))


@pytest.mark.parametrize("needs", [None, 3, {"clock"}])
def test_a_policy_that_does_not_say_what_it_needs_is_an_error(needs: object) -> None:
    with pytest.raises(PolicyError, match="frozenset of Need"):
        needs_of(Own(needs=needs))  # type: ignore[arg-type]


def test_policies_are_values() -> None:
    assert len({EveryNSteps(2) | OnEnd(), EveryNSteps(2) | OnEnd(), EveryNSteps(3) | OnEnd()}) == 2
    with pytest.raises((FrozenInstanceError, AttributeError)):
        EveryNSteps(2).n = 3  # type: ignore[misc]


def test_metrics_are_taken_as_floats_and_nan_passes() -> None:
    found = check_metrics({"loss": 1, "acc": float("nan")}, wanted=["loss"])
    assert found["loss"] == 1.0
    assert found["acc"] != found["acc"]
    assert check_metrics({}, wanted=["loss"]) == {}


@pytest.mark.parametrize("value", ["0.5", None, True, [1.0], object()])
def test_a_metric_that_is_no_number_is_an_error(value: object) -> None:
    with pytest.raises(PolicyError, match="metric 'loss' must be a number"):
        check_metrics({"loss": value})


def test_a_wanted_metric_that_is_not_among_those_given_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"metric 'val/loss' not in metrics; have \['loss'\]"):
        check_metrics({"loss": 1.0}, wanted=["val/loss"])
