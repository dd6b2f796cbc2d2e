"""What a save, a second save of the same step, and a mere look promise, on one rank and a real directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import layout
from sm_tiered.agreement import Request
from sm_tiered.errors import SaveSkippedError, TierUnavailableError
from sm_tiered.group import SoloGroup
from sm_tiered.handle import SaveHandle
from sm_tiered.inventory import list_checkpoints
from sm_tiered.recipe import Recipe
from sm_tiered.store import Store
from sm_tiered.testing.plain import PlainEngine, PlainLoader, PlainPart
from sm_tiered.worker import Worker

Open = Callable[..., PlainEngine]


@pytest.fixture
def engine(memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens engines of one recipe; no drainer is started, so what is queued stays queued."""
    monkeypatch.setattr(Store, "start_drainer", lambda self: None)
    opened: list[PlainEngine] = []

    def open_it(*, keep: int = 2, memory: bool = True, **more: Any) -> PlainEngine:
        tiers: dict[str, Any] = {"disk": {"kind": "local", "path": str(tmp_path / "disk"), "fsync": False}}
        if memory:
            tiers = {"memory": {"kind": "memory", "path": str(memory_dir), "keep": {"latest": keep}}, **tiers}
        else:
            tiers["other"] = {"kind": "local", "path": str(tmp_path / "other"), "fsync": False}
        recipe = {"version": 1, "namespace": "run", "tiers": tiers, **more}
        opened.append(PlainEngine(Recipe.parse(recipe).settings(), SoloGroup()))
        return opened[-1]

    yield open_it
    for one in opened:
        one.close()


def saved(one: PlainEngine, step: int, tiers: list[str] | None = None, **facts: Any) -> SaveHandle:
    handle = one.save(step, f"state of {step}".encode(), tiers or ["memory"], **facts)
    if "memory" in handle.tiers:
        handle.wait("memory", timeout=10)
    return handle


def queued(one: PlainEngine) -> list[int]:
    assert one.store.queue is not None
    one.saver._worker.close()
    return [entry.checkpoint.step for entry in one.store.queue.entries()]


def test_looking_at_an_old_step_does_not_make_it_the_one_to_resume_from(engine: Open) -> None:
    job = engine()
    for step in (50, 100):
        saved(job, step)
    job.close()
    reader = engine()
    looked = reader.store.restore(PlainLoader(SoloGroup()), step=50, opens=False)
    assert looked is not None
    assert looked.step == 50
    reader.close()
    assert engine().restore() == (100, b"state of 100")


def test_saving_after_a_look_goes_on_from_what_was_looked_at(engine: Open) -> None:
    job = engine()
    for step in (50, 100):
        saved(job, step)
    job.close()
    again = engine()
    again.store.restore(PlainLoader(SoloGroup()), step=50, opens=False)
    saved(again, 51)
    again.close()
    assert engine().restore() == (51, b"state of 51")


def test_an_urgent_save_of_a_step_that_was_left_out_is_queued_after_all(engine: Open) -> None:
    job = engine()
    saved(job, 50, ["memory", "disk"])
    handle = saved(job, 100, ["memory", "disk"])
    assert isinstance(handle.exception("disk"), SaveSkippedError)
    assert saved(job, 100, ["disk"], urgent=True) is handle
    assert not handle.skipped("disk")
    assert queued(job) == [50, 100]


def test_a_second_tier_for_a_step_that_is_not_in_memory_is_streamed(engine: Open) -> None:
    job = engine(memory=False)
    handle = job.save(100, b"state", ["disk"])
    assert job.save(100, b"state", ["other"]) is handle
    for tier in ("disk", "other"):
        handle.wait(tier, timeout=10)
    later = job.save(200, b"state", ["disk"])
    later.wait("disk", timeout=10)


def test_a_job_that_raises_does_not_end_the_worker() -> None:
    told: list[Exception] = []
    done: list[int] = []
    worker = Worker("test", on_error=told.append)
    worker.submit(lambda: done.append(1 // 0))
    worker.submit(lambda: done.append(2))
    worker.close()
    assert done == [2]
    assert [type(error) for error in told] == [ZeroDivisionError]


def test_a_save_that_stops_after_the_agreement_never_counts_as_whole(engine: Open) -> None:
    job = engine(keep=1)
    saved(job, 10)
    job.saver.agree(Request(step=20, tiers=frozenset({"memory"}), size=12))
    for step in (30, 40):
        saved(job, step)
    assert job.store.generations.watermark is not None
    assert job.store.generations.watermark.step == 30
    assert 20 not in [checkpoint.step for checkpoint in job.store.generations.line[:-1]]


def test_latest_tells_a_silent_tier_from_an_empty_one(engine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    job = engine()
    saved(job, 10)
    assert job.store.latest() == 10

    def silent(prefix: str) -> list[str]:
        raise TierUnavailableError("no answer", tier="disk")

    monkeypatch.setattr(job.store.tiers.durable["disk"], "list_dirs", silent)
    with pytest.raises(TierUnavailableError, match="no answer"):
        job.store.latest()


def test_a_rank_with_small_files_only_recycles_them_too(engine: Open) -> None:
    job = engine(keep=1)
    for step in range(1, 9):
        agreement = job.saver.agree(Request(step=step, tiers=frozenset({"memory"})))
        part = PlainPart(layout.part_name(0, 1), b"value", recycled=False)
        job.saver.save(agreement, [part], metrics={}, begun=0.0).wait("memory", timeout=10)
    assert job.store.tiers.memory is not None
    assert len(list_checkpoints(job.store.tiers.memory)) <= 4


def test_files_of_ranks_that_live_elsewhere_now_are_taken_over(engine: Open, memory_dir: Path) -> None:
    job = engine()
    saved(job, 10)
    job.close()
    step = next(path for path in (memory_dir / "run").iterdir() if path.name.startswith("step_"))
    for name, moved in (("__0_0.distcp", "__3_0.distcp"), ("record-00000.json", "record-00003.json")):
        (step / name).rename(step / moved)
    again = engine()
    for number in range(11, 16):
        saved(again, number)
    assert not step.exists()
