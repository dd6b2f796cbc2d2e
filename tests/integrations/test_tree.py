"""Names and leaves: what a state is stored as."""

from __future__ import annotations

import collections
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from sm_tiered.errors import StructureError
from sm_tiered_dcp.tree import Flat, flatten, signature, stock_path, values_signature


def _stock(state: dict[str, Any]) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    values, paths = flatten_state_dict(state)
    return {name: (paths[name], value) for name, value in values.items()}


def _ours(flat: Flat) -> dict[str, tuple[tuple[str | int, ...], Any]]:
    leaves = {**flat.tensors, **flat.values}
    return {name: (stock_path(leaf.path), leaf.value) for name, leaf in leaves.items()}


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and not isinstance(one, torch.Tensor) and one == other)


_KEYS = st.one_of(st.sampled_from("abc"), st.text(max_size=3).filter(lambda key: "\0" not in key), st.integers(-2, 2))
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=2), st.builds(lambda: torch.zeros(2)))
_TREES = st.recursive(
    st.one_of(_LEAVES, st.tuples(st.integers(), st.integers())),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(_KEYS, inner, min_size=1, max_size=3)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    state=st.dictionaries(
        st.text(min_size=1, max_size=3).filter(lambda key: "\0" not in key), _TREES, min_size=1, max_size=3
    )
)
def test_names_paths_and_leaves_are_those_of_stock_dcp(state: dict[str, Any]) -> None:
    try:
        stock = _stock(state)
    except ValueError:
        with pytest.raises(StructureError, match="two values have the name"):
            flatten(state, rank=0)
        return
    ours = _ours(flatten(state, rank=0))
    assert ours.keys() == stock.keys()
    assert all(ours[name][0] == stock[name][0] and _same(ours[name][1], stock[name][1]) for name in stock)


def test_a_known_list_of_keys_does_not_hide_that_the_values_changed() -> None:
    def names(state: dict[str, Any]) -> set[str]:
        flat = flatten(state, rank=0)
        return {*flat.tensors, *flat.values}

    assert names({"a": {"x": 1, "y": {"z": 1}}}) == {"a.x", "a.y.z"}
    assert names({"a": {"x": {"q": 1}, "y": 2}}) == {"a.x.q", "a.y"}
    assert names({"a": {"y": 2, "x": 1}}) == {"a.x", "a.y"}
    assert names({"a": {True: 2, "x": 1}}) == {"a"}
    assert names({"a": {1: 2, "x": 1}}) == {"a.1", "a.x"}
    assert names({"a": {True: 2, "x": 1}}) == {"a"}


def test_empty_containers_and_dicts_with_other_keys_are_leaves() -> None:
    state = {"a": {}, "b": {"c": [], "d": collections.OrderedDict()}, "e": {(0, 1): 2}, "f": {True: 1}, "g": [{}]}
    flat = flatten(state, rank=0)
    assert {name: leaf.value for name, leaf in flat.values.items()} == {
        "a": {},
        "b.c": [],
        "b.d": {},
        "e": {(0, 1): 2},
        "f": {True: 1},
        "g.0": {},
    }


def test_an_int_key_and_an_index_have_different_paths() -> None:
    flat = flatten({"a": {0: torch.zeros(1)}, "b": [torch.zeros(1)]}, rank=0)
    assert flat.tensors["a.0"].path != ("a", 0)
    assert stock_path(flat.tensors["a.0"].path) == ("a", "0")
    assert flat.tensors["b.0"].path == ("b", 0)


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"a": {1: torch.zeros(1), "1": torch.zeros(1)}},
        {"a.b": torch.zeros(1), "a": {"b": 2}},
        {"a": {"b.c": torch.zeros(1), "b": {"c": torch.ones(1)}}},
    ],
)
def test_one_name_for_two_values_is_refused_naming_both(state: dict[str, Any]) -> None:
    with pytest.raises(StructureError, match=r"the name 'a\..*: state\['a.*\] and state\['a.*\]"):
        flatten(state, rank=0)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, "empty"),
        ({1: torch.zeros(1)}, "key 1 of type int.*'1'"),
        (nn.Linear(1, 1), "Linear, not a mapping.*{'model': model}"),
        ([1], "list, not a mapping"),
        ({"a": {"b\0c": 1}}, "NUL"),
        ({"a\0": torch.zeros(1)}, "NUL"),
        ({"per_rank.00000.x": 1}, "reserved.*per_rank"),
        ({"a": torch.zeros(2, device="meta")}, "a, a Tensor, is on the meta device"),
        ({"a": {"b": torch.eye(2).to_sparse()}}, r"a\.b.*layout torch\.sparse_coo"),
        (lambda: {"a": {"b": torch.eye(2).to_sparse_csr()}}, r"a\.b.*layout torch\.sparse_csr"),
        (lambda: {"a": {"q": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}}, r"a\.q.*quantized"),
        (lambda: {"a": [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]}, r"a\.0.*nested"),
        (lambda: {"a": {"n": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}}, r"a\.n.*nested"),
        ({"a": {"l": nn.LazyLinear(2).weight}}, r"a\.l.*no storage yet"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_can_not_be_a_checkpoint_is_refused_by_name(state: Any, words: str) -> None:
    state = state() if isinstance(state, type(lambda: 0)) else state
    with pytest.raises(StructureError, match=words):
        flatten(state, rank=0)


def test_a_container_that_holds_itself_is_refused() -> None:
    loop: dict[str, Any] = {"x": 1}
    loop["loop"] = loop
    with pytest.raises(StructureError, match="hold itself"):
        flatten({"a": loop}, rank=0)


def test_stateful_objects_are_asked_wherever_they_stand() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)
    flat = flatten({"model": model, "more": [{"x": other}, nn.Linear]}, rank=0)
    assert list(flat.tensors) == ["model.weight", "model.bias", "more.0.x.weight"]
    assert flat.tensors["model.weight"].value.data_ptr() == model.weight.data_ptr()
    assert list(flat.values) == ["more.1"]  # a class is no object with state


