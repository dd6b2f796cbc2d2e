"""Jobs, attempts, nodes and timelines that get in each other's way: none takes, hides or deletes what is another's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sm_tiered.errors import CheckpointNotFoundError, NamespaceInUseError, StructureError, TieredError
from sm_tiered.group import Group, SoloGroup
from sm_tiered.manifest import manifest_from_json
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import NAMESPACE, Job, agreed, drain, in_child, killed, origin, state
from tests.waiting import WAIT_SECS, wait_until

ROOT = Path(__file__).parents[2]


def save_all(engine: PlainEngine, run: int, *steps: int, tiers: list[str] | None = None) -> None:
    for step in steps:
        engine.save(step, state(run, step, engine.group.rank), tiers=tiers, urgent=True).wait("memory")


def saved(job: Job, run: int, *steps: int, tiers: list[str] | None = None, memory: Path | None = None) -> None:
    """Restore and save *steps*, by one launch; drain them unless *tiers* are named."""
    node = memory or job.memory()

    def work(group: Group) -> None:
        engine = job.open(group, memory=memory)
        engine.restore()
        save_all(engine, run, *steps, tiers=tiers)
        engine.close()

    with job.no_drainer(at=node):
        assert not killed(job.run(work))
    if tiers is None:
        assert drain(node) == 0


def restored(job: Job, step: int | None = None, *, memory: Path | None = None) -> tuple[int, int, str]:
    """Restore on all ranks; return run, step and tier, which are the same on all."""

    def work(group: Group) -> tuple[int, int, str]:
        engine = job.open(group, memory=memory)
        found = engine.restore(step)
        assert found is not None
        assert engine.store.restored is not None
        run, of_step = origin(found[1], group.rank)
        assert of_step == found[0]
        engine.close()
        return run, of_step, engine.store.restored.tier

    results = job.run(work)
    assert len({str(result.value) for result in results}) == 1, results
    return tuple(results[0].value)


def refused(job: Job, step: int, *, memory: Path) -> str:
    """Return by which error a restore of *step* is refused, on all ranks alike."""

    def work(group: Group) -> str:
        engine = job.open(group, memory=memory)
        with pytest.raises(TieredError) as caught:
            engine.restore(step)
        engine.close()
        return type(caught.value).__name__

    return agreed(job.run(work))


# ---- two jobs


def test_a_second_job_in_the_same_memory_directory_is_refused_with_the_pids_of_the_first(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, options={"in_use_wait_secs": 0.2})

    def work(group: Group) -> list[str]:
        job.open(group)
        pids = group.gather(os.getpid())
        if group.rank == 0:

            def second() -> None:
                with pytest.raises(NamespaceInUseError) as caught:
                    Job(memory_dir, options={"in_use_wait_secs": 0.2}).open(SoloGroup())
                assert sorted(caught.value.pids) == sorted(pids)
                assert str(pids[0]) in str(caught.value)
                assert caught.value.hint

            assert in_child(second) == 0
        return []

    assert not killed(job.run(work))


def test_a_second_job_begins_once_the_first_has_ended_while_it_waits(memory_dir: Path) -> None:
    job = Job(memory_dir, options={"in_use_wait_secs": 20})
    reading, writing = os.pipe()
    first = os.fork()
    if first == 0:
        engine = job.open(SoloGroup())
        save_all(engine, 1, 1, tiers=["memory"])
        os.write(writing, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(reading, 1)
    second = os.fork()
    if second == 0:
        os._exit(0 if restored(job)[:2] == (1, 1) else 1)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert os.waitpid(second, 0)[1] == 0


def test_an_older_attempt_on_another_node_commits_late_and_deletes_nothing(memory_dir: Path) -> None:
    job, other = Job(memory_dir, durable_keep=1), memory_dir / "other-node"
    saved(job, 1, 1)
    saved(job, 1, 2, 3, tiers=["memory", "durable"])
    saved(job, 2, 2, memory=other)
    assert sorted(job.step_dirs("durable")) == [1, 2]
    before = {path for path in job.durable.rglob("*") if path.is_file() and "events" not in path.parts}
    assert job.drain() == 0
    assert all(path.exists() for path in before), "the older attempt deleted"
    seen = [event for event in job.events() if event["event"] == "NewerAttemptSeen"]
    assert seen, "the older attempt did not say what it saw"
    assert restored(job, memory=memory_dir / "third-node") == (2, 2, "durable")


_DRAINER = """
import os, signal, sys
from sm_tiered import crashpoints, drainer

memory, namespace, point, number = sys.argv[1:]
reached = []

def stop(name):
    reached.append(name)
    if name == point and reached.count(point) == int(number):
        os.kill(os.getpid(), signal.SIGSTOP)

