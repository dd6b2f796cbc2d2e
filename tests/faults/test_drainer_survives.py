"""The drain goes on: without its trainers, after its own death, and through signals."""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import crashpoints, drainer, layout
from sm_tiered.errors import SaveSkippedError
from sm_tiered.group import Group
from sm_tiered.locks import probe
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import NAMESPACE, History, Job, judged_restore, killed, noted_save, state
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "0.1")


def committed(job: Job, step: int) -> bool:
    root = job.store_dir("durable")
    return (
        root.exists()
        and step in job.step_dirs("durable")
        and (job.step_dirs("durable")[step] / "manifest.json").exists()
    )


def drainer_pid(job: Job, node: int = 0) -> int | None:
    holder = probe(job.store_dir("memory", node) / layout.LOCKS / drainer.DRAINER_LOCK)
    return holder.pid if holder else None


def save(engine: PlainEngine, step: int, **facts: object) -> None:
    tiers = facts.pop("tiers", None)
    engine.save(step, state(0, step, engine.group.rank), tiers=tiers, **facts).wait("memory")  # type: ignore[arg-type]


def restored_from_durable(job: Job) -> int:
    """Lose all nodes, and restore."""
    for node in range(job.nodes):
        job.wipe(node)

    def work(engine: PlainEngine) -> int:
        found = engine.restore()
        assert found is not None
        assert found[1] == state(0, found[0], engine.group.rank)
        return found[0]

    return job.work(work)[0]


@contextmanager
def cleaned_up(job: Job) -> Generator[None]:
    """Leave no drainer behind, whatever happens."""
    try:
        yield
    finally:
        for node in range(job.nodes):
            pid = drainer_pid(job, node)
            if pid is not None:
                os.kill(pid, signal.SIGKILL)


def test_the_drain_is_finished_after_all_trainers_are_dead(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)

    def work(group: Group) -> None:
        save(job.open(group), 1)
        # Where a rank is late, the drainer may have brought both shares away before anybody looks.
        wait_until(lambda: len(job.queued()) == 2 or committed(job, 1), "not both ranks have enqueued")
        os.kill(os.getpid(), signal.SIGKILL)

    with cleaned_up(job):
        assert killed(job.run(work))
        wait_until(lambda: committed(job, 1), "the drainer has not committed")
        wait_until(lambda: drainer_pid(job) is None, "the drainer has not ended")
    assert restored_from_durable(job) == 1


def test_the_drainer_is_outside_of_the_trainers_session_and_behind_them_in_priority(
    waiting: tuple[Job, int],
) -> None:
    _, pid = waiting
    assert os.getsid(pid) == pid != os.getsid(0), "who ends the trainers' session would end it too"
    assert os.getpgid(pid) == pid
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid) >= min(ours + 1, 19) > 0


def test_the_death_of_the_trainers_whole_process_group_does_not_touch_the_drain(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2, nodes=2)

    def work(group: Group) -> None:
        os.setpgid(0, group.gather(os.getpid() if group.rank else _new_process_group())[0])
        save(job.open(group), 1)
        wait_until(lambda: job.queued(group.rank), "nothing is queued")
        if group.rank == 0:
            wait_until(lambda: drainer_pid(job), "no drainer has started")
        group.gather(None)
        if group.rank == 0:
            # Half of the step is not even sent: the drainer of the other node is kept from starting.
            os.killpg(0, signal.SIGKILL)
        signal.pause()

    with cleaned_up(job):
        with job.no_drainer(1):
            assert [result.status for result in job.run(work)] == [signal.SIGKILL] * 2
            pid = drainer_pid(job)
            assert pid is not None, "the drainer died with the trainers"
            ended, _, _ = select.select([os.pidfd_open(pid)], [], [], 0.3)
            assert not ended, "the drainer died with the trainers"
            assert not committed(job, 1)
        assert job.drain(node=1) == 0
        assert committed(job, 1)
        wait_until(lambda: drainer_pid(job) is None, "the drainer has not ended")
    assert restored_from_durable(job) == 1


def _new_process_group() -> int:
    os.setpgid(0, 0)
    return os.getpid()


