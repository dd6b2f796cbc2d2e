"""No room, no memory tier, no durable tier, or neither: what can be saved is, what can't is said, nothing is harmed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import crashpoints
from sm_tiered.errors import (
    DeadlineExceededError,
    RankFailedError,
    SaveSkippedError,
    TieredError,
    TierError,
    TierFullError,
    TierUnavailableError,
)
from sm_tiered.handle import SaveHandle
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import Job, state

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def short_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "0.1")


def fill(path: Path) -> Path:
    """Take every page that is left."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return filler


def save(engine: PlainEngine, step: int, size: int = 100_000, **facts: Any) -> SaveHandle:
    return engine.save(step, state(0, step, engine.group.rank, size), **facts)


def failure(handle: SaveHandle, tier: str) -> TieredError | None:
    """Wait for the end, and return why it was no good one."""
    with suppress(TieredError):
        handle.wait(tier)
    assert handle.done(tier), f"step {handle.step} has not ended on {tier}"
    return handle.exception(tier)


def restored(job: Job) -> list[tuple[int, str]]:
    def work(engine: PlainEngine) -> tuple[int, str]:
        found = engine.restore()
        assert found is not None
        assert found[1] == state(0, found[0], engine.group.rank, len(found[1]))
        assert engine.store.restored is not None
        return found[0], engine.store.restored.tier

    return [tuple(value) for value in job.work(work)]


NO_ROOM = (TierFullError, SaveSkippedError)


def test_a_state_that_outgrows_memory_is_streamed_and_the_last_checkpoint_stays(
    make_tmpfs: Callable[[str, int], Path],
) -> None:
    job = Job(make_tmpfs("memory-0", 4).parent)

    def work(engine: PlainEngine) -> None:
        save(engine, 1, MIB, tiers=["memory"]).wait("memory")
        large = save(engine, 2, 5 * MIB)
        assert isinstance(failure(large, "memory"), TierFullError)
        large.wait("durable")
        assert isinstance(failure(save(engine, 3, 5 * MIB, tiers=["memory"]), "memory"), NO_ROOM)
        assert 1 in job.step_dirs(), "what was safe in memory is gone"
        save(engine, 4, MIB, tiers=["memory"])
        save(engine, 5, MIB, tiers=["memory"]).wait("memory")

    job.work(work)
    assert restored(job) == [(5, "memory")]
    job.wipe_steps()
    assert restored(job) == [(2, "durable")]


def before_record(action: Callable[[], object]) -> None:
    """Run *action* the next time that this process is about to write a record, when all is copied."""
    actions = [action]

    def reached(name: str) -> None:
        if name == "record.before_write" and actions:
            actions.pop()()

    crashpoints._armed, crashpoints._reached = True, reached


def test_a_record_that_finds_no_room_fails_the_save_in_memory_and_streams_what_was_copied(
    make_tmpfs: Callable[[str, int], Path],
) -> None:
    root = make_tmpfs("memory-0", 2)
    job = Job(root.parent)

    def work(engine: PlainEngine) -> None:
        for step in (1, 2, 3):
            save(engine, step, tiers=["memory"]).wait("memory")
        begun = time.monotonic()
        before_record(lambda: fill(root))
        full = save(engine, 4)
        assert isinstance(failure(full, "memory"), TierFullError)
        full.wait("durable")
        for step in (5, 7, 9):
            (root / "filler").unlink()
            save(engine, step, tiers=["memory"]).wait("memory")
            before_record(lambda: fill(root))
            assert isinstance(failure(save(engine, step + 1, tiers=["memory"]), "memory"), TierFullError)
        assert time.monotonic() - begun < 10
        (root / "filler").unlink()
        save(engine, 20, tiers=["memory"]).wait("memory")
        save(engine, 21).wait("durable")

    job.work(work)
    assert restored(job) == [(21, "memory")]
    assert sorted(job.step_dirs("durable")) == [4, 21]


def test_failures_in_a_row_do_not_use_up_the_generations(make_tmpfs: Callable[[str, int], Path]) -> None:
    root = make_tmpfs("memory-0", 2)
    job = Job(root.parent)

    def work(engine: PlainEngine) -> None:
        save(engine, 1, tiers=["memory"]).wait("memory")
        for step in range(2, 8):
            before_record(lambda: fill(root))
            assert failure(save(engine, step, tiers=["memory"]), "memory") is not None
            (root / "filler").unlink(missing_ok=True)
        save(engine, 8, tiers=["memory"]).wait("memory")

    job.work(work)
    assert restored(job) == [(8, "memory")]


