"""`sm-tiered why`: what a restore would take, and why not something newer, against what a restore does take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.cli.reasons import walk
from sm_tiered.manifest import record_from_json, record_to_json
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from tests.faults.core_jobs import NAMESPACE
from tests.faults.fallback import make_saved, nearest, oracle, table_of
from tests.unit.cli_checkpoints import (
    checkpoint,
    file_of,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

STEPS = (10, 20)


def run(*arguments: object, columns: int = 80) -> Result:
    """Run ``why`` in this process."""
    result = CliRunner().invoke(app, ["why", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def why(recipe: Path, *arguments: object, status: int = 0) -> Any:
    """Its JSON."""
    result = run(recipe, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (status, "")
    return json.loads(result.stdout)


def test_it_tells_what_a_restore_does_for_every_combination_of_damage(memory_dir: Path) -> None:
    places = list(product(("memory", "durable"), STEPS))
    with table_of(memory_dir, STEPS) as table:
        settings = table.job.settings()
        for states in product(("ok", "missing", "corrupt"), repeat=len(places)):
            cells: Any = dict(zip(places, states, strict=True))
            with table.states(cells):
                found = walk(settings, step=None, share=1.0)
                found.seen.close()
                told = None if found.taken is None else found.taken.checkpoint.step
                expected = oracle(cells, use_memory=False)
                assert told == (expected if isinstance(expected, int) else None), cells
                assert table.restore(use_memory=False) == expected
                if found.taken is not None:
                    assert [source.tier for source in found.taken.sources] == [
                        nearest(cells, found.taken.checkpoint.step)
                    ]
                newer = [candidate for candidate in found.candidates if candidate.refused is not None]
                assert all(candidate.refused for candidate in newer)


def test_ranks_that_memory_has_lost_are_read_from_the_durable_tier(memory_dir: Path) -> None:
    job = make_saved(memory_dir, STEPS, world=2)
    (job.step_dirs("memory")[20] / "record-00001.json").unlink()
    found = walk(job.settings(), step=None, share=None)
    found.seen.close()
    assert found.taken is not None
    assert (found.taken.checkpoint.step, found.taken.world) == (20, 2)
    assert [(source.tier, source.ranks) for source in found.taken.sources] == [("memory", (0,)), ("durable", (1,))]
    (job.step_dirs("durable")[20] / "__1_0.distcp").unlink()
    found = walk(job.settings(), step=None, share=None)
    found.seen.close()
    assert [candidate.checkpoint.step for candidate in found.candidates] == [20, 10]
    assert "of rank 1 nothing can be read" in str(found.candidates[0].refused)
    assert {"parts of rank 1 are missing or cut"} == {
        copy.problem for copy in found.candidates[0].copies if copy.tier == "durable"
    }


def test_what_is_cut_in_memory_or_was_never_committed_is_read_elsewhere(memory_dir: Path) -> None:
    job = make_saved(memory_dir, STEPS, world=2)
    part = job.step_dirs("memory")[20] / "__1_0.distcp"
    os.truncate(part, part.stat().st_size - 1)
    found = walk(job.settings(), step=None, share=None)
    found.seen.close()
    assert found.taken is not None
    assert [(source.tier, source.ranks) for source in found.taken.sources] == [("memory", (0,)), ("durable", (1,))]
    assert found.taken.copies[0].problem == "parts of rank 1 are missing or cut"
    record = job.step_dirs("memory")[20] / "record-00000.json"
    told = record_from_json(record.read_bytes())
    record.write_bytes(record_to_json(replace(told, metrics={"loss": 1.0})))
    found = walk(job.settings(), step=None, share=None)
    found.seen.close()
    assert found.taken is not None
    assert [(source.tier, source.ranks) for source in found.taken.sources] == [("durable", (0, 1))]
    assert found.taken.copies[0].problem == "the record of rank 0 is not the one that was committed"


# ---- what is said


@pytest.fixture
def gone_back(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A recipe, and its memory and local tiers, of a run that went back to step 20 and then was cut off."""
    memory, local = tmp_path / "memory", tmp_path / "local"
    memory.mkdir(mode=0o700)
    local.mkdir(mode=0o700)
    fast, slow = memory_tier(memory), local_tier(local)
    for tier in (fast, slow):
        write_attempt(tier, 1)
        write_attempt(tier, 2, checkpoint(20, 1), chosen=True)
    for step in (20, 40, 60):
        write_checkpoint(slow, checkpoint(step, 1), durable=True)
    write_checkpoint(fast, checkpoint(30, 2), durable=False, skip_ranks=frozenset({1}))
    write_checkpoint(slow, checkpoint(30, 2), durable=True, commit=False, skip_ranks=frozenset({1}))
    return write_recipe(tmp_path, memory=memory, local=local), memory, local


