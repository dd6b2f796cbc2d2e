"""A restore where something stands and can't be read, and one of a step that two attempts have."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.errors import (
    CheckpointNotFoundError,
    CorruptPartError,
    NothingRestorableError,
    TierError,
    TierRefusedError,
)
from sm_tiered.group import SoloGroup
from sm_tiered.inventory import list_checkpoints, read_holding
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import Job, origin, state

MANIFEST, RECORD = "manifest.json", "record-00000.json"


@contextmanager
def opened(job: Job) -> Iterator[PlainEngine]:
    """One launch of one rank."""
    with closing(job.open(SoloGroup())) as engine:
        yield engine


def saved_once(job: Job) -> Path:
    """Save step 1 of run 1 to the durable tier alone, and return its directory there."""
    with opened(job) as engine:
        engine.save(1, state(1, 1, 0), ["durable"]).wait("durable")
    return job.step_dirs("durable")[1]


def make_faulty(engine: PlainEngine, **fault: Any) -> FaultPlan:
    """Let one kind of call to the durable tier go wrong every time."""
    plan = FaultPlan(faults=[Fault(times=10**6, **fault)])
    engine.store.tiers = replace(engine.store.tiers, durable={"durable": FaultyTier(durable_of(engine), plan)})
    return plan


def durable_of(engine: PlainEngine) -> Any:
    return engine.store.tiers.durable["durable"]


def refused() -> TierRefusedError:
    return TierRefusedError("access denied", tier="durable")


def too_long() -> CorruptPartError:
    return CorruptPartError("the file is longer than is read", tier="durable")


# ---- what stands there and can't be read is not nothing


@pytest.mark.parametrize("error", [refused, too_long], ids=lambda error: error.__name__)
@pytest.mark.parametrize("name", [MANIFEST, RECORD])
def test_a_checkpoint_that_can_not_be_read_is_never_taken_for_a_fresh_start(
    name: str, error: Callable[[], TierError], tmp_path: Path
) -> None:
    job = Job(tmp_path, in_memory=False)
    saved_once(job)
    with opened(job) as engine:
        plan = make_faulty(engine, operations=frozenset({"get"}), key=name, error=error)
        with pytest.raises(NothingRestorableError, match=error().message):
            engine.restore()
        assert plan.fired
        with pytest.raises(NothingRestorableError, match=error().message):
            engine.restore(1)
    with opened(job) as engine:
        assert engine.restore() == (1, state(1, 1, 0)), "nothing was lost by it"


@pytest.mark.parametrize("error", [refused, too_long], ids=lambda error: error.__name__)
def test_a_record_that_can_not_be_read_counts_before_its_commit_too(
    error: Callable[[], TierError], tmp_path: Path
) -> None:
    job = Job(tmp_path, in_memory=False)
    (saved_once(job) / MANIFEST).unlink()
    with opened(job) as engine:
        make_faulty(engine, operations=frozenset({"get"}), key=RECORD, error=error)
        with pytest.raises(NothingRestorableError, match=error().message):
            engine.restore()
    with opened(job) as engine:
        assert engine.restore() == (1, state(1, 1, 0)), "all its records are there: it is committed late"


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def huge(path: Path) -> None:
    os.truncate(path, MAX_BYTES + 1)  # a hole: it takes no room


@pytest.mark.parametrize("spoil", [linked, huge], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("name", [MANIFEST, RECORD])
def test_files_that_can_not_be_read_are_never_taken_for_a_fresh_start(
    name: str, spoil: Callable[[Path], None], tmp_path: Path
) -> None:
    job = Job(tmp_path, in_memory=False)
    spoil(saved_once(job) / name)
    with opened(job) as engine, pytest.raises(NothingRestorableError, match="checkpoints exist and none can be"):
        engine.restore()


@pytest.mark.parametrize("name", [MANIFEST, RECORD])
def test_an_older_step_is_taken_where_the_newest_can_not_be_read(name: str, tmp_path: Path) -> None:
    job = Job(tmp_path, in_memory=False)
    with opened(job) as engine:
        for step in (1, 2):
            engine.save(step, state(1, step, 0)).wait("durable")
    newest = job.step_dirs("durable")[2].name
    with opened(job) as engine:
        make_faulty(engine, operations=frozenset({"get"}), key=f"{newest}/{name}", error=refused)
        assert engine.restore() == (1, state(1, 1, 0))
        assert engine.store.restored is not None
        assert "access denied" in engine.store.restored.reasons[0]


def test_where_nothing_was_ever_saved_a_restore_still_begins_anew(tmp_path: Path) -> None:
    job = Job(tmp_path, in_memory=False)
    for _ in range(2):
        with opened(job) as engine:
            assert engine.restore() is None
    left = saved_once(job)
    (left / MANIFEST).unlink()
    (left / RECORD).unlink()
    with opened(job) as engine:
        assert engine.restore() is None, "parts without a record were never a checkpoint"


@pytest.mark.parametrize("name", [MANIFEST, RECORD])
def test_a_holding_that_is_too_long_to_be_read_is_a_damaged_one(name: str, tmp_path: Path) -> None:
    job = Job(tmp_path, in_memory=False)
    huge(saved_once(job) / name)
    with opened(job) as engine:
        (checkpoint,) = list_checkpoints(durable_of(engine))
        held = read_holding(durable_of(engine), checkpoint, durable=True)
        assert held.damaged
        assert held.problem is not None
        assert "longer than" in held.problem
        assert engine.store.latest() is None, "no complete step, and no error that hides the older ones"


# ---- a step that two attempts have


def rolled_back_twice(job: Job, tier: str) -> None:
    """Run 1 saves 10 to 100, run 2 begins again at 30 and saves 40 to 60, run 3 goes back to run 1's 100."""
    for run, start, steps in ((1, None, range(10, 101, 10)), (2, 30, (40, 50, 60)), (3, 100, ())):
        with opened(job) as engine:
            if start is not None:
                assert origin_of(engine, start) == (1, start)
            for step in steps:
                engine.save(step, state(run, step, 0), [tier]).wait(tier)