def test_a_full_memory_never_costs_the_last_checkpoint(make_tmpfs: Callable[[str, int], Path]) -> None:
    root = make_tmpfs("memory-0", 2)
    job = Job(root.parent)

    def work(engine: PlainEngine) -> int:
        safe = 0
        for step in range(1, 12):
            if step > 3:
                before_record(lambda: fill(root))
            error = failure(save(engine, step, tiers=["memory"]), "memory")
            assert error is None or isinstance(error, NO_ROOM)
            safe = safe if error else step
        return safe

    safe = job.work(work)
    (root / "filler").unlink()
    assert restored(job) == [(safe[0], "memory")]


def test_a_queue_that_takes_nothing_neither_takes_back_the_acknowledged_nor_stops_the_durable_save(
    memory_dir: Path,
) -> None:
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        assert engine.store.queue is not None

        def full(entry: object) -> None:
            raise TierFullError("no room for an entry", tier="memory")

        engine.store.queue.put = full
        handle = save(engine, 1)
        handle.wait("durable")
        assert failure(handle, "memory") is None
        save(engine, 2, tiers=["memory"]).wait("memory")
        save(engine, 3).wait("durable")

    job.work(work)
    assert restored(job) == [(3, "memory")]
    job.wipe()
    assert restored(job) == [(3, "durable")]


def test_a_job_counter_that_fails_does_not_take_back_a_written_record(memory_dir: Path) -> None:
    """The addition may have counted although its answer was lost: others may rely on it."""
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        real = engine.group.add

        def lost(key: str, amount: int) -> int:
            value = real(key, amount)
            if amount:
                raise RankFailedError("the answer was lost", rank=0)
            return value

        engine.group.add = lost
        save(engine, 1, tiers=["memory"])
        engine.saver.settle()

    job.work(work)
    assert restored(job) == [(1, "memory")]


def test_a_memory_directory_that_disappears_does_not_stop_durable_saves(memory_dir: Path) -> None:
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        save(engine, 1, tiers=["memory"]).wait("memory")
        job.wipe()
        handle = save(engine, 2)
        handle.wait("durable")
        after = save(engine, 3, tiers=["memory"])
        assert isinstance(failure(after, "memory"), TierError | None)

    job.work(work)
    job.wipe()
    assert restored(job) == [(2, "durable")]


# ---- one of two ranks


def two_nodes(root: Path, **options: Any) -> Job:
    return Job(root, world=2, nodes=2, options=options)


def test_a_rank_without_room_streams_its_share_while_the_other_one_drains(
    make_tmpfs: Callable[[str, int], Path],
) -> None:
    small = make_tmpfs("memory-1", 2)
    job = two_nodes(small.parent)

    def work(engine: PlainEngine) -> None:
        save(engine, 1, tiers=["memory"]).wait("memory")
        if engine.group.rank == 1:
            before_record(lambda: fill(small))
        handle = save(engine, 2)
        error = failure(handle, "memory")
        assert isinstance(error, TierFullError if engine.group.rank == 1 else RankFailedError)
        assert engine.group.rank == 1 or error.rank == 1
        handle.wait("durable")

    job.work(work)
    (small / "filler").unlink()
    assert restored(job)[0][0] == 2
    for node in (0, 1):
        job.wipe_steps(node)
    assert restored(job) == [(2, "durable")] * 2


def test_a_rank_that_has_neither_memory_nor_a_durable_tier_ends_the_save_for_all(memory_dir: Path) -> None:
    """Within moments, and not when the commit's deadline passes; and the next save is not held up."""
    job = two_nodes(memory_dir)

    def work(engine: PlainEngine) -> None:
        rank, durable = engine.group.rank, engine.store.tiers.durable["durable"]
        if rank == 1:
            real_stage, real_put = engine.saver._stager.stage, durable.put_part

            def full(*arguments: object) -> None:
                raise TierFullError("injected", tier="memory")

            engine.saver._stager.stage = full  # type: ignore[assignment, method-assign]
            durable.put_part = full  # type: ignore[assignment, method-assign]
        begun = time.monotonic()
        handle = save(engine, 1)
        assert isinstance(failure(handle, "memory"), TierFullError if rank == 1 else RankFailedError)
        error = failure(handle, "durable")
        assert isinstance(error, TierFullError if rank == 1 else RankFailedError), error
        assert time.monotonic() - begun < 10
        if rank == 1:
            engine.saver._stager.stage, durable.put_part = real_stage, real_put  # type: ignore[method-assign]
        save(engine, 2, tiers=["memory"]).wait("memory")
        engine.group.gather(None)
        save(engine, 3).wait("durable")

    job.work(work)
    assert restored(job) == [(3, "memory")] * 2


