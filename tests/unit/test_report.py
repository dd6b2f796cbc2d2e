"""``sm-tiered report``: the ledger for people and for programs, and advice that can be pasted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from sm_tiered.advice import Advice, advise, changed_policy
from sm_tiered.cli.app import app
from sm_tiered.exposure import exposure
from sm_tiered.goodput import goodput
from sm_tiered.policies.optimum import lost_share, optimal_interval_secs
from sm_tiered.recipe import Recipe
from sm_tiered.settings import S3Settings
from sm_tiered.story_telling import tell
from sm_tiered.tiers import open_tier
from tests.faults.core_jobs import s3_fields
from tests.told_runs import NAMESPACE, Teller, as_lines
from tests.unit.cli_checkpoints import local_tier, memory_tier

pytestmark = pytest.mark.usefixtures("plain_terminal")


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def document(*arguments: object, status: int = 0) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def a_run() -> Teller:
    """Saves of 0.4 s every 10 steps of a second; two deaths of its processes, one loss of its node."""
    run = Teller(tiers=("memory", "local"))
    run.start()
    for _ in range(8):
        run.train(10)
        run.save(blocked=0.4, drain=6.0 if run.step % 40 == 0 else None)
    run.train(3)
    run.kill(down=20)
    run.start()
    run.train(10)
    run.save(blocked=0.4)
    run.train(4)
    run.kill(down=20)
    run.start()
    run.train(7)
    run.kill(node=True, down=60)
    run.start(node_lost=True)
    run.train(30)
    run.save(blocked=0.4, drain=3.0)
    run.end()
    return run


@pytest.fixture
def places(tmp_path: Path, make_s3_settings: Callable[..., S3Settings]) -> tuple[Path, Teller]:
    """A recipe with three tiers; some events are on one of them only, others on all, in part."""
    run = a_run()
    files = sorted(as_lines(run.done()).items())
    s3 = make_s3_settings()
    memory, local, bucket = memory_tier(tmp_path / "memory"), local_tier(tmp_path / "local"), open_tier(s3, NAMESPACE)
    for number, (name, data) in enumerate(files):
        bucket.put(f"events/{name}", data)
        local.put(f"events/{name}", data[: len(data) // 2] if number else data)
        if number > 1:
            memory.put(f"events/{name}", data)
    bucket.close()
    recipe = tmp_path / "recipe.yaml"
    tiers = {
        "memory": {
            "kind": "memory",
            "path": str(tmp_path / "memory"),
            "allow_disk": True,
            "save": {"every_n_steps": 10},
        },
        "local": {
            "kind": "local",
            "path": str(tmp_path / "local"),
            "save": {"any": [{"every_n_steps": 40}, "on_end", "on_preemption"]},
        },
        "s3": {"kind": "s3", **s3_fields(s3)},
    }
    recipe.write_text(yaml.safe_dump({"version": 1, "namespace": NAMESPACE, "tiers": tiers}, sort_keys=False))
    return recipe, run


def test_the_ledger_of_all_tiers_is_what_happened(places: tuple[Path, Teller]) -> None:
    recipe, run = places
    found = document("report", recipe)
    truth = run.truth
    assert found["namespace"] == NAMESPACE
    assert found["launches"] == 4
    for name in ("kept", "lost", "blocked", "restoring", "closing", "down"):
        assert found[f"{name}_secs"] == pytest.approx(getattr(truth, name), abs=0.01), name
    assert found["goodput"] == pytest.approx(truth.kept / found["wall_secs"])
    assert [(f["kind"], f["reached_step"], f["restored_step"]) for f in found["failures"]] == [
        ("process", 83, 80),
        ("process", 94, 90),
        ("node", 97, 80),
    ]
    assert found["lost_steps"] == 3 + 4 + 17
    assert found["step_secs"] == pytest.approx(1.0)
    up = found["wall_secs"] - found["down_secs"]
    assert found["mtbf_secs"] == pytest.approx(up / 3, abs=0.01)
    assert found["node_mtbf_secs"] == pytest.approx(up, abs=0.01)
    assert [tier["tier"] for tier in found["tiers"]] == ["memory", "local", "s3"]
    assert (found["bad_lines"], found["errors"]) == (4, {}), "a copy of each of four files ends in half a line"
    assert found["remarks"] == ["left out, for they are no events: 4 lines"]


def test_the_advice_can_be_pasted_and_is_the_optimum(places: tuple[Path, Teller]) -> None:
    recipe, _ = places
    found = document("report", recipe)
    pasted = yaml.safe_load(found["advice"])
    memory, local, s3 = found["intervals"]
    assert memory["optimal_secs"] == pytest.approx(optimal_interval_secs(0.4, found["mtbf_secs"]))
    assert local["optimal_secs"] == pytest.approx(optimal_interval_secs(0.4, found["node_mtbf_secs"]))
    assert (s3["interval_secs"], s3["optimal_secs"]) == (None, None)
    everything = yaml.safe_load(recipe.read_text())
    for tier, change in pasted["tiers"].items():
        everything["tiers"][tier].update(change)
    settings = Recipe.parse(everything).settings()
    assert "local" in pasted["tiers"], "40 seconds between durable saves are too many here"
    changed = pasted["tiers"]["local"]["save"]["any"]
    assert changed[1:] == ["on_end", "on_preemption"], "the rest of the policy stays"
    assert changed[0] == {"every_n_steps": local["steps"]}
    assert str(local["steps"]) in repr(settings.durable[0].save)
    for advice in (memory, local):
        then = lost_share(
            advice["advised_secs"],
            cost_secs=advice["cost_secs"],
            mtbf_secs=advice["mtbf_secs"],
            lag_secs=next(t["safe_secs"] for t in found["tiers"] if t["tier"] == advice["tier"]),
        )
        assert advice["lost_then"] == pytest.approx(then)
        assert advice["worth_it"] == (advice["lost_now"] - advice["lost_then"] >= 0.001)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_tables_fit_their_window(
    places: tuple[Path, Teller], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = call("report", places[0])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert max(map(len, lines)) <= columns
    for words in ("training", "lost to failures and done again", "node lost", "processes died", "what to change in"):
        assert words in result.stdout
    assert "100.0%  in all" in result.stdout
    if columns >= 80:
        assert "mean time between failures: any every" in result.stdout


def test_times_between_failures_can_be_said(places: tuple[Path, Teller]) -> None:
    found = document("report", places[0], "--mtbf", "6h", "--node-mtbf", "7d")
    memory, local, _ = found["intervals"]
    assert (memory["mtbf_secs"], local["mtbf_secs"]) == (6 * 3600, 7 * 86400)
    assert memory["given"]
    assert local["given"]
    assert memory["optimal_secs"] == pytest.approx(optimal_interval_secs(0.4, 6 * 3600))
    assert "(as said)" in call("report", places[0], "--mtbf", "6h").stdout
    refused = call("report", places[0], "--mtbf", "often")
    assert refused.exit_code == 2
    assert "--mtbf: 'often' is no duration" in refused.stderr


def test_a_run_without_failures_is_told_so_and_nothing_is_made_up(tmp_path: Path) -> None:
    run = Teller()
    run.start()
    run.train(20)
    run.save()
    run.end()
    for name, data in as_lines(run.done()).items():
        (tmp_path / name).write_bytes(data)
    result = call("report", tmp_path)
    assert result.exit_code == 0
    assert "no failure in 25" in result.stdout
    assert "--mtbf" in result.stdout
    assert "too little is known for advice" in result.stdout
    found = document("report", tmp_path)
    assert (found["mtbf_secs"], found["advice"], found["failures"]) == (None, None, [])


def test_a_tier_that_does_not_answer_is_said_and_the_rest_is_told(places: tuple[Path, Teller]) -> None:
    recipe = places[0]
    text = yaml.safe_load(recipe.read_text())
    text["tiers"]["s3"].update(endpoint_url="http://127.0.0.1:9", retry={"attempts": 1, "deadline_secs": 1})
    recipe.write_text(yaml.safe_dump(text, sort_keys=False))
    found = document("report", recipe, status=1)
    assert list(found["errors"]) == ["s3"]
    assert found["launches"] >= 3
    assert any(remark.startswith("s3 did not answer") for remark in found["remarks"])


def test_no_events_is_an_error_that_says_where_they_would_be(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"version: 1\nnamespace: x\ntiers: {{local: {{kind: local, path: {tmp_path}/local}}}}\n")
    result = call("report", recipe)
    assert result.exit_code == 1
    assert "there are no events yet" in result.stderr
    assert "no memory tier" in result.stderr


def test_attempts_that_left_nothing_are_said(tmp_path: Path) -> None:
    run = a_run()
    for name, data in as_lines([event for event in run.done() if event.launch != "00000002"]).items():
        (tmp_path / name).write_bytes(data)
    found = document("report", tmp_path)
    assert found["remarks"] == ["nothing is known of 1 attempt: no events are left of them"]


# ---- policies


def advice(secs: float, steps: int | None) -> Advice:
    ledger = goodput(tell(a_run().done(), memory="memory"), exposure(tell(a_run().done(), memory="memory")))
    found = advise(ledger, memory="memory")[0]
    return replace(found, advised_secs=secs, steps=steps)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        (None, {"every_secs": 120}),
        ({"every_n_steps": 10}, {"every_n_steps": 99}),
        ({"every_secs": 10}, {"every_secs": 120}),
        (
            {"every_n_steps": {"n": 200, "offset": 150, "start": 7}},
            {"every_n_steps": {"n": 99, "offset": 51, "start": 7}},
        ),
        ({"any": [{"all": [{"every_n_steps": 5}]}, "on_end"]}, {"any": [{"all": [{"every_n_steps": 99}]}, "on_end"]}),
        ({"any": [{"max_overhead": 0.01}, {"every_n_steps": 5}]}, None),
        ({"optimal": {"mtbf_secs": 5}}, None),
        ({"on_end": True}, None),
        ({"at_steps": [5]}, None),
    ],
    ids=str,
)
def test_of_a_policy_only_the_interval_changes(policy: object, wanted: object) -> None:
    assert changed_policy(policy, advice(123.4, 99)) == wanted


def test_steps_go_on_as_they_are_where_a_step_s_time_is_not_known() -> None:
    assert changed_policy({"every_n_steps": 10}, advice(123.4, None)) is None


def test_an_interval_is_never_shorter_than_an_upload_or_a_step() -> None:
    run = Teller(step_secs=30.0)
    run.start()
    for _ in range(6):
        run.train(10)
        run.save(blocked=0.001, drain=200.0)
    run.train(7)
    run.kill(down=5)
    run.start(node_lost=True)
    run.train(1)
    story = tell(run.done(), memory="memory")
    memory, disk = advise(goodput(story, exposure(story)), memory="memory", mtbf_secs=100.0, node_mtbf_secs=100.0)
    assert memory.optimal_secs is not None
    assert memory.optimal_secs < 1
    assert memory.advised_secs == pytest.approx(30.0)
    assert disk.advised_secs == pytest.approx(200.1)