def test_values_of_one_rank_have_names_of_their_own() -> None:
    flat = flatten({"a": 1, "per_rank": {"x": torch.zeros(1), "n": {"k": 2}}}, rank=3)
    assert list(flat.values) == ["a"]
    assert flat.tensors == {}
    assert list(flat.per_rank_tensors) == ["per_rank.00003.x"]
    assert flat.per_rank_values["per_rank.00003.n.k"].path == ("per_rank", "00003", "n", "k")


def test_only_exact_aliases_are_tied() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base,
        "same": base[:],
        "wrapped": nn.Parameter(base),
        "row": base[0],
        "flat": base.view(12),
        "again": base.view(12),
        "turned": base.t(),
        "bits": base.view(torch.int32),
        "copy": base.clone(),
        "empty": base[:0],
        "empty2": base[:0],
        "c": torch.ones(2, dtype=torch.complex64),
    }
    state["conjugate"] = state["c"].conj()
    assert flatten({"s": state}, rank=0).tied == {"s.same": "s.a", "s.wrapped": "s.a", "s.again": "s.flat"}
    assert flatten(state, rank=0).tied == {"same": "a", "wrapped": "a", "again": "flat"}


def _signature(world: int = 1, **state: Any) -> int:
    return signature(flatten(state, rank=0), world=world)


def test_the_signature_follows_structure_and_nothing_else() -> None:
    first = _signature(a=torch.zeros(2, 3), b={"c": torch.zeros(4)}, n=1)
    assert 0 <= first < 2**63
    assert first == _signature(a=torch.ones(3, 2).t(), b={"c": nn.Parameter(torch.ones(4))}, n="other")
    tied = torch.zeros(2, 3)
    different = [
        _signature(a=torch.zeros(3, 2), b={"c": torch.zeros(4)}),
        _signature(a=torch.zeros(2, 3).bool(), b={"c": torch.zeros(4)}),
        _signature(a=torch.zeros(2, 3), b={"d": torch.zeros(4)}),
        signature(flatten({"a": torch.zeros(2, 3), "b.c": torch.zeros(4)}, rank=0)),
        _signature(a=torch.zeros(2, 3), b={"c": torch.zeros(4)}, d=torch.zeros(1)),
        _signature(a=torch.zeros(2, 3), b={"c": torch.zeros(4)}, per_rank={"d": torch.zeros(1)}),
        _signature(2, a=torch.zeros(2, 3), b={"c": torch.zeros(4)}),
        _signature(a=tied, b=tied),
        _signature(a=tied, b=tied.clone()),
    ]
    assert len({first, *different}) == 1 + len(different)


def test_the_signature_follows_what_the_keys_are() -> None:
    nested = {"x": torch.zeros(4), "b": {"c": torch.zeros(4)}}
    dotted = {"x": torch.zeros(4), "b.c": torch.zeros(4)}
    assert signature(flatten(nested, rank=0)) != signature(flatten(dotted, rank=0))


def test_a_tensor_that_is_resized_in_place_changes_the_signature() -> None:
    weight = nn.Parameter(torch.zeros(4))
    state = {"m": {"w": weight}}
    first = signature(flatten(state, rank=0))
    weight.data = torch.zeros(5)
    assert signature(flatten(state, rank=0)) != first


def test_the_names_of_values_have_a_signature_without_those_of_one_rank() -> None:
    def of(state: dict[str, Any]) -> int:
        return values_signature(flatten(state, rank=0))

    assert of({"a": 1, "b": [1], "per_rank": {"x": 1}}) == of({"b": 2, "a": None, "per_rank": {"y": 1}})
    assert of({"a": 1, "b": 1}) != of({"a": 1, "b": {"c": 1}})
