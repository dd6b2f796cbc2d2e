"""The commands that look, on a recipe with memory, the cluster's memory and a directory; and with a silent service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from sm_tiered.cli.reasons import walk
from sm_tiered.recipe import Recipe
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from tests.told_runs import Teller, as_lines
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    cluster_tier,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

SILENT = "http://127.0.0.1:9"
PLAN = ("--steps", 1000, "--step-secs", 1, "--state-bytes", "1GiB", "--nodes", 2, "--ranks", 4)
Run = Callable[..., Result]

pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture
def service() -> Iterator[StandInDaemon]:
    with StandInDaemon() as running:
        yield running


@pytest.fixture
def recipe(service: StandInDaemon, memory_dir: Path, tmp_path: Path) -> Path:
    """Step 30 half in memory, 20 and 30 in the cluster's memory, 10 of the attempt before there too, 20 on disk."""
    memory, cluster, local = memory_tier(memory_dir), cluster_tier(service.url), local_tier(tmp_path / "local")
    for tier in (memory, cluster, local):
        write_attempt(tier, 1)
        write_attempt(tier, 2, parent=checkpoint(10))
    write_checkpoint(cluster, checkpoint(10), durable=True)
    write_checkpoint(cluster, checkpoint(20, 2), durable=True, metrics={"loss": 0.5})
    write_checkpoint(cluster, checkpoint(30, 2), durable=True, saved_at=1e9)
    write_checkpoint(local, checkpoint(20, 2), durable=True, metrics={"loss": 0.5})
    half = frozenset({1})
    write_checkpoint(memory, checkpoint(30, 2), durable=False, saved_at=1e9, skip_ranks=half, replica=False)
    cluster.close()
    return write_recipe(tmp_path, memory=memory_dir, cluster=service.url, local=tmp_path / "local")


@pytest.fixture
def found(run: Run) -> Callable[..., Any]:
    """Run a command and return its JSON."""

    def call(command: str, *arguments: object, status: int = 0) -> Any:
        result = run(command, *arguments, "--json")
        assert result.exit_code == status, result.output
        return json.loads(result.stdout)

    return call


def silenced(recipe: Path, service: StandInDaemon) -> Path:
    """The recipe, with an address at which nobody answers."""
    recipe.write_text(recipe.read_text().replace(service.url, SILENT))
    return recipe


def of(document: Any, name: str) -> Any:
    """A tier's part of it."""
    return next(tier for tier in document["tiers"] if tier["name"] == name)


def test_ls_lists_what_the_service_holds_as_it_does_a_directory(
    recipe: Path, service: StandInDaemon, found: Any
) -> None:
    for more in ((), ("--all",)):
        listed = found("ls", recipe, *more)
        cluster = of(listed, "cluster")
        assert (cluster["kind"], cluster["location"], cluster["error"]) == ("hyperpod", service.url, None)
        told = [(each["step"], each["complete"], each["world"], each["records"]) for each in cluster["checkpoints"]]
        assert told == [(30, True, 2, 2), (20, True, 2, 2), (10, True, 2, 2)]
        assert cluster["checkpoints"][1]["metrics"] == {"loss": 0.5}
        assert cluster["checkpoints"][0]["bytes"] > 2 * 4096
        assert listed["next"] == {"step": 30, "attempt": str(checkpoint(30, 2).attempt)}


def test_show_verify_and_export_read_what_is_there(recipe: Path, found: Any, run: Run, tmp_path: Path) -> None:
    shown = found("show", recipe, "--step", 30)["checkpoints"]
    assert {tier["name"] for one in shown for tier in one["tiers"]} == {"memory", "cluster"}
    assert [tensor["fqn"] for tensor in shown[0]["tensors"]]
    verified = found("verify", recipe, "--tier", "cluster")
    assert [(each["step"], each["state"]) for each in verified["checkpoints"]] == [
        (30, "whole"),
        (20, "whole"),
        (10, "whole"),
    ]
    assert run("export", recipe, "--step", 30, "--tier", "cluster", "-o", tmp_path / "out").exit_code == 0
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert run("diff", recipe, "cluster:20", "local:20", "--exit-code").exit_code == 0
    assert run("diff", recipe, "cluster:20", "cluster:30", "--exit-code").exit_code == 1


