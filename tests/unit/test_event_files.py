"""Files of events: a name for each launch, what is brought to the durable tiers, and what can be read back of it."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from sm_tiered import event_files, event_reading, layout
from sm_tiered.errors import ConfigError
from sm_tiered.event_files import Publisher
from sm_tiered.event_log import Events
from sm_tiered.event_reading import Piece, merge
from sm_tiered.events import DrainerStarted, Progress
from sm_tiered.layout import EventFile
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from tests.unit.cli_checkpoints import NAMESPACE, local_tier, memory_tier


def line(step: int, *, when: float | None = None, rank: int | None = 0, kind: str = "Progress") -> bytes:
    facts = {"time": 100.0 + step if when is None else when, "event": kind, "namespace": "run", "rank": rank}
    return json.dumps({**facts, "step": step}).encode() + b"\n"


def steps(pieces: Iterable[Piece]) -> list[object]:
    return [told.facts["step"] for told in merge(pieces).events]


def keys(tier: Tier) -> list[str]:
    return [entry.key for entry in tier.list("events/")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The namespace's directory on a memory tier."""
    root = tmp_path / "memory" / NAMESPACE
    (root / "events").mkdir(parents=True)
    return root


# ---- names


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("rank-00003-1790000000-0a1b2c3d.jsonl", EventFile(3, 1790000000, "0a1b2c3d")),
        ("rank-00003-1790000000-0a1b2c3d.jsonl.12", EventFile(3, 1790000000, "0a1b2c3d", 12)),
        ("drainer-1790000000-0a1b2c3d.jsonl", EventFile(None, 1790000000, "0a1b2c3d")),
        ("rank-00000.jsonl", EventFile(0, 0, "")),
        ("drainer.jsonl.1", EventFile(None, 0, "", 1)),
    ],
)
def test_a_name_tells_whose_it_is_and_is_made_of_that(name: str, file: EventFile) -> None:
    assert layout.parse_event_file_name(name) == file
    assert layout.event_file_name(file) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "rank-0.jsonl",
        "rank-00000-1-0a1b2c3d.json",
        "rank-00000-x-0a1b2c3d.jsonl",
        "rank-00000-1-0A1B2C3D.jsonl",
        "rank-00000-1-0a1b2c3d.jsonl.0",
        "rank-00000-1-0a1b2c3d.jsonl\n",
        "../rank-00000.jsonl",
        "rank-0000٣.jsonl",
    ],
)
def test_other_names_are_none_of_ours(name: str) -> None:
    assert layout.parse_event_file_name(name) is None


def test_names_of_one_rank_are_in_the_order_of_launches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for when in (9.0, 1_700_000_000.0, 1_800_000_000.0):
        monkeypatch.setattr(time, "time", lambda when=when: when)
        names.append(event_files.begin_launch(root, launch=f"{int(when):016x}", rank=0).name)
    assert names == sorted(names)
    assert len(set(names)) == 3


def test_drainers_of_one_memory_directory_share_a_file_and_those_of_another_have_their_own(
    root: Path, tmp_path: Path
) -> None:
    first = event_files.of_drainer(root)
    Events(namespace="run", rank=None, path=first).emit(DrainerStarted(pid=1))
    first.with_name(first.name + ".1").write_bytes(line(1, rank=None))
    (root / "events" / "drainer.jsonl").write_bytes(line(1, rank=None))
    assert event_files.of_drainer(root) == first
    assert event_files.of_drainer(tmp_path).name != first.name


def test_a_rank_leaves_a_bounded_number_of_launches_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_files, "LAUNCHES_KEPT", 3)
    monkeypatch.setattr(event_files, "OLD_BYTES_KEPT", 250)
    other = root / "events" / "rank-00001-0000000001-00000000.jsonl"
    old = root / "events" / "rank-00000.jsonl"
    for path in (other, old):
        path.write_bytes(b"x" * 100)
    for when in range(1, 8):
        monkeypatch.setattr(time, "time", lambda when=when: float(when))
        path = event_files.begin_launch(root, launch=f"{when:08x}", rank=0)
        path.write_bytes(b"x" * 10)
        path.with_name(path.name + ".1").write_bytes(b"x" * 10)
    ours = sorted({file.utc_secs for file in event_files._files(root / "events") if file.rank == 0 and file.nonce})
    assert ours == [4, 5, 6, 7], "three earlier ones and its own"
    (root / "events" / "rank-00000-0000000006-00000006.jsonl").write_bytes(b"x" * 240)
    event_files.begin_launch(root, launch="00000008", rank=0)
    ours = sorted({file.utc_secs for file in event_files._files(root / "events") if file.rank == 0 and file.nonce})
    assert ours == [7], "the one before is longer than what may be kept"
    assert other.exists()
    assert old.exists()


