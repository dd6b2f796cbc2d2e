"""The two votes of a restore: what one rank meets while it plans, places or hands over, all ranks act upon alike.

Each rank notes what its loader is asked for, so that a rank that goes another way than the others is seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.errors import (
    CorruptPartError,
    MismatchError,
    TieredError,
    TierRefusedError,
)
from sm_tiered.group import Group
from sm_tiered.resolve import Candidate
from sm_tiered.sources import Span
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier
from sm_tiered.testing.plain import PlainEngine, PlainLoader
from sm_tiered.voted_load import Read
from tests.faults.core_jobs import Job, origin, state

STEPS = (10, 20, 30)
Script = Mapping[tuple[str, int], Exception]
"""What is raised, by method and step."""


@dataclass
class ScriptedLoader(PlainLoader):
    """A loader that notes what it is asked for, and raises where its script says so: in ``place`` with all placed."""

    script: Script = field(default_factory=dict[tuple[str, int], Exception])
    asked: list[str] = field(default_factory=list[str])
    step: int = -1

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Plan, or fail."""
        self.step = candidate.checkpoint.step
        self._note("plan")
        self._fail("plan")
        return super().plan(candidate)

    def place(self, read: Read) -> None:
        """Place, then perhaps fail."""
        self._note("place")
        super().place(read)
        self._fail("place")

    def finish(self) -> None:
        """Finish, or fail."""
        self._note("finish")
        self._fail("finish")

    def _note(self, method: str) -> None:
        self.asked.append(f"{method} {self.step}")

    def _fail(self, method: str) -> None:
        error = self.script.get((method, self.step))
        if error is not None:
            raise error


@dataclass(frozen=True)
class Answer:
    """What one rank was told."""

    said: Any
    """The step that was restored, or the name of the error."""
    text: str
    """Why better candidates were refused, or the message."""
    asked: list[str]
    tier: str | None = None
    """Where it came from."""
    rank: int | None = None
    """The rank that the error names."""
    step: int | None = None
    """The step that the error names."""


def saved(root: Path, *, world: int = 2, tiers: Sequence[str] = ("memory",), steps: Sequence[int] = STEPS) -> Job:
    """Save *steps*; on the durable tier too if *tiers* says so."""
    job = Job(root, world=world, keep=3, durable_keep=9)

    def work(engine: PlainEngine) -> None:
        for step in steps:
            engine.save(step, state(0, step, engine.group.rank), tiers, urgent=True).wait("memory")

    with job.no_drainer():
        job.work(work)
    if "durable" in tiers:
        assert job.drain() == 0
    return job


def answers(
    job: Job,
    scripts: Mapping[int, Script],
    *,
    step: int | None = None,
    prepare: Callable[[PlainEngine], object] = lambda engine: None,
) -> list[Answer]:
    """Restore with the script of each rank, on two ranks; *prepare* is called with each rank's engine."""

    def work(group: Group) -> list[Any]:
        engine = job.open(group)
        prepare(engine)
        loader = ScriptedLoader(group, script=scripts.get(group.rank, {}))
        try:
            found = engine.store.restore(loader, step=step)
        except TieredError as error:
            told = [type(error).__name__, error.message, loader.asked, error.tier, error.rank, error.step]
        else:
            assert found is not None, "a silent fresh start"
            for name, data in loader.parts.items():
                assert origin(data, int(name.split("_")[2])) == (0, found.step), f"{name} is that of another step"
            told = [found.step, "; ".join(found.reasons), loader.asked, found.tier]
        engine.close()
        return told

    results = job.run(work, world=2)
    assert [result.status for result in results] == [0, 0], results
    return [Answer(*result.value) for result in results]


def alike(found: list[Answer]) -> Answer:
    """Return what both ranks were told, which must be the same, and so must be what their loaders were asked for."""
    first, second = found
    assert (first.said, first.asked) == (second.said, second.asked), found
    return first


# ---- place