def test_verify_finds_a_flipped_bit(recipe: Path, service: StandInDaemon, found: Any) -> None:
    wire = 2 * 10**10 + 20
    blob = service.namespaces[NAMESPACE].blobs[1][wire]
    service.flip(NAMESPACE, 1, wire, 8 * blob.size - 3)
    verified = found("verify", recipe, "--tier", "cluster", status=3)
    (damaged,) = [each for each in verified["checkpoints"] if each["state"] == "damaged"]
    assert (damaged["step"], [problem["rank"] for problem in damaged["problems"]]) == (20, [1])


def test_why_takes_ranks_that_this_node_lacks_from_the_cluster(recipe: Path, found: Any) -> None:
    told = found("why", recipe)
    assert told["next"]["step"] == 30
    assert told["candidates"][0]["sources"] == [{"tier": "memory", "ranks": [0]}, {"tier": "cluster", "ranks": [1]}]
    assert told["skipped"] == []
    read = found("why", recipe, "--read-data", "100%")
    assert read["next"]["step"] == 30


@pytest.mark.parametrize("silence", ["absent", "refusing", "half"])
def test_a_silent_service_is_left_out_and_it_is_said(
    recipe: Path, service: StandInDaemon, found: Any, run: Run, silence: str
) -> None:
    if silence == "absent":
        silenced(recipe, service)
    elif silence == "refusing":
        service.restart(DaemonFault(kind="status", status=503))
    else:  # it lists, and then is gone
        service.restart(DaemonFault(kind="status", status=503, method="GET", path="/[0-9]+/[0-9]+$"))
    told = found("why", recipe)
    assert (told["next"]["step"], told["skipped"], [*told["errors"]]) == (20, ["cluster"], ["cluster"])
    assert told["candidates"][-1]["sources"] == [{"tier": "local", "ranks": [0, 1]}]
    assert any("cluster did not answer; a restore goes on without it" in line for line in told["advice"])
    assert not any("use_memory" in line for line in told["advice"])
    text = " ".join(run("why", recipe).stdout.split())
    assert "a restore takes step 20 now: all ranks from local; without cluster" in text
    listed = run("ls", recipe)
    assert listed.exit_code == 1
    assert "a restore takes step 20 now, without cluster" in " ".join(listed.stdout.split())
    assert "did not answer" in listed.stdout


def test_a_service_that_has_to_answer_ends_the_walk(recipe: Path, service: StandInDaemon, found: Any, run: Run) -> None:
    recipe = silenced(recipe, service)
    recipe.write_text(recipe.read_text().replace("kind: hyperpod,", "kind: hyperpod, unreachable: raise,"))
    told = found("why", recipe, status=1)
    assert (told["next"], told["skipped"]) == (None, [])
    assert told["stopped"] == "cluster did not answer, so what is newest can't be told"
    assert "would refuse to choose" in run("ls", recipe).stdout


def test_where_nothing_else_is_found_nobody_says_that_nothing_was_saved(
    tmp_path: Path, memory_dir: Path, found: Any, run: Run
) -> None:
    recipe = write_recipe(tmp_path, memory=memory_dir, cluster=SILENT, local=tmp_path / "local")
    told = found("why", recipe, status=1)
    assert (told["next"], told["nothing_saved"], told["skipped"]) == (None, False, ["cluster"])
    assert "whether it holds more can't be told" in told["stopped"]
    assert "a restore would raise TierUnavailableError" in run("why", recipe).stdout
    assert "nothing complete is here, and cluster did not answer" in " ".join(run("ls", recipe).stdout.split())
    for command in (("export", recipe, "-o", tmp_path / "out"), ("show", recipe)):
        failed = run(*command)
        assert (failed.exit_code, "does not answer" in failed.stderr) == (1, True), failed.output


def test_reading_goes_on_without_it_but_for_what_was_named(
    recipe: Path, service: StandInDaemon, run: Run, tmp_path: Path
) -> None:
    recipe = silenced(recipe, service)
    exported = run("export", recipe, "-o", tmp_path / "out")
    assert exported.exit_code == 0, exported.output
    assert "cluster did not answer and is left out" in exported.stderr
    named = run("export", recipe, "--tier", "cluster", "-o", tmp_path / "other")
    assert (named.exit_code, "does not answer" in named.stderr) == (1, True)
    missing = run("export", recipe, "--step", 30, "-o", tmp_path / "other")
    assert missing.exit_code == 1
    assert "cluster did not answer and is left out" in missing.stderr, "it may be there"
    assert not (tmp_path / "other").exists()


