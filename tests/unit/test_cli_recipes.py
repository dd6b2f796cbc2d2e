"""``config``, ``schema`` and ``--set``: what a recipe comes to, for people, programs and every other command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from sm_tiered.cli.app import app
from sm_tiered.cli.common import read_recipe
from sm_tiered.recipe import Recipe
from sm_tiered.recipe_schema import recipe_schema
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, local_tier, memory_tier, write_checkpoint

ROOT = Path(__file__).parents[2]
AWS_KEY = "AKIA" + "A" * 16

BASE = """\
version: 1
namespace: ${TRAINING_JOB_NAME:-run-1}
tiers:
  memory:
    kind: memory
    path: /dev/shm/x
    save: {every_n_steps: 10}
  s3:
    kind: s3
    uri: s3://bucket/base
    save: {any: [{every_n_steps: 50}, on_end]}
"""
CHILD = """\
extends: base.yaml
tiers:
  s3:
    uri: s3://bucket/own
    profile: ${WHO:-}
    retry: {attempts: 3}
  local: {kind: local, path: /srv/checkpoints, save: on_end}
"""

AT_80 = """\
version: 1                                      # base.yaml:1
# base.yaml:2, default of ${TRAINING_JOB_NAME}
namespace: run-1
tiers:
  memory:
    kind: memory                                # base.yaml:5
    path: /dev/shm/x                            # base.yaml:6
    save: {every_n_steps: 10}                   # base.yaml:7
    budget: 2GiB                                # --set tiers.memory.budget
    keep: {latest: 2}                           # default
    allow_disk: false                           # default
  s3:
    kind: s3                                    # base.yaml:9
    uri: s3://bucket/own                        # child.yaml:4
    save: {any: [{every_n_steps: 50}, on_end]}  # base.yaml:11
    profile: '(hidden: looks like a secret)'    # child.yaml:5, ${WHO}
    retry:
      attempts: 3                               # child.yaml:6
      deadline_secs: 120.0                      # default
    # environment SM_TIERED__TIERS__S3__REGION
    region: eu-west-1
    keep: {latest: 3}                           # default
    allow_http: false                           # default
    force_path_style: false                     # default
    part_size: 32MiB                            # default
    throughput_gbps: 100.0                      # default
    reader: boto3                               # default
    request_timeout_secs: 30.0                  # default
  local:
    kind: local                                 # child.yaml:7
    path: /srv/checkpoints                      # child.yaml:7
    # --set tiers.local.save
    save: {any: [on_end, on_preemption, {every_secs: 1800.0}, {at_steps: [1, 10,
      100]}, {every_n_steps: 1000}]}
    keep: {latest: 3}                           # default
    fsync: true                                 # default
on_error: warn                                  # default
unreachable: raise                              # default
allow_pickle: false                             # default
allow_partial: false                            # default
drain_timeout_secs: 1800.0                      # default
commit_deadline_secs: 3600.0                    # default
group_timeout_secs: 600.0                       # default
in_use_wait_secs: 30.0                          # default
stream_timeout_secs: 600.0                      # default
"""
POLICIES = "on_end, on_preemption, {every_secs: 1800}, {at_steps: [1, 10, 100]}, {every_n_steps: 1000}"
SETS = ("--set", "tiers.memory.budget=2GiB", "--set", f"tiers.local.save={{any: [{POLICIES}]}}")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a recipe in two files; 80 columns, no colours."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TRAINING_JOB_NAME", "WHO"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SM_TIERED__")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "child.yaml").write_text(CHILD)
    return tmp_path


@pytest.fixture
def layered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that goes over the recipe."""
    monkeypatch.setenv("SM_TIERED__TIERS__S3__REGION", "eu-west-1")
    monkeypatch.setenv("WHO", AWS_KEY)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# ---- config


@pytest.mark.usefixtures("layered")
def test_config_tells_what_results_and_who_said_so() -> None:
    result = run("config", "child.yaml", *SETS)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == AT_80


