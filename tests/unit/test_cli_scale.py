"""Thousands of checkpoints: the newest are listed, and of the others no more than their names is read."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    file_of,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

MANY = 10_000
WHOLE = 55
"""How many of the newest are real checkpoints; a look at an older one finds nonsense."""


def fill(tier: Tier, base: Path, *, durable: bool, many: int = MANY) -> None:
    """Leave *many* steps of attempt 1 on *tier*: the older ones have files that can't be read."""
    write_attempt(tier, 1)
    for step in range(many - WHOLE, many):
        write_checkpoint(tier, checkpoint(step), durable=durable, world=1, size=64)
    nonsense = base / "nonsense"
    nonsense.write_bytes(b"{")
    names = ["__0_0.distcp", "record-00000.json", *([layout.MANIFEST] if durable else [])]
    for step in range(many - WHOLE):
        directory = base / NAMESPACE / layout.checkpoint_dir(checkpoint(step))
        os.mkdir(directory, 0o700)
        for name in names:
            os.link(nonsense, directory / name)


def run(*arguments: object) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture
def crowded(tmp_path: Path, memory_dir: Path) -> Path:
    """A recipe whose memory and local tiers hold 10,000 steps each."""
    local = tmp_path / "local"
    local.mkdir(mode=0o700)
    fill(memory_tier(memory_dir), memory_dir, durable=False)
    fill(local_tier(local), local, durable=True)
    return write_recipe(tmp_path, memory=memory_dir, local=local)