def test_plan_counts_it_as_what_outlives_the_node_and_not_the_cluster(
    recipe: Path, tmp_path: Path, found: Any, run: Run
) -> None:
    plan = found("plan", recipe, *PLAN)
    lost = plan["lost"]
    assert lost["node"]["tiers"] == ["cluster", "local"]
    assert lost["cluster"]["tiers"] == ["local"]
    assert lost["process"]["mean_secs"] < lost["node"]["mean_secs"] < lost["cluster"]["mean_secs"]
    assert of(plan, "cluster")["storage"] | {"slots": 6, "month_price": None} == of(plan, "cluster")["storage"]
    assert of(plan, "local")["storage"]["slots"] is None
    assert "the cluster is lost" in run("plan", recipe, *PLAN).stdout
    alone = write_recipe(tmp_path, memory=tmp_path / "memory", cluster=SILENT)
    plan = found("plan", alone, *PLAN)
    assert (plan["lost"]["node"]["tiers"], plan["lost"]["cluster"]) == (["cluster"], None)
    assert any("no tier outlives the cluster" in warning for warning in plan["warnings"])


def test_watch_report_and_config_know_it(recipe: Path, service: StandInDaemon, found: Any, run: Run) -> None:
    assert of(found("watch", recipe), "cluster")["newest"] == 30
    assert "cluster" in run("watch", recipe, "--once").stdout
    assert "kind: hyperpod" in run("config", recipe).stdout
    for command, *more in (("report",), ("timeline", "-o", recipe.with_name("run.html"))):
        result = run(command, recipe, *more)
        assert (result.exit_code, "there are no events yet" in result.stderr) == (1, True), result.output
    assert of(found("watch", silenced(recipe, service), status=1), "cluster")["error"]["kind"] == "TierUnavailableError"


def test_the_walk_is_that_of_a_restore_for_every_silence(recipe: Path, service: StandInDaemon) -> None:
    settings = Recipe.load(recipe).settings()
    for first in range(1, 60):
        service.restart(DaemonFault(kind="status", status=503, first=first))
        walked = walk(settings, step=None, share=None)
        walked.seen.close()
        assert walked.taken is not None
        assert walked.taken.checkpoint.step == (30 if not walked.skipped else 20)
        if not service.fired:
            return
    raise AssertionError("it never ran through")


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["ls", "why", "watch", "plan", "doctor"])
def test_the_text_fits_its_window(
    recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    more = PLAN if command == "plan" else ("--once",) if command == "watch" else ()
    lines = run(command, recipe, *more).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert any("cluster" in line for line in lines)


def test_report_judges_the_cluster_by_lost_nodes_and_what_is_behind_it_by_none(
    tmp_path: Path, found: Callable[..., Any], run: Run, service: StandInDaemon
) -> None:
    told = Teller(tiers=("memory", "cluster"))
    told.start()
    for _ in range(12):
        told.train(10)
        told.save(blocked=0.4, drain=2.0)
    told.tell("SaveStaged", step=told.step, tiers=["memory", "local"], blocked_secs=0.4, bytes=2**30)
    told.tell("PromoteStarted", rank=None, step=told.step, tier="local")
    told.tell("Committed", rank=None, step=told.step, tier="local", secs=1.0, bytes=2**30)
    told.train(7)
    told.kill(node=True, down=60)
    told.start(node_lost=True)
    told.train(10)
    told.end()
    memory = memory_tier(tmp_path / "memory")
    for name, data in as_lines(told.done()).items():
        memory.put(f"events/{name}", data)
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", cluster=service.url, local=tmp_path / "local")
    report = found("report", recipe)
    assert [(failure["kind"], failure["restored_step"]) for failure in report["failures"]] == [("node", 120)]
    by_tier = {each["tier"]: each for each in report["intervals"]}
    assert by_tier["cluster"]["mtbf_secs"] == report["node_mtbf_secs"] is not None
    assert by_tier["local"]["mtbf_secs"] is by_tier["local"]["optimal_secs"] is None
    assert "for the loss of the cluster's memory" in " ".join(run("report", recipe).stdout.split())
