"""The command line, run in this process: what it says, and with which exit status."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from sm_tiered import layout
from sm_tiered.manifest import record_from_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import ItemTable
from sm_tiered.settings import MemorySettings, S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.memory import MemoryTier
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    file_of,
    flip,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("plain_terminal")

EVIL = "loss\x1b[31m\x07\x9b2J\u202e\n"


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A recipe with a memory and a local tier, and their directories, filled: a run that went back once."""
    memory, local = tmp_path / "memory", tmp_path / "local"
    memory.mkdir(mode=0o700)
    local.mkdir(mode=0o700)
    fast, slow = memory_tier(memory), local_tier(local)
    for tier in (fast, slow):
        write_attempt(tier, 1)
        write_attempt(tier, 2, checkpoint(20, 1), chosen=True)
    for step, ordinal in ((20, 1), (40, 1), (40, 2)):
        write_checkpoint(slow, checkpoint(step, ordinal), durable=True, metrics={"val_loss": step / 8})
    write_checkpoint(slow, checkpoint(60, 2), durable=True, commit=False, skip_ranks=frozenset({1}))
    for step in (50, 55):
        write_checkpoint(fast, checkpoint(step, 2), durable=False)
    write_checkpoint(fast, checkpoint(60, 2), durable=False, skip_ranks=frozenset({1}))
    slow.put(f"pins/{layout.checkpoint_dir(checkpoint(20, 1))}.json", b"{}")
    return write_recipe(tmp_path, memory=memory, local=local), memory, local


def document(result: Result) -> Any:
    """The JSON document that is all of standard output."""
    return json.loads(result.stdout)


def rows(listing: Any, tier: str) -> dict[tuple[int, int], Any]:
    """The entries of a tier by step and attempt."""
    entries = next(entry for entry in listing["tiers"] if entry["name"] == tier)["checkpoints"]
    return {(entry["step"], int(entry["attempt"][1:7])): entry for entry in entries}


# ---- ls


