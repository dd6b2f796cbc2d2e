"""Records and manifests as JSON: the same facts, the same bytes; anything else a `FormatError`."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sm_tiered import layout
from sm_tiered import manifest as m
from sm_tiered.checksum import CHUNK_BYTES, digest
from sm_tiered.errors import FormatError
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Item, ItemTable, Part, Record
from sm_tiered.sealed_json import sealed

HEX = digest(b"x")
HERE = CheckpointId(attempt=Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="0123abcd"), step=0)


def record(rank: int = 0, world: int = 2, **changes: Any) -> Record:
    part = Part(name=f"__{rank}_0.distcp", size=CHUNK_BYTES + 1, chunks=(HEX, HEX))
    tensor = Item(
        fqn="a.b", path=("a", "b"), part=part.name, offset=64, length=256, payload=128,
        dtype="float32", sizes=(2, 3), offsets=(0, 3), shape=(2, 6),
    )  # fmt: skip
    value = Item(fqn="n.1", path=("n", 1), part=part.name, offset=400, length=3)
    facts: dict[str, Any] = {
        "namespace": "n",
        "checkpoint": HERE,
        "rank": rank,
        "world": world,
        "saved_at": 1.5,
        "parts": (part,),
        "tables": (ItemTable(items=(tensor,)), ItemTable(items=(value,))),
        "metrics": {"loss": 0.25, "diverged": float("nan")},
        **changes,
    }
    return Record(**facts)


BEYOND: list[Any] = [-1, -(10**9), 2**62, 2**64, 10**400, True, False, 1.0, 1e300, "1", None, [1], {}]
"""No count, size or offset."""
RANKS = [10**9, layout.MAX_WORLD + 1]
"""More than there ever are, and bytes enough."""


def shown(value: object) -> str:
    return str(value)[:20]


def forged(data: bytes, path: tuple[str | int, ...], value: object) -> bytes:
    """The same file but for one field, with a digest made anew."""
    fields: Any = json.loads(data)
    del fields["xxh3_128"]
    place: Any = fields
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return sealed(json.dumps(fields))


def assert_refused_cheaply(call: Callable[[], object], *words: str) -> None:
    """Nothing of the size that a forged number says may be made before it is looked at."""
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with pytest.raises(FormatError) as caught:
            call()
        secs, (_, peak) = time.perf_counter() - begun, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for word in words:
        assert word in str(caught.value)
    assert peak < 32 * 1024 * 1024
    assert secs < 1.0


def test_a_record_is_read_as_it_was_written() -> None:
    written = record(watermark=HERE)
    found = m.record_from_json(m.record_to_json(written))
    assert found.items == written.items
    assert (found.parts, found.checkpoint, found.watermark) == (written.parts, HERE, HERE)
    assert found.metrics == {"loss": 0.25}


def test_a_manifest_is_a_function_of_the_records() -> None:
    records = {rank: m.record_to_json(record(rank)) for rank in (0, 1)}
    one, other = m.compose_manifest(records), m.compose_manifest(dict(reversed(records.items())))
    assert m.manifest_to_json(one) == m.manifest_to_json(other)
    assert m.manifest_from_json(m.manifest_to_json(one)) == one
    assert one.records == {rank: digest(data) for rank, data in records.items()}


def test_replicas_are_not_in_a_manifest() -> None:
    replica = Part(name="__0_2.distcp", size=0, chunks=(), replica=True)
    records = {0: m.record_to_json(record(0, world=1, parts=(*record().parts, replica)))}
    assert list(m.compose_manifest(records).parts) == ["__0_0.distcp"]


@pytest.mark.parametrize(
    "records",
    [
        {},
        {1: m.record_to_json(record(1))},
        {0: m.record_to_json(record(0))},
        {0: m.record_to_json(record(0)), 1: m.record_to_json(record(0))},
        {0: m.record_to_json(record(0)), 1: m.record_to_json(record(1, parts=(), tables=(), failed="disk"))},
        {0: m.record_to_json(record(0)), 1: m.record_to_json(record(1, namespace="other"))},
        {0: m.record_to_json(record(0, world=3)), 1: m.record_to_json(record(1))},
    ],
    ids=["none", "no rank 0", "one missing", "stale rank", "failed", "foreign", "worlds differ"],
)
def test_no_manifest_is_made_of_an_incomplete_set(records: dict[int, bytes]) -> None:
    with pytest.raises(FormatError):
        m.compose_manifest(records)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("format",), "1"),
        (("kind",), "manifest"),
        (("step",), -1),
        (("step",), 10**10),
        (("attempt",), "../../x"),
        (("namespace",), "../x"),
        (("rank",), True),
        (("world",), 0),
        (("saved_at",), "now"),
        (("parts", 0, "name"), "../../etc/passwd"),
        (("parts", 0, "name"), "manifest.json"),
        (("parts", 0, "size"), -1),
        (("parts", 0, "size"), 5),
        (("parts", 0, "chunks", 0), "zz"),
        (("items", 0, "part"), "elsewhere"),
        (("items", 0, "length"), 2**40),
        (("items", 0, "payload"), 4),
        (("items", 0, "sizes"), [2, 9]),
        (("items", 0, "offsets"), [0]),
        (("metrics",), {"loss": None}),
        (("watermark",), "step_1"),
    ],
)
def test_a_record_that_is_not_exactly_ours_is_refused(path: tuple[str | int, ...], value: object) -> None:
    with pytest.raises(FormatError) as caught:
        m.record_from_json(forged(m.record_to_json(record()), path, value))
    assert "its own digest" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *product(["world", "rank", "size", "offset", "payload", "sizes", "shape"], BEYOND),
        *product(["world", "rank"], RANKS),
        ("world", 0),
        ("rank", layout.MAX_WORLD),
    ],
    ids=shown,
)
def test_a_number_of_a_record_that_is_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    places: dict[str, tuple[str | int, ...]] = {"world": ("world",), "rank": ("rank",), "size": ("parts", 0, "size")}
    path = places.get(field, ("items", 0, field, *([0] if field in ("sizes", "shape") else [])))
    data = forged(m.record_to_json(record()), path, value)
    assert_refused_cheaply(lambda: m.record_from_json(data), f"{field} must be an integer", str(value)[:40])


@pytest.mark.parametrize(
    ("field", "value"),
    [*product(["world", "__1_0.distcp"], BEYOND), *product(["world"], [0, *RANKS])],
    ids=shown,
)
def test_a_number_of_a_manifest_that_is_out_of_bounds_is_refused_by_name(field: str, value: Any) -> None:
    whole = m.manifest_to_json(m.compose_manifest({rank: m.record_to_json(record(rank)) for rank in (0, 1)}))
    for kind in ("manifest", "tombstone"):
        data = forged(forged(whole, ("kind",), kind), ("world",) if field == "world" else ("parts", field), value)
        assert_refused_cheaply(
            lambda data=data: m.manifest_from_json(data), f"{field} must be an integer", str(value)[:40]
        )


@pytest.mark.parametrize("world", [1, 3, layout.MAX_WORLD])
def test_a_world_other_than_that_of_the_records_is_refused(world: int) -> None:
    records = {rank: m.record_to_json(record(rank)) for rank in (0, 1)}
    data = forged(m.manifest_to_json(m.compose_manifest(records)), ("world",), world)
    assert_refused_cheaply(lambda: m.manifest_from_json(data), f"world is {world}", "[0, 1]")
    others = {rank: forged(data, ("world",), world) for rank, data in records.items()}
    assert_refused_cheaply(lambda: m.compose_manifest(others), "[0, 1]")


@pytest.mark.parametrize("name", ["record-99999999999.json", "record--0001.json", "record-1.json", "record-00002.json"])
def test_a_manifest_of_a_rank_that_can_not_be_is_refused(name: str) -> None:
    records = {rank: m.record_to_json(record(rank)) for rank in (0, 1)}
    data = forged(m.manifest_to_json(m.compose_manifest(records)), ("records", name), HEX)
    assert_refused_cheaply(lambda: m.manifest_from_json(data), "record")


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 2000), byte=st.integers(0, 255), cut=st.integers(0, 3000))
def test_damaged_bytes_give_a_format_error_or_a_record_and_nothing_else(at: int, byte: int, cut: int) -> None:
    data = bytearray(m.record_to_json(record()))
    data[at % len(data)] = byte
    try:
        m.record_from_json(bytes(data[: max(1, cut)]))
    except FormatError:
        return


def test_deep_nesting_is_no_crash() -> None:
    with pytest.raises(FormatError):
        m.record_from_json(b"[" * 100_000)


def test_an_attempt_record_is_read_as_it_was_written() -> None:
    written = AttemptRecord(namespace="n", attempt=HERE.attempt, parent=HERE, chosen=True)
    assert m.attempt_record_from_json(m.attempt_record_to_json(written)) == written
