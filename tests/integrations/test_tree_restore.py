"""Restoring: what a state becomes, given what was stored."""

from __future__ import annotations

import collections
import copy
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sm_tiered.errors import MismatchError, StructureError
from sm_tiered_dcp.target import Stored, Target
from sm_tiered_dcp.tree import Flat, flatten


class _Checkpoint:
    """What a storage would keep: clones."""

    def __init__(self, *flats: Flat) -> None:
        self.stored: dict[str, Stored] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self.values: dict[str, Any] = {}
        for flat in flats:
            for name, leaf in {**flat.tensors, **flat.per_rank_tensors}.items():
                self.stored[name] = Stored(path=leaf.path, is_tensor=True)
                self.tensors[name] = leaf.value.detach().clone()
            for name, leaf in {**flat.values, **flat.per_rank_values}.items():
                self.stored[name] = Stored(path=leaf.path, is_tensor=False)
                self.values[name] = copy.deepcopy(leaf.value)

    def open(self, state: Any, stored_rank: int | None = None) -> Target:
        target = Target(state)
        target.open(self.stored, stored_rank=stored_rank)
        return target

    def fill(self, target: Target) -> None:
        for name, tensor in target.tensors.items():
            tensor.copy_(self.tensors[name])
        target.assign_values({name: copy.deepcopy(self.values[name]) for name in target.wanted_values})
        target.finish()

    def restore(self, state: Any, stored_rank: int | None = None) -> Target:
        target = self.open(state, stored_rank)
        target.check_names()
        self.fill(target)
        return target


def _saved(state: dict[str, Any], rank: int = 0) -> _Checkpoint:
    return _Checkpoint(flatten(state, rank=rank))


class _Counter:
    """A Stateful object whose state_dict() is its own dict, which its load_state_dict() clears."""

    def __init__(self, **state: Any) -> None:
        self.state, self.asked, self.loaded = state, 0, 0

    def state_dict(self) -> dict[str, Any]:
        self.asked += 1
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded += 1
        self.state.clear()
        self.state.update(state)


_KEYS = st.one_of(st.text("ab", max_size=2), st.integers(-1, 2))
_TREES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.tuples(st.integers())),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, max_size=3)),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(saved=_TREES, now=_TREES)
def test_python_values_become_what_was_stored_whatever_is_there_now(saved: Any, now: Any) -> None:
    state = {"log": saved}
    try:
        checkpoint = _saved(state)
    except StructureError:  # an int key and its digits
        return
    target = {"log": now}
    checkpoint.restore(target)
    assert target == state
    assert repr(target) == repr({"log": saved}) or not isinstance(saved, (dict, list))


def test_containers_stay_the_same_objects() -> None:
    log, best, inner = [1], {"loss": 3}, {"x": 1}
    log2: collections.deque[int] | list[int] = [9]
    state = {"log": log, "best": best, "outer": {"inner": inner}, "a": {"t": torch.zeros(1), "l": log2}}
    grown = {
        "log": [1, {"b": 2}],
        "best": {},
        "outer": {"inner": {"y": {5: 2}}, "z": 1},
        "a": {"t": torch.ones(1), "l": []},
    }
    checkpoint = _saved(grown)
    checkpoint.restore(state)
    assert log == [1, {"b": 2}]
    assert best == {}
    assert inner == {"y": {5: 2}}
    assert log2 == []
    assert state["log"] is log
    assert state["best"] is best
    assert state["outer"] == {"inner": inner, "z": 1}
    assert state["a"]["t"] == 1


def test_a_container_that_stands_twice_is_not_given_two_contents() -> None:
    shared: list[int] = []
    state = {"a": shared, "b": shared, "c": dict.fromkeys("xy", shared)}
    _saved({"a": [1], "b": [2], "c": {"x": [3], "y": [4]}}).restore(state)
    assert state == {"a": [1], "b": [2], "c": {"x": [3], "y": [4]}}


def test_scalars_are_set_where_they_stand_and_subclasses_of_dict_are_kept() -> None:
    counts = collections.Counter(a=1)
    state = {"step": 0, "best": None, "pair": (0, 0), "counts": counts, "t": torch.tensor(0)}
    _saved(
        {"step": 7, "best": {"loss": 0.5}, "pair": (1, 2), "counts": collections.Counter(b=3), "t": torch.tensor(5)}
    ).restore(state)
    assert state == {"step": 7, "best": {"loss": 0.5}, "pair": (1, 2), "counts": {"b": 3}, "t": torch.tensor(5)}
    assert state["counts"] is counts


