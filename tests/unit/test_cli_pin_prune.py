"""``sm-tiered pin`` and ``prune`` on a run with memory, local and S3 tiers."""

from __future__ import annotations

from pathlib import Path

import pytest

from sm_tiered import layout
from sm_tiered.manifest import manifest_to_json
from sm_tiered.pins import pinned
from sm_tiered.policies.keep import Latest
from sm_tiered.queue import Entry, Queue
from sm_tiered.records import Manifest
from sm_tiered.settings import MemorySettings, S3Settings
from sm_tiered.tiers.memory import MemoryTier
from tests.unit.acting import Run, call, document, names_of
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, write_attempt, write_checkpoint

pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture
def run(tmp_path: Path, s3_settings: S3Settings) -> Run:
    """Steps 20 to 80 on both durable tiers, of which the policies keep the newest two; 85 and 90 in memory."""
    made = Run(tmp_path, s3_settings)
    made.fill(20, 40, 60, 80)
    made.fill(85, 90, on=["memory"])
    return made


@pytest.fixture
def near(tmp_path: Path) -> Run:
    """The same without the S3 tier."""
    made = Run(tmp_path)
    made.fill(20, 40, 60, 80)
    made.fill(85, 90, on=["memory"])
    return made


# ---- pin


def test_a_pin_stands_on_every_durable_tier_that_holds_the_step(run: Run) -> None:
    recipe = run.recipe()
    result = call("pin", recipe, "--step", 20, "--reason", "best so far", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = document(result)
    assert (found["version"], found["action"], found["errors"]) == (1, "pin", {})
    assert [(p["tier"], p["step"], p["state"], p["reason"]) for p in found["pins"]] == [
        ("local", 20, "pinned", "best so far"),
        ("s3", 20, "pinned", "best so far"),
    ]
    assert pinned(run.local) == pinned(run.s3) == {checkpoint(20)}
    assert not run.memory.list("pins/")
    listed = document(call("ls", recipe, "--all", "--json"))
    marked = [(tier["name"], c["step"]) for tier in listed["tiers"] for c in tier["checkpoints"] if c["pinned"]]
    assert marked == [("local", 20), ("s3", 20)]


@pytest.mark.parametrize("columns", [80, 120])
def test_pins_are_listed_with_their_reasons(run: Run, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    recipe = run.recipe()
    assert call("pin", recipe).stdout == "nothing is pinned\n"
    call("pin", recipe, "--step", 40, "--tier", "s3", "--reason", "for the paper\x1b[31m")
    run.local.put(layout.pin_key(checkpoint(7)), b"by another program")
    shown = call("pin", recipe).stdout
    assert max(map(len, shown.splitlines())) <= columns
    rows = [line.split() for line in shown.splitlines()[1:]]
    assert [row[:3] for row in rows] == [["local", "7", "a1"], ["s3", "40", "a1"]]
    assert "nothing is there" in shown
    assert r"for the paper\x1b[31m" in shown
    pins = document(call("pin", recipe, "--json"))["pins"]
    assert [(p["step"], p["state"], p["pinned_at"] is None) for p in pins] == [
        (7, "nothing is there", True),
        (40, "kept", False),
    ]


def test_a_pin_comes_once_and_goes_again(run: Run) -> None:
    recipe = run.recipe()
    for state in ("pinned", "pinned already"):
        pins = document(call("pin", recipe, "--step", 40, "--json"))["pins"]
        assert [p["state"] for p in pins] == [state, state]
    renamed = document(call("pin", recipe, "--step", 40, "--reason", "now said", "--json"))["pins"]
    assert {p["reason"] for p in renamed} == {"now said"}
    removed = document(call("pin", recipe, "--step", 40, "--remove", "--json"))
    assert (removed["action"], [p["state"] for p in removed["pins"]]) == ("remove", ["pin removed"] * 2)
    assert not pinned(run.local) | pinned(run.s3)
    again = call("pin", recipe, "--step", 40, "--remove")
    assert again.exit_code == 1
    assert "Nothing is pinned" in again.stderr


def test_the_attempt_that_restore_takes_is_pinned_or_the_one_that_is_named(near: Run) -> None:
    near.fill(40, ordinal=2)
    recipe = near.recipe()
    call("pin", recipe, "--step", 40)
    assert pinned(near.local) == {checkpoint(40, 2)}
    call("pin", recipe, "--step", 40, "--attempt", "a1", "--tier", "local")
    assert pinned(near.local) == {checkpoint(40, 1), checkpoint(40, 2)}
    call("pin", recipe, "--step", 40, "--attempt", "a2", "--remove")
    assert pinned(near.local) == {checkpoint(40, 1)}


def test_a_step_in_memory_alone_is_not_pinned_and_told_why(near: Run) -> None:
    result = call("pin", near.recipe(), "--step", 90)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "memory recycles its files" in result.stderr
    assert "promote" in result.stderr


def test_what_is_pinned_is_never_pruned(run: Run) -> None:
    recipe = run.recipe()
    call("pin", recipe, "--step", 20)
    assert call("prune", recipe, "--yes").exit_code == 0
    assert run.steps("local") == run.steps("s3") == [20, 60, 80]
    call("pin", recipe, "--step", 20, "--remove")
    assert call("prune", recipe, "--yes").exit_code == 0
    assert run.steps("local") == run.steps("s3") == [60, 80]


def test_one_tier_that_does_not_answer_leaves_the_other_pinned(run: Run) -> None:
    recipe = run.recipe()
    recipe.write_text(recipe.read_text().replace("s3://", "s3://no-such-"), encoding="utf-8")
    result = call("pin", recipe, "--step", 40, "--json")
    assert result.exit_code == 1
    found = document(result)
    assert ([p["tier"] for p in found["pins"]], list(found["errors"])) == (["local"], ["s3"])


# ---- prune


def test_without_yes_nothing_is_touched_and_all_is_told(run: Run) -> None:
    recipe = run.recipe()
    before = [entry for name in ("local", "s3") for entry in run.tier(name).list("")]
    result = call("prune", recipe, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [entry for name in ("local", "s3") for entry in run.tier(name).list("")] == before
    found = document(result)
    assert (found["dry_run"], [tier["name"] for tier in found["tiers"]]) == (True, ["local", "s3"])
    for tier in found["tiers"]:
        assert [(d["step"], d["why"]) for d in tier["delete"]] == [
            (20, "the keep policy gives it up"),
            (40, "the keep policy gives it up"),
        ]
        assert [(k["step"], k["reasons"]) for k in tier["kept"]] == [(60, ["keep policy"]), (80, ["newest"])]
        assert tier["deleted"] is None
        files = [
            e.size for step in (20, 40) for e in run.tier(tier["name"]).list(layout.checkpoint_dir(checkpoint(step)))
        ]
        assert tier["freed_bytes"] == sum(files) > 0
    assert found["freed_bytes"] == sum(tier["freed_bytes"] for tier in found["tiers"])


@pytest.mark.parametrize("columns", [80, 120])
def test_the_plan_is_a_table_that_fits(run: Run, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    call("pin", run.recipe(), "--step", 20, "--tier", "local")
    shown = call("prune", run.recipe()).stdout
    assert max(map(len, shown.splitlines())) <= columns
    local = shown.partition("s3\n")[0]
    assert [line.split()[0] for line in local.splitlines()[2:6]] == ["80", "60", "40", "20"]
    assert "goes" in local
    assert "pinned" in local
    assert "3 checkpoints would go" in shown
    assert "say --yes" in shown


def test_yes_deletes_behind_tombstones_and_says_what(run: Run) -> None:
    result = call("prune", run.recipe(), "--tier", "local", "--yes")
    assert result.exit_code == 0
    assert "2 checkpoints deleted" in result.stdout
    assert result.stderr.splitlines() == ["local step 20: deleted", "local step 40: deleted"]
    assert (run.steps("local"), run.steps("s3")) == ([60, 80], [20, 40, 60, 80])
    assert names_of(run.local, checkpoint(20)) == [layout.MANIFEST]
    again = call("prune", run.recipe(), "--tier", "local", "--yes")
    assert "nothing is to be given up" in again.stdout


def test_what_a_restore_could_need_stays_and_is_told(near: Run) -> None:
    write_attempt(near.local, 2, checkpoint(20, 1), chosen=True)
    write_checkpoint(near.local, checkpoint(30, 2), durable=True)
    write_checkpoint(near.local, checkpoint(50, 2), durable=True, commit=False)
    near.local.put(layout.in_dir(checkpoint(40), layout.MANIFEST), b"{")
    found = document(call("prune", near.recipe(tiers=["local"]), "--yes", "--json"))
    kept = {(k["step"], k["attempt"][:7]): k["reasons"] for k in found["tiers"][0]["kept"]}
    assert kept == {
        (20, "a000001"): ["restored from"],
        (40, "a000001"): ["unreadable"],
        (80, "a000001"): ["keep policy"],
        (30, "a000002"): ["newest"],
        (50, "a000002"): ["in flight"],
    }
    assert [d["step"] for d in found["tiers"][0]["deleted"]] == [60]


def test_another_namespace_and_unknown_files_stay(run: Run) -> None:
    other = Run(run.root, run.s3_settings, namespace="run-2")
    for name in ("local", "s3"):
        write_checkpoint(other.tier(name), checkpoint(1), durable=True)
        run.tier(name).put(layout.in_dir(checkpoint(20), "notes.txt"), b"mine")
    assert call("prune", run.recipe(), "--yes").exit_code == 0
    for name in ("local", "s3"):
        assert names_of(run.tier(name), checkpoint(20)) == [layout.MANIFEST, "notes.txt"]
        assert len(names_of(other.tier(name), checkpoint(1))) == 7


def test_what_dead_attempts_left_goes_and_what_is_queued_does_not(near: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncommitted steps that are long out of use, a deletion that was cut short, old tombstones, uploads of nobody."""
    recipe = near.recipe(tiers=["memory", "local"])
    recipe.write_text(recipe.read_text() + "commit_deadline_secs: 0.001\n", encoding="utf-8")
    for step in (5, 10):
        write_checkpoint(near.local, checkpoint(step), durable=True, commit=False)
    grave = Manifest(namespace=NAMESPACE, checkpoint=checkpoint(15), world=1, saved_at=0.0, tombstone=True)
    near.local.put(layout.in_dir(checkpoint(15), layout.MANIFEST), manifest_to_json(grave))
    near.local.put(layout.in_dir(checkpoint(15), layout.part_name(0, 0)), b"rest")
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(1), path=str(near.root / "memory"), budget_bytes=None, allow_disk=True
    )
    Queue(MemoryTier(settings, NAMESPACE)).put(
        Entry(checkpoint=checkpoint(10), rank=0, tier="local", world=2, recipe="", finisher="", deadline_at=0.0)
    )
    near.fill(100, on=["local"])
    found = document(call("prune", recipe, "--yes", "--json"))["tiers"][0]
    assert [(d["step"], d["why"]) for d in found["delete"]] == [
        (5, "never committed, and long out of use"),
        (20, "the keep policy gives it up"),
        (40, "the keep policy gives it up"),
        (60, "the keep policy gives it up"),
        (15, "its deletion was cut short"),
    ]
    assert names_of(near.local, checkpoint(15)) == names_of(near.local, checkpoint(5)) == [layout.MANIFEST]
    assert len(names_of(near.local, checkpoint(10))) == 4
    monkeypatch.setattr("sm_tiered.retention.TOMBSTONE_SECS", -1e6)
    later = document(call("prune", recipe, "--yes", "--json"))["tiers"][0]
    assert [tomb["step"] for tomb in later["tombstones"]] == [5, 15, 20, 40, 60]
    assert names_of(near.local, checkpoint(15)) == []


def test_uploads_of_nobody_are_counted_first_and_aborted_then(
    run: Run, s3_client: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.s3_settings is not None
    key = f"{run.s3_settings.prefix}/{NAMESPACE}/{layout.in_dir(checkpoint(20), 'x')}"
    s3_client.create_multipart_upload(Bucket=run.s3_settings.bucket, Key=key)  # type: ignore[attr-defined]

    def left() -> int:
        answer = s3_client.list_multipart_uploads(Bucket=run.s3_settings.bucket)  # type: ignore[attr-defined]
        return len(answer.get("Uploads", []))

    recipe = run.recipe(tiers=["s3"])
    for options, count in (([], 1), (["--yes"], 0)):  # moto says that all began in 2010
        assert document(call("prune", recipe, *options, "--json"))["tiers"][0]["unfinished_uploads"] == 1
        assert left() == count


def test_an_attempt_that_is_newer_elsewhere_holds_everything(near: Run) -> None:
    """It is in memory only yet: it may go on from anything that is here."""
    write_attempt(near.memory, 2, checkpoint(20))
    result = call("prune", near.recipe(), "--yes")
    assert result.exit_code == 0
    assert "has nothing committed here yet" in " ".join(result.stdout.split())
    assert near.steps("local") == [20, 40, 60, 80]


def test_a_damaged_attempt_record_stops_it_with_3(near: Run) -> None:
    near.local.put(layout.attempt_key(checkpoint(1).attempt), b"{")
    result = call("prune", near.recipe(tiers=["local"]), "--yes")
    assert result.exit_code == 3
    assert "is damaged" in result.stderr
    assert near.steps("local") == [20, 40, 60, 80]


def test_an_unreachable_tier_is_exit_1_and_the_others_are_pruned(run: Run) -> None:
    recipe = run.recipe()
    recipe.write_text(recipe.read_text().replace("s3://", "s3://no-such-"), encoding="utf-8")
    result = call("prune", recipe, "--yes", "--json")
    assert result.exit_code == 1
    assert list(document(result)["errors"]) == ["s3"]
    assert run.steps("local") == [60, 80]


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["pin", "--step", "40", "--tier", "s4"], 2, "It has: memory, local"),
        (["pin", "--step", "40", "--tier", "memory"], 2, "memory recycles its files"),
        (["pin", "--step", "-1"], 2, "0 <= step < 10**10"),
        (["pin", "--step", "41"], 1, "local: steps 80, 60, 40, 20"),
        (["pin", "--step", "40", "--attempt", "a9"], 1, "step 40 of a9 is on no tier"),
        (["pin", "--step", "40", "--attempt", "two"], 2, "as `sm-tiered ls` shows it"),
        (["pin", "--remove"], 2, "--step is missing"),
        (["pin", "--reason", "x"], 2, "--step is missing"),
        (["pin", "--step", "40", "--reason", ""], 2, "Allowed: 1 to 500"),
        (["pin", "--step", "40", "--reason", "x", "--remove"], 2, "don't go together"),
        (["prune", "--tier", "s4"], 2, "It has: memory, local"),
        (["prune", "--tier", "memory", "--yes"], 2, "memory recycles its files"),
    ],
)
def test_a_mistake_says_what_is_allowed(near: Run, arguments: list[str], status: int, words: str) -> None:
    before = [entry for name in near.durable for entry in near.tier(name).list("")]
    result = call(arguments[0], near.recipe(), *arguments[1:])
    assert (result.exit_code, result.stdout) == (status, "")
    assert words in result.stderr
    assert [entry for name in near.durable for entry in near.tier(name).list("")] == before


@pytest.mark.parametrize("command", [["pin", "--step", "20"], ["prune", "--yes"]])
def test_without_credentials_it_is_told_what_was_tried(
    run: Run, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    result = call(command[0], run.recipe(tiers=["s3"]), *command[1:])
    assert result.exit_code == 1
    assert "no usable AWS credentials" in result.stderr
    assert "AWS_PROFILE" in result.stderr


def test_a_recipe_without_a_durable_tier_has_nothing_to_pin(near: Run) -> None:
    result = call("pin", near.recipe(tiers=["memory"]), "--step", 85)
    assert result.exit_code == 2
    assert "no durable tier" in result.stderr
