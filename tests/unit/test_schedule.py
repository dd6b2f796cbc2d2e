"""The schedule of one rank: what it tells policies of the past, and what it learns from saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sm_tiered import schedule as module
from sm_tiered.errors import PolicyError
from sm_tiered.group import SoloGroup
from sm_tiered.history import Extremes, History, TypicalCost, count_failures
from sm_tiered.layout import parse_attempt
from sm_tiered.preemption import Preemption
from sm_tiered.recipe import Recipe
from sm_tiered.records import AttemptRecord, CheckpointId
from sm_tiered.requests import Requests
from sm_tiered.schedule import Schedule


class Clock:
    now = 1000.0

    @classmethod
    def time(cls) -> float:
        return cls.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(Clock, "now", 1000.0)
    return Clock


def schedule(save: Any, **more: Any) -> Schedule:
    tiers = {"disk": {"kind": "local", "path": "/nowhere", "save": save, **more}}
    settings = Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers}).settings()
    return Schedule(settings, SoloGroup(), Preemption(), started_at=1000.0)


def saved(plan: Schedule, clock: type[Clock], steps: range, *, secs: float, cost: float) -> list[int]:
    """Train, a step in *secs*, with saves that cost *cost*; return the steps that were saved."""
    found: list[int] = []
    for step in steps:
        clock.now += secs
        if plan.due(step, metrics={}).tiers:
            clock.now += cost
            plan.note_saved(step, ["disk"], blocked_secs=cost)
            found.append(step)
    return found


def test_an_overhead_stretches_a_fixed_interval_to_its_multiples(clock: type[Clock]) -> None:
    plan = schedule({"all": [{"every_n_steps": 10}, {"max_overhead": 0.02}]})
    assert saved(plan, clock, range(1, 101), secs=1.0, cost=0.5) == [10, 40, 70, 100], "25 s of training pay for 0.5 s"


def test_an_overhead_that_is_kept_leaves_the_interval_alone(clock: type[Clock]) -> None:
    plan = schedule({"all": [{"every_n_steps": 10}, {"max_overhead": 0.02}]})
    assert saved(plan, clock, range(1, 51), secs=1.0, cost=0.1) == [10, 20, 30, 40, 50]


def test_the_share_is_really_kept(clock: type[Clock]) -> None:
    plan = schedule({"max_overhead": 0.01})
    found = saved(plan, clock, range(1, 2001), secs=1.0, cost=0.7)
    assert 0.009 < 0.7 * len(found) / 2000 <= 0.0105


def test_the_optimal_interval_follows_what_saves_cost(clock: type[Clock]) -> None:
    plan = schedule({"optimal": {"mtbf_secs": 5000}})
    cheap = saved(plan, clock, range(1, 401), secs=1.0, cost=0.01)
    assert cheap[2] - cheap[1] == 10, "sqrt(2 * 0.01 * 5000) s"
    dear = saved(plan, clock, range(401, 2401), secs=1.0, cost=0.25)
    assert dear[-1] - dear[-2] == pytest.approx(50, abs=1), "sqrt(2 * 0.25 * 5000) s, once the median has followed"


def test_the_first_save_plans_and_does_not_count_once_there_is_another() -> None:
    cost = TypicalCost()
    assert cost.secs is None
    cost.take(5.0)
    assert cost.secs == 5.0
    for secs in (0.1, 0.3, 0.2):
        cost.take(secs)
    assert cost.secs == 0.2
    for _ in range(8):
        cost.take(0.7)
    assert cost.secs == 0.7, "old ones are forgotten"


def test_a_metric_has_to_beat_all_that_was_saved_there() -> None:
    plan = schedule({"when_improved": {"metric": "loss", "mode": "min", "min_delta": 0.1}})
    seen: list[int] = []
    for step, loss in enumerate([0.9, 0.85, 0.7, float("nan"), 0.75, 0.61, 0.59], start=1):
        if plan.due(step, metrics={"loss": loss}).tiers:
            plan.note_saved(step, ["disk"], metrics={"loss": loss})
            seen.append(step)
    assert seen == [1, 3, 7], "0.61 is not better than 0.7 by more than 0.1"
    assert plan.metrics == {"loss"}


def test_what_was_left_out_on_a_tier_has_not_to_be_beaten_there() -> None:
    plan = schedule({"when_improved": {"metric": "loss", "mode": "min"}})
    plan.note_saved(10, ["disk"], metrics={"loss": 1.0})
    plan.note_saved(20, ["disk"], metrics={"loss": 0.5}, left_out=["disk"])
    assert plan.due(30, metrics={"loss": 0.6}).tiers == {"disk"}


def test_what_was_saved_before_a_restart_counts_too() -> None:
    plan = schedule({"when_improved": {"metric": "acc", "mode": "max"}})
    plan.started_from(40, History(extremes={"disk": Extremes({"acc": (0.1, 0.8)})}))
    assert not plan.due(41, metrics={"acc": 0.8}).tiers
    assert plan.due(42, metrics={"acc": 0.81}).tiers


def test_a_request_is_answered_by_one_save(tmp_path: Path) -> None:
    plan = schedule({"any": ["on_request", {"every_n_steps": 100}]})
    plan.requests = Requests([tmp_path / "save"])
    assert not plan.due(1, metrics={}).tiers
    (tmp_path / "save").touch()
    due = plan.due(2, metrics={})
    assert (due.tiers, due.requested, due.preempted) == ({"disk"}, True, False)
    assert plan.due(3, metrics={}) == module.Due(tiers=frozenset())


def test_a_request_waits_until_the_other_policies_agree(tmp_path: Path) -> None:
    plan = schedule({"all": ["on_request", {"every_n_steps": 100}]})
    plan.requests = Requests([tmp_path / "save"])
    (tmp_path / "save").touch()
    assert plan.due(57, metrics={}) == module.Due(tiers=frozenset())
    assert plan.due(100, metrics={}) == module.Due(tiers=frozenset({"disk"}), requested=True)
    assert not (tmp_path / "save").exists()


def test_a_metric_may_come_now_and_then_unless_checkpoints_are_ranked_by_it() -> None:
    keep = {"best": {"metric": "acc", "mode": "max"}}
    plan = schedule({"when_improved": {"metric": "loss", "mode": "min"}}, keep=keep)
    assert (plan.metrics, plan.ranked_by) == ({"loss", "acc"}, {"acc"})


def test_a_broken_policy_is_told_of_also_when_a_request_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = schedule("on_request")
    plan.requests = Requests([tmp_path / "save"])
    (tmp_path / "save").touch()
    monkeypatch.setattr("sm_tiered.policies.when.OnRequest.should_save", lambda self, context: None)
    with pytest.raises(PolicyError, match="OnRequest"):
        plan.due(2, metrics={})
    assert (tmp_path / "save").exists(), "nothing has answered it"


@pytest.mark.parametrize(
    ("save", "wanted"),
    [
        ("on_exception", {"disk"}),
        ({"any": [{"every_n_steps": 5}, "on_exception"]}, {"disk"}),
        ({"all": ["on_exception", {"not": {"every_n_steps": 5}}]}, set()),
        ({"every_n_steps": 5}, set()),
    ],
)
def test_after_an_exception_only_those_are_asked_that_wait_for_one(save: Any, wanted: set[str]) -> None:
    assert schedule(save).after_exception(10) == wanted
    assert not schedule("on_exception").due(10, metrics={}).tiers


def _attempt(ordinal: int, parent: int | None, *, chosen: bool = False, source: str | None = None) -> AttemptRecord:
    names = [parse_attempt(f"a{number:06d}-1700000000-0000000{number}") for number in (ordinal, ordinal - 1)]
    came = None if parent is None else CheckpointId(attempt=names[1], step=parent)
    return AttemptRecord(namespace="run", attempt=names[0], parent=came, chosen=chosen, source=source)


def test_a_tier_counts_the_failures_that_it_is_there_for() -> None:
    attempts = [
        _attempt(1, None),
        _attempt(2, 10, source="memory"),
        _attempt(3, 20, source="s3"),
        _attempt(4, 5, chosen=True, source="s3"),
        _attempt(5, 30, source="memory+s3"),
        _attempt(6, 40),
    ]
    assert count_failures(attempts, memory="memory", durable=["s3", "disk"]) == {"memory": 4, "s3": 2, "disk": 2}
    assert count_failures(attempts, memory=None, durable=["s3"]) == {"s3": 3}


def test_time_is_observed_since_the_first_attempt() -> None:
    assert History().observed_secs(5.0) == 0.0
    assert History(began_at=100.0).observed_secs(130.0) == 30.0
    assert History(began_at=100.0).observed_secs(30.0) == 0.0, "a clock that went back"