crashpoints._armed, crashpoints._reached = True, stop
sys.exit(drainer.main([memory, namespace]))
"""


def drainer_apart(memory: Path, point: str = "none", number: int = 1) -> subprocess.Popen[bytes]:
    """Start a drainer that shares nothing with this process, whose threads a fork would leave in the middle of things.

    It stops itself where it reaches *point* the *number*-th time.
    """
    environment = {**os.environ, "SM_TIERED_DRAINER_IDLE_SECS": "0"}
    arguments = [sys.executable, "-c", _DRAINER, str(memory), NAMESPACE, point, str(number)]
    return subprocess.Popen(arguments, env=environment, cwd=ROOT)


@contextmanager
def stopped_drainer(memory: Path, point: str, number: int) -> Iterator[None]:
    """Run the drainer of *memory*, stopped where it reaches *point* the *number*-th time until the block ends."""
    process = drainer_apart(memory, point, number)
    try:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1]), f"{point} was not reached"
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(WAIT_SECS) == 0


def backdate(directory: Path) -> None:
    """Let *directory* look as if it had been written an hour ago, so that retention takes it for left behind."""
    for path in directory.iterdir():
        hour_ago = time.time() - 3600
        os.utime(path, (hour_ago, hour_ago))


@pytest.mark.long
@pytest.mark.parametrize(("point", "number"), [("promote.after_part", 1), ("commit.before_manifest", 1)])
def test_a_committer_that_comes_after_retention_finds_the_tombstone_and_gives_up(
    memory_dir: Path, point: str, number: int
) -> None:
    """Two jobs on two nodes, of which the older one does not know yet that it was replaced."""
    job, other = Job(memory_dir, durable_keep=1, options={"commit_deadline_secs": 60}), memory_dir / "other-node"
    saved(job, 1, 1)
    older, newer = job.open(SoloGroup()), job.open(SoloGroup(), memory=other)
    assert older.restore() is not None
    assert newer.restore() is not None
    with job.no_drainer():
        late = older.save(2, state(1, 2, 0))
        wait_until(job.queued, "nothing is queued")
    with stopped_drainer(job.memory(), point, number):
        directory = job.step_dirs("durable")[2]
        backdate(directory)
        for step in (3, 4):
            with job.no_drainer(at=other):
                newer.save(step, state(2, step, 0)).wait("memory")
            assert drainer_apart(other).wait(WAIT_SECS) == 0
        assert manifest_from_json((directory / "manifest.json").read_bytes()).tombstone
    error = late.exception("durable")
    assert error is not None, "the older job was told that its step is safe"
    assert "deleted" in str(error)
    assert manifest_from_json((directory / "manifest.json").read_bytes()).tombstone
    older.close()
    with job.no_drainer(at=other):
        newer.save(5, state(2, 5, 0)).wait("memory")
    newer.close()
    assert drainer_apart(other).wait(WAIT_SECS) == 0
    assert [path.name for path in directory.iterdir()] == ["manifest.json"], "what came late was never swept"
    assert refused(job, 2, memory=memory_dir / "third-node") == "NothingRestorableError"
    assert restored(job, memory=memory_dir / "fourth-node") == (2, 5, "durable")


# ---- timelines


@pytest.mark.parametrize("node_lost", [False, True])
def test_a_crash_right_after_a_rollback_leaves_the_chosen_step_and_not_the_newer_ones(
    memory_dir: Path, node_lost: bool
) -> None:
    job = Job(memory_dir, world=2, keep=3, durable_keep=3)
    saved(job, 1, 10, 20, 30)

    def roll_back(group: Group) -> None:
        engine = job.open(group)
        found = engine.restore(10)
        assert found is not None
        assert found[0] == 10
        group.gather(None)
        os.kill(os.getpid(), signal.SIGKILL)

    assert killed(job.run(roll_back))
    if node_lost:
        job.wipe()
    for _ in range(2):
        assert restored(job)[:2] == (1, 10)


def test_after_a_rollback_lower_steps_are_saved_and_become_the_latest(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, keep=2, durable_keep=3)
    saved(job, 1, 10, 20, 30)

    def work(engine: PlainEngine) -> None:
        engine.restore(10)
        save_all(engine, 2, 11, 12)
        with pytest.raises(StructureError, match="step 5 is below step 12"):
            engine.save(5, state(2, 5, engine.group.rank))

    with job.no_drainer():
        job.work(work)
    assert restored(job) == (2, 12, "memory")
    assert job.drain() == 0
    job.wipe()
    assert restored(job) == (2, 12, "durable")
    assert restored(job, 10)[:2] == (1, 10), "the named parent was deleted"


def test_a_step_that_no_tier_has_is_named_and_nothing_is_loaded(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)
    saved(job, 1, 10)

    def work(engine: PlainEngine) -> str:
        with pytest.raises(CheckpointNotFoundError, match="step 11 is on no tier") as caught:
            engine.restore(11)
        return str(caught.value)

    assert all("10" in said for said in job.work(work))


def test_a_second_save_of_a_step_gives_the_first_handle_and_adds_what_it_lacked(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)

    def work(engine: PlainEngine) -> None:
        rank = engine.group.rank
        first = engine.save(1, state(1, 1, rank), tiers=["memory"])
        second = engine.save(1, state(2, 1, rank), tiers=["memory", "durable"], metrics={"loss": 0.5})
        assert second is first
        assert set(first.tiers) == {"memory", "durable"}
        first.wait("memory")
        wait_until(lambda: len(job.queued()) == 2, "the tier that was added is not queued")

    with job.no_drainer():
        job.work(work)
    assert restored(job) == (1, 1, "memory")
    assert job.drain() == 0
    job.wipe()
    assert restored(job) == (1, 1, "durable")
    manifest = manifest_from_json((job.step_dirs("durable")[1] / "manifest.json").read_bytes())
    assert manifest.metrics == {"loss": 0.5}


def test_launches_that_save_nothing_are_forgotten_by_retention_and_choices_are_not(memory_dir: Path) -> None:
    """Each restore reads every attempt's record: a job that is started a thousand times must not read a thousand."""
    job = Job(memory_dir, keep=3, durable_keep=9)
    saved(job, 1, 10, 20)
    assert restored(job, 10)[1] == 10
    for _ in range(5):
        assert restored(job)[:2] == (1, 10)
    attempts = job.store_dir("durable") / "attempts"
    assert len(list(attempts.iterdir())) == 7
    saved(job, 2, 30)
    left = sorted(path.name[:7] for path in attempts.iterdir())
    assert left == ["a000001", "a000002", "a000008"], "those with checkpoints, the choice and the newest"
    job.wipe()
    assert restored(job) == (2, 30, "durable")