def test_tensors_are_filled_in_place_also_those_that_need_gradients() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    view = torch.zeros(4, 4)
    state = {"w": weight, "list": [torch.zeros(1), {"v": view[:, 1]}]}
    _saved({"w": torch.ones(2, 2), "list": [torch.ones(1), {"v": torch.ones(4)}]}).restore(state)
    assert state["w"] is weight
    assert weight.requires_grad
    assert torch.equal(weight, torch.ones(2, 2))
    assert view.sum() == 4


def test_nothing_is_asked_before_open_and_nothing_is_changed_before_finish() -> None:
    saved, fresh = _Counter(n=3, t=torch.ones(1)), _Counter(n=0, t=torch.zeros(1))
    checkpoint = _saved({"c": saved, "log": [1, 2]})
    log = [0]
    target = Target({"c": fresh, "log": log})
    assert fresh.asked == 0
    target.open(checkpoint.stored)
    assert (fresh.asked, fresh.loaded) == (1, 0)
    target.assign_values(checkpoint.values)
    assert (fresh.state["n"], log) == (0, [0])
    checkpoint.fill(target)
    assert (fresh.asked, fresh.loaded) == (1, 1)
    assert fresh.state == {"n": 3, "t": torch.ones(1)}
    assert log == [1, 2]


def test_a_stateful_object_may_have_grown_or_have_no_state_yet() -> None:
    for saved in ({"rows": [1, {"a": 2}], "pos": {}}, {}, {"n": {3: "x"}}):
        for now in ({}, {"rows": []}, {"pos": {"x": 1}, "n": 4}):
            fresh = _Counter(**copy.deepcopy(now))
            _saved({"c": _Counter(**saved)}).restore({"c": fresh})
            assert fresh.state == saved


def test_a_module_gets_its_state_with_its_metadata_and_keeps_its_tensors() -> None:
    saved, fresh = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    saved(torch.randn(4, 3))
    pointer = fresh.weight.data_ptr()
    _saved({"m": saved}).restore({"m": fresh})
    assert fresh.weight.data_ptr() == pointer
    assert all(torch.equal(one, other) for one, other in zip(saved.buffers(), fresh.buffers(), strict=True))


def test_an_object_that_makes_its_state_lazily_is_told_what_is_stored() -> None:
    class Lazy(_Counter):
        def state_dict_for(self, stored: Any) -> dict[str, Any]:
            self.told = sorted(stored)
            return {name: torch.zeros(2) for name in stored}

    fresh = Lazy()
    _saved({"a": {"l": _Counter(x=torch.ones(2), y=torch.ones(2))}, "a.lx": 1}).restore({"a": {"l": fresh}, "a.lx": 2})
    assert fresh.told == ["x", "y"]
    assert fresh.asked == 0
    assert torch.equal(fresh.state["x"], torch.ones(2))


def test_what_is_missing_and_what_is_unexpected_is_named() -> None:
    checkpoint = _saved({"m": {"w": torch.zeros(1), "old": torch.zeros(1), "n": 1}, "gone": {"a": 1}, "log": {"x": 1}})
    target = checkpoint.open(
        {"m": {"w": torch.zeros(1), "new": torch.zeros(1)}, "also": 1, "log": {}, "none": {"b": 1}}
    )
    assert target.missing == ("also", "m.new", "none.b")
    assert target.unexpected == ("gone.a", "m.n", "m.old")
    with pytest.raises(MismatchError, match=r"3 not in the checkpoint: also, m\.new.*3 not in the state: gone\.a"):
        target.check_names()
    checkpoint.fill(target)  # what fits can be loaded all the same


