"""What a restore asks of a state: its ``per_rank`` values, names that are not stored, and how often it asks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.errors import ConfigError, MismatchError
from sm_tiered.resolve import Candidate, assemble, survey
from sm_tiered_dcp import TieredCheckpointer
from sm_tiered_dcp.state_loader import PerRankRule, StateLoader
from tests.distributed.dcp_jobs import bits, raised, recipe, run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


class Asked:
    """A Stateful object that tells what was called on it."""

    def __init__(self, value: float = 0.0) -> None:
        self.calls: list[str] = []
        self.value = torch.full((3,), value)

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"value": self.value}

    def load_state_dict(self, found: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")


def state(value: float, **more: Any) -> dict[str, Any]:
    return {"w": torch.full((50,), value), "values": {"epoch": value}, **more}


def own(value: float) -> dict[str, Any]:
    return {"rank": value, "seed": torch.full((2,), value)}


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    return recipe(tmp_path, memory_dir)


def save(which: dict[str, Any], *states: dict[str, Any]) -> None:
    """Save each of *states* as a step, from 1."""
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step, held in enumerate(states, start=1):
            checkpointer.save(step, held, ["memory"]).wait("memory")


def load(which: dict[str, Any], target: dict[str, Any], rule: PerRankRule | None = None) -> dict[str, Any]:
    """Restore step 1 into *target* and return its bits."""
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(target, per_rank=rule) == 1
    return bits(target)


def refused(which: dict[str, Any], target: dict[str, Any], words: str, rule: PerRankRule | None = None) -> None:
    """A restore into *target* is refused with *words*, and nothing of the state is asked or changed."""
    before, asked = bits(target), Asked()
    with TieredCheckpointer.from_recipe(which) as checkpointer, pytest.raises(MismatchError, match=words):
        checkpointer.restore({**target, "asked": asked}, per_rank=rule)
    assert asked.calls == []
    assert bits(target) == before


# ---- per_rank on one side only

FOUND, LACKED = (state(1.0, per_rank=own(1.0)), state(1.0))


def test_per_rank_values_that_the_state_has_no_place_for_are_not_dropped_in_silence(which: dict[str, Any]) -> None:
    save(which, FOUND)
    refused(which, state(0.0), "the checkpoint has per_rank values, the other has none.*allow_partial: true")


def test_a_state_does_not_silently_keep_per_rank_values_that_were_never_saved(which: dict[str, Any]) -> None:
    save(which, LACKED)
    refused(which, state(0.0, per_rank=own(7.0)), "the state has per_rank values, the other has none.*allow_partial")


def test_with_allow_partial_either_side_may_lack_per_rank_values(tmp_path: Path, memory_dir: Path) -> None:
    for name, saved, target in (("found", FOUND, state(0.0)), ("lacked", LACKED, state(0.0, per_rank=own(7.0)))):
        which = recipe(tmp_path / name, memory_dir / name, allow_partial=True)
        kept = bits({key: value for key, value in target.items() if key == "per_rank"})
        save(which, saved)
        assert load(which, target) == {**bits(state(1.0)), **kept}, name


def test_a_rule_of_nothing_leaves_each_rank_s_own_whatever_was_saved(tmp_path: Path, memory_dir: Path) -> None:
    for number, saved in enumerate((FOUND, LACKED)):
        which = recipe(tmp_path / str(number), memory_dir / str(number))
        save(which, saved)
        for kept in ({"per_rank": own(7.0)}, {}):
            assert load(which, state(0.0, **kept), lambda *_: None) == bits(state(1.0, **kept))


def test_a_rule_does_not_make_up_for_values_that_are_not_there(which: dict[str, Any]) -> None:
    save(which, LACKED)
    refused(which, state(0.0, per_rank=own(7.0)), "the state has per_rank values", lambda rank, *_: rank)
    assert load(which, state(0.0), lambda rank, *_: rank) == bits(state(1.0))


def test_an_empty_per_rank_asks_for_nothing(which: dict[str, Any]) -> None:
    save(which, LACKED)
    assert load(which, state(0.0, per_rank={})) == bits(state(1.0, per_rank={}))


def test_per_rank_values_on_both_sides_are_restored(which: dict[str, Any]) -> None:
    save(which, FOUND)
    for rule in (None, lambda rank, *_: rank):
        assert load(which, state(0.0, per_rank=own(7.0)), rule) == bits(FOUND)


# ---- a rule that is wrong


def test_a_rule_that_is_wrong_is_told_even_where_there_is_nothing_of_a_rank(which: dict[str, Any]) -> None:
    save(which, LACKED)
    for target in (state(0.0), state(0.0, per_rank=own(7.0))):
        refused(which, target, "the per_rank rule gave 1 for rank 0.*0 to 0, or None", lambda *_: 1)


def _wrong_for_rank_1(rank: int, which: dict[str, Any]) -> list[Any]:
    held = state(1.0, per_rank=own(float(rank)))
    found: list[Any] = []
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, held, ["memory"]).wait("memory")
        gives: Any
        for gives in (2, -1, "1"):
            asked, target = Asked(), state(0.0, per_rank=own(7.0))
            before = bits(target)
            told = raised(
                lambda target=target, asked=asked, gives=gives: checkpointer.restore(
                    {**target, "asked": asked}, per_rank=lambda rank, *_: gives if rank == 1 else rank
                )
            )
            found.append((told, asked.calls, bits(target) == before))
    return found


def test_a_rule_that_is_wrong_for_one_rank_is_told_on_all_before_any_state_is_asked(which: dict[str, Any]) -> None:
    of_rank_0, of_rank_1 = run(2, _wrong_for_rank_1, which)
    assert of_rank_0 == of_rank_1
    for gave, ((kind, text), calls, untouched) in zip((2, -1, "1"), of_rank_0, strict=True):
        assert kind == "MismatchError"
        assert f"the per_rank rule gave {gave!r} for rank 1" in text
        assert calls == [], "state_dict() may be collective: no rank may be alone in it"
        assert untouched


# ---- names on one side only


def test_with_allow_partial_what_fits_is_loaded_and_all_else_left_alone(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, allow_partial=True)
    save(which, state(1.0, surplus={"t": torch.ones(2), "n": 1}, both={"a": torch.ones(2), "stored": torch.ones(1)}))
    missing = {"t": torch.full((4,), 7.0), "n": "mine"}
    target = state(0.0, missing=missing, both={"a": torch.zeros(2), "asked": torch.full((1,), 7.0)})
    both = {"a": torch.ones(2), "asked": torch.full((1,), 7.0)}
    assert load(which, target) == bits(state(1.0, missing={"t": torch.full((4,), 7.0), "n": "mine"}, both=both))


def test_with_allow_partial_a_shape_that_differs_is_refused_still(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, allow_partial=True)
    save(which, state(1.0))
    target = {**state(0.0), "w": torch.zeros(51)}
    with TieredCheckpointer.from_recipe(which) as checkpointer, pytest.raises(MismatchError, match=r"w: saved \(50,\)"):
        checkpointer.restore(target)
    assert bits(target) == bits({**state(0.0), "w": torch.zeros(51)})


@pytest.mark.parametrize(
    ("saved", "more", "words"),
    [
        ({}, {"t": torch.zeros(4)}, "1 not in the checkpoint: t"),
        ({}, {"n": 3}, "1 not in the checkpoint: n"),
        ({"t": torch.ones(4)}, {}, "1 not in the state: t"),
        ({"n": 3}, {}, "1 not in the state: n"),
    ],
)
def test_without_allow_partial_a_name_on_one_side_only_is_refused(
    saved: dict[str, Any], more: dict[str, Any], words: str, which: dict[str, Any]
) -> None:
    save(which, state(1.0, **saved))
    target = state(0.0, **more)
    before = bits(target)
    with TieredCheckpointer.from_recipe(which) as checkpointer, pytest.raises(MismatchError, match=words):
        checkpointer.restore(target)
    assert bits(target) == before


# ---- how often a state is asked


def test_a_state_is_opened_once_for_a_checkpoint_however_often_its_reads_are_planned(which: dict[str, Any]) -> None:
    asked = Asked()
    save(which, *(state(value, asked=Asked(value)) for value in (1.0, 2.0)))
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        engine = checkpointer._open
        seen = survey(engine.group, engine.store.tiers)
        newest, older = (
            assemble(engine.group, engine.store.tiers, seen, checkpoint) for checkpoint in seen.candidates[:2]
        )
        loader = StateLoader(state(0.0, asked=asked), engine.settings, engine.group, None)
        first = loader.plan(newest)
        assert asked.calls == ["state_dict"]
        assert loader.plan(newest) == first
        assert loader.plan(_from_afar(newest)) == first, "on one node, the same parts from farther away"
        assert asked.calls == ["state_dict"], "it may be collective, and the other ranks do not plan again"
        loader.plan(older)
        assert asked.calls == ["state_dict"] * 2, "another checkpoint may have other names"


def _from_afar(candidate: Candidate) -> Candidate:
    return replace(candidate, near=frozenset())


# ---- what only a pickle could load


class Harmless:
    """Needs a pickle."""


def test_a_pickle_is_refused_before_anything_is_placed(tmp_path: Path, memory_dir: Path) -> None:
    save(recipe(tmp_path, memory_dir, allow_pickle=True), state(1.0, asked=Asked(1.0), z={"deep": [Harmless()]}))
    asked = Asked()
    target = state(0.0, asked=asked, z={"deep": [None]})
    with (
        TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir)) as checkpointer,
        pytest.raises(MismatchError, match=r"z\.deep: .*allow_pickle: true"),
    ):
        checkpointer.restore(target)
    assert bits({key: target[key] for key in ("w", "values", "z")}) == bits({**state(0.0), "z": {"deep": [None]}})
    assert bits(asked.value) == bits(torch.zeros(3))
    assert asked.calls == ["state_dict"]


def _pickle_on_rank_1(rank: int, trusting: dict[str, Any], strict: dict[str, Any]) -> tuple[tuple[str, str], bool]:
    held = state(1.0, per_rank={"hook": Harmless() if rank == 1 else 3})
    with TieredCheckpointer.from_recipe(trusting) as checkpointer:
        checkpointer.save(1, held, ["memory"]).wait("memory")
    target = state(0.0, per_rank={"hook": None})
    before = bits(target)
    with TieredCheckpointer.from_recipe(strict) as checkpointer:
        told = raised(lambda: checkpointer.restore(target))
    return told, bits(target) == before


def test_a_pickle_that_one_rank_refuses_leaves_the_tensors_of_all_as_they_were(
    tmp_path: Path, memory_dir: Path
) -> None:
    trusting, strict = recipe(tmp_path, memory_dir, allow_pickle=True), recipe(tmp_path, memory_dir)
    for (kind, text), untouched in run(2, _pickle_on_rank_1, trusting, strict):
        assert kind == "MismatchError"
        assert "per_rank.00001.hook: " in text
        assert "allow_pickle: true" in text
        assert untouched


def test_what_is_not_wanted_is_left_out_with_all_below_it(tmp_path: Path, memory_dir: Path) -> None:
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir)) as checkpointer:
        checkpointer.save(1, state(1.0, extra={"a": torch.ones(3), "b": 2}, extras=torch.ones(2))).wait("memory")
        wanted = state(0.0, extras=torch.zeros(2))
        with pytest.raises(MismatchError, match=r"not in the state: extra\.a, extra\.b"):
            checkpointer.restore(wanted)
        with pytest.raises(ConfigError, match=r"without must be a list of names, got 'extra'. Give \['extra'\]"):
            checkpointer.restore(wanted, without="extra")
        assert checkpointer.restore(wanted, without=["extra"]) == 1
        assert bits(wanted) == bits(state(1.0, extras=torch.ones(2)))