@pytest.mark.usefixtures("layered")
@pytest.mark.parametrize("columns", [60, 63, 66, 69, 72, 75, 78, 80, 120, 200])
def test_config_fits_its_window_and_is_yaml_of_the_same_recipe(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = run("config", "child.yaml", *SETS)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line.endswith(":") and not re.fullmatch(" *[a-z0-9_]+:", line)]
    assert AWS_KEY not in result.output
    monkeypatch.delenv("SM_TIERED__TIERS__S3__REGION")
    wanted = Recipe.load("child.yaml", overrides=[*SETS[1::2], "tiers.s3.region=eu-west-1"]).values()
    again: Any = Recipe.parse(result.stdout).values()
    assert again["tiers"]["s3"].pop("profile") == "(hidden: looks like a secret)"
    del wanted["tiers"]["s3"]["profile"]  # type: ignore[attr-defined]
    assert again == wanted


@pytest.mark.usefixtures("layered")
def test_on_wide_windows_every_origin_stands_beside_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = run("config", "child.yaml", "--set", "tiers.memory.budget=2GiB").stdout.splitlines()
    assert not [line for line in lines if line.lstrip().startswith("#")]
    assert len({line.index("#") for line in lines if "#" in line}) == 1
    [region] = [line for line in lines if "region" in line]
    assert region.endswith("# environment SM_TIERED__TIERS__S3__REGION")


@pytest.mark.usefixtures("layered")
def test_config_for_programs() -> None:
    found = document(run("config", "child.yaml", *SETS, "--json"))
    assert (found["version"], found["files"], found["warnings"]) == (1, ["child.yaml", "base.yaml"], [])
    told = {entry["path"]: entry for entry in found["values"]}
    assert told["tiers.s3.uri"] == {
        "path": "tiers.s3.uri",
        "value": "s3://bucket/own",
        "hidden": False,
        "from": {"kind": "file", "file": "child.yaml", "line": 4},
        "filled": [],
    }
    assert told["tiers.s3.region"]["from"] == {"kind": "environment", "name": "SM_TIERED__TIERS__S3__REGION"}
    assert told["tiers.memory.budget"]["from"] == {"kind": "option", "name": "tiers.memory.budget"}
    assert told["on_error"]["from"] == {"kind": "default"}
    assert told["namespace"]["filled"] == [{"name": "TRAINING_JOB_NAME", "default": True}]
    assert (told["tiers.s3.profile"]["value"], told["tiers.s3.profile"]["hidden"]) == (None, True)
    assert AWS_KEY not in json.dumps(found)
    recipe = found["recipe"]
    assert recipe["tiers"]["local"]["save"]["any"][:2] == ["on_end", "on_preemption"]
    del recipe["tiers"]["s3"]["profile"]
    assert Recipe.parse(recipe).values()["namespace"] == "run-1"


def test_config_warns_of_what_is_hardly_meant() -> None:
    arguments = ("config", "child.yaml", "--set", "tiers.memory.save={every_n_steps: 20}")
    result = run(*arguments)
    assert "\n# warning: child.yaml: tiers.s3.save: steps 50 are no multiples" in result.stdout
    assert Recipe.parse(result.stdout).values()["namespace"] == "run-1"
    [warning] = document(run(*arguments, "--json"))["warnings"]
    assert "'memory' (20)" in warning


