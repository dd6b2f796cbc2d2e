"""Metadata of the predecessor's that lies is refused, and metadata that is right is read for what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata

from sm_tiered.errors import FormatError, SaveError
from sm_tiered_dcp.predecessor import metadata, tiling
from sm_tiered_dcp.predecessor.metadata import read_contents
from sm_tiered_dcp.predecessor.tiling import Box, are_apart
from tests.integrations.predecessor_made import Made, made, two_ranks


def _place(found: Made, fqn: str) -> Any:
    return next(info for index, info in found.metadata.storage_data.items() if index.fqn == fqn)


def _shape(found: Made, *sizes: int) -> None:
    entry: Any = found.metadata.state_dict_metadata["a"]
    entry.size = torch.Size(sizes)
    entry.chunks[0].sizes = torch.Size(sizes)


def _entry(found: Made, fqn: str) -> Any:
    return found.metadata.state_dict_metadata[fqn]


def _chunked(found: Made, shape: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Let the tensor ``a`` have those chunks, each of them stored in a place of its own."""
    entry, stored = _entry(found, "a"), found.metadata.storage_data
    kind, place = type(entry.chunks[0]), _place(found, "a")
    entry.size = torch.Size(shape)
    entry.chunks = [kind(offsets=torch.Size(offsets), sizes=torch.Size(sizes)) for offsets, sizes in chunks]
    for index in [index for index in stored if index.fqn == "a"]:
        del stored[index]
    for number, (offsets, _) in enumerate(chunks):
        index = dcp_metadata.MetadataIndex("a", torch.Size(offsets), number)
        stored[index] = type(place)(rank=0, offset=(number + 1) * 10_000, length=10_000)


def _empty(found: Made) -> None:
    for mapping in (found.metadata.state_dict_metadata, found.metadata.planner_data, found.metadata.storage_data):
        mapping.clear()


LIES: dict[str, tuple[Callable[[Made], Any], str]] = {
    "rank": (lambda m: setattr(_place(m, "a"), "rank", -1), "rank: -1"),
    "a rank too high": (lambda m: setattr(_place(m, "a"), "rank", 10**6), "rank: 1000000"),
    "a rank that is a text": (lambda m: setattr(_place(m, "a"), "rank", "../x"), "rank: a str is no integer"),
    "offset": (lambda m: setattr(_place(m, "a"), "offset", 2**63), "offset: 9223372036854775808"),
    "an offset that is true": (lambda m: setattr(_place(m, "a"), "offset", True), "offset: True"),
    "length": (lambda m: setattr(_place(m, "a"), "length", -5), "length: -5"),
    "more than the bytes": (lambda m: _shape(m, 2**40, 3), r"doesn't fit into \d+ stored bytes"),
    "a product above 2**64": (lambda m: _shape(m, 2**40, 2**40, 2**40), "a: a chunk of|doesn't fit"),
    "a dimension below 0": (lambda m: _shape(m, -40, 3), "size: -40"),
    "many dimensions": (lambda m: _shape(m, *[1] * 100), "100 dimensions"),
    "the bytes of another": (lambda m: vars(_place(m, "epoch")).update(offset=0), "overlap in the shard of rank 0"),
    "a value that nothing describes": (lambda m: m.metadata.state_dict_metadata.pop("a"), "don't name the same values"),
    "a tensor that is nowhere": (
        lambda m: m.metadata.storage_data.pop(next(i for i in m.metadata.storage_data if i.fqn == "a")),
        "a: nothing says where",
    ),
    "a path to another place": (lambda m: m.metadata.planner_data.update(a=("b",)), "its path leads to another name"),
    "a path that is none": (lambda m: m.metadata.planner_data.update(a=(1.5,)), "its path is none"),
    "the name of a part of ours": (
        lambda m: m.metadata.state_dict_metadata.update({"__0_0.distcp": m.metadata.state_dict_metadata.pop("a")}),
        "name",
    ),
    "chunks that overlap": (lambda m: _chunked(m, (40, 3), ((0, 0), (20, 3)), ((10, 0), (20, 3))), "the same elements"),
    "chunks that overlap in the second dimension": (
        lambda m: _chunked(m, (4, 4), ((0, 0), (4, 2)), ((0, 1), (4, 2))),
        "a: two of its chunks hold the same elements",
    ),
    "an empty tensor without a chunk": (lambda m: _chunked(m, (0, 3)), "its chunks are not all of"),
    "the chunks of another": (
        lambda m: m.metadata.state_dict_metadata.update(b=_entry(m, "a")),
        "its chunks are another tensor's",
    ),
    "nothing at all": (_empty, "^it: it holds nothing"),
    "a sparse tensor": (
        lambda m: setattr(vars(m.metadata.state_dict_metadata["a"])["properties"], "layout", torch.sparse_coo),
        "not a dense tensor",
    ),
}


