"""Any policies, any events, each rank with a clock, metrics and eyes of its own: all ranks decide alike, and the same
decisions come out when what rank 0 knew is replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from sm_tiered import schedule as module
from sm_tiered.policies import SaveContext, SavePolicy, ask
from sm_tiered.preemption import Preemption
from sm_tiered.recipe import Recipe
from sm_tiered.schedule import Due, Schedule
from tests.properties.thread_ranks import ThreadGroup, ThreadHub

WORLD = 3
_leaves: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        lambda n, offset, start: {"every_n_steps": {"n": n, "offset": offset % n, "start": start}},
        st.integers(1, 6),
        st.integers(0, 5),
        st.integers(0, 10),
    ),
    st.builds(lambda n: {"every_n_epochs": n}, st.integers(1, 3)),
    st.builds(lambda secs: {"every_secs": secs}, st.integers(1, 40)),
    st.builds(lambda steps: {"at_steps": steps}, st.lists(st.integers(0, 20), min_size=1, max_size=3)),
    st.builds(lambda mode: {"when_improved": {"metric": "loss", "mode": mode}}, st.sampled_from(["min", "max"])),
    st.builds(lambda share: {"max_overhead": share}, st.floats(0.001, 0.5)),
    st.builds(lambda secs: {"optimal": {"mtbf_secs": secs, "observe": True}}, st.integers(1, 1000)),
    st.sampled_from(["on_end", "on_exception", "on_preemption", "on_request"]),
)
_policies = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.builds(lambda members: {"any": members}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda members: {"all": members}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda member: {"not": member}, inner),
    ),
    max_leaves=5,
)


@dataclass(frozen=True)
class Moment:
    """What happens around one step; what only some ranks see is theirs alone."""

    secs: float
    losses: tuple[float, float, float]
    costs: tuple[float, float, float]
    told_to_stop: int | None
    asked: int | None
    epochs_ended: int | None


_moments = st.builds(
    Moment,
    secs=st.floats(0, 20),
    losses=st.tuples(*[st.floats(0, 1)] * WORLD),
    costs=st.tuples(*[st.floats(0.001, 3)] * WORLD),
    told_to_stop=st.none() | st.none() | st.integers(0, WORLD - 1),
    asked=st.none() | st.integers(0, WORLD - 1),
    epochs_ended=st.none() | st.integers(1, 4),
)


@dataclass
class Eyes:
    """A rank's own view of signals and requests."""

    asked: bool = False

    def noticed(self) -> bool:
        return self.asked

    def take(self) -> None:
        self.asked = False


@dataclass
class Signals:
    noticed: bool = False


class Clocks:
    """Rank 0's is right; the others are hours off and run backwards."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._rank = threading.local()

    def use(self, rank: int) -> None:
        self._rank.value = rank

    def time(self) -> float:
        rank = self._rank.value
        return self.now if rank == 0 else 1e6 * rank - self.now


@contextmanager
def recorded() -> Iterator[list[tuple[SavePolicy, SaveContext, bool]]]:
    """Note what policies are asked, and what they answer."""
    asked: list[tuple[SavePolicy, SaveContext, bool]] = []

    def noting(policy: SavePolicy, context: SaveContext) -> bool:
        answer = ask(policy, context)
        asked.append((policy, context, answer))
        return answer

    with patch.object(module, "ask", noting):
        yield asked


def test_the_slowest_rank_tells_what_a_save_costs() -> None:
    tiers = {"near": {"kind": "local", "path": "/a", "save": {"max_overhead": 0.1}}}
    found = Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers}).settings()
    hub, costs, saved = ThreadHub(WORLD), (0.1, 0.1, 2.0), list[int]()
    plans = [Schedule(found, ThreadGroup(hub, rank), Preemption(), started_at=0.0) for rank in range(WORLD)]
    with patch.object(module, "time", Clocks()) as clocks, ThreadPoolExecutor(WORLD) as pool:

        def decide(rank: int, step: int) -> None:
            clocks.use(rank)
            if plans[rank].due(step, metrics={}).tiers:
                plans[rank].note_saved(step, ["near"], blocked_secs=costs[rank])
                saved.extend([step] if rank == 0 else [])

        for step in range(1, 62):
            clocks.now += 1.0
            list(pool.map(decide, range(WORLD), [step] * WORLD))
    # What a save cost the others is known a step later: at step 2 rank 0 still goes by its own 0.1 s.
    assert saved == [1, 2, 22, 42], "20 s of training pay for the 2 s of rank 2"


@settings(max_examples=150, deadline=None)
@given(save=_policies, other=_policies, moments=st.lists(_moments, min_size=1, max_size=12))
def test_all_ranks_decide_alike_and_a_replay_decides_the_same(save: Any, other: Any, moments: list[Moment]) -> None:
    tiers = {
        "near": {"kind": "local", "path": "/a", "save": save},
        "far": {"kind": "local", "path": "/b", "save": other},
    }
    found = Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers}).settings()
    hub, clocks = ThreadHub(WORLD), Clocks()
    eyes, signals = [Eyes() for _ in range(WORLD)], [Signals() for _ in range(WORLD)]
    plans = [
        Schedule(found, ThreadGroup(hub, rank), signals[rank], eyes[rank], started_at=1000.0)  # type: ignore[arg-type]
        for rank in range(WORLD)
    ]

    def decide(rank: int, step: int, moment: Moment) -> Due:
        clocks.use(rank)
        metrics = {"loss": moment.losses[rank]}
        ending = step == len(moments)
        due = plans[rank].due(step, metrics=metrics, epochs_ended=moment.epochs_ended, ending=ending)
        if due.tiers:
            plans[rank].note_saved(step, due.tiers, metrics=metrics, blocked_secs=moment.costs[rank])
        return due

    with patch.object(module, "time", clocks), recorded() as asked, ThreadPoolExecutor(WORLD) as pool:
        for step, moment in enumerate(moments, start=1):
            clocks.now += moment.secs
            if moment.told_to_stop is not None:
                signals[moment.told_to_stop].noticed = True
            if moment.asked is not None:
                eyes[moment.asked].asked = True
            dues = list(pool.map(decide, range(WORLD), [step] * WORLD, [moment] * WORLD))
            assert dues[1:] == dues[:-1]
    assert [ask(policy, context) for policy, context, _ in asked] == [answer for _, _, answer in asked]