def test_ls_tells_what_each_tier_holds(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    result = run("ls", places[0], "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    listing = document(result)
    memory, local = rows(listing, "memory"), rows(listing, "local")
    assert list(memory) == [(60, 2), (55, 2), (50, 2)]
    assert list(local) == [(60, 2), (40, 2), (40, 1), (20, 1)]
    assert [entry["complete"] for entry in memory.values()] == [False, True, True]
    assert [entry["problem"] for entry in local.values()] == ["not committed", None, None, None]
    assert listing["next"] == {"step": 55, "attempt": str(checkpoint(55, 2).attempt)}
    assert [entry["next"] for entry in memory.values()] == [False, True, False]
    assert not any(entry["next"] for entry in local.values())
    assert [entry["left_behind"] for entry in local.values()] == [False, False, True, False]
    assert [entry["pinned"] for entry in local.values()] == [False, False, False, True]
    newest = local[(40, 2)]
    assert (newest["world"], newest["records"], newest["metrics"]) == (2, 2, {"val_loss": 5.0})
    assert newest["bytes"] == sum(p.stat().st_size for p in file_of(places[2], checkpoint(40, 2), "x").parent.iterdir())
    assert 0 <= newest["age_secs"] < 60


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_table_fits_its_window_and_marks_what_restore_takes(
    run: Callable[..., Result], places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run("ls", places[0]).stdout.splitlines()
    assert max(map(len, lines)) <= columns
    marked = [line.split()[1:3] for line in lines if line.startswith("▶")]
    assert marked == [["55", "a2"], ["a", "restore"]]
    assert all(line == line.rstrip() for line in lines)


def test_a_record_that_was_not_committed_is_found_before_restore_would(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    tier = local_tier(tmp_path / "local")
    for step in (20, 40):
        write_checkpoint(tier, checkpoint(step), durable=True)
    flip(file_of(tmp_path / "local", checkpoint(40), "record-00001.json"), 40)
    listing = document(run("ls", write_recipe(tmp_path, local=tmp_path / "local"), "--json"))
    assert listing["next"]["step"] == 20
    assert "not the one that was committed" in rows(listing, "local")[(40, 1)]["problem"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("__1_0.distcp", "__1_0.distcp is missing"),
        ("record-00001.json", "record of rank 1"),
        ("manifest.json", "not c"),
    ],
)
def test_ls_says_why_a_durable_checkpoint_is_not_complete(
    run: Callable[..., Result], tmp_path: Path, name: str, words: str
) -> None:
    write_checkpoint(local_tier(tmp_path / "local"), checkpoint(20), durable=True)
    file_of(tmp_path / "local", checkpoint(20), name).unlink()
    result = run("ls", write_recipe(tmp_path, local=tmp_path / "local"), "--json")
    entry = rows(document(result), "local")[(20, 1)]
    assert (result.exit_code, entry["complete"]) == (0, False)
    assert words in entry["problem"]


def test_nothing_saved_yet_is_said(run: Callable[..., Result], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")
    result = run("ls", recipe)
    assert result.exit_code == 0
    assert "nothing was saved yet" in result.stdout
    assert run("show", recipe).exit_code == 1
    assert run("verify", recipe).exit_code == 1
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]


def test_attempts_of_one_ordinal_are_told_apart(run: Callable[..., Result], tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    first = checkpoint(20)
    second = replace(first, attempt=replace(first.attempt, nonce="feedbeef"))
    for each in (first, second):
        write_checkpoint(tier, each, durable=True)
    shown = run("ls", write_recipe(tmp_path, local=tmp_path / "local")).stdout
    assert "a1-feedbeef" in shown
    assert "a1-00000001" in shown


# ---- tiers that do not answer


@pytest.fixture
def silent(tmp_path: Path, places: tuple[Path, Path, Path]) -> Path:
    """A recipe whose local tier refuses: a link stands where its directory would."""
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / NAMESPACE).symlink_to(places[2] / NAMESPACE)
    return write_recipe(tmp_path, memory=places[1], local=tmp_path / "silent")


def test_a_tier_that_does_not_answer_is_a_row_and_exit_1(run: Callable[..., Result], silent: Path) -> None:
    result = run("ls", silent)
    assert result.exit_code == 1
    assert "did not answer" in result.stdout
    assert "would refuse to choose" in result.stdout
    assert "▶" not in result.stdout
    result = run("ls", silent, "--json")
    assert result.exit_code == 1
    assert (document(result)["next"], result.stderr) == (None, "")
    assert document(result)["tiers"][1]["error"]["kind"] == "TierRefusedError"
    assert len(document(result)["tiers"][0]["checkpoints"]) == 3


def test_memory_is_taken_where_the_recipe_says_so(run: Callable[..., Result], silent: Path) -> None:
    silent.write_text(silent.read_text(encoding="utf-8") + "unreachable: use_memory\n", encoding="utf-8")
    assert document(run("ls", silent, "--json"))["next"]["step"] == 55


@pytest.mark.parametrize("command", ["show", "verify"])
def test_what_answers_is_still_shown(run: Callable[..., Result], silent: Path, command: str) -> None:
    result = run(command, silent)
    assert result.exit_code == 1
    assert "55" in result.stdout
    assert result.stderr.count("Error: ") == 1
    result = run(command, silent, "--json")
    assert result.exit_code == 1
    assert list(document(result)["errors"]) == ["local"]
    assert result.stderr == ""


# ---- show


def test_show_tells_all_about_the_newest_complete_one(
    run: Callable[..., Result], places: tuple[Path, Path, Path]
) -> None:
    result = run("show", places[0], "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    fast, slow = document(result)["checkpoints"]
    assert (fast["step"], [copy["name"] for copy in fast["tiers"]]) == (55, ["memory"])
    assert (slow["step"], [copy["name"] for copy in slow["tiers"]]) == (40, ["local"])
    assert (slow["tiers"][0]["committed"], fast["tiers"][0]["committed"]) == (True, False)
    assert slow["parent"] == {"step": 20, "attempt": str(checkpoint(20, 1).attempt)}
    assert slow["parent_chosen"] is True
    assert (slow["world"], slow["metrics"]) == (2, {"val_loss": 5.0})
    assert slow["watermark"] == layout.checkpoint_dir(checkpoint(39, 2))
    assert [(part["name"], part["rank"], part["bytes"]) for part in slow["parts"]] == [
        ("__0_0.distcp", 0, 4096),
        ("__1_0.distcp", 1, 4096),
    ]
    assert slow["tensors"] == [
        {"fqn": "model.layers.0.attention.weight", "dtype": "float32", "shape": [32, 64], "bytes": 8192, "chunks": 2}
    ]
    assert slow["values"] == ["per_rank.0.rng", "per_rank.1.rng"]


def test_show_says_the_same_tensors_once(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    shown = run("show", places[0]).stdout
    assert shown.count("attention.weight") == 1
    assert "the same tensors and values as step 55" in shown


def test_show_groups_tiers_that_hold_the_same(run: Callable[..., Result], tmp_path: Path) -> None:
    write_checkpoint(local_tier(tmp_path / "local"), checkpoint(20), durable=True, saved_at=5.0)
    write_checkpoint(local_tier(tmp_path / "archive"), checkpoint(20), durable=True, saved_at=5.0)
    more = f"  archive: {{kind: local, path: {tmp_path / 'archive'}}}\n"
    shown = document(run("show", write_recipe(tmp_path, local=tmp_path / "local", more=more), "--json"))
    assert [[copy["name"] for copy in one["tiers"]] for one in shown["checkpoints"]] == [["local", "archive"]]


def test_show_lists_20_tensors_unless_all_are_asked_for(run: Callable[..., Result], tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    write_checkpoint(tier, checkpoint(20), durable=True, tensors=25, size=65536)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    shown = run("show", recipe).stdout
    assert len(re.findall(r"attention\.weight", shown)) == 20
    assert shown.index("layers.2.") < shown.index("layers.10.")
    assert "5 tensors more" in shown
    assert len(re.findall(r"attention\.weight", run("show", recipe, "--all").stdout)) == 25
    assert len(document(run("show", recipe, "--json"))["checkpoints"][0]["tensors"]) == 25


def test_show_of_a_step_that_is_not_there_says_which_are(
    run: Callable[..., Result], places: tuple[Path, Path, Path]
) -> None:
    result = run("show", places[0], "--step", "7")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "step 7 is on no tier" in result.stderr
    assert "60, 55, 50, 40, 20" in result.stderr


def test_show_of_an_uncommitted_step_tells_what_is_there(
    run: Callable[..., Result], places: tuple[Path, Path, Path]
) -> None:
    result = run("show", places[0], "--step", "60", "--json")
    assert result.exit_code == 0
    copies = {copy["name"]: copy for one in document(result)["checkpoints"] for copy in one["tiers"]}
    assert copies["local"]["problem"] == "not committed"
    assert "missing" in copies["memory"]["problem"]


def test_show_of_a_damaged_record_is_exit_3(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    path = file_of(places[2], checkpoint(40, 2), "record-00001.json")
    path.write_bytes(path.read_bytes()[:-9])
    assert run("show", places[0], "--json").exit_code == 0
    result = run("show", places[0], "--step", "40")
    assert result.exit_code == 3
    assert "rank 1" in result.stdout


# ---- verify


def test_verify_of_a_healthy_run_is_exit_0(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    result = run("verify", places[0], "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = document(result)
    assert found["ok"] is True
    states = {(entry["tier"], entry["step"], entry["attempt"][6]): entry["state"] for entry in found["checkpoints"]}
    assert states == {
        ("memory", 60, "2"): "partial",
        ("memory", 55, "2"): "whole",
        ("memory", 50, "2"): "whole",
        ("local", 60, "2"): "uncommitted",
        ("local", 40, "2"): "whole",
        ("local", 40, "1"): "whole",
        ("local", 20, "1"): "whole",
    }
    shown = run("verify", places[0])
    assert shown.exit_code == 0
    assert "all right: 6 checkpoints" in shown.stdout
    assert len(shown.stderr.splitlines()) == 7


@pytest.mark.parametrize("tier", ["memory", "local"])
def test_verify_of_a_flipped_bit_is_exit_3_and_says_where(
    run: Callable[..., Result], places: tuple[Path, Path, Path], tier: str
) -> None:
    which, base = (checkpoint(55, 2), places[1]) if tier == "memory" else (checkpoint(40, 2), places[2])
    flip(file_of(base, which, "__1_0.distcp"), 77)
    result = run("verify", places[0], "--json")
    assert result.exit_code == 3
    bad = [entry for entry in document(result)["checkpoints"] if entry["problems"]]
    assert [(entry["tier"], entry["step"], entry["state"]) for entry in bad] == [(tier, which.step, "damaged")]
    problem = bad[0]["problems"][0]
    assert (problem["rank"], problem["file"], problem["chunk"]) == (1, "__1_0.distcp", 0)
    shown = run("verify", places[0])
    assert shown.exit_code == 3
    assert re.search(rf"{tier} +{which.step} +1 +__1_0\.distcp +0 +has XXH3", shown.stdout)
    other = "local" if tier == "memory" else "memory"
    assert run("verify", places[0], "--tier", other).exit_code == 0
    assert run("verify", places[0], "--step", "20").exit_code == 0
    assert run("verify", places[0], "--step", which.step).exit_code == 3


def test_verify_of_a_share_says_its_seed(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    first = run("verify", places[0], "--read-data", "50%", "--step", "20")
    seed = re.search(r"50% of the chunks, seed (\d+)", " ".join(first.stdout.split()))
    assert seed is not None
    again = document(run("verify", places[0], "--read-data=50", "--step", "20", "--seed", seed[1], "--json"))
    assert (again["share"], again["seed"]) == (0.5, int(seed[1]))
    assert [entry["chunks_read"] for entry in again["checkpoints"]] == [1]


def test_verify_of_nothing_is_exit_1(run: Callable[..., Result], places: tuple[Path, Path, Path]) -> None:
    for step in (7, 60):
        result = run("verify", places[0], "--step", step, "--tier", "local")
        assert result.exit_code == 1
        assert f"nothing to verify of step {step}" in result.stdout


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "--read-data=0%"], "above 0% and up to 100%"),
        (["verify", "--read-data=150%"], "above 0% and up to 100%"),
        (["verify", "--read-data=abc"], "above 0% and up to 100%"),
        (["verify", "--read-data=-5"], "above 0% and up to 100%"),
        (["verify", "--read-data=nan"], "above 0% and up to 100%"),
        (["verify", "--read-data="], "above 0% and up to 100%"),
        (["verify", "--tier", "s4"], "It has: memory, local"),
        (["verify", "--step", "-1"], "0 <= step < 10**10"),
        (["show", "--step", "10000000000"], "0 <= step < 10**10"),
        (["show", "--step", "abc"], "--step"),
        (["lss"], "Did you mean 'ls'?"),
        (["verfy"], "Did you mean 'verify'?"),
        (["ls", "--jsn"], "--json"),
    ],
)
def test_a_mistake_is_exit_2_and_says_what_is_allowed(
    run: Callable[..., Result], places: tuple[Path, Path, Path], arguments: list[str], words: str
) -> None:
    result = run(arguments[0], places[0], *arguments[1:])
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
@pytest.mark.parametrize(
    ("text", "words"), [(None, "not found"), ("version: 1\ntiers: {}\n", "namespace"), ("a: [", "recipe.yaml")]
)
def test_a_recipe_that_cannot_be_used_is_exit_2(
    run: Callable[..., Result], tmp_path: Path, command: str, text: str | None, words: str
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = run(command, path, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def test_no_command_is_a_help_text(run: Callable[..., Result]) -> None:
    result = run()
    assert result.exit_code in (0, 2)
    for name in ("ls", "show", "verify"):
        assert name in result.output


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
@pytest.mark.parametrize("as_json", [False, True])
def test_escapes_in_names_from_outside_do_not_reach_the_terminal(
    run: Callable[..., Result], tmp_path: Path, command: str, as_json: bool
) -> None:
    tier = memory_tier(tmp_path / "memory")
    write_checkpoint(tier, checkpoint(20), durable=False, metrics={EVIL: 1.0})
    for rank in (0, 1):
        key = layout.in_dir(checkpoint(20), layout.record_name(rank))
        record = record_from_json(tier.get(key).data)
        items = tuple(replace(item, fqn=f"{item.fqn}{EVIL}") for item in record.items)
        failed = EVIL if rank == 1 and command == "verify" else None
        tier.put(key, record_to_json(replace(record, tables=(ItemTable(items=items),), failed=failed)))
    result = run(command, write_recipe(tmp_path, memory=tmp_path / "memory"), *(["--json"] if as_json else []))
    assert r"\x1b[31m" in result.output or r"\u001b[31m" in result.output
    assert not set(result.output) & set("\x1b\x07\x9b\u202e")


# ---- looking changes nothing


def _snapshot(base: Path) -> dict[str, tuple[int, int, int, int]]:
    found: dict[str, tuple[int, int, int, int]] = {}
    for path in sorted([base, *base.rglob("*")]):
        facts = path.lstat()
        found[str(path)] = (facts.st_ino, facts.st_mode, facts.st_mtime_ns, facts.st_size)
    return found


def test_looking_at_a_running_job_changes_nothing(run: Callable[..., Result], memory_dir: Path, tmp_path: Path) -> None:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=2), path=str(memory_dir), budget_bytes=None, allow_disk=True
    )
    memory = MemoryTier(settings, NAMESPACE)
    lock = memory.trainer_lock("launch-1", 0)
    try:
        write_checkpoint(memory, checkpoint(20), durable=False)
        before = _snapshot(memory_dir)
        recipe = write_recipe(tmp_path, memory=memory_dir)
        for command in ("ls", "show", "verify"):
            assert run(command, recipe).exit_code == 0
        assert _snapshot(memory_dir) == before
        assert len(memory.live_trainers("launch-2")) == 1
    finally:
        lock.release()
    before = _snapshot(memory_dir)
    assert run("ls", recipe).exit_code == 0
    assert _snapshot(memory_dir) == before


# ---- S3


def _recipe_for(settings: S3Settings, directory: Path) -> Path:
    more = (
        f"  s3: {{kind: s3, uri: 's3://{settings.bucket}/{settings.prefix}', region: us-east-1, "
        f"force_path_style: true, endpoint_url: '{settings.endpoint_url}'}}\n"
    )
    return write_recipe(directory, more=more)


def test_an_s3_tier_is_looked_at_alike(run: Callable[..., Result], s3_settings: S3Settings, tmp_path: Path) -> None:
    tier = open_tier(s3_settings, NAMESPACE)
    write_attempt(tier, 1)
    for step in (20, 40):
        write_checkpoint(tier, checkpoint(step), durable=True, metrics={"val_loss": 0.5})
    recipe = _recipe_for(s3_settings, tmp_path)
    listing = document(run("ls", recipe, "--json"))
    assert listing["next"]["step"] == 40
    assert [entry["complete"] for entry in listing["tiers"][0]["checkpoints"]] == [True, True]
    assert document(run("show", recipe, "--json"))["checkpoints"][0]["tiers"][0]["committed"] is True
    assert run("verify", recipe).exit_code == 0
    key = layout.in_dir(checkpoint(40), "__0_0.distcp")
    data = bytearray(4096)
    tier.read_into(key, 0, memoryview(data))
    data[5] ^= 4
    tier.put(key, bytes(data))
    result = run("verify", recipe, "--json")
    assert result.exit_code == 3
    assert [len(entry["problems"]) for entry in document(result)["checkpoints"]] == [1, 0]
    tier.close()


def test_an_s3_that_is_not_there_is_told_without_secrets(
    run: Callable[..., Result], s3_settings: S3Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sentinel-secret-key")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "sentinel-session-token")
    recipe = _recipe_for(replace(s3_settings, bucket="no-such-bucket"), tmp_path)
    for command in ("ls", "show", "verify"):
        for options in ([], ["--json"]):
            result = run(command, recipe, *options)
            assert result.exit_code == 1
            assert "sentinel" not in result.output
    assert "Create the bucket" in document(run("ls", recipe, "--json"))["tiers"][0]["error"]["hint"]
