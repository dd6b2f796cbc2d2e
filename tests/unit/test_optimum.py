"""The optimal interval: the published formulas, and a simulation of failures that has never heard of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sm_tiered.errors import PolicyError
from sm_tiered.policies import MaxOverhead, Need, Optimal, SaveContext, ask, needs_of
from sm_tiered.policies.optimum import expected_secs, lost_share, optimal_interval_secs

SEGMENTS = 30_000


def at(elapsed: float, **facts: object) -> SaveContext:
    """A step *elapsed* seconds after the last save."""
    return SaveContext(**{"step": 7, "now": 1000.0 + elapsed, "started_at": 0.0, "last_saved_at": 1000.0, **facts})


def chosen_interval(policy: Optimal, cost_secs: float, **facts: object) -> float:
    """Return when *policy* first wants to save, found by asking it."""
    low, high = 0.0, 1e9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if ask(policy, at(middle, cost_secs=cost_secs, **facts)) else (middle, high)
    return high


def simulated_secs(interval: float, cost: float, mtbf: float, restart: float) -> float:
    """Return the time that a second of training takes where failures strike whenever they like, saves and restarts too.

    Every segment of training and save is tried until no failure falls into it; so is every restart.
    """
    random = np.random.default_rng(1729)
    spent, trying = 0.0, SEGMENTS
    while trying:
        until_failure = random.exponential(mtbf, trying)
        failed = until_failure[until_failure < interval + cost]
        spent += (trying - len(failed)) * (interval + cost) + float(failed.sum())
        trying = again = len(failed)
        while again:
            struck = random.exponential(mtbf, again)
            struck = struck[struck < restart]
            spent += (again - len(struck)) * restart + float(struck.sum())
            again = len(struck)
    return spent / (SEGMENTS * interval)


@pytest.mark.parametrize("mtbf", [600.0, 3 * 3600.0, 7 * 86400.0])
@pytest.mark.parametrize("cost", [0.05, 1.0, 20.0, 90.0])
def test_no_fixed_interval_is_better_by_more_than_2_percent(cost: float, mtbf: float) -> None:
    ours = chosen_interval(Optimal(mtbf), cost)
    restart = min(60.0, mtbf / 20)
    others = [ours * 2 ** (exponent / 6) for exponent in range(-12, 13)]
    best = min(simulated_secs(interval, cost, mtbf, restart) for interval in others)
    assert simulated_secs(ours, cost, mtbf, restart) <= 1.02 * best


def test_the_simulation_can_tell_a_bad_interval_from_a_good_one() -> None:
    ours = chosen_interval(Optimal(600.0), 20.0)
    best = simulated_secs(ours, 20.0, 600.0, 30.0)
    for factor in (0.3, 3.0):
        assert simulated_secs(factor * ours, 20.0, 600.0, 30.0) > 1.05 * best


@pytest.mark.parametrize(("cost", "mtbf"), [(0.2, 3600.0), (5.0, 3600.0), (60.0, 7200.0), (300.0, 3600.0)])
def test_the_expected_time_is_what_the_simulation_finds(cost: float, mtbf: float) -> None:
    for interval in (optimal_interval_secs(cost, mtbf), 0.5 * mtbf):
        found = expected_secs(1.0, interval, cost_secs=cost, mtbf_secs=mtbf, restart_secs=30.0)
        assert found == pytest.approx(simulated_secs(interval, cost, mtbf, 30.0), rel=0.015)


def test_young_is_what_is_left_where_saves_cost_little() -> None:
    assert optimal_interval_secs(0.1, 86400.0) == pytest.approx(math.sqrt(2 * 0.1 * 86400.0), rel=1e-3)


def test_daly_by_hand() -> None:
    # sqrt(2 * 300 * 21600) = 3600, and 300 / (2 * 21600) = 1 / 144.
    assert optimal_interval_secs(300.0, 21_600.0) == pytest.approx(3600 * (1 + 1 / 36 + 1 / 1296) - 300)


def test_saves_that_cost_more_than_failures_are_apart_are_made_once_in_that_time() -> None:
    assert optimal_interval_secs(300.0, 100.0) == 100.0


def test_nothing_lost_costs_nothing_and_a_lag_costs_more() -> None:
    assert lost_share(100.0, cost_secs=0.0, mtbf_secs=1e9) == pytest.approx(0.0, abs=1e-6)
    quick, late = (lost_share(100.0, cost_secs=1.0, mtbf_secs=3600.0, lag_secs=lag) for lag in (0.0, 300.0))
    assert 0.02 < quick < 0.04
    assert late == pytest.approx(quick + 300 / 3600, rel=0.1)
    assert expected_secs(1.0, 1e9, cost_secs=1.0, mtbf_secs=1.0) == math.inf


def test_failures_that_were_seen_correct_what_was_given() -> None:
    believed = Optimal(36_000.0, observe=True)
    calm = chosen_interval(believed, 1.0, failures=0, observed_secs=0.0)
    assert calm == pytest.approx(chosen_interval(Optimal(36_000.0), 1.0))
    stormy = chosen_interval(believed, 1.0, failures=9, observed_secs=4_000.0)
    assert stormy == pytest.approx(chosen_interval(Optimal(4_000.0), 1.0)), "(36000 + 4000) / (1 + 9)"
    assert chosen_interval(Optimal(36_000.0), 1.0, failures=9, observed_secs=4_000.0) == pytest.approx(calm)


@pytest.mark.parametrize("policy", [Optimal(3600.0), MaxOverhead(0.01)])
def test_what_goes_by_cost_saves_once_to_measure_it_and_never_step_0(policy: Optimal | MaxOverhead) -> None:
    assert needs_of(policy) == {Need.CLOCK, Need.COST}
    assert ask(policy, at(0.0, cost_secs=None)) is True
    assert ask(policy, at(0.0, cost_secs=1.0)) is False
    assert ask(policy, at(1e6, cost_secs=1.0, step=0)) is False


@pytest.mark.parametrize(("elapsed", "due"), [(49.9, False), (50.1, True)])
def test_an_overhead_of_a_hundredth_wants_a_hundred_times_the_cost_of_training(elapsed: float, due: bool) -> None:
    assert ask(MaxOverhead(0.01), at(elapsed, cost_secs=0.5)) is due


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaxOverhead(0), "share must be a number above 0 and below 1, got int 0"),
        (lambda: MaxOverhead(1.0), "share"),
        (lambda: MaxOverhead(True), "share"),
        (lambda: MaxOverhead("1%"), "share"),  # type: ignore[arg-type]
        (lambda: Optimal(0), "mtbf_secs must be above 0"),
        (lambda: Optimal(math.inf), "mtbf_secs"),
        (lambda: Optimal("6h"), "mtbf_secs must be a number"),  # type: ignore[arg-type]
        (lambda: Optimal(60.0, observe=1), "observe must be true or false"),  # type: ignore[arg-type]
    ],
)
def test_what_can_not_be_an_overhead_or_a_time_between_failures_is_refused(make: object, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        make()  # type: ignore[operator]