def test_ten_thousand_checkpoints_are_listed_in_less_than_two_seconds(crowded: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "sm_tiered.cli.app", "ls", str(crowded)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
        timeout=60,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # What this process used, not what it waited for others: nothing here waits for a disk.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0
    lines = done.stdout.splitlines()
    assert sum(" complete" in line for line in lines) == 2 * 50
    assert lines.count("  … and 9,950 more: --all lists them") == 2
    assert lines[-1] == f"▶ a restore takes step {MANY - 1} now (complete on memory, local)"
    listing = json.loads(run("ls", crowded, "--json").stdout)
    assert [(tier["more"], len(tier["checkpoints"])) for tier in listing["tiers"]] == [(9950, 50), (9950, 50)]
    assert {entry["looked_at"] for tier in listing["tiers"] for entry in tier["checkpoints"]} == {"files"}
    assert json.loads(run("show", crowded, "--json").stdout)["checkpoints"][0]["step"] == MANY - 1


def test_all_lists_every_one(tmp_path: Path) -> None:
    fill(local_tier(tmp_path / "local"), tmp_path / "local", durable=True, many=200)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    listing = json.loads(run("ls", recipe, "--all", "--json").stdout)["tiers"][0]
    assert (len(listing["checkpoints"]), listing["more"]) == (200, 0)
    assert sum("the manifest is damaged" in (entry["problem"] or "") for entry in listing["checkpoints"]) == 145
    assert "more: --all" not in run("ls", recipe, "--all").stdout


def test_what_a_restore_takes_is_told_and_shown_however_old_it_is(tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    write_attempt(tier, 1)
    write_attempt(tier, 2, checkpoint(3), chosen=True)
    for step in range(60):
        cut = step in (3, 4, 5)
        missing = frozenset({1}) if cut else frozenset[int]()
        write_checkpoint(tier, checkpoint(step), durable=True, size=64, commit=not cut, skip_ranks=missing)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    listing = json.loads(run("ls", recipe, "--json").stdout)
    assert listing["next"]["step"] == 2  # the user went back to step 3, of which a record is missing
    entries = listing["tiers"][0]["checkpoints"]
    assert [entry["step"] for entry in entries] == [*range(59, 9, -1), 3, 2]
    assert [entry["step"] for entry in entries if entry["next"]] == [2]
    assert all(entry["left_behind"] for entry in entries[:50])
    assert listing["tiers"][0]["more"] == 8
    shown = json.loads(run("show", recipe, "--json").stdout)["checkpoints"]
    assert [entry["step"] for entry in shown] == [2]


def test_what_only_lacks_its_manifest_is_what_a_restore_commits_and_takes(tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    write_checkpoint(tier, checkpoint(20), durable=True)
    write_checkpoint(tier, checkpoint(40), durable=True, commit=False)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    listing = json.loads(run("ls", recipe, "--json").stdout)
    newest = listing["tiers"][0]["checkpoints"][0]
    assert (listing["next"]["step"], newest["complete"], newest["next"]) == (40, False, True)
    assert "not committed · whole: a restore commits it" in " ".join(run("ls", recipe).stdout.split())


def test_behind_a_damaged_attempt_record_nothing_is_a_candidate(tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    write_checkpoint(tier, checkpoint(10, 1), durable=True)
    write_attempt(tier, 2, checkpoint(10, 1))
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    assert json.loads(run("ls", recipe, "--json").stdout)["next"]["step"] == 10
    tier.put(layout.attempt_key(checkpoint(0, 2).attempt), b"{}")
    assert json.loads(run("ls", recipe, "--json").stdout)["next"] is None


# ---- S3


@pytest.fixture
def recorded(s3_settings: S3Settings, tmp_path: Path) -> Iterator[tuple[Tier, Path, FaultProxy]]:
    """An S3 tier, a recipe that reaches it through a proxy, and the proxy, which records the requests."""
    tier = open_tier(s3_settings, NAMESPACE)
    assert s3_settings.endpoint_url is not None
    with FaultProxy(s3_settings.endpoint_url) as proxy:
        more = (
            f"  s3: {{kind: s3, uri: 's3://{s3_settings.bucket}/{s3_settings.prefix}', region: us-east-1, "
            f"force_path_style: true, endpoint_url: '{proxy.url}'}}\n"
        )
        yield tier, write_recipe(tmp_path, more=more), proxy
    tier.close()


def requests_of(proxy: FaultProxy) -> Counter[str]:
    """What was asked, by kind."""

    def kind(path: str) -> str:
        if "list-type=2" in path:
            return "delimited listing" if "delimiter" in path else "listing"
        return path.partition("?")[0].rpartition("/")[2].split("-0")[0]

    return Counter(kind(request.path) for request in proxy.requests)


def test_on_s3_one_delimited_listing_and_the_manifests_of_the_rows(
    recorded: tuple[Tier, Path, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sm_tiered.cli import ls as command

    monkeypatch.setattr(command, "_SHOWN", 5)
    tier, recipe, proxy = recorded
    write_attempt(tier, 1)
    for step in range(12):
        write_checkpoint(tier, checkpoint(step), durable=True, size=64)
    result = run("ls", recipe, "--json")
    asked = requests_of(proxy)
    assert (asked["delimited listing"], asked[layout.MANIFEST]) == (1, 5 + 1)
    # Beside them what the verdict needs: the attempts, and of the one checkpoint that a restore takes its records.
    assert asked["listing"] == 2
    assert asked["record"] == 2
    assert sum(asked.values()) == 1 + 6 + 2 + 2 + 1
    listing = json.loads(result.stdout)
    entries: list[dict[str, Any]] = listing["tiers"][0]["checkpoints"]
    assert [entry["step"] for entry in entries] == [11, 10, 9, 8, 7]
    assert [entry["looked_at"] for entry in entries] == ["files", *["manifest"] * 4]
    assert all(entry["complete"] and entry["world"] == entry["records"] == 2 for entry in entries)
    assert [entry["bytes"] for entry in entries[1:]] == [128] * 4
    assert entries[0]["bytes"] > 128
    assert listing["tiers"][0]["more"] == 7
    shown = run("ls", recipe).stdout
    assert sum(line.endswith("  committed") for line in shown.splitlines()) == 4
    assert "told by the manifest alone" in shown


def test_on_s3_a_missing_part_is_found_where_it_counts(recorded: tuple[Tier, Path, FaultProxy]) -> None:
    tier, recipe, _ = recorded
    for step in (1, 2, 3):
        write_checkpoint(tier, checkpoint(step), durable=True, size=64)
    for step in (1, 3):
        tier.delete([layout.in_dir(checkpoint(step), "__1_0.distcp")])
    listing = json.loads(run("ls", recipe, "--json").stdout)
    problems = {entry["step"]: entry["problem"] for entry in listing["tiers"][0]["checkpoints"]}
    assert listing["next"]["step"] == 2
    assert problems == {3: "__1_0.distcp is missing", 2: None, 1: None}
    listing = json.loads(run("ls", recipe, "--all", "--json").stdout)
    problems = {entry["step"]: entry["problem"] for entry in listing["tiers"][0]["checkpoints"]}
    assert problems[1] == "__1_0.distcp is missing"
    assert json.loads(run("show", recipe, "--json").stdout)["checkpoints"][0]["step"] == 2


def test_on_s3_what_is_not_committed_and_what_was_deleted_are_told_apart(
    recorded: tuple[Tier, Path, FaultProxy], make_tombstone: Callable[[Tier, int], None]
) -> None:
    tier, recipe, _ = recorded
    write_checkpoint(tier, checkpoint(1), durable=True, size=64)
    write_checkpoint(tier, checkpoint(2), durable=True, size=64)
    make_tombstone(tier, 2)
    write_checkpoint(tier, checkpoint(3), durable=True, size=64, commit=False)
    entries = json.loads(run("ls", recipe, "--json").stdout)["tiers"][0]["checkpoints"]
    assert [(entry["step"], entry["problem"]) for entry in entries] == [(3, "not committed"), (1, None)]
    entries = json.loads(run("ls", recipe, "--all", "--json").stdout)["tiers"][0]["checkpoints"]
    found = [(entry["step"], entry["problem"]) for entry in entries]
    assert found == [(3, "not committed"), (2, "being deleted"), (1, None)]


@pytest.fixture
def make_tombstone() -> Callable[[Tier, int], None]:
    """Turn the manifest of a step into a tombstone, as retention does before it deletes the rest."""
    from sm_tiered.manifest import manifest_from_json, manifest_to_json

    def make(tier: Tier, step: int) -> None:
        key = layout.in_dir(checkpoint(step), layout.MANIFEST)
        standing = tier.get(key)
        grave = replace(manifest_from_json(standing.data), tombstone=True, records={}, metrics={})
        tier.replace(key, manifest_to_json(grave), version=standing.version)

    return make


def test_a_tombstone_takes_no_row_from_what_is_older(
    tmp_path: Path, make_tombstone: Callable[[Tier, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sm_tiered.cli import ls as command

    monkeypatch.setattr(command, "_SHOWN", 2)
    tier = local_tier(tmp_path / "local")
    for step in range(6):
        write_checkpoint(tier, checkpoint(step), durable=True, size=64)
    for step in (2, 3, 4):
        make_tombstone(tier, step)
        names = [path.name for path in file_of(tmp_path / "local", checkpoint(step), "x").parent.iterdir()]
        tier.delete(layout.in_dir(checkpoint(step), name) for name in names if name != layout.MANIFEST)
    entries = json.loads(run("ls", write_recipe(tmp_path, local=tmp_path / "local"), "--json").stdout)["tiers"][0]
    assert [entry["step"] for entry in entries["checkpoints"]] == [5, 1]
