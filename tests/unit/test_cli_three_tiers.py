"""The commands that look, on a namespace with memory, local and S3 tiers: they agree, and their text fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

PLAN = ("--steps", 100, "--step-secs", 1, "--state-bytes", "1GiB")


def run(command: str, *arguments: object, columns: int = 80) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [command, *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def found(command: str, *arguments: object) -> Any:
    """Its JSON."""
    result = run(command, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert (document["version"], document["namespace"]) == (1, NAMESPACE)
    return document


@pytest.fixture
def recipe(s3_settings: S3Settings, memory_dir: Path, tmp_path: Path) -> Path:
    """Three tiers: step 60 half in memory and half on its way to S3, 40 on S3, 20 on both durable ones."""
    memory, local, s3 = memory_tier(memory_dir), local_tier(tmp_path / "local"), open_tier(s3_settings, NAMESPACE)
    for tier in (memory, local, s3):
        write_attempt(tier, 1)
    for step in (20, 40):
        write_checkpoint(s3, checkpoint(step), durable=True, saved_at=1e9 + step, metrics={"loss": 0.5})
    write_checkpoint(local, checkpoint(20), durable=True, saved_at=1e9 + 20)
    half = frozenset({1})
    write_checkpoint(s3, checkpoint(60), durable=True, commit=False, skip_ranks=half)
    write_checkpoint(memory, checkpoint(60), durable=False, skip_ranks=half)
    local.put(layout.pin_key(checkpoint(20)), b"{}")
    s3.close()
    more = (
        f"  s3: {{kind: s3, uri: 's3://{s3_settings.bucket}/{s3_settings.prefix}', region: us-east-1, "
        f"force_path_style: true, endpoint_url: '{s3_settings.endpoint_url}', save: {{every_n_steps: 20}}}}\n"
    )
    return write_recipe(tmp_path, memory=memory_dir, local=tmp_path / "local", more=more)


def test_all_tell_the_same(recipe: Path) -> None:
    listed, explained, watched = found("ls", recipe), found("why", recipe), found("watch", recipe)
    assert listed["next"] == explained["next"] == {"step": 40, "attempt": str(checkpoint(40).attempt)}
    assert [tier["name"] for tier in listed["tiers"]] == ["memory", "local", "s3"]
    assert {tier["name"]: tier["newest"] for tier in watched["tiers"]} == {"memory": None, "local": 20, "s3": 40}
    assert [entry["step"] for entry in explained["candidates"]] == [60, 40]
    assert explained["candidates"][0]["refused"] == "memory: records of ranks [1] of 2 are missing; s3: not committed"
    assert explained["candidates"][1]["sources"] == [{"tier": "s3", "ranks": [0, 1]}]
    assert [entry["pinned"] for entry in listed["tiers"][1]["checkpoints"]] == [True]
    assert {tier["name"]: tier["saves"] for tier in found("plan", recipe, *PLAN)["tiers"]} == {
        "memory": 20,
        "local": 5,
        "s3": 5,
    }
    assert found("doctor", recipe)["ok"] is True


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("ls", (), "a restore takes step 40 now (complete on s3)"),
        ("ls", ("--all",), "a restore takes step 40 now (complete on s3)"),
        ("why", (), "a restore takes step 40 now: all ranks from s3"),
        ("watch", ("--once",), "no trainer is alive here"),
        ("plan", PLAN, "100 steps of 1 s, 1.0 GiB of state, 1 rank on 1 node"),
        ("doctor", (), "conditional PutObject"),
        ("verify", (), "all right: 4 checkpoints"),
    ],
)
def test_the_text_fits_its_window(
    recipe: Path, command: str, arguments: tuple[object, ...], words: str, columns: int
) -> None:
    result = run(command, recipe, *arguments, columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert words in " ".join(result.stdout.split())
    if command in ("ls", "watch", "plan"):
        for name in ("memory", "local", "s3"):
            assert name in result.stdout


@pytest.mark.parametrize("command", ["why", "doctor", "watch", "plan"])
@pytest.mark.parametrize(
    ("text", "words"), [(None, "not found"), ("version: 1\ntiers: {}\n", "namespace"), ("a: [", "recipe.yaml")]
)
def test_a_recipe_that_cannot_be_used_is_exit_2(tmp_path: Path, command: str, text: str | None, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = run(command, path, *(PLAN if command == "plan" else ()), "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