def broken() -> CorruptPartError:
    return CorruptPartError("it broke in the middle")


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_rank_can_t_place_the_newest_all_take_the_next_and_are_told_why(memory_dir: Path, victim: int) -> None:
    job = saved(memory_dir)
    found = answers(job, {victim: {("place", 30): broken()}})
    assert alike(found).said == 20
    assert found[0].asked == ["plan 30", "place 30", "plan 20", "place 20", "finish 20"]
    for answer in found:
        assert "step 30 of" in answer.text
        assert f"rank {victim}: it broke in the middle" in answer.text
        assert "step 20 of" not in answer.text
    told = [event for event in job.events() if event["event"] == "CandidateRefused"]
    assert sorted(event["rank"] for event in told) == [0, 1]
    assert {event["step"] for event in told} == {30}
    assert all("it broke in the middle" in event["reason"] for event in told)


def test_ranks_that_fail_at_different_candidates_meet_at_the_one_that_all_can_place(memory_dir: Path) -> None:
    scripts = {0: {("place", 30): broken()}, 1: {("place", 20): broken()}}
    found = answers(saved(memory_dir), scripts)
    assert alike(found).said == 10
    for answer in found:
        assert [f"rank {rank}: it broke" in answer.text for rank in (0, 1)] == [True, True]


@pytest.mark.parametrize("step", [None, 30])
def test_when_no_candidate_can_be_placed_all_are_told_that_the_state_must_not_be_used(
    memory_dir: Path, step: int | None
) -> None:
    tried = STEPS[::-1] if step is None else (step,)
    found = answers(saved(memory_dir), {1: {("place", each): broken() for each in tried}}, step=step)
    assert alike(found).said == "RestoreIncompleteError"
    assert found[0].asked == [f"{method} {each}" for each in tried for method in ("plan", "place")]
    for answer in found:
        assert [f"step {each} of" in answer.text for each in STEPS] == [each in tried for each in STEPS]


# ---- finish

FAILURES = [ValueError("no such key"), MismatchError("no such key"), TierRefusedError("no such key")]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_when_one_rank_can_t_hand_over_no_older_candidate_is_tried_and_all_states_are_spoilt(
    memory_dir: Path, victim: int, error: Exception
) -> None:
    found = answers(saved(memory_dir, steps=STEPS[1:]), {victim: {("finish", 30): error}})
    assert alike(found).said == "RestoreIncompleteError"
    assert found[0].asked == ["plan 30", "place 30", "finish 30"]
    for answer in found:
        assert "no such key" in answer.text
        assert answer.step == 30


# ---- plan


@pytest.mark.parametrize("victim", [0, 1])
def test_a_state_that_does_not_fit_on_one_rank_is_raised_on_all_and_nothing_is_placed(
    memory_dir: Path, victim: int
) -> None:
    found = answers(saved(memory_dir), {victim: {("plan", 30): MismatchError("another shape")}})
    assert alike(found).said == "MismatchError"
    assert found[0].asked == ["plan 30"]
    assert [answer.text for answer in found] == ["another shape"] * 2
    assert found[1 - victim].rank == victim


def test_a_state_dict_that_raises_on_one_rank_is_raised_on_all_and_nothing_is_placed(memory_dir: Path) -> None:
    found = answers(saved(memory_dir), {1: {("plan", 30): KeyError("mine")}})
    assert alike(found).said == "RestoreError"
    assert found[0].asked == ["plan 30"]
    assert all("KeyError: 'mine'" in answer.text for answer in found)


# ---- a durable tier that falls silent in the middle


def silence(victim: int) -> Callable[[PlainEngine], None]:
    """Without room, let the durable tier not answer the second read of *victim*, and that alone: one part is placed."""

    def prepare(engine: PlainEngine) -> None:
        store = engine.store
        store.room = lambda size: None
        if engine.group.rank == victim:
            plan = FaultPlan(faults=[Fault(operations=frozenset({"read_into"}), first=2)])
            store.tiers = replace(store.tiers, durable={"durable": FaultyTier(store.tiers.durable["durable"], plan)})

    return prepare


@pytest.fixture
def half_read(memory_dir: Path) -> Job:
    """Three steps of four ranks on both tiers, the newest on the durable one alone: two ranks read two parts each."""
    job = saved(memory_dir, world=4, tiers=("memory", "durable"))
    shutil.rmtree(job.step_dirs()[30])
    return job