def test_a_commit_leaves_the_events_beside_the_checkpoints(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)

    def published() -> dict[int | None, list[dict[str, Any]]]:
        files = (job.store_dir("durable") / layout.EVENTS).glob("*")
        return {
            file.rank: [json.loads(line) for line in path.read_text().splitlines()]
            for path in files
            if (file := layout.parse_event_file_name(path.name)) is not None
        }

    def work(engine: PlainEngine) -> None:
        for step in (1, 2):
            engine.save(step, state(0, step, engine.group.rank)).wait("durable")

    def told() -> list[int]:
        return [event["step"] for event in published().get(None, []) if event["event"] == "Committed"]

    with cleaned_up(job):
        job.work(work)
        wait_until(lambda: told() == [1, 2], "the commits are not told beside the checkpoints")
    assert set(published()) == {None, 0}, "a job of thousands of ranks must not leave thousands of files"
    for event in published()[None]:
        if event["event"] == "Committed":
            assert event["tier"] == "durable"
            assert event["namespace"] == NAMESPACE
            assert event["bytes"] >= 40_000


def die_in_upload(job: Job, engine: PlainEngine, step: int) -> None:
    """Save *step* to all tiers with a drainer that is killed in the middle; return once it is dead."""
    os.environ[crashpoints.VARIABLE] = "promote.after_part"
    save(engine, step)
    wait_until(lambda: step in job.step_dirs("durable"), "the drainer has not begun")
    wait_until(lambda: drainer_pid(job) is None, "the drainer has not died")
    del os.environ[crashpoints.VARIABLE]
    assert not committed(job, step)


def test_a_dead_drainer_is_replaced_by_the_next_save_though_nobody_waits(memory_dir: Path) -> None:
    job = Job(memory_dir)
    job.durable.mkdir()

    def work(engine: PlainEngine) -> None:
        die_in_upload(job, engine, 1)
        save(engine, 2, tiers=["memory"])
        wait_until(lambda: committed(job, 1), "no other drainer has committed")

    with cleaned_up(job):
        job.work(work)
    assert restored_from_durable(job) == 1


def test_a_dead_drainer_is_replaced_by_whoever_waits(memory_dir: Path) -> None:
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        os.environ[crashpoints.VARIABLE] = "promote.after_part"
        handle = engine.save(1, state(0, 1, 0))
        handle.wait("memory")
        wait_until(lambda: job.queued(), "nothing is queued")
        del os.environ[crashpoints.VARIABLE]
        handle.wait("durable")

    with cleaned_up(job):
        job.work(work)
    assert restored_from_durable(job) == 1


def test_what_dead_trainers_and_a_dead_drainer_left_is_drained_by_the_next_launch(memory_dir: Path) -> None:
    job = Job(memory_dir)
    job.durable.mkdir()

    def work(group: Group) -> None:
        die_in_upload(job, job.open(group), 1)
        os.kill(os.getpid(), signal.SIGKILL)

    def next_launch(engine: PlainEngine) -> None:
        assert engine.restore() == (1, state(0, 1, 0))
        save(engine, 2, tiers=["memory"])
        wait_until(lambda: committed(job, 1), "the next launch has not drained")

    with cleaned_up(job):
        assert killed(job.run(work))
        job.work(next_launch)
    assert restored_from_durable(job) == 1


@pytest.fixture
def waiting(memory_dir: Path) -> Generator[tuple[Job, int]]:
    """Two nodes, the drainer of the first one waiting for what the other one has not sent; and its pid."""
    job = Job(memory_dir, world=2, nodes=2)
    with cleaned_up(job):
        with job.no_drainer(1):
            job.work(lambda engine: save(engine, 1))
        wait_until(lambda: any(name.startswith("commit-") for name in job.queued(0)), "rank 0's part is not sent")
        pid = drainer_pid(job)
        assert pid is not None
        yield job, pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_drainer_that_is_told_to_stop_finishes_its_work_first(
    waiting: tuple[Job, int], number: signal.Signals
) -> None:
    job, pid = waiting
    os.kill(pid, number)
    assert job.drain(node=1) == 0
    assert committed(job, 1)
    assert job.queued(0) == [] or drainer_pid(job) == pid
    wait_until(lambda: drainer_pid(job) is None, "the drainer has not ended")
    assert job.queued(0) == []


def test_a_stopped_drainer_holds_nobody_up_and_goes_on_when_continued(waiting: tuple[Job, int]) -> None:
    job, pid = waiting
    os.kill(pid, signal.SIGSTOP)

    def goes_on(engine: PlainEngine) -> None:
        assert engine.restore() == (1, state(0, 1, engine.group.rank))
        for step in (2, 3):
            save(engine, step, tiers=["memory"])

    with job.no_drainer(1):
        job.work(goes_on)
    assert drainer_pid(job) == pid, "a second drainer was started beside the one that is stopped"
    os.kill(pid, signal.SIGCONT)
    assert job.drain(node=1) == 0
    wait_until(lambda: drainer_pid(job) is None, "the drainer has not ended")
    assert committed(job, 1)


