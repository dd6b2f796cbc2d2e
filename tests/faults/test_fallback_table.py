"""Every combination of what can be wrong with every step on every tier, against an oracle of a few lines.

And one rank of two whose tier fails at its first, second … request: all ranks restore the same step, or all raise.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import layout
from sm_tiered.errors import TieredError, TierUnavailableError
from sm_tiered.group import Group
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier, Kind
from sm_tiered.tiers.memory import MemoryTier
from tests.faults.core_jobs import NAMESPACE, Job, origin
from tests.faults.fallback import STATES, make_saved, nearest, oracle, table_of

TIERS = ("memory", "durable")
STEPS = (10, 20, 30)


def check_all(root: Path, steps: tuple[int, ...], *, more: tuple[str, ...] = (), every: int = 1) -> int:
    """Check the combinations, or one in *every* so many; *more* are durable tiers besides the one."""
    places = list(product((*TIERS, *more), steps))
    checked = 0
    with table_of(root, steps, more) as table:
        for found in islice(product(STATES, repeat=len(places)), 0, None, every):
            cells: Any = dict(zip(places, found, strict=True))
            with table.states(cells):
                for use_memory in (False, True):
                    expected = oracle(cells, use_memory=use_memory)
                    assert table.restore(use_memory=use_memory) == expected, f"{cells}, use_memory {use_memory}"
                    if isinstance(expected, int):
                        assert table.taken == nearest(cells, expected), f"{cells}, use_memory {use_memory}"
                    checked += 1
    return checked


def test_every_combination_of_two_steps_on_two_tiers_gives_what_the_oracle_says(memory_dir: Path) -> None:
    assert check_all(memory_dir, STEPS[:2]) == 2 * 4**4


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_combination_of_three_steps_on_two_tiers_gives_what_the_oracle_says(memory_dir: Path) -> None:
    assert check_all(memory_dir, STEPS) == 2 * 4**6


def test_every_combination_of_one_step_on_three_tiers_gives_what_the_oracle_says(memory_dir: Path) -> None:
    assert check_all(memory_dir, STEPS[:1], more=("second",)) == 2 * 4**3


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.long)])
def test_combinations_of_two_steps_on_three_tiers_give_what_the_oracle_says(every: int, memory_dir: Path) -> None:
    """A prime number apart, so that every two cells are seen in all their states together."""
    assert check_all(memory_dir, STEPS[:2], more=("second",), every=every) == 2 * -(-(4**6) // every)


def test_a_durable_tier_that_is_down_is_never_taken_for_an_empty_one(memory_dir: Path) -> None:
    """Whatever memory has, for the listing itself fails; and memory only counts when the recipe says so."""
    with table_of(memory_dir, STEPS[:2]) as table:
        for found in product(STATES, repeat=2):
            near = dict(zip(STEPS[:2], found, strict=True))
            with table.states({("memory", step): how for step, how in near.items()}):
                durable = table.tiers.durable["durable"]
                assert isinstance(durable, FaultyTier)
                durable.plan = FaultPlan(faults=[Fault(times=10**9)])
                whole = max((step for step, how in near.items() if how == "ok"), default=TierUnavailableError)
                assert table.restore(use_memory=False) is TierUnavailableError, near
                assert table.restore(use_memory=True) == whole, near


def test_an_older_attempt_in_memory_is_not_used_while_the_durable_tier_is_down(memory_dir: Path) -> None:
    with table_of(memory_dir, STEPS[:2]) as table:
        newest = table.job.step_dirs()[20]
        of_next = layout.parse_checkpoint_dir(newest.name)
        assert of_next is not None
        newer = replace(of_next, attempt=replace(of_next.attempt, ordinal=7), step=21)
        (newest.parent / layout.checkpoint_dir(newer)).mkdir(mode=0o700)
        shutil.copy(newest / "record-00000.json", newest.parent / layout.checkpoint_dir(newer))
        with table.states({}):
            assert table.restore(use_memory=False) == 20
            durable = table.tiers.durable["durable"]
            assert isinstance(durable, FaultyTier)
            durable.plan = FaultPlan(faults=[Fault(times=10**9)])
            assert table.restore(use_memory=True) is TierUnavailableError


# ---- one rank of two


def restore_with_fault(job: Job, victim: int, tier: str, kind: Kind, number: int) -> tuple[list[Any], bool]:
    """Restore while the call *number* that *victim* makes to *tier* goes wrong; return what each rank says."""

    def work(group: Group) -> list[Any]:
        engine = job.open(group)
        plan = FaultPlan.at_call(number, kind) if group.rank == victim else FaultPlan()
        store = engine.store
        if tier == "durable":
            store.tiers = replace(store.tiers, durable={"durable": FaultyTier(store.tiers.durable["durable"], plan)})
        else:
            memory = store.tiers.memory
            assert memory is not None
            strike(memory, plan)
        try:
            found = engine.restore()
            assert found is not None, "a silent fresh start"
            assert origin(found[1], group.rank) == (0, found[0])
            said: Any = found[0]
        except TieredError as error:
            said = type(error).__name__
        engine.close()
        return [said, bool(plan.fired)]

    results = job.run(work)
    assert [result.status for result in results] == [0, 0], results
    return [result.value[0] for result in results], any(result.value[1] for result in results)


def strike(memory: MemoryTier, plan: FaultPlan) -> None:
    """Let the calls that *plan* names fail."""
    for name in ("list", "list_dirs", "get", "open_part"):
        setattr(memory, name, partial(_struck, plan, name, getattr(memory, name)))


def _struck(plan: FaultPlan, name: str, real: Callable[..., Any], key: str, **options: Any) -> Any:
    fault = plan.take(name, key)
    if fault is not None:
        raise fault.error()
    return real(key, **options)


def check_one_failing_rank(root: Path, victim: int, tier: str, kind: Kind, stride: int) -> int:
    """Loop over the requests until a restore sees no fault; return how many there were."""
    job = make_saved(root, STEPS[:2], world=2)
    if tier == "memory-only":
        shutil.rmtree(job.durable)
    attempts = set(job.root.glob(f"*/{NAMESPACE}/attempts/*"))
    for number in count(1, stride):
        if tier == "durable":
            job.wipe()
        said, fired = restore_with_fault(job, victim, tier.removesuffix("-only"), kind, number)
        assert len(set(said)) == 1, f"{tier} of rank {victim}, call {number} {kind}: the ranks say {said}"
        assert said[0] in (10, 20, "TierUnavailableError", "NothingRestorableError")
        if not fired:
            assert said == [20, 20]
            return number
        for path in set(job.root.glob(f"*/{NAMESPACE}/attempts/*")) - attempts:
            path.unlink()  # each launch opens one, and the next reads them all
    raise AssertionError


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("tier", [*TIERS, "memory-only"])
def test_when_one_request_of_one_rank_fails_all_ranks_restore_the_same_step_or_all_raise(
    memory_dir: Path, victim: int, tier: str
) -> None:
    assert check_one_failing_rank(memory_dir, victim, tier, "fail", 1) >= 2


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_when_one_answer_to_one_rank_is_damaged_all_ranks_restore_the_same_step(memory_dir: Path, kind: Kind) -> None:
    assert check_one_failing_rank(memory_dir, 0, "durable", kind, 2) > 2