# ---- publishing


class Counted:
    """A tier that notes what is written."""

    def __init__(self, tier: Tier) -> None:
        self.tier, self.name, self.puts = tier, tier.name, list[str]()

    def list(self, prefix: str) -> object:
        return self.tier.list(prefix)

    def put(self, key: str, data: bytes) -> None:
        self.puts.append(key)
        self.tier.put(key, data)


def test_only_what_tells_the_story_and_has_grown_is_published(tmp_path: Path, root: Path) -> None:
    memory, durable = memory_tier(tmp_path / "memory"), Counted(local_tier(tmp_path / "local"))
    for name in ("rank-00000-1-000000aa.jsonl", "rank-00001-1-000000aa.jsonl", "rank-00003-2-000000bb.jsonl"):
        memory.put(f"events/{name}", line(1))
    for name in ("drainer-1-000000cc.jsonl", "rank-00000-1-000000aa.jsonl.1", "rank-00000.jsonl", "other.txt"):
        memory.put(f"events/{name}", line(2))
    publisher = Publisher(memory)
    publisher.publish(durable)  # type: ignore[arg-type]
    wanted = [
        "events/drainer-1-000000cc.jsonl",
        "events/rank-00000-1-000000aa.jsonl",
        "events/rank-00000-1-000000aa.jsonl.1",
        "events/rank-00003-2-000000bb.jsonl",
    ]
    assert durable.puts == wanted
    publisher.publish(durable)  # type: ignore[arg-type]
    Publisher(memory).publish(durable)  # type: ignore[arg-type]
    assert durable.puts == wanted, "nothing has grown, and another drainer sees what stands there"
    Events(namespace="run", rank=0, path=root / "events" / "rank-00000-1-000000aa.jsonl").emit(Progress(step=2))
    publisher.publish(durable)  # type: ignore[arg-type]
    assert durable.puts[4:] == ["events/rank-00000-1-000000aa.jsonl"]
    for key in wanted:
        assert durable.tier.get(key).data == memory.get(key).data


def test_a_new_node_adds_to_the_history_of_the_old_one(
    tmp_path: Path, make_s3_settings: Callable[..., S3Settings]
) -> None:
    s3 = open_tier(make_s3_settings(), NAMESPACE)
    for node, step in (("a", 1), ("b", 2)):
        root = tmp_path / node / NAMESPACE
        (root / "events").mkdir(parents=True)
        path = event_files.begin_launch(root, launch=f"{step:08x}00000000", rank=0)
        Events(namespace="run", rank=0, path=path).emit(Progress(step=step))
        Events(namespace="run", rank=None, path=event_files.of_drainer(root)).emit(DrainerStarted(pid=step))
        Publisher(memory_tier(tmp_path / node)).publish(s3)
    pieces, left_out = event_reading.of_tier(s3)
    reading = merge(pieces)
    assert left_out == ()
    assert [told.facts["step"] for told in reading.events if told.kind == "Progress"] == [1, 2]
    assert [told.facts["pid"] for told in reading.events if told.kind == "DrainerStarted"] == [1, 2]
    assert len({told.launch for told in reading.events if told.rank == 0}) == 2
    s3.close()


# ---- reading


def piece(data: bytes, name: str = "rank-00000-1-000000aa.jsonl") -> Piece:
    return Piece(where=name, file=layout.parse_event_file_name(name), data=data)


def test_what_stands_on_two_tiers_and_what_was_put_aside_since_counts_once() -> None:
    whole = [line(step) for step in range(10)]
    older = piece(b"".join(whole[:6]))
    put_aside = piece(b"".join(whole[:8]), "rank-00000-1-000000aa.jsonl.1")
    newest = piece(b"".join(whole[8:]))
    for order in ([older, put_aside, newest], [newest, put_aside, older]):
        assert steps(order) == list(range(10))