ODD = ["a/b c", "x: y", "#x", "a #b", "null", "1e3", "12:30", "yes", "é", "'", '"', "[", "&a", "- a", "~x/y"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(ODD), st.sampled_from(ODD), st.integers(60, 160))
def test_whatever_a_value_is_config_prints_it_as_yaml(here: Path, path: str, metric: str, columns: int) -> None:
    tier = {"kind": "local", "path": f"/d/{path}", "keep": {"best": {"metric": metric, "mode": "min"}}}
    given = {"version": 1, "namespace": "run", "tiers": {"t": tier}}
    (here / "odd.yaml").write_text(json.dumps(given))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        result = run("config", "odd.yaml")
    assert Recipe.parse(result.stdout).values() == Recipe.load("odd.yaml").values()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.yaml",), "recipe not found: nowhere.yaml"),
        (("child.yaml", "--set", "tiers.s3.urii=x"), "--set tiers.s3.urii: unknown key 'urii'\n  Did you mean 'uri'?"),
        (("child.yaml", "--set", "tiers.s3.uri"), "--set tiers.s3.uri: no value\n  Write --set tiers.s3.uri=s3://"),
        (("child.yaml", "--set", f"tiers.s3.token={AWS_KEY}"), "key 'token' looks like a secret"),
        (("child.yaml", "--set", "tiers.s3.uri=bucket"), "--set tiers.s3.uri: 'bucket' must start with s3://"),
    ],
)
def test_what_is_wrong_is_usage_and_told_in_two_lines(arguments: tuple[str, ...], words: str) -> None:
    for command in ("config", "ls", "verify"):
        result = run(command, *arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert words in result.stderr
        assert AWS_KEY not in result.output
        assert len(result.stderr.splitlines()) == 2


# ---- --set


def test_every_command_takes_set_but_the_one_that_takes_no_recipe() -> None:
    found = [info for info in app.registered_commands if info.callback]
    names = {str(info.name or info.callback.__name__).replace("_", "-") for info in found if info.callback}
    assert {"ls", "show", "verify", "config", "doctor", "report"} <= names
    assert {name for name in names if "--set KEY" not in run(name, "--help").stdout} == {"schema"}


def test_set_reaches_every_tier(
    here: Path, memory_dir: Path, s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names other places than those of the checkpoints; the options put it right."""
    s3 = open_tier(s3_settings, NAMESPACE)
    write_checkpoint(s3, checkpoint(40), durable=True)
    s3.close()
    write_checkpoint(memory_tier(memory_dir), checkpoint(60), durable=False)
    write_checkpoint(local_tier(here / "local"), checkpoint(50), durable=True)
    changes = [
        f"tiers.memory.path={memory_dir}",
        f"tiers.local.path={here / 'local'}",
        f"tiers.s3.uri=s3://{s3_settings.bucket}/{s3_settings.prefix}",
        f"tiers.s3.endpoint_url={s3_settings.endpoint_url}",
        "tiers.s3.force_path_style=true",
        "tiers.s3.region=us-east-1",
    ]
    options = [word for change in changes for word in ("--set", change)]
    listing = document(run("ls", "child.yaml", "--json", *options))
    found = {tier["name"]: [entry["step"] for entry in tier["checkpoints"]] for tier in listing["tiers"]}
    assert found == {"memory": [60], "s3": [40], "local": [50]}
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = run("ls", "child.yaml", *options).stdout
        assert "a restore takes step 60 now (complete on memory)" in shown
        assert max(map(len, shown.splitlines())) <= columns
    only = document(run("ls", "child.yaml", "--json", *options, "--set", "tiers.memory=null", "--set", "tiers.s3=null"))
    assert [tier["name"] for tier in only["tiers"]] == ["local"]


def test_what_one_call_sets_is_gone_with_it() -> None:
    assert document(run("config", "child.yaml", "--json", "--set", "on_error=raise"))["recipe"]["on_error"] == "raise"
    assert read_recipe("child.yaml").on_error == "warn"
    assert document(run("config", "child.yaml", "--json"))["recipe"]["on_error"] == "warn"


# ---- schema


def test_schema_is_one_json_document() -> None:
    for arguments in ((), ("--json",)):
        assert document(run("schema", *arguments)) == recipe_schema()


def test_schema_can_be_written(here: Path) -> None:
    result = run("schema", "-o", "own.json")
    assert (result.exit_code, result.stdout) == (0, "wrote own.json\n")
    assert json.loads((here / "own.json").read_text()) == recipe_schema()
    told = document(run("schema", "--output", "own.json", "--json"))
    assert told == {"version": 1, "written": "own.json", "bytes": (here / "own.json").stat().st_size}


@pytest.mark.parametrize(
    ("output", "status", "words"),
    [
        ("nowhere/own.json", 1, "nowhere/own.json can't be written: "),
        (".", 1, "Name a file in a directory"),
        ("", 2, "--output: is empty"),
    ],
)
def test_a_place_that_can_t_be_written_is_told(here: Path, output: str, status: int, words: str) -> None:
    before = sorted(here.iterdir())
    result = run("schema", "-o", output)
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
    assert sorted(here.iterdir()) == before


# ---- as a process


@pytest.mark.parametrize("arguments", [("config", "child.yaml"), ("config", "child.yaml", "--json"), ("schema",)])
def test_what_is_about_recipes_alone_loads_neither_torch_nor_aws(here: Path, arguments: tuple[str, ...]) -> None:
    script = (
        "import sys\nfrom sm_tiered.cli.app import main\n"
        "try:\n    main()\nfinally:\n    print(sorted(sys.modules), file=sys.stderr)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SM_TIERED__NAMESPACE": "from-the-environment"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not [name for name in ("'torch'", "'boto3'", "'botocore'", "'numpy'") if name in done.stderr]
    assert ("from-the-environment" in done.stdout) == (arguments[0] == "config")
