"""A real job, killed for real, launch after launch: what its events tell is what really happened."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sm_tiered.agreement import Request
from sm_tiered.cli.app import app
from sm_tiered.events import Progress, TrainingEnded
from sm_tiered.group import Group
from sm_tiered.layout import part_name
from sm_tiered.settings import S3Settings
from sm_tiered.testing.plain import PlainEngine, PlainPart
from tests.faults.core_jobs import NAMESPACE, Job, killed, s3_fields, state

STEP_SECS = 0.02


@dataclass(frozen=True)
class ThreeTiers(Job):
    """With a directory and a bucket behind memory."""

    def recipe(self, rank: int = 0, *, memory: Path | None = None) -> dict[str, Any]:
        recipe = super().recipe(rank, memory=memory)
        assert self.s3 is not None
        local = {"kind": "local", "path": str(self.durable), "fsync": False, "keep": {"latest": 3}}
        recipe["tiers"] = {"memory": recipe["tiers"]["memory"], "durable": local, "s3": {"kind": "s3", **self.s3}}
        return recipe


class Journal:
    """What rank 0 notes of each launch, out of the library's reach: facts as lines of JSON."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, **facts: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(facts) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


def launch(job: Job, journal: Journal, number: int, saves: Mapping[int, list[str]], last: int, *, dies: bool) -> None:
    """Restore, train to step *last* with these saves, then die by SIGKILL or end in good order."""

    def work(group: Group) -> None:
        engine = job.open(group)
        lead = group.rank == 0
        began = time.time()
        found = engine.restore()
        start = found[0] if found else 0
        if lead:
            journal.note(launch=number, restored=start, secs=time.time() - began)
        for step in range(start + 1, last + 1):
            began = time.time()
            time.sleep(STEP_SECS)
            if lead:
                engine.store.events.emit(Progress(step=step))
                journal.note(launch=number, step=step, secs=time.time() - began)
            if step in saves:
                waited = save(engine, step, saves[step])
                if lead:
                    journal.note(launch=number, saved=step, blocked=waited)
        if dies:
            group.gather(None)
            os.kill(os.getpid(), signal.SIGKILL)
        engine.store.events.emit(TrainingEnded(step=last, how="finished"))
        engine.close()

    # What is queued waits for a drainer of ours: one at the lowest priority takes its time where other tests run.
    with job.no_drainer():
        results = job.run(work)
    assert killed(results) == dies


def save(engine: PlainEngine, step: int, tiers: list[str]) -> float:
    """Save into *tiers*, wait until memory has it, and return how long the training waited for its part of that."""
    data, begun = state(0, step, engine.group.rank), time.monotonic()
    request = Request(step=step, tiers=frozenset(tiers), size=len(data), urgent=True)
    agreement = engine.saver.agree(request)
    part = PlainPart(part_name(engine.group.rank, 0), data)
    handle = engine.saver.save(agreement, [part], metrics={}, begun=begun)
    handle.wait("memory")
    return handle.blocked_secs


@pytest.fixture
def job(memory_dir: Path, make_s3_settings: Callable[..., S3Settings]) -> ThreeTiers:
    return ThreeTiers(memory_dir, world=2, keep=2, s3=s3_fields(make_s3_settings()))


def report(job: Job, *more: str) -> Any:
    path = job.root / "recipe.yaml"
    path.write_text(json.dumps(job.recipe()))
    result = CliRunner().invoke(app, ["report", str(path), "--json", *more])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_ledger_of_a_job_that_was_killed_twice_and_lost_its_node(job: ThreeTiers) -> None:
    journal, every = Journal(job.root / "journal"), ["memory", "durable", "s3"]
    launch(job, journal, 1, {5: ["memory"], 10: every}, 13, dies=True)
    assert job.drain() == 0
    launch(job, journal, 2, {15: every, 20: ["memory"]}, 23, dies=True)
    assert job.drain() == 0
    launch(job, journal, 3, {25: ["memory"]}, 26, dies=True)
    before = report(job)
    # The node goes now, with all that nobody brought away.
    job.wipe()
    launch(job, journal, 4, {20: every}, 22, dies=False)
    assert job.drain() == 0

    told = journal.read()
    restored = [fact["restored"] for fact in told if "restored" in fact]
    assert restored == [0, 10, 20, 15]
    found = report(job)
    of_launch = {number: [f for f in told if f["launch"] == number] for number in (1, 2, 3, 4)}

    # Before the node was lost everything was there to be told.
    assert [(f["kind"], f["reached_step"], f["restored_step"], f["lost_steps"]) for f in before["failures"]] == [
        ("process", 13, 10, 3),
        ("process", 23, 20, 3),
    ]
    steps = {(f["launch"], f["step"]): f["secs"] for f in told if "step" in f}
    lost = sum(secs for (number, step), secs in steps.items() if (number, step) in LOST_BEFORE)
    assert before["lost_secs"] == pytest.approx(lost, abs=0.15)
    blocked = {number: sum(f["blocked"] for f in facts if "saved" in f) for number, facts in of_launch.items()}
    assert [leg["blocked_secs"] for leg in before["legs"]] == pytest.approx([blocked[n] for n in (1, 2, 3)], abs=0.002)
    restoring = [leg["restoring_secs"] for leg in before["legs"]]
    assert restoring == pytest.approx([f["secs"] for f in told if "restored" in f][:3], abs=0.3)
    assert [leg["end"] for leg in before["legs"]] == ["silent"] * 3

    # Of the third launch nothing was brought away: what it lost can't be known, and that is said.
    assert found["remarks"] == ["nothing is known of 1 attempt: no events are left of them"]
    assert [leg["restored_step"] for leg in found["legs"]] == [None, 10, 15]
    assert (found["legs"][-1]["end"], found["legs"][-1]["restored_from"]) == ("finished", "durable")
    assert found["failures"][0] == before["failures"][0]
    last = found["failures"][-1]
    assert (last["kind"], last["reached_step"], last["restored_step"]) == ("node", 23, 15)
    assert last["at_least"]
    assert [tier["safe"] for tier in found["tiers"]][1:] == [3, 3]


LOST_BEFORE = {(1, 11), (1, 12), (1, 13), (2, 21), (2, 22), (2, 23)}


def test_the_durable_tiers_alone_tell_of_a_run_that_ended_well(job: ThreeTiers) -> None:
    journal = Journal(job.root / "journal")
    launch(job, journal, 1, {5: ["memory", "durable", "s3"]}, 8, dies=False)
    assert job.drain() == 0
    job.wipe()
    found = report(job)
    [leg] = found["legs"]
    assert (leg["end"], leg["reached_step"], leg["saves"]) == ("finished", 8, 1)
    assert found["failures"] == []
    assert [(tier["tier"], tier["safe"]) for tier in found["tiers"]] == [("memory", 1), ("durable", 1), ("s3", 1)]
    trained = sum(fact["secs"] for fact in journal.read() if "step" in fact)
    assert found["kept_secs"] == pytest.approx(trained, abs=0.3)
    assert found["namespace"] == NAMESPACE