def test_two_launches_may_tell_the_same() -> None:
    assert steps([piece(line(1)), piece(line(1), "rank-00000-1-000000bb.jsonl")]) == [1, 1]


GARBAGE = [
    line(1)[:-9],
    b"\xff\xfe\x00",
    b"[]",
    b"null",
    b"1e999",
    b'{"time":NaN,"event":"Progress","namespace":"run","rank":0}',
    b'{"time":Infinity,"event":"Progress","namespace":"run","rank":0}',
    b'{"time":1e999,"event":"Progress","namespace":"run","rank":0}',
    b'{"time":-1,"event":"Progress","namespace":"run","rank":0}',
    b'{"time":true,"event":"Progress","namespace":"run","rank":0}',
    b'{"time":"1","event":"Progress","namespace":"run","rank":0}',
    b'{"time":1,"event":5,"namespace":"run","rank":0}',
    b'{"time":1,"event":"","namespace":"run","rank":0}',
    b'{"time":1,"event":"Progress","namespace":7,"rank":0}',
    b'{"time":1,"event":"Progress","namespace":"run","rank":-1}',
    b'{"time":1,"event":"Progress","namespace":"run","rank":true}',
    b'{"time":1,"event":"Progress","namespace":"run","rank":0,"step":' + b"9" * 5000 + b"}",
    b"[" * 60_000,
    b'{"x":"' + b"y" * 70_000 + b'"}',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_a_line_that_is_no_event_is_counted_and_costs_no_other(garbage: bytes) -> None:
    reading = merge([piece(line(1) + garbage + b"\n" + line(2))])
    assert [told.facts["step"] for told in reading.events] == [1, 2]
    assert reading.bad_lines == 1


def test_cut_anywhere_all_whole_lines_are_read() -> None:
    data = b"".join(line(step) for step in range(20))
    for end in random.Random(5).sample(range(len(data)), 40):
        reading = merge([piece(data[:end])])
        whole = data[:end].count(b"\n")
        # The line break alone may be what is missing.
        assert len(reading.events) - whole in (0, 1)
        assert [told.facts["step"] for told in reading.events] == list(range(len(reading.events)))


def test_what_is_too_long_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_reading, "MAX_PIECE_BYTES", 1000)
    tier = memory_tier(tmp_path)
    tier.put("events/rank-00000-1-000000aa.jsonl", line(1) * 100)
    tier.put("events/rank-00000-2-000000bb.jsonl", line(2))
    pieces, left_out = event_reading.of_tier(tier)
    assert steps(pieces) == [2]
    assert left_out == ("memory: events/rank-00000-1-000000aa.jsonl is longer than 1000 bytes",)


def test_of_very_much_the_newest_is_read_and_the_rest_said(tmp_path: Path) -> None:
    tier = memory_tier(tmp_path)
    for number in range(4):
        name = f"rank-00000-{number}-0000000{number}.jsonl"
        tier.put(f"events/{name}", line(number) * 5)
        os.utime(tmp_path / NAMESPACE / "events" / name, (number, number))
    room = 2 * len(line(1)) * 5 + 3
    pieces, left_out = event_reading.of_tier(tier, max_bytes=room)
    assert steps(pieces) == [2, 3]
    assert len(left_out) == 2
    assert all(f"{room} bytes of newer events are" in reason for reason in left_out)


def test_files_and_directories_can_be_named(tmp_path: Path) -> None:
    events = tmp_path / "events"
    events.mkdir()
    (events / "rank-00000-1-000000aa.jsonl").write_bytes(line(1))
    (events / "rank-00001-1-000000aa.jsonl").write_bytes(line(7, rank=1))
    (events / "rank-00000.jsonl").write_bytes(line(2))
    (tmp_path / "copied.jsonl").write_bytes(line(3))
    for directory in (events, tmp_path):
        pieces, _ = event_reading.of_paths([directory, tmp_path / "copied.jsonl"])
        assert steps(pieces) == [1, 2, 3]
    with pytest.raises(ConfigError, match="no files of events"):
        event_reading.of_paths([_empty(tmp_path)])
    with pytest.raises(ConfigError, match="No such file"):
        event_reading.of_paths([tmp_path / "missing.jsonl"])


def _empty(tmp_path: Path) -> Path:
    path = tmp_path / "empty"
    path.mkdir()
    return path
