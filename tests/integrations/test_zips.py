"""Zip bombs in the place of a stored value are refused before torch's reader sees them, whatever the recipe allows."""

from __future__ import annotations

import copy
import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from sm_tiered.errors import CorruptPartError
from sm_tiered_dcp import values
from sm_tiered_dcp.values import dump_value, load_value
from sm_tiered_dcp.zips import check_zip

NUMBERS = 1 << 18
PIECES = 8


def rezipped(stream: bytes, method: int = zipfile.ZIP_STORED, *, only: str = "") -> bytes:
    """The same entries in a zip of Python's; those whose name has *only* in it are compressed with *method*."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stream)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), method if only in name else zipfile.ZIP_STORED)
    return out.getvalue()


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def zeros() -> list[torch.Tensor]:
    return [torch.zeros(NUMBERS) for _ in range(PIECES)]


def overlapping() -> bytes:
    """One payload that stands in the directory under the name of each tensor."""
    stream, out = saved(zeros()), io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stream)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if "/data/" not in name or name.endswith("/data/0"):
                new.writestr(name, old.read(name))
                continue
            twin = copy.copy(next(entry for entry in new.filelist if entry.filename.endswith("/data/0")))
            # No longer than the first one's: torch finds the payload by the local header, which they share.
            twin.filename = name
            new.filelist.append(twin)
    return out.getvalue()


class End(NamedTuple):
    """Where the directory of a plain zip stands."""

    entries: int
    size: int
    offset: int

    @classmethod
    def of(cls, stream: bytes) -> End:
        return cls(*struct.unpack("<H2L", stream[-12:-2]))

    def record(self) -> bytes:
        """It as a zip64 record."""
        return struct.pack("<4sQHH2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, self.entries, *self)

    def last(self, comment: bytes = b"") -> bytes:
        """It as the record that every zip ends with."""
        return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, self.entries, *self, len(comment)) + comment


def locator_to(offset: int) -> bytes:
    """What tells where the zip64 record stands."""
    return struct.pack("<4sLQL", b"PK\6\7", 0, offset, 1)


def shifted(outer: bytes, by: int) -> bytearray:
    """The directory of *outer* for when it stands *by* bytes later."""
    shown = End.of(outer)
    directory, at = bytearray(outer[shown.offset : shown.offset + shown.size]), 0
    while at < len(directory):
        (local,) = struct.unpack_from("<L", directory, at + 42)
        struct.pack_into("<L", directory, at + 42, local + by)
        at += 46 + sum(struct.unpack_from("<3H", directory, at + 28))
    return directory


def two_faced(inner: bytes, outer: bytes, way: str) -> bytes:
    """Python's reader finds the entries of *outer*; torch's follows an offset to those of *inner*."""
    hidden, shown = End.of(inner), End.of(outer)
    start = inner[:-22] + hidden.record() + outer[: shown.offset]
    directory = shifted(outer, len(start) - shown.offset)
    if way == "locator":
        end = shown._replace(offset=len(start)).record() + locator_to(len(inner) - 22)
        return start + directory + end + End(0xFFFF, 2**32 - 1, 2**32 - 1).last()
    # In a comment of the last entry, because Python wants nothing between the directory and its end; and torch wants a
    # directory to be as long as all its entries.
    more = 76 if way == "record" else 0
    struct.pack_into("<H", directory, directory.rindex(b"PK\1\2") + 32, hidden.size + more)
    directory += bytes(hidden.size)
    at, comment = len(start) + len(directory), b""
    if way == "record":
        directory += b"none" + End(0, 0, at).record()[4:] + locator_to(at)
    else:
        comment = b"none" + End(0, 0, at + 22).last()[4:]
    return start + directory + End(hidden.entries, len(directory), hidden.offset).last(comment)


def faces(way: str) -> bytes:
    return two_faced(rezipped(saved(zeros()), zipfile.ZIP_DEFLATED), rezipped(saved([1])), way)


BOMBS: dict[str, Callable[[], bytes]] = {
    "compressed": lambda: rezipped(saved(zeros()), zipfile.ZIP_DEFLATED),
    "one compressed": lambda: rezipped(saved([torch.zeros(1 << 20), 1]), zipfile.ZIP_DEFLATED, only="/data/0"),
    "overlapping": overlapping,
    "two directories: locator": lambda: faces("locator"),
    "two directories: record": lambda: faces("record"),
    "two directories: comment": lambda: faces("comment"),
}
WORDS = {
    "overlapping": "its entries are longer than it is",
    **dict.fromkeys((name for name in BOMBS if ":" in name), "its directory is not at its end|BadZipFile"),
}


@pytest.fixture(scope="module", params=BOMBS)
def bomb(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    return request.param, BOMBS[request.param]()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What torch was asked to read."""
    asked: list[bytes] = []
    real: Any = values._loaded
    monkeypatch.setattr(values, "_loaded", lambda stored, **options: (asked.append(stored), real(stored, **options))[1])
    return asked


def test_torch_would_unfold_each(bomb: tuple[str, bytes]) -> None:
    """Or the next test would be about streams that nobody need fear."""
    name, stream = bomb
    found: Any = torch.load(io.BytesIO(stream), weights_only=True)
    assert sum(tensor.nbytes for tensor in found if isinstance(tensor, torch.Tensor)) > 7 * len(stream), name


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_bomb_is_refused_unread(bomb: tuple[str, bytes], allow_pickle: bool, loaded: list[bytes]) -> None:
    name, stream = bomb
    with pytest.raises(CorruptPartError, match=WORDS.get(name, "a compressed entry")) as caught:
        load_value(stream, allow_pickle=allow_pickle, what="extra.x")
    assert caught.value.key == "extra.x"
    assert not loaded


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_torch_could_not_unfold_today_is_refused_too(method: int, loaded: list[bytes]) -> None:
    with pytest.raises(CorruptPartError, match="a compressed entry"):
        load_value(rezipped(saved([torch.zeros(9)]), method), allow_pickle=False, what="v")
    assert not loaded


@pytest.mark.parametrize("said", [2**20, 2**32 - 2])
def test_an_entry_that_says_it_is_longer_than_all_is_refused(said: int, loaded: list[bytes]) -> None:
    """It would be made room for, before anybody sees that there is less."""
    stream = bytearray(rezipped(saved([torch.zeros(9)])))
    struct.pack_into("<L", stream, End.of(bytes(stream)).offset + 24, said)
    with pytest.raises(CorruptPartError, match="its entries are longer than it is"):
        load_value(stream, allow_pickle=False, what="v")
    assert not loaded


def test_a_stream_with_something_before_it_is_refused() -> None:
    """Python's reader takes it as it is meant, torch's as it is written."""
    for stream in (saved([1]), rezipped(saved([1]))):
        check_zip(io.BytesIO(stream), len(stream))
        with pytest.raises(ValueError, match="its directory is not at its end"):
            check_zip(io.BytesIO(stream[:30] + stream), 30 + len(stream))


def test_values_that_are_as_long_as_their_stream_pass(loaded: list[bytes]) -> None:
    for value in (torch.zeros(NUMBERS), zeros(), [], {"text": "x" * 100_000}):
        stream = dump_value("v", value, allow_pickle=False)
        load_value(stream, allow_pickle=False, what="v")
        check_zip(io.BytesIO(rezipped(stream)), len(rezipped(stream)))
    assert len(loaded) == 4
