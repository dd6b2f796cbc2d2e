"""A running job that is asked for a save, improves, or fails: what its policies make of it, on all ranks alike."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sm_tiered.cli.app import app
from sm_tiered.event_reading import merge, of_paths
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import pause, recipe, run, start, step_dir, tell
from tests.waiting import wait_until


def _state(rank: int, value: float) -> dict[str, Any]:
    import torch

    return {"w": torch.full((5,), float(value)), "epoch": float(value), "per_rank": {"rank": rank}}


def events(*roots: Path) -> list[tuple[str, object]]:
    """Return kind and step of what rank 0 told, in order."""
    pieces, _ = of_paths(root / "run-1" for root in roots)
    return [(event.kind, event.facts.get("step")) for event in merge(pieces).events if event.rank == 0]


def _stepping(rank: int, which: list[dict[str, Any]]) -> list[Any]:
    """Step again and again; the test asks for a save between two steps."""
    saved: list[Any] = []
    with TieredCheckpointer.from_recipe(which[rank]) as checkpointer:
        for step in range(1, 6):
            tell(step)
            pause()
            handle = checkpointer.maybe_save(step, _state(rank, step))
            saved.append(handle and handle.tiers)
    return saved


def test_asking_on_one_node_saves_on_all_of_them(tmp_path: Path, memory_dir: Path) -> None:
    """Two ranks with two memory directories stand for two nodes; `sm-tiered request` runs on the second one."""
    save = {"any": ["on_request", {"every_n_steps": 100}]}
    nodes = [memory_dir / "one", memory_dir / "two"]
    which = [recipe(tmp_path, node, memory={"save": "on_request"}, disk={"save": save}) for node in nodes]
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(which[1]))
    job = start(2, _stepping, which)
    for step in range(1, 6):
        assert [job.heard(rank) for rank in (0, 1)] == [step, step]
        if step == 3:
            asked = CliRunner().invoke(app, ["request", str(written), "--wait", "0"])
            assert asked.exit_code == 0, asked.output
            assert "the job saves when it comes to its next step" in asked.output
            again = CliRunner().invoke(app, ["request", str(written), "--wait", "0", "--json"])
            assert json.loads(again.output)["asked"] is False, "one is waiting already"
        job.go()
    for end in job.wait():
        assert end.trace is None, end.trace
        assert end.value == [None, None, ("memory", "disk"), None, None]
    assert not (nodes[1] / "run-1" / "request.json").exists()
    assert step_dir(tmp_path / "disk", 3).is_dir()
    told = events(nodes[0])
    assert ("SaveRequested", 3) in told
    assert told[-1] == ("TrainingEnded", 5)


def test_the_command_waits_and_tells_the_step(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": "on_request"})
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(which))
    job = start(0, _until_asked, which)
    job.heard(0)
    asked = CliRunner().invoke(app, ["request", str(written), "--json"])
    [end] = job.wait()
    assert end.trace is None, end.trace
    assert asked.exit_code == 0, asked.output
    found = json.loads(asked.output)
    assert (found["taken"], found["step"]) == (True, end.value)
    after = CliRunner().invoke(app, ["request", str(written)])
    assert after.exit_code == 1
    assert "no trainer of namespace 'run-1' is alive" in after.output


def _until_asked(rank: int, which: dict[str, Any]) -> int:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        tell("ready")
        for step in range(1, 10_000):
            if checkpointer.maybe_save(step, _state(rank, step)) is not None:
                time.sleep(0.5)
                return step
            time.sleep(0.01)
    return -1


def test_a_job_that_waits_for_no_request_says_what_to_write(tmp_path: Path, memory_dir: Path) -> None:
    written = tmp_path / "recipe.yaml"
    written.write_text(json.dumps(recipe(tmp_path, memory_dir)))
    asked = CliRunner().invoke(app, ["request", str(written)])
    assert asked.exit_code == 2
    assert "no policy of" in asked.output
    assert "on_request" in asked.output


def _improving(rank: int, which: dict[str, Any], losses: list[float], restores: bool) -> list[int]:
    saved: list[int] = []
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        state = _state(rank, 0.0)
        begun = checkpointer.restore(state) or 0
        assert restores is (begun > 0)
        for step, loss in enumerate(losses, start=begun + 1):
            mine = loss if rank == 0 else 1.0 - loss
            handle = checkpointer.maybe_save(step, _state(rank, step), metrics={"loss": mine})
            if handle is not None and "disk" in handle.tiers:
                handle.wait("disk")
                saved.append(step)
    return saved


def test_what_was_best_before_a_restart_has_to_be_beaten_after_it(tmp_path: Path, memory_dir: Path) -> None:
    better = {"when_improved": {"metric": "loss", "mode": "min", "min_delta": 0.05}}
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": better})
    assert run(2, _improving, which, [0.9, 0.4, 0.6, 0.38], False) == [[1, 2]] * 2
    shutil.rmtree(memory_dir)
    assert run(2, _improving, which, [0.39, 0.37, 0.3], True) == [[5]] * 2, "step 2 was restored, with 0.4"


def _failing(rank: int, which: dict[str, Any], restores: bool) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        if restores:
            assert checkpointer.restore(_state(rank, 0.0)) == 4
            return
        for step in range(1, 6):
            if step == 5 and rank == 1:
                raise ValueError("a bad batch")
            handle = checkpointer.maybe_save(step, _state(rank, step))
            assert handle is not None
            handle.wait("memory")
            if step == 4 and rank == 0:
                raise ValueError("gone too")


def committed(disk: Path) -> bool:
    return any(disk.glob("run-1/step_0000000004-*/manifest.json"))


@pytest.mark.parametrize(("save", "kept"), [("on_exception", True), ("on_end", False)])
def test_a_failure_brings_the_newest_whole_step_to_the_tier_that_wants_it(
    save: str, kept: bool, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": save})
    for end in start(2, _failing, which, False).wait():
        assert end.trace is not None
        assert "ValueError" in end.trace
    if kept:
        wait_until(lambda: committed(tmp_path / "disk"), "step 4 is not committed", secs=60.0)
    assert committed(tmp_path / "disk") is kept
    assert [kind for kind, _ in events(memory_dir)].count("TrainingEnded") == 1
    if kept:
        shutil.rmtree(memory_dir)
        run(2, _failing, which, True)