def test_a_drainer_whose_directory_was_deleted_leaves_the_next_one_alone(
    memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "60")
    job = Job(memory_dir)
    with cleaned_up(job):
        job.work(lambda engine: engine.save(1, state(0, 1, 0)).wait("durable"))
        pid = drainer_pid(job)
        assert pid is not None
        watch = os.pidfd_open(pid)
        job.wipe(0)
        ended, _, _ = select.select([watch], [], [], 10)
        os.close(watch)
        assert ended, "it still works in a directory whose lock it lost"


def test_a_rank_that_has_failed_brings_the_newest_step_of_its_whole_node_to_safety(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)
    job.durable.mkdir()

    def work(group: Group) -> object:
        engine = job.open(group)
        for step in (1, 2):
            save(engine, step, tiers=["memory"])
        assert engine.saver.promote_newest() == 2 if group.rank == 0 else True
        os.kill(os.getpid(), signal.SIGKILL)

    with cleaned_up(job):
        assert killed(job.run(work))
        wait_until(lambda: committed(job, 2), "step 2 is not brought to the durable tier")
    assert restored_from_durable(job) == 2


def test_what_went_to_the_durable_tiers_is_not_sent_again_after_a_failure(memory_dir: Path) -> None:
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        assert engine.saver.promote_newest() is None
        save(engine, 1)
        assert engine.saver.promote_newest() is None

    with cleaned_up(job):
        job.work(work)


def test_what_could_not_be_drained_is_sent_again_after_a_failure(memory_dir: Path) -> None:
    job = Job(memory_dir, options={"commit_deadline_secs": 1})

    def work(engine: PlainEngine) -> None:
        job.durable.rename(memory_dir / "away")
        job.durable.touch()
        handle = engine.save(1, state(1, 1, 0))
        wait_until(lambda: handle.done("durable"), "the drain does not give up")
        assert handle.exception("durable") is not None
        job.durable.unlink()
        (memory_dir / "away").rename(job.durable)
        assert engine.saver.promote_newest() == 1
        wait_until(lambda: committed(job, 1), "step 1 is not brought to the durable tier")

    with cleaned_up(job):
        job.work(work)


def test_a_busy_drain_makes_the_newest_step_win_and_says_so(memory_dir: Path) -> None:
    job = Job(memory_dir, world=2)

    def work(engine: PlainEngine) -> None:
        with job.no_drainer() if engine.group.rank == 0 else nullcontext():
            engine.group.gather(None)
            for step in (1, 2, 3):
                handle = engine.save(step, state(0, step, engine.group.rank))
                handle.wait("memory")
                if step > 1:
                    assert isinstance(handle.exception("durable"), SaveSkippedError)
            engine.group.gather(None)
        save(engine, 4, tiers=["memory"])
        wait_until(lambda: committed(job, 1), "the first one is not committed")
        wait_until(lambda: not job.queued(), "the queue is not empty")
        engine.group.gather(None)
        engine.save(5, state(0, 5, engine.group.rank), tiers=["memory"]).wait("memory")
        wait_until(lambda: committed(job, 5), "the step after the busy drain did not take the place of those skipped")

    with cleaned_up(job):
        job.work(work)
    assert sorted(job.step_dirs("durable")) == [1, 5]
    skipped = [event["step"] for event in job.events() if event["event"] == "DurableSkipped" and event["rank"] == 0]
    assert skipped == [2, 3]


def test_a_step_that_memory_had_no_room_for_never_counts_as_whole(memory_dir: Path) -> None:
    """Else the step after it would recycle the last whole one, and a crash would lose what was acknowledged."""
    job, history = Job(memory_dir, keep=1), History(memory_dir / "history")

    def work(group: Group) -> None:
        engine = job.open(group)
        for step in (1, 2):  # held, for nothing drains them
            noted_save(engine, history, 0, step, promote=True)
        noted_save(engine, history, 0, 3)
        skipped = engine.save(4, state(0, 4, 0), tiers=["memory"])
        assert isinstance(skipped.exception("memory"), SaveSkippedError)
        crashpoints.arm("stage.after_copy")
        engine.save(5, state(0, 5, 0), tiers=["memory"])
        os.kill(os.getpid(), signal.SIGKILL)

    with job.no_drainer():
        assert killed(job.run(work))
        assert job.work(lambda engine: judged_restore(engine, history)) == [3]