# ---- the durable tier is down


@pytest.fixture
def silent_endpoint() -> Generator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(128)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def dead_endpoint() -> str:
    """An address that refuses connections."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def s3_at(url: str, **retry: Any) -> dict[str, Any]:
    return {
        "uri": "s3://bucket/prefix",
        "endpoint_url": url,
        "allow_http": True,
        "region": "us-east-1",
        "force_path_style": True,
        "request_timeout_secs": 0.5,
        "retry": {"attempts": 2, "deadline_secs": 1, **retry},
    }


@pytest.mark.parametrize("endpoint", ["silent_endpoint", "dead_endpoint"])
def test_memory_saves_neither_fail_nor_wait_while_s3_is_down(
    memory_dir: Path, endpoint: str, request: pytest.FixtureRequest
) -> None:
    job = Job(memory_dir, s3=s3_at(request.getfixturevalue(endpoint)), options={"commit_deadline_secs": 2})

    def work(engine: PlainEngine) -> float:
        engine.store.line.attempt()
        begun = time.monotonic()
        first = save(engine, 1)
        for step in (2, 3, 4):
            save(engine, step, tiers=["memory"]).wait("memory")
        first.wait("memory")
        secs = time.monotonic() - begun
        error = failure(first, "durable")
        assert isinstance(error, TierUnavailableError | DeadlineExceededError), error
        return secs

    assert job.work(work)[0] < 3
    assert restored_with_s3_down(job) == 4


def restored_with_s3_down(job: Job) -> int:
    patient = Job(job.root, s3=job.s3, options={"unreachable": "use_memory"})

    def refused(engine: PlainEngine) -> str:
        with pytest.raises(TierUnavailableError, match="use_memory"):
            engine.restore()
        return "refused"

    assert job.work(refused) == ["refused"], "an unreachable tier was taken for an empty one"
    return restored(patient)[0][0]


@pytest.mark.parametrize("on_error", ["raise"])
def test_with_memory_full_and_s3_down_the_failure_is_told_in_time(
    make_tmpfs: Callable[[str, int], Path], silent_endpoint: str, on_error: str
) -> None:
    job = Job(
        make_tmpfs("memory-0", 1).parent,
        s3=s3_at(silent_endpoint, deadline_secs=30, attempts=20),
        options={"stream_timeout_secs": 1.5, "on_error": on_error},
    )

    def work(engine: PlainEngine) -> None:
        engine.store.line.attempt()
        begun = time.monotonic()
        handle = save(engine, 1, 5 * MIB)
        assert time.monotonic() - begun < 5, "the training was blocked beyond stream_timeout"
        assert isinstance(failure(handle, "memory"), TierFullError)
        assert isinstance(failure(handle, "durable"), TierUnavailableError | DeadlineExceededError)
        told = engine.saver.deliver()
        assert isinstance(told, TieredError) if on_error == "raise" else told is None
        assert engine.saver.deliver() is None, "told twice"

    job.work(work)
    failed = [(event["step"], event["tier"]) for event in job.events() if event["event"] == "SaveFailed"]
    assert {(1, "memory"), (1, "durable")} <= set(failed)


def test_a_durable_directory_that_is_gone_fails_the_durable_save_alone(memory_dir: Path) -> None:
    job = Job(memory_dir)

    def work(engine: PlainEngine) -> None:
        save(engine, 1).wait("durable")
        job.durable.rename(job.root / "away")
        job.durable.write_text("a file")
        handle = save(engine, 2)
        handle.wait("memory")
        assert isinstance(failure(handle, "durable"), TierError)
        job.durable.unlink()
        (job.root / "away").rename(job.durable)
        save(engine, 3, tiers=["memory"]).wait("memory")
        save(engine, 4).wait("durable")

    job.work(work)
    assert restored(job) == [(4, "memory")]