def origin_of(engine: PlainEngine, step: int | None = None) -> tuple[int, int]:
    """Restore, and return the run and step that the bytes are of."""
    found = engine.restore(step)
    assert found is not None
    return origin(found[1], 0)


@pytest.mark.parametrize("tier", ["memory", "durable"])
def test_a_named_step_is_that_of_the_line_and_not_that_of_an_abandoned_attempt(tier: str, tmp_path: Path) -> None:
    job = Job(tmp_path, keep=30, durable_keep=30, in_memory=tier == "memory")
    rolled_back_twice(job, tier)
    for step in (None, 50):
        with opened(job) as engine:
            assert origin_of(engine, step) == (1, step or 100)
    with opened(job) as engine:
        assert origin_of(engine, 40) == (1, 40), "the line goes on from 50 now"
    with opened(job) as engine:
        assert origin_of(engine) == (1, 40)


def test_a_step_that_only_an_abandoned_attempt_has_can_still_be_named(tmp_path: Path) -> None:
    job = Job(tmp_path, durable_keep=30, in_memory=False)
    with opened(job) as engine:
        for step in (10, 20):
            engine.save(step, state(1, step, 0)).wait("durable")
    with opened(job) as engine:
        assert origin_of(engine, 10) == (1, 10)
        for step in (15, 20):
            engine.save(step, state(2, step, 0)).wait("durable")
    with opened(job) as engine:
        assert origin_of(engine, 20) == (2, 20), "the newest attempt's, where it is the line"
        assert origin_of(engine, 10) == (1, 10)
        assert origin_of(engine, 15) == (2, 15), "left behind, and found where the line has no such step"
        with pytest.raises(CheckpointNotFoundError, match="step 30 is on no tier"):
            engine.restore(30)