@pytest.mark.parametrize("victim", [0, 1])
def test_a_tier_that_falls_silent_after_bytes_were_placed_spoils_the_state_of_all_ranks(
    half_read: Job, victim: int
) -> None:
    """An older step that memory has whole is not taken instead: the newest may be had in a minute."""
    found = answers(half_read, {}, prepare=silence(victim))
    assert alike(found).said == "RestoreIncompleteError"
    assert found[0].asked == ["plan 30", "place 30"]
    assert all("after bytes were placed" in answer.text for answer in found)


@pytest.mark.parametrize("victim", [0, 1])
def test_with_use_memory_all_ranks_go_on_from_memory_alone_when_a_tier_falls_silent(
    half_read: Job, victim: int
) -> None:
    """Step 20 is damaged in memory: the durable tier has it, and answers the other rank, but counts no more."""
    for part in half_read.step_dirs()[20].glob("__*"):
        part.write_bytes(b"x")
    found = answers(replace(half_read, options={"unreachable": "use_memory"}), {}, prepare=silence(victim))
    assert alike(found).said == 10
    assert [answer.tier for answer in found] == ["memory"] * 2
    assert all("injected fault" in answer.text and "step 30 of" in answer.text for answer in found)


def test_with_use_memory_and_nothing_there_a_tier_that_falls_silent_spoils_the_state_of_all_ranks(
    half_read: Job,
) -> None:
    half_read.wipe_steps()
    found = answers(replace(half_read, options={"unreachable": "use_memory"}), {}, prepare=silence(1))
    assert alike(found).said == "RestoreIncompleteError"
    assert found[0].asked == ["plan 30", "place 30"]


# ---- whatever it is: once bytes were placed, no error says that the state is as it was


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MismatchError("a pickle")], ids=["any", "mismatch"])
def test_whatever_one_rank_meets_after_it_placed_bytes_the_state_is_said_to_be_spoilt(
    memory_dir: Path, error: Exception
) -> None:
    found = answers(saved(memory_dir), {1: {("place", 30): error}})
    assert alike(found).said == "RestoreIncompleteError"


def test_an_older_candidate_that_does_not_fit_after_a_newer_one_was_placed_leaves_a_spoilt_state(
    memory_dir: Path,
) -> None:
    script: Script = {("place", 30): broken(), ("plan", 20): MismatchError("another shape")}
    found = answers(saved(memory_dir), {1: script})
    assert alike(found).said == "RestoreIncompleteError"


def test_a_tier_that_falls_silent_before_the_next_candidate_leaves_a_spoilt_state(memory_dir: Path) -> None:
    job = saved(memory_dir, tiers=("memory", "durable"))
    job.wipe_steps()
    silent = FaultPlan(faults=[Fault(key=job.step_dirs("durable")[20].name, times=10**9)])

    def prepare(engine: PlainEngine) -> None:
        tiers = engine.store.tiers
        engine.store.tiers = replace(tiers, durable={"durable": FaultyTier(tiers.durable["durable"], silent)})

    found = answers(job, {1: {("place", 30): broken()}}, prepare=prepare)
    assert alike(found).said == "RestoreIncompleteError"


def test_with_use_memory_and_only_an_older_attempt_there_a_tier_that_falls_silent_leaves_a_spoilt_state(
    memory_dir: Path,
) -> None:
    job = saved(memory_dir, world=4, tiers=("memory", "durable"), steps=STEPS[:2])

    def another_attempt(engine: PlainEngine) -> None:
        engine.restore()
        engine.save(30, state(0, 30, engine.group.rank), urgent=True).wait("memory")

    with job.no_drainer():
        job.work(another_attempt)
    assert job.drain() == 0
    shutil.rmtree(job.step_dirs()[30])
    found = answers(replace(job, options={"unreachable": "use_memory"}), {}, prepare=silence(1))
    assert found[0].asked == ["plan 30", "place 30"]
    assert alike(found).said == "RestoreIncompleteError"
