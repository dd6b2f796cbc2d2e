"""Saves that are left out, given up, late or refused: what they owe to the handle, to the line and to the next save."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from sm_tiered import layout
from sm_tiered.agreement import Request
from sm_tiered.commit import Outcome, try_commit
from sm_tiered.errors import (
    DeadlineExceededError,
    SaveError,
    SaveSkippedError,
    TieredError,
    TierFullError,
    TierRefusedError,
)
from sm_tiered.finish import Finisher
from sm_tiered.group import SoloGroup
from sm_tiered.handle import SaveHandle
from sm_tiered.queue import Queue
from sm_tiered.recipe import Recipe
from sm_tiered.records import Record
from sm_tiered.store import Store
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier
from sm_tiered.testing.plain import PlainEngine, PlainPart
from sm_tiered.tiers.arena import Arena
from tests.properties.simulated import BOTH, MEMORY, committed, content, save
from tests.properties.thread_ranks import Cluster, running

Open = Callable[..., PlainEngine]


def recipe(memory: Path, *durable: Path, keep: int = 2) -> Recipe:
    """One memory tier, and a local one for each of *durable*, called as its directory."""
    tiers: dict[str, Any] = {"memory": {"kind": "memory", "path": str(memory), "keep": {"latest": keep}}}
    tiers |= {path.name: {"kind": "local", "path": str(path), "fsync": False} for path in durable}
    return Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers})


@pytest.fixture
def engine(memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens engines; no drainer is started, so what is queued stays queued until a test tells how it ended."""
    monkeypatch.setattr(Store, "start_drainer", lambda self: None)
    opened: list[PlainEngine] = []

    def open_it(*durable: str, keep: int = 2) -> PlainEngine:
        paths = [tmp_path / name for name in durable or ("disk",)]
        opened.append(PlainEngine(recipe(memory_dir, *paths, keep=keep).settings(), SoloGroup()))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


@pytest.fixture
def cluster(memory_dir: Path) -> Iterator[Cluster]:
    one = Cluster(memory_dir, nodes=1)
    with one.clock():
        yield one


def saved(one: PlainEngine, step: int, *tiers: str) -> SaveHandle:
    """Save *step* in memory and on *tiers*, and see it safe in memory and queued."""
    handle = one.save(step, b"state", ["memory", *tiers])
    handle.wait("memory", timeout=10)
    one.saver.quiesce()
    return handle


def queued(one: PlainEngine) -> list[tuple[int, str]]:
    assert one.store.queue is not None
    return [(entry.checkpoint.step, entry.tier) for entry in one.store.queue.entries()]


def drained(one: PlainEngine, step: int, tier: str, error: TieredError | None = None) -> None:
    """Do as the drainer does when the promotion of *step* to *tier* has ended."""
    assert one.store.queue is not None
    for entry in one.store.queue.entries():
        if (entry.checkpoint.step, entry.tier) == (step, tier):
            one.store.queue.put_result(entry.checkpoint, tier, error)
            one.store.queue.remove(entry)


def steps(one: PlainEngine) -> list[int]:
    return [checkpoint.step for checkpoint in one.store.generations.line]


def make_faulty(one: PlainEngine, tier: str, **fault: Any) -> None:
    """Let one kind of call to a durable tier go wrong every time, for this engine alone."""
    plan = FaultPlan(faults=[Fault(times=10**6, **fault)])
    tiers = one.store.tiers
    one.store.tiers = replace(tiers, durable={**tiers.durable, tier: FaultyTier(tiers.durable[tier], plan)})


# ---- what was left out and is saved after all


def left_out(one: PlainEngine, monkeypatch: pytest.MonkeyPatch) -> SaveHandle:
    """Save step 20 while the drain is busy and memory has no free generation."""
    saved(one, 10, "disk")
    monkeypatch.setattr(Arena, "can_take", lambda *_: False)
    handle = one.save(20, b"state", ["memory", "disk"])
    assert handle.skipped("memory")
    assert handle.skipped("disk")
    return handle


