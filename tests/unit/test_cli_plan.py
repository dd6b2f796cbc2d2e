"""`sm-tiered plan`: the policies replayed on a counted clock, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given as given_by
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sm_tiered.cli.app import app
from sm_tiered.cli.plan_figures import lost_work, stretches
from sm_tiered.cli.planning import Assumptions, Planned, Run, simulate
from sm_tiered.group import SoloGroup
from sm_tiered.preemption import Preemption
from sm_tiered.recipe import Recipe
from sm_tiered.schedule import Schedule
from sm_tiered.settings import Settings

MEMORY = "memory: {kind: memory, path: /dev/shm, keep: {latest: 2}, save: %s}"
LOCAL = "local: {kind: local, path: /tmp/durable, save: %s, keep: %s}"
CLUSTER = "cluster: {kind: hyperpod, save: %s, keep: {latest: 2}}"
S3 = "s3: {kind: s3, uri: s3://bucket/prefix, region: us-east-1, save: %s, keep: %s}"


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of those tiers."""

    def write(*tiers: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text("version: 1\nnamespace: run-1\ntiers:\n  " + "\n  ".join(tiers) + "\n", encoding="utf-8")
        return path

    return write


def run(*arguments: object, columns: int = 80) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def assume(**changes: Any) -> Assumptions:
    """100 steps of a second; a save blocks for half a second, a drain takes 9 s and a commit 1 s."""
    facts = {"steps": 100, "step_secs": 1.0, "state_bytes": 900, "drain_bytes_per_sec": 100.0}
    return Assumptions(**{**facts, "blocked_secs": 0.5, "commit_secs": 1.0, **changes})


def settings(path: Path) -> Settings:
    """What the recipe says."""
    return Recipe.load(path).settings()


def steps(done: Run, tier: str) -> list[int]:
    """What was saved there."""
    return [planned.step for planned in done.planned[tier]]


# ---- the replay


def test_each_tier_has_what_its_policy_wants_and_the_clock_counts_saves(recipe: Callable[..., Path]) -> None:
    path = recipe(MEMORY % "{every_n_steps: 10}", LOCAL % ("{every_n_steps: 50}", "{latest: 1}"))
    done = simulate(settings(path), assume())
    assert (steps(done, "memory"), steps(done, "local")) == (list(range(10, 101, 10)), [50, 100])
    assert (done.secs, done.blocked_secs, done.saves) == (105.0, 5.0, 10)
    first, second = done.planned["local"]
    assert (first.at, first.usable_at) == (52.0, 62.5)
    assert (second.at, second.usable_at) == (104.5, 115.0)
    assert done.skipped == {"local": []}


def test_while_the_drain_is_busy_the_newest_due_step_waits_and_takes_the_place_of_older_ones(
    recipe: Callable[..., Path],
) -> None:
    path = recipe(MEMORY % "{every_n_steps: 2}", LOCAL % ("{every_n_steps: 4}", "{latest: 1}"))
    done = simulate(settings(path), assume(steps=20, blocked_secs=0.001))
    # 4 goes at once and is there at 14 s; 8 waits, gives way to 12, and this one to the next save after that.
    assert steps(done, "local") == [4, 14, 20]
    assert done.skipped["local"] == [8, 12, 16]
    assert [round(planned.usable_at) for planned in done.planned["local"]] == [14, 24, 34]


def test_a_step_that_waited_goes_with_the_next_save_whatever_that_is_due_for(recipe: Callable[..., Path]) -> None:
    path = recipe(MEMORY % "{every_n_steps: 5}", LOCAL % ("{at_steps: [5, 10]}", "{latest: 1}"))
    slow = {"blocked_secs": 0.001, "drain_bytes_per_sec": 75.0}
    done = simulate(settings(path), assume(steps=18, **slow))
    assert (steps(done, "local"), done.skipped["local"]) == ([5], [10])
    done = simulate(settings(path), assume(steps=20, **slow))
    assert (steps(done, "local"), done.skipped["local"]) == ([5, 20], [10])


def test_the_cluster_s_memory_does_not_wait_for_storage_nor_storage_for_it(recipe: Callable[..., Path]) -> None:
    path = recipe(
        MEMORY % "{every_n_steps: 1}", CLUSTER % "{at_steps: [6, 25]}", LOCAL % ("{at_steps: [5, 26]}", "{latest: 2}")
    )
    done = simulate(settings(path), assume(steps=30, blocked_secs=0.001))
    assert (steps(done, "cluster"), steps(done, "local")) == ([6, 25], [5, 26])
    assert [round(planned.usable_at) for name in ("cluster", "local") for planned in done.planned[name]] == [
        16,
        35,
        15,
        36,
    ]
    assert done.skipped == {"cluster": [], "local": []}


def test_the_last_save_does_not_wait_and_is_no_second_one(recipe: Callable[..., Path]) -> None:
    path = recipe(MEMORY % "{every_n_steps: 5}", LOCAL % ("{any: [{every_n_steps: 5}, on_end]}", "{latest: 1}"))
    done = simulate(settings(path), assume(steps=12))
    assert (steps(done, "memory"), steps(done, "local")) == ([5, 10, 12], [5, 12])
    done = simulate(settings(path), assume(steps=10))
    assert (steps(done, "memory"), steps(done, "local")) == ([5, 10], [5, 10])
    assert done.saves == 2


def test_time_epochs_and_costs_are_facts_of_the_replay(recipe: Callable[..., Path]) -> None:
    path = recipe(MEMORY % "{every_secs: 10}", LOCAL % ("{every_n_epochs: 2}", "{latest: 1}"))
    done = simulate(settings(path), assume(steps_per_epoch=20))
    assert steps(done, "local") == [40, 80]
    assert [planned.at for planned in done.planned["memory"]][:3] == [10.0, 20.5, 31.0]
    # Half a second is 2.5 % of twenty.
    done = simulate(settings(recipe(MEMORY % "{max_overhead: 0.025}")), assume())
    assert steps(done, "memory") == [1, 21, 41, 61, 81]


def test_without_a_memory_tier_the_training_waits_for_the_drain(recipe: Callable[..., Path]) -> None:
    done = simulate(settings(recipe(LOCAL % ("{every_n_steps: 50}", "{latest: 1}"))), assume())
    assert (steps(done, "local"), done.blocked_secs, done.secs) == ([50, 100], 20.0, 120.0)
    assert [planned.usable_at - planned.at for planned in done.planned["local"]] == [10.0, 10.0]


def test_what_is_kept_is_what_the_keep_policy_keeps(recipe: Callable[..., Path]) -> None:
    keep = "{any: [{latest: 2}, {every_n_steps: 50}]}"
    done = simulate(settings(recipe(MEMORY % "{every_n_steps: 20}", LOCAL % ("{every_n_steps: 25}", keep))), assume())
    stored = done.stored["local"]
    assert [planned.step for planned in stored.kept] == [50, 75, 100]
    assert stored.most == 3


def test_a_plan_saves_when_the_schedule_of_a_training_does(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [
        "{every_n_steps: 7}",
        "{every_secs: 13.5}",
        "{any: [{at_steps: [3, 50]}, {every_n_epochs: 2}, on_end]}",
        "{all: [{every_n_steps: 2}, {max_overhead: 0.02}]}",
        "{all: [{every_secs: 4}, {not: {every_n_steps: 3}}]}",
        "{optimal: {mtbf_secs: 300}}",
    ]
    for near, far in zip(policies, [*policies[1:], policies[0]], strict=True):
        chosen = settings(recipe(MEMORY % near, LOCAL % (far, "{latest: 1}")))
        # A drain that takes no time: what is planned is what is due.
        given = assume(steps_per_epoch=11, state_bytes=1, drain_bytes_per_sec=1e12, commit_secs=1e-6)
        done = simulate(chosen, given)
        clock = [1e9]
        monkeypatch.setattr("sm_tiered.schedule.time", SimpleNamespace(time=lambda now=clock: now[0]))
        schedule = Schedule(chosen, SoloGroup(), Preemption(), started_at=clock[0])
        due: dict[str, list[int]] = {"memory": [], "local": []}
        for step in [*range(1, given.steps + 1), None]:
            clock[0] += given.step_secs if step is not None else 0.0
            at, ending = (step, False) if step is not None else (given.steps, True)
            epochs = at // 11 if at % 11 == 0 and not ending else None
            tiers = schedule.due(at, metrics={}, epochs_ended=epochs, ending=ending).tiers
            copied = tiers and due["memory"][-1:] != [at]
            clock[0] += given.blocked_secs if copied else 0.0
            if tiers:
                schedule.note_saved(at, tiers, blocked_secs=given.blocked_secs)
                # Whatever is due is copied into memory first.
                for tier in {*tiers, "memory"}:
                    due[tier] += [at] if due[tier][-1:] != [at] else []
        assert {tier: steps(done, tier) for tier in due} == due, (near, far)


# ---- what follows


@given_by(st.lists(st.integers(1, 400), unique=True).map(sorted))
def test_stretches_are_the_steps(given: list[int]) -> None:
    found = stretches(given)
    assert [s.first + n * (s.every or 0) for s in found for n in range(s.count)] == given
    assert all(s.count >= 3 if s.every else s.count == 1 for s in found)


def test_an_even_schedule_is_one_stretch() -> None:
    assert [(s.first, s.last, s.count, s.every) for s in stretches(range(50, 1001, 50))] == [(50, 1000, 20, 50)]


def test_lost_work_is_what_failures_at_every_moment_would_lose() -> None:
    planned = [Planned(step=1, at=10.0, usable_at=16.0), Planned(step=2, at=30.0, usable_at=31.0)]
    # An older step comes late on another tier, and a newer one only after the end.
    late = [Planned(step=1, at=10.0, usable_at=45.0), Planned(step=2, at=30.0, usable_at=60.0)]
    done = Run(secs=50.0, planned={"a": planned, "b": late})

    def sampled(tiers: list[str]) -> list[float]:
        moments = [(n + 0.5) / 100 for n in range(5000)]
        usable = [each for tier in tiers for each in done.planned[tier]]
        return [t - max([each.at for each in usable if each.usable_at <= t], default=0.0) for t in moments]

    for tiers in (["a", "b"], ["b"], []):
        lost = lost_work(done, tiers, mtbf_secs=1000.0, blocked_secs=1.0)
        found = sampled(tiers)
        assert lost.mean_secs == pytest.approx(sum(found) / len(found), rel=1e-3)
        assert lost.worst_secs == pytest.approx(max(found), abs=0.02)
        assert lost.share == lost.mean_secs / 1000.0


ARGUMENTS = ("--steps", 1000, "--step-secs", 1.5, "--state-bytes", "14GiB", "--ranks", 8)


def test_the_document_tells_all_of_it(recipe: Callable[..., Path]) -> None:
    path = recipe(
        MEMORY % "{every_n_steps: 10}",
        LOCAL % ("{every_n_steps: 500}", "{latest: 1}"),
        S3 % ("{any: [{every_n_steps: 50}, on_end]}", "{latest: 3}"),
    )
    result = run("plan", path, *ARGUMENTS, "--nodes", 2, "--blocked-secs", 0.3, "--drain-gbps", 8, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plan = json.loads(result.stdout)
    memory, local, s3 = plan["tiers"]
    assert memory["steps"] == [{"first": 10, "last": 1000, "count": 100, "every": 10}]
    assert (memory["saves"], local["saves"], s3["saves"]) == (100, 2, 20)
    assert s3["written_bytes"] == 20 * 14 * 2**30
    assert s3["storage"]["bytes"] == 3 * 14 * 2**30
    assert s3["storage"]["month_price"] == pytest.approx(3 * 14 * 0.023)
    assert local["storage"]["month_price"] is None
    assert local["requests"] is None
    # A rank's 1.75 GiB: 56 parts of 32 MiB, begin and complete; a small file and the record; three for the commit.
    assert s3["requests"]["puts"] == 8 * (56 + 2 + 2) + 3 + 2
    assert s3["requests"]["puts_per_sec"] == pytest.approx(485 / (7 * 2**30 / 1e9 + 1))
    assert (plan["memory"]["generations"], plan["memory"]["need_bytes"]) == (4, 4 * 7 * 2**30)
    assert plan["blocked_secs"] == pytest.approx(30.0)
    assert plan["lost"]["process"]["mean_secs"] == pytest.approx(7.95, abs=0.2)
    assert plan["lost"]["node"]["mean_secs"] > 37.5
    assert plan["lost"]["node"]["mtbf_secs"] == 7 * 86400
    assert not any("--blocked-secs" in line or "--drain-gbps" in line for line in plan["assumptions"])


@pytest.mark.parametrize("columns", [80, 120])
def test_the_text_fits_its_window_and_warns(recipe: Callable[..., Path], columns: int) -> None:
    path = recipe(
        MEMORY % "{every_n_steps: 10}",
        LOCAL % ("{at_steps: [5000]}", "{latest: 1}"),
        S3 % ("{every_n_steps: 10}", "{best: {metric: loss, mode: min, n: 2}}"),
    )
    result = run("plan", path, *ARGUMENTS, columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    told = " ".join(result.stdout.split())
    for words in (
        "1,000 steps of 1.5 s, 14.0 GiB of state, 8 ranks on 1 node",
        "10, 20 … 1000 (100×, every 10)",
        "training blocked 100 saves",
        "processes die",
        "a node is lost",
        "memory a node 56.0 GiB (4 generations)",
        "find the drain busy",
        "local: nothing is ever saved there in these steps",
        "keep.best is not replayed",
        "(--drain-gbps)",
    ):
        assert words in told


def test_one_tier_alone_is_planned_too(recipe: Callable[..., Path]) -> None:
    result = run("plan", recipe(MEMORY % "{every_n_steps: 10}"), *ARGUMENTS, "--json")
    plan = json.loads(result.stdout)
    assert plan["lost"]["node"] is None
    assert any("no durable tier" in line for line in plan["warnings"])
    result = run("plan", recipe("local: {kind: local, path: /tmp/durable}"), *ARGUMENTS, "--json")
    plan = json.loads(result.stdout)
    assert (result.exit_code, plan["tiers"][0]["saves"], plan["blocked_secs"]) == (0, 0, 0.0)
    assert plan["lost"]["node"]["mean_secs"] == pytest.approx(750.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "100000000"], "Allowed: 1 to 10,000,000"),
        (["--step-secs", "0"], "--step-secs is 0"),
        (["--step-secs", "nan"], "--step-secs is nan"),
        (["--state-bytes", "14"], "--state-bytes: unit missing"),
        (["--state-bytes", "14GB"], "Did you mean '14GiB'?"),
        (["--nodes", "9"], "Allowed: 1 to 8"),
        (["--mtbf", "6 weeks"], "--mtbf: '6 weeks' is no duration"),
        (["--node-mtbf", "0"], "one of s, min, h, d"),
        (["--drain-gbps", "-1"], "--drain-gbps is -1"),
        (["--price", "inf"], "--price is inf"),
        (["--steps-per-epoch", "0"], "--steps-per-epoch is 0"),
    ],
)
def test_a_mistake_is_exit_2_and_says_what_is_allowed(
    recipe: Callable[..., Path], arguments: list[str], words: str
) -> None:
    result = run("plan", recipe(MEMORY % "{every_n_steps: 10}"), *ARGUMENTS, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_what_must_be_given_is_asked_for(recipe: Callable[..., Path]) -> None:
    result = run("plan", recipe(MEMORY % "{every_n_steps: 10}"))
    assert result.exit_code == 2
    assert "--steps" in result.stderr
