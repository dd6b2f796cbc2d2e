"""``sm-tiered copy``, and ``promote`` from a durable tier, on a run with memory, local and S3 tiers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sm_tiered import layout
from sm_tiered.inventory import read_attempts, read_manifest
from sm_tiered.manifest import manifest_to_json
from sm_tiered.pins import pinned
from sm_tiered.records import Manifest
from sm_tiered.settings import S3Settings
from tests.unit.acting import Run, call, document, names_of
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, file_of, flip, write_attempt, write_checkpoint

pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture
def run(tmp_path: Path, s3_settings: S3Settings) -> Run:
    """Steps 20 and 40 on the local tier."""
    made = Run(tmp_path, s3_settings)
    made.fill(20, 40, on=["local"])
    return made


@pytest.fixture
def near(tmp_path: Path) -> Run:
    """The same, of a run without an S3 tier."""
    made = Run(tmp_path)
    made.fill(20, 40)
    return made


def other_run(run: Run, namespace: str) -> Run:
    return Run(run.root, run.s3_settings, namespace=namespace)


# ---- copy


def test_a_step_goes_to_the_other_tier_and_is_verified_there(run: Run) -> None:
    recipe = run.recipe()
    result = call("copy", recipe, "--step", 40, "--from", "local", "--to", "s3", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = document(result)
    assert (found["version"], found["ok"], found["notes"]) == (1, True, [])
    assert (found["from"]["tier"], found["to"]["tier"], found["to"]["namespace"]) == ("local", "s3", NAMESPACE)
    entry = found["checkpoints"][0]
    assert (entry["step"], entry["already"], entry["bytes_sent"], entry["error"]) == (40, False, 8192, None)
    assert run.steps("s3") == [40]
    assert call("verify", recipe, "--tier", "s3").exit_code == 0
    again = document(call("copy", recipe, "--step", 40, "--from", "local", "--to", "s3", "--json"))
    assert (again["ok"], again["checkpoints"][0]["already"], again["checkpoints"][0]["bytes_sent"]) == (True, True, 0)
    back = call("copy", recipe, "--step", 40, "--from", "s3", "--to", "local")
    assert back.exit_code == 0
    assert "there already" in back.stdout


@pytest.mark.parametrize("columns", [80, 120])
def test_all_go_into_another_namespace_and_are_its_own_there(
    near: Run, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    write_checkpoint(near.local, checkpoint(60), durable=True, commit=False)
    recipe = near.recipe()
    result = call("copy", recipe, "--all", "--from", "local", "--to", "local", "--namespace", "run-2")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= columns
    rows = [line.split() for line in result.stdout.splitlines()[1:3]]
    assert [(row[0], row[1]) for row in rows] == [("20", "a1"), ("40", "a1")]
    assert "2 of 2 from local" in result.stdout
    assert re.fullmatch(r"step 20: local to local: copied, verified, committed\nstep 40: .*committed\n", result.stderr)
    there = other_run(near, "run-2")
    assert there.steps("local") == [20, 40]
    manifest = read_manifest(there.local, checkpoint(40))
    assert manifest is not None
    assert manifest.namespace == "run-2"
    good, _ = read_attempts(there.local)
    assert [record.namespace for record in good.values()] == ["run-2"]
    listing = document(call("ls", there.recipe("other.yaml"), "--json"))
    assert listing["next"]["step"] == 40
    assert call("verify", there.recipe("other.yaml"), "--tier", "local").exit_code == 0
    assert near.steps("local") == [20, 40]


def test_the_other_recipe_names_tier_and_namespace(run: Run) -> None:
    there = Run(run.root, run.s3_settings, namespace="run-3")
    target = there.recipe("other.yaml", tiers=["s3"])
    result = call("copy", run.recipe(), "--all", "--from", "local", "--to", "s3", "--to-recipe", target, "--json")
    assert result.exit_code == 0
    assert document(result)["to"]["namespace"] == "run-3"
    assert there.steps("s3") == [20, 40]
    assert call("verify", target).exit_code == 0


def test_a_namespace_with_a_life_of_its_own_is_told_of(near: Run) -> None:
    there = other_run(near, "run-2")
    there.fill(7, ordinal=9)
    arguments = ["--step", 40, "--from", "local", "--to", "local", "--namespace", "run-2"]
    result = call("copy", near.recipe(), *arguments)
    assert result.exit_code == 0
    assert "run-2 has attempts of its own, up to a9" in " ".join(result.stdout.split())
    assert document(call("ls", there.recipe("o.yaml"), "--json"))["next"]["step"] == 7


def test_damage_is_exit_3_and_the_rest_is_copied(near: Run) -> None:
    flip(file_of(near.root / "local", checkpoint(20), "__0_0.distcp"), 5)
    arguments = ["--from", "local", "--to", "local", "--namespace", "run-2"]
    result = call("copy", near.recipe(), "--all", *arguments)
    assert result.exit_code == 3
    assert "chunk 0 has XXH3-128" in result.stderr
    assert "1 of 2 from local" in result.stdout
    assert other_run(near, "run-2").steps("local") == [40]
    found = document(call("copy", near.recipe(), "--step", 20, *arguments, "--json"))
    assert (found["ok"], found["checkpoints"][0]["error"]["kind"]) == (False, "CorruptPartError")
    near.local.delete([layout.in_dir(checkpoint(40), layout.record_name(1))])
    assert call("copy", near.recipe(), "--step", 40, *arguments).exit_code == 3


def test_what_was_deleted_there_is_not_brought_back_unasked(near: Run) -> None:
    there = other_run(near, "run-2")
    grave = Manifest(namespace="run-2", checkpoint=checkpoint(40), world=2, saved_at=0.0, tombstone=True)
    there.local.put(layout.in_dir(checkpoint(40), layout.MANIFEST), manifest_to_json(grave))
    result = call("copy", near.recipe(), "--step", 40, "--from", "local", "--to", "local", "--namespace", "run-2")
    assert result.exit_code == 1
    assert "was deleted there" in result.stderr
    assert "sm-tiered prune --yes" in result.stderr


def test_from_memory_it_goes_without_the_drainer(near: Run) -> None:
    near.fill(50, on=["memory"])
    for name in (layout.INDEX, layout.METADATA):
        near.memory.put(layout.in_dir(checkpoint(50), name), b'{"step":50,"attempt":"%s"}' % _attempt())
    recipe = near.recipe()
    assert call("copy", recipe, "--step", 50, "--from", "memory", "--to", "local").exit_code == 0
    assert near.steps("local") == [20, 40, 50]
    assert call("verify", recipe, "--tier", "local").exit_code == 0
    assert not near.memory.list(f"{layout.QUEUE}/")


def _attempt() -> bytes:
    return str(checkpoint(50).attempt).encode()


# ---- promote from a durable tier


def test_a_step_of_one_durable_tier_is_promoted_to_the_other(run: Run) -> None:
    recipe = run.recipe()
    result = call("promote", recipe, "--step", 40, "--to", "s3", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = document(result)
    assert (found["from"], found["to"], found["by"], found["ok"], found["bytes"]) == ("local", "s3", "copy", True, 8192)
    assert run.steps("s3") == [40]
    again = call("promote", recipe, "--step", 40, "--to", "s3", "--pin")
    assert again.exit_code == 0
    assert again.stdout == "step 40 of a1 is on s3 already, committed, pinned\n"
    assert pinned(run.s3) == {checkpoint(40)}


def test_a_step_that_would_go_at_once_needs_a_pin(near: Run) -> None:
    near.fill(10, on=["memory"])
    near.fill(60)
    result = call("promote", near.recipe(), "--step", 10)
    assert result.exit_code == 1
    assert "the keep policy of local would give step 10 up at once" in result.stderr
    assert "--pin" in result.stderr
    assert not near.memory.list(f"{layout.QUEUE}/")
    assert near.steps("local") == [20, 40, 60]


def test_a_damaged_source_leaves_no_pin(run: Run) -> None:
    flip(file_of(run.root / "local", checkpoint(40), "__0_0.distcp"), 5)
    result = call("promote", run.recipe(), "--step", 40, "--to", "s3", "--pin")
    assert result.exit_code == 3
    assert "step 40 of a1 is not on s3" in result.stdout
    assert pinned(run.s3) == frozenset()
    assert run.steps("s3") == []


# ---- bad input

_COPY = ["copy", "--from", "local", "--to", "local"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([*_COPY, "--step", "40"], 2, "can't be copied onto itself"),
        ([*_COPY, "--all", "--namespace", NAMESPACE], 2, "can't be copied onto itself"),
        ([*_COPY, "--all", "--namespace", "../x"], 2, "illegal character"),
        ([*_COPY, "--namespace", "run-2"], 2, "name one of --step N and --all"),
        ([*_COPY, "--all", "--step", "40", "--namespace", "run-2"], 2, "name one of --step N and --all"),
        ([*_COPY, "--step", "41", "--namespace", "run-2"], 1, "local: steps 40, 20"),
        ([*_COPY, "--step", "-1", "--namespace", "run-2"], 2, "0 <= step < 10**10"),
        (["copy", "--all", "--from", "s4", "--to", "local"], 2, "It has: memory, local"),
        (["copy", "--all", "--from", "local", "--to", "s4"], 2, "It has: memory, local"),
        (["copy", "--all", "--from", "local", "--to", "memory"], 2, "only its own job saves there"),
        (["copy", "--all", "--from", "memory", "--to", "local"], 1, "memory holds no complete checkpoint"),
        (["copy", "--all", "--from", "local"], 2, "--to"),
        ([*_COPY, "--all", "--to-recipe", "/no/such.yaml"], 2, "not found"),
        (["promote", "--step", "41"], 1, "local: steps 40, 20"),
        (["promote", "--step", "40", "--to", "s4"], 2, "It has: memory, local"),
        (["promote", "--step", "40", "--to", "memory"], 2, "is the memory tier"),
        (["promote"], 2, "--step"),
        (["promote", "--step", "40", "--timeout", "0"], 2, "is no time to wait"),
        (["drain", "--timeout", "-1"], 2, "is no time to wait"),
    ],
)
def test_a_mistake_says_what_is_allowed(near: Run, arguments: list[str], status: int, words: str) -> None:
    before = sorted(near.root.rglob("*"))
    result = call(arguments[0], near.recipe(), *arguments[1:])
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
    assert [path for path in sorted(near.root.rglob("*")) if path.name != "recipe.yaml"] == before


def test_promote_asks_which_where_there_are_several_durable_tiers(run: Run) -> None:
    result = call("promote", run.recipe(), "--step", 40)
    assert result.exit_code == 2
    assert "Name one of local, s3" in result.stderr


def test_a_recipe_without_memory_has_nothing_to_drain(near: Run) -> None:
    result = call("drain", near.recipe(tiers=["local"]))
    assert result.exit_code == 2
    assert "no memory tier" in result.stderr


def test_an_alias_of_the_same_directory_is_the_same_place(near: Run) -> None:
    (near.root / "alias").symlink_to(near.root / "local")
    recipe = near.recipe()
    other = near.root / "other.yaml"
    other.write_text(recipe.read_text().replace(str(near.root / "local"), str(near.root / "alias")), encoding="utf-8")
    result = call("copy", recipe, "--all", "--from", "local", "--to", "local", "--to-recipe", other)
    assert result.exit_code == 2
    assert "onto itself" in result.stderr


def test_without_credentials_it_is_told_what_was_tried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for command in (["copy", "--from", "local", "--to", "s3"], ["promote", "--to", "s3"]):
        result = call(command[0], run.recipe(), "--step", 40, *command[1:])
        assert result.exit_code == 1
        assert "no usable AWS credentials" in result.stderr
    assert names_of(run.local, checkpoint(40))


def test_of_two_attempts_the_one_that_restore_takes_is_copied(near: Run) -> None:
    write_attempt(near.local, 2, checkpoint(20), chosen=True)
    write_checkpoint(near.local, checkpoint(40, 2), durable=True)
    arguments = ["--step", 40, "--from", "local", "--to", "local", "--json", "--namespace"]
    found = document(call("copy", near.recipe(), *arguments, "run-2"))["checkpoints"]
    assert [entry["attempt"] for entry in found] == [str(checkpoint(40, 2).attempt)]
    found = document(call("copy", near.recipe(), "--attempt", "a1", *arguments, "run-3"))["checkpoints"]
    assert [entry["attempt"] for entry in found] == [str(checkpoint(40, 1).attempt)]