@pytest.mark.parametrize("kind", LIES)
def test_metadata_that_lies_is_refused(kind: str) -> None:
    lie, told = LIES[kind]
    found = two_ranks(1)
    lie(found)
    with pytest.raises(FormatError, match=told):
        read_contents(found.pickled(), "it")


# ---- what it says


def test_chunks_side_by_side_are_a_tensor() -> None:
    found = two_ranks(1)
    _chunked(found, (4, 4), ((0, 0), (4, 1)), ((0, 1), (2, 3)), ((2, 1), (2, 3)), ((4, 0), (0, 4)))
    assert [entry.offsets for entry in read_contents(found.pickled(), "it").of(0)[0]] == [
        (0, 0),
        (0, 1),
        (2, 1),
        (4, 0),
    ]


def test_an_empty_key_leads_to_a_value() -> None:
    found = read_contents(made({"a": {"": torch.ones(2), "b": {"": 1}}, "c": 3}).pickled(), "it")
    assert {entry.fqn: entry.path for entry in found.entries} == {"a.": ("a", ""), "a.b.": ("a", "b", ""), "c": ("c",)}


def test_what_is_asked_for_each_value_is_found_out_once() -> None:
    found = read_contents(two_ranks(1).pickled(), "it")
    assert found.entries is found.entries
    assert found.ends is found.ends
    assert all(one is other for one, other in zip(found.of(1), found.of(1), strict=True))
    assert found.size == sum(entry.span.length for entry in found.entries)
    assert [[entry.fqn for entry in each] for each in found.of(1)] == [["b"], ["note"]]
    assert found.of(2) == ((), ())


def test_memory_that_runs_out_is_no_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(metadata, "read_pickle", full)
    with pytest.raises(SaveError, match="^it: there is not enough memory for what 3 bytes tell"):
        read_contents(b"abc", "it")


# ---- side by side

GRID = [((x, y, z), (2, 3, 4)) for x in range(0, 20, 2) for y in range(0, 30, 3) for z in range(0, 40, 4)]
PINWHEEL = [((0, 0), (2, 1)), ((0, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 0), (1, 2)), ((1, 1), (1, 1))]


@pytest.mark.parametrize(
    ("boxes", "apart"),
    [
        (GRID, True),
        ([*GRID, ((5, 5, 5), (1, 1, 1))], False),
        ([*GRID, ((5, 5, 5), (0, 1, 1))], True),
        (PINWHEEL, True),
        ([*PINWHEEL[:-1], ((1, 1), (1, 2))], False),
        ([((), ())], True),
        ([], True),
    ],
    ids=["grid", "one in a grid", "an empty one in a grid", "pinwheel", "pinwheel that overlaps", "scalar", "none"],
)
def test_boxes_are_apart_where_no_element_is_in_two(boxes: list[Box], apart: bool) -> None:
    assert are_apart(boxes) == apart
    assert are_apart(boxes[::-1]) == apart


def test_boxes_that_would_take_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_BESIDES", 0)
    assert are_apart(GRID), "what sharding makes takes no more"
    stairs = [((at, at), (1000 - at, 1)) if at % 2 else ((at, at), (1, 1000 - at)) for at in range(500)]
    with pytest.raises(ValueError, match="500 chunks that are cut up in too many ways"):
        are_apart(stairs)
