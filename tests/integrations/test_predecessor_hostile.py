"""Hostile and strange files in the place of the predecessor's: nothing of them is run, and each is refused by name."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint.metadata as dcp_metadata

from sm_tiered.errors import CorruptPartError, FormatError, MismatchError, TieredError
from sm_tiered_dcp.predecessor import import_step, unpickling
from sm_tiered_dcp.predecessor.metadata import read_contents
from tests.integrations.predecessor_made import Made, directory, made, source, two_ranks


class Runs:
    """Makes the file *path* when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


def _somewhere(put: Callable[[Any, Any], None]) -> Callable[[Path], bytes]:
    def build(canary: Path) -> bytes:
        found = two_ranks(1)
        put(found.metadata, Runs(canary))
        return found.pickled()

    return build


def _first(mapping: Any, value: Any) -> None:
    mapping[next(iter(mapping))] = value


def _opcodes(text: bytes) -> Callable[[Path], bytes]:
    return lambda canary: b"\x80\x04" + text.replace(b"CANARY", str(canary).encode()) + b"."


HOSTILE: dict[str, Callable[[Path], bytes]] = {
    "instead of the metadata": lambda canary: pickle.dumps(Runs(canary)),
    "where a shard stands": _somewhere(lambda m, evil: _first(m.storage_data, evil)),
    "what a tensor is": _somewhere(lambda m, evil: _first(m.state_dict_metadata, evil)),
    "the path of a value": _somewhere(lambda m, evil: _first(m.planner_data, evil)),
    "of the save": _somewhere(lambda m, evil: setattr(m, "storage_meta", evil)),
    "protocol 0": lambda canary: pickle.dumps(Runs(canary), protocol=0),
    "an old opcode": _opcodes(b"(S'touch CANARY'\nios\nsystem\n"),
    "eval": _opcodes(b"cbuiltins\neval\n(\x8c\x011tR"),
    "an attribute of a module that is known": _opcodes(
        b"\x8c\x05torch\x8c\x17serialization.os.system\x93\x8c\x02id\x85R"
    ),
    "an attribute of a class that is known": _opcodes(
        b"ctorch.distributed.checkpoint.metadata\nMetadata.__init__.__globals__\n"
    ),
    "a registered extension": _opcodes(b"\x82\x01"),
    "a persistent id": _opcodes(b"\x8c\x01xQ"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_metadata_is_run(kind: str, tmp_path: Path) -> None:
    canary = tmp_path / "it-ran"
    data = HOSTILE[kind](canary)
    with pytest.raises(FormatError, match=r"^the metadata of step 1 (names '|is no pickled DCP)") as caught:
        read_contents(data, "the metadata of step 1")
    assert not canary.exists()
    if "names" in caught.value.message:
        assert caught.value.hint == (
            "Nothing of it was run. If you did not put it there, somebody else can write to that place."
        )


def test_the_name_that_it_stumbles_over_is_told() -> None:
    with pytest.raises(FormatError, match=r"names 'posix.open', which is no part of DCP's metadata"):
        read_contents(pickle.dumps(Runs(Path("/nowhere"))), "it")


def test_classes_of_this_process_can_t_be_changed() -> None:
    text = b"ctorch.distributed.checkpoint.metadata\nMetadata\nN}\x8c\x08__init__I1\ns\x86b"
    with pytest.raises(FormatError):
        read_contents(b"\x80\x04" + text + b".", "it")
    assert callable(dcp_metadata.Metadata.__init__)


def _with_rank(opcodes: bytes) -> bytes:
    """Metadata in which what *opcodes* make is a rank. They may use place 1 of the memo, which nothing else needs."""
    data, first = two_ranks(1).pickled(), b"\x8c\x04rank\x94K\x00"
    assert data.count(first) == 1
    return data.replace(first, first + b"\x8c\x01x" + opcodes + b"q\x01\x8c\x04rankh\x01")


_OBJECT = b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81"
_DOUBLED_TUPLE = b")" + b"q\x01h\x01\x86" * 30
_DOUBLED_LIST = b"]q\x01" + b"\x8c\x01x](h\x01h\x01eq\x01" * 30
_DEEP_LIST = b"]" * 50_000 + b"a" * 49_999

BOMBS: dict[str, bytes] = {
    "a place in the memo that nothing has": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a very long string that isn't there": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "a very long integer": b"\x80\x04\x8b" + struct.pack("<I", 2**30) + b"\x01" * 5000 + b".",
    "an integer of 200 bytes": b"\x80\x04\x8a\xc8" + b"\x01" * 200 + b".",
    "lists in lists": b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "a list that holds itself": b"\x80\x04]q\x00h\x00a.",
    "no end": b"\x80\x04" + b"N" * 100,
    "nothing": b"",
    "text": b"metadata",
    "a stack that is empty": b"\x80\x040.",
    "a deep tuple as a key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "a tuple that doubles as a key": b"\x80\x04}" + _DOUBLED_TUPLE + b"Ns.",
    "a tuple that doubles as a rank": _with_rank(_DOUBLED_TUPLE),
    "a list that doubles as a rank": _with_rank(_DOUBLED_LIST),
    "a deep list as a rank": _with_rank(_DEEP_LIST),
    "a size of tuples": _with_rank(b"ctorch\nSize\n)\x85\x85R"),
    "deep objects": b"\x80\x04" + _OBJECT * 50_000 + b"b" * 49_999 + b".",
    "a dict as a key": b"\x80\x04}}Ns.",
    "no value as a key": b"\x80\x04}NNs.",
    "more remembered than made": b"\x80\x04N" + b"\x94" * 20 + b".",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_is_no_pickle_of_metadata_is_refused(kind: str) -> None:
    with pytest.raises(FormatError, match="^it"):
        read_contents(BOMBS[kind], "it")


def test_an_opcode_that_no_metadata_has_is_refused_before_its_argument_is_read() -> None:
    with pytest.raises(FormatError, match=r"an opcode b'\\x8b'"):
        read_contents(b"\x80\x04\x8b\xff\xff\xff\x7f.", "it")


@pytest.mark.parametrize("bound", ["_MOST_OPCODES", "_MOST_MADE", "MAX_BYTES"])
def test_what_is_made_of_metadata_has_a_bound(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = two_ranks(1).pickled()
    monkeypatch.setattr(unpickling, bound, 10_000)
    assert read_contents(data, "it").world == 2
    monkeypatch.setattr(unpickling, bound, 100)
    with pytest.raises(FormatError, match=r"^it is (\d+ bytes long, above 100|no pickled DCP .*: it makes too much)"):
        read_contents(data, "it")


def _place(found: Made, fqn: str) -> Any:
    return next(info for index, info in found.metadata.storage_data.items() if index.fqn == fqn)


# ---- what stands in shards


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _with_stream(found: Made, fqn: str, data: bytes) -> Made:
    """Let *data* stand for *fqn*, at the end of the shard."""
    place = _place(found, fqn)
    shard = found.shards[place.rank]
    place.offset, place.length = len(shard), len(data)
    found.shards[place.rank] = shard + data
    return found


@pytest.mark.parametrize("fqn", ["a", "epoch"])
def test_no_value_is_unpickled_and_nothing_stays_behind(fqn: str, tmp_path: Path) -> None:
    canary = tmp_path / "it-ran"
    _with_stream(two_ranks(5), fqn, _saved(Runs(canary))).put(tmp_path / "base", 5)
    place, target = source(tmp_path / "base"), directory(tmp_path / "out", "ours")
    with pytest.raises(MismatchError, match=f"^{fqn} in base/theirs/rank_0/step_5/checkpoint.pt") as caught:
        import_step(place, place.listed()[0], target, namespace="ours")
    assert not canary.exists()
    hint = caught.value.hint or ""
    assert ("--allow-pickle" in hint) == (fqn == "epoch"), "a tensor is never unpickled, whatever is allowed"
    assert [entry.key for entry in target.list("step_")] == []


def test_a_tensor_is_not_unpickled_though_pickles_are_allowed(tmp_path: Path) -> None:
    canary = tmp_path / "it-ran"
    _with_stream(two_ranks(5), "a", _saved(Runs(canary))).put(tmp_path / "base", 5)
    place, target = source(tmp_path / "base"), directory(tmp_path / "out", "ours")
    with pytest.raises(MismatchError, match="no plain tensor"):
        import_step(place, place.listed()[0], target, namespace="ours", allow_pickle=True)
    assert not canary.exists()


ODD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "another shape": ("a", lambda: _saved(torch.zeros(3, 40))),
    "another dtype": ("a", lambda: _saved(torch.zeros(40, 3, dtype=torch.float64))),
    "a value for a tensor": ("a", lambda: _saved([torch.zeros(40, 3)])),
    "no stream": ("a", lambda: b"x" * 2000),
    "a bare pickle": ("epoch", lambda: pickle.dumps(3)),
    "an old stream": ("epoch", lambda: _legacy(3)),
}


def _legacy(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_what_the_metadata_says_is_refused(kind: str, tmp_path: Path) -> None:
    fqn, build = ODD[kind]
    _with_stream(two_ranks(5), fqn, build()).put(tmp_path / "base", 5)
    place, target = source(tmp_path / "base"), directory(tmp_path / "out", "ours")
    with pytest.raises((CorruptPartError, MismatchError), match=f"^{fqn} in "):
        import_step(place, place.listed()[0], target, namespace="ours")
    assert [entry.key for entry in target.list("step_")] == []


def test_a_value_that_needs_a_pickle_can_be_taken_where_that_is_allowed(tmp_path: Path) -> None:
    import datetime

    made({"a": torch.ones(2), "when": datetime.date(2026, 1, 2), "n": 1}).put(tmp_path / "base", 5)
    place, target = source(tmp_path / "base"), directory(tmp_path / "out", "ours")
    with pytest.raises(MismatchError, match="^when in "):
        import_step(place, place.listed()[0], target, namespace="ours")
    found = import_step(place, place.listed()[0], target, namespace="ours", allow_pickle=True)
    assert found.pickled == ("when",)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_of_the_metadata_never_gives_other_values(seed: int) -> None:
    """What is not refused says the same, leads where no stream begins or ends, or lacks a name that is asked for."""
    import random

    found = two_ranks(7)
    data, good = found.pickled(), read_contents(found.pickled(), "it")
    streams = {(entry.span.rank, entry.span.offset, entry.span.length) for entry in good.entries}
    pick = random.Random(seed)
    for _ in range(60):
        flipped = bytearray(data)
        flipped[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
        try:
            other = read_contents(bytes(flipped), "it")
        except TieredError:
            continue
        moved = {(entry.span.rank, entry.span.offset, entry.span.length) for entry in other.entries}
        renamed = {entry.fqn for entry in other.entries} != {entry.fqn for entry in good.entries}
        assert other == good or moved != streams or renamed, pickletools.dis(bytes(flipped))