# ---- nodes


@pytest.fixture
def two_nodes(memory_dir: Path) -> Job:
    """Step 1 is in both tiers, step 2 only in the memory of two nodes."""
    job = Job(memory_dir, world=2, nodes=2, keep=2)

    def work(engine: PlainEngine) -> None:
        save_all(engine, 1, 1)
        engine.group.gather(None)
        save_all(engine, 1, 2, tiers=["memory"])

    with job.no_drainer(0), job.no_drainer(1):
        job.work(work)
    other = os.fork()
    if other == 0:
        os._exit(job.drain(node=1))
    assert job.drain(node=0) == 0
    assert os.waitpid(other, 0)[1] == 0
    return job


def restored_with_reasons(job: Job, *, swapped: bool = False) -> list[tuple[int, str, str]]:
    def work(group: Group) -> tuple[int, str, str]:
        engine = job.open(group, memory=job.memory(1 - group.rank) if swapped else None)
        found = engine.restore()
        assert found is not None
        assert origin(found[1], group.rank) == (1, found[0])
        assert engine.store.restored is not None
        engine.close()
        return found[0], engine.store.restored.tier, "; ".join(engine.store.restored.reasons)

    results = job.run(work)
    assert [result.status for result in results] == [0, 0]
    return [tuple(result.value) for result in results]


def test_two_nodes_whose_trainers_are_dead_restore_from_memory(two_nodes: Job) -> None:
    assert restored_with_reasons(two_nodes) == [(2, "memory", "")] * 2


def test_one_lost_node_means_the_newest_step_that_all_ranks_can_reach(two_nodes: Job) -> None:
    two_nodes.wipe(1)
    for step, tier, reasons in restored_with_reasons(two_nodes):
        assert step == 1
        assert "durable" in tier
        assert "step 2" in reasons


def test_ranks_swapped_over_their_nodes_restore_from_the_durable_tier_and_say_why(two_nodes: Job) -> None:
    for step, tier, reasons in restored_with_reasons(two_nodes, swapped=True):
        assert (step, tier) == (1, "durable")
        assert "not on this node" in reasons
    said = [event["reason"] for event in two_nodes.events() if event["event"] in ("CandidateRefused", "CopyRefused")]
    assert any("not on this node" in reason for reason in said)


def test_both_nodes_lost_means_the_durable_tier(two_nodes: Job) -> None:
    two_nodes.wipe(0)
    two_nodes.wipe(1)
    assert [found[:2] for found in restored_with_reasons(two_nodes)] == [(1, "durable")] * 2