def test_each_newer_candidate_has_its_reason_and_what_was_left_behind_is_told(
    gone_back: tuple[Path, Path, Path],
) -> None:
    found = why(gone_back[0])
    assert found["next"] == {"step": 20, "attempt": str(checkpoint(20, 1).attempt)}
    assert [(entry["step"], entry["taken"]) for entry in found["candidates"]] == [(30, False), (20, True)]
    assert found["candidates"][0]["refused"] == ("memory: records of ranks [1] of 2 are missing; local: not committed")
    assert found["candidates"][1]["sources"] == [{"tier": "local", "ranks": [0, 1]}]
    assert [entry["step"] for entry in found["left_behind"]] == [60, 40]
    assert found["attempts"][0]["parent"] == {"step": 20, "attempt": str(checkpoint(20, 1).attempt)}
    advice = " ".join(found["advice"])
    assert "other nodes may have the missing ranks of step 30" in advice
    assert "step 30 was cut off on its way to local" in advice
    assert "restore(state, step=60) goes back" in advice


@pytest.mark.parametrize("columns", [80, 120])
def test_the_text_fits_its_window(gone_back: tuple[Path, Path, Path], columns: int) -> None:
    result = run(gone_back[0], columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert lines[0] == "a restore takes step 20 now: all ranks from local"
    marked = [line.split()[:3] for line in lines if line.startswith("▶")]
    assert marked == [["▶", "20", "a1"]]
    told = " ".join(result.stdout.split())
    assert "left behind, no candidates: step 60, 40: a2 went back to step 20 of a000001" in told


def test_a_step_is_judged_alone(gone_back: tuple[Path, Path, Path]) -> None:
    assert why(gone_back[0], "--step", 60)["next"]["step"] == 60
    found = why(gone_back[0], "--step", 30, status=3)
    assert (found["next"], [entry["step"] for entry in found["candidates"]]) == (None, [30])
    result = run(gone_back[0], "--step", 50)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "step 50 is on no tier" in result.stderr
    assert "60, 40, 30, 20" in result.stderr
    assert run(gone_back[0], "--step", -1).exit_code == 2
    assert run(gone_back[0], "--read-data", "200%").exit_code == 2


def test_what_is_queued_is_on_its_way(gone_back: tuple[Path, Path, Path]) -> None:
    entry = {
        "checkpoint": layout.checkpoint_dir(checkpoint(30, 2)),
        "rank": 0,
        "tier": "local",
        "world": 2,
        "recipe": "0" * 32,
        "finisher": "",
        "deadline_at": 1.0,
    }
    queue = gone_back[1] / NAMESPACE / layout.QUEUE
    queue.mkdir(mode=0o700)
    name = f"promote-{layout.checkpoint_dir(checkpoint(30, 2))}-00000-local.json"
    (queue / name).write_text(json.dumps(entry))
    assert "step 30 is on its way to local: wait, or `sm-tiered drain`" in why(gone_back[0])["advice"]


def test_damage_is_found_when_asked_for(gone_back: tuple[Path, Path, Path]) -> None:
    path = file_of(gone_back[2], checkpoint(20, 1), "__0_0.distcp")
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(bytes(data))
    assert why(gone_back[0])["next"]["step"] == 20
    found = why(gone_back[0], "--read-data", "100%", status=3)
    assert found["next"] is None
    assert "damaged: __0_0.distcp has XXH3-128" in found["candidates"][1]["refused"]
    assert any("sm-tiered verify --step 20" in line for line in found["advice"])
    assert "NothingRestorableError" in run(gone_back[0], "--read-data", "100%").stdout


def test_a_damaged_manifest_and_a_failed_rank_are_reasons(tmp_path: Path) -> None:
    memory, local = tmp_path / "memory", tmp_path / "local"
    fast, slow = memory_tier(memory), local_tier(local)
    write_checkpoint(slow, checkpoint(10), durable=True)
    write_checkpoint(slow, checkpoint(20), durable=True)
    slow.put(layout.in_dir(checkpoint(20), layout.MANIFEST), b"{}")
    write_checkpoint(fast, checkpoint(30), durable=False)
    key = layout.in_dir(checkpoint(30), layout.record_name(1))
    fast.put(key, record_to_json(replace(record_from_json(fast.get(key).data), failed="out of \x1b[31mmemory")))
    recipe = write_recipe(tmp_path, memory=memory, local=local)
    found = why(recipe)
    assert [entry["step"] for entry in found["candidates"]] == [30, 20, 10]
    assert "rank 1 failed: out of" in found["candidates"][0]["refused"]
    assert "the manifest is damaged" in found["candidates"][1]["refused"]
    assert "\x1b" not in run(recipe).output


def test_a_damaged_attempt_ends_the_walk(tmp_path: Path) -> None:
    tier = local_tier(tmp_path / "local")
    write_checkpoint(tier, checkpoint(10, 1), durable=True)
    tier.put(layout.attempt_key(checkpoint(0, 2).attempt), b"{}")
    found = why(write_recipe(tmp_path, local=tmp_path / "local"), status=3)
    assert (found["next"], found["nothing_saved"]) == (None, False)
    assert "a000002" in found["stopped"]


def test_nothing_saved_is_no_damage(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")
    assert why(recipe)["nothing_saved"] is True
    assert "nothing was ever saved" in run(recipe).stdout
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]


@pytest.fixture
def silent(gone_back: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A recipe whose local tier refuses: a link stands where its directory would."""
    write_checkpoint(memory_tier(gone_back[1]), checkpoint(25, 2), durable=False)
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / NAMESPACE).symlink_to(gone_back[2] / NAMESPACE)
    return write_recipe(tmp_path, memory=gone_back[1], local=tmp_path / "silent")


def test_a_tier_that_does_not_answer_ends_the_walk_unless_memory_may_do(silent: Path) -> None:
    found = why(silent, status=1)
    assert (found["next"], list(found["errors"])) == (None, ["local"])
    assert "local did not answer" in found["stopped"]
    assert any("unreachable: use_memory" in line for line in found["advice"])
    assert "would refuse to choose" in run(silent).stdout
    silent.write_text(silent.read_text(encoding="utf-8") + "unreachable: use_memory\n", encoding="utf-8")
    assert why(silent, status=1)["next"]["step"] == 25


def test_on_s3_it_is_the_same(
    s3_settings: S3Settings, tmp_path: Path, make_recipe: Callable[[S3Settings], Path]
) -> None:
    tier: Tier = open_tier(s3_settings, NAMESPACE)
    for step in (10, 20, 30):
        write_checkpoint(tier, checkpoint(step), durable=True, commit=step < 30)
    tier.delete([layout.in_dir(checkpoint(20), "__1_0.distcp")])
    found = why(make_recipe(s3_settings))
    assert [(entry["step"], entry["taken"]) for entry in found["candidates"]] == [(30, True)]
    assert found["candidates"][0]["tiers"][0]["note"] == "only the manifest is missing: a restore commits it"
    tier.delete([layout.in_dir(checkpoint(30), "record-00001.json")])
    found = why(make_recipe(s3_settings))
    refused = [(entry["step"], entry["refused"]) for entry in found["candidates"]]
    assert refused == [
        (30, "s3: not committed"),
        (20, "of rank 1 nothing can be read: s3: parts of rank 1 are missing or cut"),
        (10, None),
    ]
    tier.close()


@pytest.fixture
def make_recipe(tmp_path: Path) -> Callable[[S3Settings], Path]:
    """Write a recipe of that S3 tier."""

    def make(settings: S3Settings) -> Path:
        more = (
            f"  s3: {{kind: s3, uri: 's3://{settings.bucket}/{settings.prefix}', region: us-east-1, "
            f"force_path_style: true, endpoint_url: '{settings.endpoint_url}'}}\n"
        )
        return write_recipe(tmp_path, more=more)

    return make