def test_a_stream_that_fails_is_told_although_the_step_was_left_out_before(
    engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = engine()
    handle = left_out(job, monkeypatch)
    refused = TierRefusedError("no key", tier="disk")
    make_faulty(job, "disk", operations=frozenset({"put_part"}), error=lambda: refused)
    assert job.save(20, b"state", ["disk"], urgent=True) is handle
    with pytest.raises(TierRefusedError, match="no key"):
        handle.wait("disk", timeout=10)


def test_a_stream_is_waited_for_although_the_step_was_left_out_before(
    engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, may_commit = engine(), threading.Event()
    handle = left_out(job, monkeypatch)

    def slow(*given: Any, **facts: Any) -> Outcome:
        return try_commit(*given, **facts) if may_commit.is_set() else Outcome.WAITING

    monkeypatch.setattr("sm_tiered.streaming.try_commit", slow)
    assert job.save(20, b"state", ["disk"], urgent=True) is handle
    drained(job, 10, "disk")
    with pytest.raises(DeadlineExceededError):
        job.saver.wait(0.1)
    may_commit.set()
    job.saver.wait(10)
    assert handle.done("disk")
    assert handle.exception("disk") is None


# ---- what was agreed on and given up


def test_giving_up_the_second_save_of_a_step_forgets_nothing_of_the_first(cluster: Cluster) -> None:
    with running(cluster.launch([0, 0])) as job:
        for step in (10, 20):
            save(job, step, MEMORY)
        for _ in range(2):
            job.each(lambda engine: engine.saver.agree(Request(step=20, tiers=frozenset({"memory"}))))
        for one in job.engines:
            assert one.store.line.last_step == 20
            assert one.store.generations.watermark == one.store.generations.line[-1]
            assert steps(one) == [10, 20]
            assert one.store.arena is not None
            released = one.store.generations.releasable(one.store.arena.published(), ())
            assert 20 not in [checkpoint.step for checkpoint in released]


def until(told: threading.Event) -> Callable[[], None]:
    """Return a job that holds up the worker."""

    def wait() -> None:
        assert told.wait(10)

    return wait


class Unreadable(PlainPart):
    """A state that can't be copied."""

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        raise MemoryError("the device has no memory left")


def test_a_step_that_failed_is_not_taken_as_whole_when_a_later_one_is_given_up(
    engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the ranks tell is about the line with the step that was given up, which is forgotten only then."""
    monkeypatch.setattr("sm_tiered.saving._SETTLE_SECS", 0.0)
    job, may_record = engine(), threading.Event()
    saved(job, 10)
    agreement = job.saver.agree(Request(step=20, tiers=frozenset({"memory"}), size=5))
    job.saver.save(agreement, [Unreadable(layout.part_name(0, 0), b"state")], metrics={}, begun=0.0)
    job.saver._worker.submit(until(may_record))
    late = job.save(30, b"state", ["memory"])
    job.saver.agree(Request(step=40, tiers=frozenset({"memory"}), size=5))
    assert steps(job) == [10, 20, 30, 40]
    may_record.set()
    late.wait("memory", timeout=10)
    job.saver.agree(Request(step=50, tiers=frozenset({"memory"}), size=5))
    assert job.store.generations.watermark is not None
    assert job.store.generations.watermark.step == 30
    assert steps(job) == [10, 30, 50]


# ---- what does not come, or can't be had


def test_a_commit_that_waits_for_another_rank_holds_up_no_later_save(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(cluster.launch([0, 0])) as job:
        save(job, 1, MEMORY)
        record = layout.record_name(1)
        make_faulty(job.engines[1], "durable", kind="silent", operations=frozenset({"put_if_absent"}), key=record)
        with patch.object(Arena, "can_take", lambda *_: False):
            streamed = job.each(lambda engine: engine.save(2, content(2, engine.group.rank), BOTH))
        for step in (3, 4):
            handles = job.each(lambda engine, step=step: engine.save(step, b"state", MEMORY))
            for handle in handles:
                handle.wait("memory", timeout=5)
        assert [handle.done("durable") for handle in streamed] == [False, False]
        assert committed(cluster) == []


def test_what_one_tier_refused_is_left_to_the_other(engine: Open) -> None:
    job = engine("disk", "other")
    handle = saved(job, 10, "disk", "other")
    drained(job, 10, "disk", SaveError("no room there"))
    busy = saved(job, 20, "disk", "other")
    assert busy.skipped("disk")
    assert busy.skipped("other")
    assert queued(job) == [(10, "other")]
    assert isinstance(handle.exception("disk"), SaveError)
    assert not handle.done("other")
    drained(job, 10, "other")
    handle.wait("other", timeout=10)
    saved(job, 30, "disk", "other")
    assert queued(job) == [(30, "disk"), (30, "other")]


def test_a_memory_tier_that_can_not_be_looked_at_keeps_no_save_from_the_durable_one(
    engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = engine()
    saved(job, 10, "disk")

    def refuse(*_: object) -> None:
        raise TierRefusedError("it has mode 0777", tier="memory")

    with patch.object(Queue, "result", refuse):
        handle = job.save(20, b"state", ["memory", "disk"], urgent=True)
        handle.wait("disk", timeout=10)
        assert isinstance(handle.exception("memory"), SaveSkippedError)
    saved(job, 30)


def test_a_recycled_checkpoint_does_not_come_back_with_its_files_for_other_readers(
    engine: Open, memory_dir: Path
) -> None:
    job = engine()
    saved(job, 10)
    saved(job, 20)
    arena, old = job.store.arena, job.store.generations.line[-1]
    assert arena is not None

    def recycling(records: Sequence[Record]) -> Mapping[str, bytes]:
        arena.drop([old])
        return {layout.METADATA: b"m", layout.INDEX: b"i"}

    job.store.finisher = Finisher(make=recycling)
    assert job.saver._composer.compose(old, at_once=True)
    left = [path.name for path in (memory_dir / "run").iterdir() if path.name.startswith("step_")]
    assert left == [layout.checkpoint_dir(job.store.generations.line[0])]


def test_the_drainer_goes_on_when_the_end_of_a_promotion_can_not_be_written(cluster: Cluster) -> None:
    """Memory is full for a while: the checkpoint is committed, and told to be once there is room again."""
    with running(cluster.launch([0])) as job:
        (handle,) = save(job, 1)

        def full(*_: object) -> None:
            raise TierFullError("no space left on device", tier="memory")

        with patch.object(Queue, "put_result", full):
            assert cluster.drainer(0).turn() is not None
        assert committed(cluster) == [1]
        assert len(cluster.waiting(0)) == 1
        cluster.drain([0])
        assert cluster.waiting(0) == []
        handle.wait("durable", timeout=10)


def test_what_is_committed_is_not_told_as_failed_because_it_could_not_be_told_at_once(cluster: Cluster) -> None:
    with running(cluster.launch([0])) as job:
        (handle,) = save(job, 1)
        put, refusals = Queue.put_result, [TierFullError("no space left on device", tier="memory")]

        def full_once(queue: Queue, *told: Any) -> None:
            if refusals:
                raise refusals.pop()
            put(queue, *told)

        with patch.object(Queue, "put_result", full_once):
            cluster.drain([0])
        assert not refusals
        handle.wait("durable", timeout=10)


def test_what_can_not_be_queued_for_one_tier_takes_back_nothing_of_another(cluster: Cluster) -> None:
    """The trainer streams what it took back; what the drainer has already is left to it."""
    with running(cluster.launch([0])) as job:
        engine = job.engines[0]
        save(job, 1)
        (queued,) = cluster.waiting(0)
        with (
            patch.object(Queue, "put", side_effect=TierFullError("no space", tier="memory")),
            pytest.raises(TierFullError),
        ):
            engine.saver._promotions.enqueue(queued.checkpoint, ["memory"])
        assert cluster.waiting(0) == [queued]
