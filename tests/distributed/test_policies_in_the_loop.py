"""Policies that need more than the step: what one rank knows decides for all of them, alike."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.event_reading import merge, of_paths
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import pause, recipe, run, start, step_dir, tell


def _state(rank: int, value: float) -> dict[str, Any]:
    import torch

    return {"w": torch.full((5,), value), "epoch": value, "per_rank": {"rank": rank}}


def _clocks(rank: int, which: dict[str, Any]) -> list[Any]:
    """Rank 0's clock tells the seconds; those of the others are hours off and go backwards."""
    from sm_tiered import schedule

    class Clock:
        now = 1000.0

        @classmethod
        def time(cls) -> float:
            return cls.now if rank == 0 else 1e7 * rank - 50 * cls.now

    schedule.time = Clock
    saved: list[Any] = []
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer._engine is not None
        checkpointer._engine.schedule.started_at = Clock.time()
        # At steps 7 and 8 somebody has set the clock back by an hour.
        for step, now in enumerate((1000, 1100, 1250, 1350, 1500, 1600, -2000, -1900, 1650, 1850), start=1):
            Clock.now = float(now)
            handle = checkpointer.maybe_save(step, _state(rank, step))
            saved.append(handle and handle.tiers)
    return saved


@pytest.mark.parametrize("world", [0, 3])
def test_seconds_are_counted_by_the_clock_of_rank_0_alone(world: int, tmp_path: Path, memory_dir: Path) -> None:
    due = {"every_secs": 200}, {"all": [{"every_secs": 400}, {"every_n_steps": 2}]}
    which = recipe(tmp_path, memory_dir, memory={"save": due[0]}, disk={"save": due[1]})
    memory, both = ("memory",), ("memory", "disk")
    for saved in run(world, _clocks, which):
        assert saved == [None, None, memory, None, memory, both, None, None, None, memory]


def _preempted(rank: int, which: dict[str, Any], world: int) -> dict[str, Any]:
    """Step again and again; the test sends SIGTERM to one rank between two steps."""
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    found: dict[str, Any] = {"saved": {}, "before": [], "preempted": []}
    checkpointer = TieredCheckpointer.from_recipe(which)
    for step in range(1, 7):
        tell(step)
        pause()
        found["before"].append(checkpointer.preempted)
        handle = checkpointer.maybe_save(step, _state(rank, step))
        found["preempted"].append(checkpointer.preempted)
        if handle is not None:
            found["saved"][step] = handle.tiers
            handle.wait(handle.tiers[-1])
    checkpointer.close()
    found["heard"] = list(heard)
    os.kill(os.getpid(), signal.SIGTERM)
    found["heard after"] = len(heard)
    return found


@pytest.mark.parametrize(("world", "victim"), [(0, 0), (2, 1)])
def test_one_rank_that_is_told_to_stop_lets_all_save_once(
    world: int, victim: int, tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir, memory={"save": {"at_steps": [5]}}, disk={"save": "on_preemption"})
    job = start(world, _preempted, which, world)
    ranks = range(max(1, world))
    for step in range(1, 7):
        assert [job.heard(rank) for rank in ranks] == [step for _ in ranks]
        if step in (3, 5):
            os.kill(job.pid(victim), signal.SIGTERM)
        job.go()
    for rank, end in enumerate(job.wait()):
        assert end.trace is None, end.trace
        assert end.value["saved"] == {3: ("memory", "disk"), 5: ("memory",)}, "acted on once"
        assert end.value["preempted"] == [False, False, True, True, True, True]
        assert end.value["before"] == [False, False, False, True, True, True], "no rank stops before the others know"
        told = 2 if rank == victim else 0
        assert end.value["heard"] == [signal.SIGTERM] * told, "who listened before still hears"
        assert end.value["heard after"] == told + 1, "and alone, once the checkpointer is closed"
    told = merge(of_paths([memory_dir / "run-1"])[0]).events
    assert [event.facts["step"] for event in told if event.kind == "Preempted" and event.rank == 0] == [3]


def _metrics(rank: int, which: dict[str, Any]) -> list[Any]:
    """Each rank has a loss of its own; rank 0's is the one that counts."""
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step, loss in enumerate((0.5, 0.1, 0.9), start=1):
            mine = loss if rank == 0 else 1.0 - loss
            checkpointer.save(step, _state(rank, step), metrics={"loss": mine}).wait("disk")
        checkpointer.save(4, _state(rank, 4), metrics={"loss": 0.8 if rank == 0 else float("nan")}).wait("disk")
        checkpointer.wait()
    return []


def test_the_best_are_chosen_by_the_metrics_of_rank_0(tmp_path: Path, memory_dir: Path) -> None:
    keep = {"any": [{"best": {"metric": "loss", "mode": "min", "n": 1}}, {"latest": 1}]}
    run(2, _metrics, recipe(tmp_path, memory_dir, disk={"keep": keep}))
    manifest = json.loads((step_dir(tmp_path / "disk", 2) / "manifest.json").read_text())
    assert (manifest["kind"], manifest["metrics"]) == ("manifest", {"loss": 0.1})
    for step in (1, 3):
        assert json.loads((step_dir(tmp_path / "disk", step) / "manifest.json").read_text())["kind"] == "tombstone"


def _failing_tier(rank: int, which: dict[str, Any], disk: str) -> None:
    import shutil

    import torch.distributed as dist

    from sm_tiered.errors import TieredError

    checkpointer = TieredCheckpointer.from_recipe(which)
    dist.barrier()
    root = Path(disk) / which["namespace"]
    if rank == 0:
        shutil.rmtree(root)
        root.write_text("no directory")
    dist.barrier()
    handle = checkpointer.save(1, _state(rank, 1.0))
    with pytest.raises(TieredError) as caught:
        handle.wait("disk")
    assert (caught.value.step, caught.value.tier) == (1, "disk")
    with pytest.raises(TieredError):
        checkpointer.save(2, _state(rank, 2.0), ["memory"])
    # All ranks have raised at the same save, so the next one finds them together.
    checkpointer.save(3, _state(rank, 3.0), ["memory"]).wait("memory")
    state = _state(rank, -1.0)
    assert checkpointer.restore(state) == 3
    assert state["epoch"] == 3.0
    checkpointer.close()


def test_a_failure_behind_the_loop_is_raised_on_all_ranks_at_the_same_save(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, on_error="raise", unreachable="use_memory")
    run(2, _failing_tier, which, str(tmp_path / "disk"))