def test_trap_b_a_fresh_optimizer_does_not_pass_for_a_restored_one() -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 1)
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = made()
    model(torch.ones(2)).backward()
    optimizer.step()
    checkpoint = _saved({"model": model, "opt": optimizer})
    fresh, fresh_optimizer = made()
    target = checkpoint.open({"model": fresh, "opt": fresh_optimizer})
    assert len(target.unexpected) == 6
    with pytest.raises(MismatchError, match=r"6 not in the state: opt\.state\.0\.exp_avg.*TrainState"):
        target.check_names()


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        (torch.zeros(1), 3, "x: a tensor was saved, the state has a int"),
        (3, torch.zeros(1), "x: a Python value was saved, the state has a Tensor"),
        (torch.zeros(1), {}, "x: a tensor was saved, the state has a dict"),
        (torch.zeros(1), None, "x: a tensor was saved, the state has a NoneType"),
    ],
)
def test_a_tensor_is_no_python_value(saved: Any, now: Any, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        _saved({"x": saved}).open({"x": now})


@pytest.mark.parametrize("now", [3, None, {}, [], {"t": {}}, {"n": 1}])
def test_a_tensor_that_goes_into_what_has_no_tensors_now_is_unexpected(now: Any) -> None:
    target = _saved({"x": {"t": {"x": torch.zeros(1)}, "n": 1}}).open({"x": now})
    assert "x.t.x" in target.unexpected
    with pytest.raises(MismatchError):
        target.check_names()


def test_shapes_and_dtypes_are_compared_in_words() -> None:
    target = _saved({"w": torch.zeros(10, 4)}).open({"w": torch.zeros(10, 8)})
    with pytest.raises(MismatchError, match=r"w: saved \(10, 4\) float32, state has \(10, 8\) float32"):
        target.check("w", (10, 4), "float32")
    with pytest.raises(MismatchError, match=r"w: saved \(10, 8\) bfloat16, state has \(10, 8\) float32"):
        target.check("w", [10, 8], torch.bfloat16)
    target.check("w", (10, 8), "float32")


def test_trap_c_each_rank_gets_its_own_values_back_and_says_so_when_there_are_none() -> None:
    states = [{"w": torch.zeros(1), "per_rank": {"losses": [rank], "t": torch.full((1,), rank)}} for rank in range(2)]
    checkpoint = _Checkpoint(*(flatten(state, rank=rank) for rank, state in enumerate(states)))

    def restored(stored_rank: int | None) -> dict[str, Any]:
        state = {"w": torch.ones(1), "per_rank": {"losses": ["mine"], "t": torch.full((1,), 9)}}
        checkpoint.restore(state, stored_rank)
        return state["per_rank"]

    assert restored(1) == {"losses": [1], "t": torch.full((1,), 1)}
    assert restored(0) == {"losses": [0], "t": torch.full((1,), 0)}
    assert restored(None)["losses"] == ["mine"]
    with pytest.raises(MismatchError, match=r"per_rank\.00002\.losses"):
        restored(2)
    with pytest.raises(MismatchError, match=r"2 not in the state: per_rank\.00001\.losses"):
        checkpoint.restore({"w": torch.zeros(1)}, 1)
    checkpoint.restore({"w": torch.zeros(1)}, None)


def test_what_belongs_to_one_rank_may_be_a_single_value() -> None:
    state: dict[str, Any] = {"w": 0, "per_rank": {"x": 1}}
    _saved({"w": 1, "per_rank": {}}).restore(state, 0)
    assert state == {"w": 1, "per_rank": {}}


def test_without_a_rule_the_objects_of_one_rank_are_not_even_asked() -> None:
    counter = _Counter(n=1)
    _saved({"w": 1, "per_rank": {"c": _Counter(n=2)}}).restore({"w": 0, "per_rank": {"c": counter}}, None)
    assert (counter.asked, counter.loaded) == (0, 0)


def test_what_belongs_to_one_rank_is_restored_last() -> None:
    order: list[str] = []

    class Noted(_Counter):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            order.append(state["name"])

    def state() -> dict[str, Any]:
        return {"per_rank": {"r": Noted(name="rng")}, "z": Noted(name="z"), "a": Noted(name="a")}

    _saved(state()).restore(state(), 0)
    assert order == ["a", "z", "rng"]


def test_a_state_that_can_not_be_set_is_refused_before_anything_changes() -> None:
    state = types.MappingProxyType({"n": 1, "w": torch.zeros(1)})
    with pytest.raises(StructureError, match="n can't be set: it stands in a mappingproxy"):
        _saved({"n": 2, "w": torch.ones(1)}).open(state)


def test_a_dict_with_int_keys_that_stock_dcp_wrote_is_found() -> None:
    target = Target({"a": {7: torch.zeros(1)}, "b": {7: {"x": 0}}})
    stored = {"a.7": Stored(path=("a", "7"), is_tensor=True), "b.7.x": Stored(path=("b", "7", "x"), is_tensor=False)}
    target.open(stored)
    assert (target.missing, target.unexpected) == ((), ())
