"""Events: what is told, to whom, and that telling never hurts."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from sm_tiered import event_log
from sm_tiered import events as module
from sm_tiered.event_log import Events
from sm_tiered.events import (
    CandidateRefused,
    Committed,
    DrainerStarted,
    Event,
    NothingSaved,
    Pruned,
    SaveFailed,
    SaveSkipped,
    SaveStaged,
)

ALL = [getattr(module, name) for name in module.__all__ if name not in ("Event", "plain")]
SAMPLES = {"int": 7, "float": 0.25, "str": "x", "bool": True, "tuple[str, ...]": ("a", "b"), "tuple[int, ...]": (1, 2)}


def sample(kind: type[Event]) -> Event:
    return kind(
        **{
            entry.name: SAMPLES[str(entry.type).split(" |")[0].replace("BaseException", "str")]
            for entry in dataclasses.fields(kind)
        }
    )


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank-0.jsonl"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_event_has_one_line_for_people_and_one_for_machines(
    kind: type[Event], path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event = sample(kind)
    with caplog.at_level(logging.DEBUG, "sm_tiered"):
        Events(namespace="run", rank=0, path=path).emit(event)
    [record] = caplog.records
    assert (record.namespace, record.rank, record.event) == ("run", 0, kind.__name__)  # type: ignore[attr-defined]
    assert record.step == getattr(event, "step", None)  # type: ignore[attr-defined]
    assert record.levelno == kind.level
    text = record.getMessage()
    assert text
    assert "{" not in text
    [found] = lines(path)
    assert list(found)[:4] == ["time", "event", "namespace", "rank"]
    assert set(found) == {"time", "event", "namespace", "rank", *(entry.name for entry in dataclasses.fields(kind))}


def test_what_all_ranks_tell_alike_is_logged_loudly_by_rank_0_alone_and_written_by_each(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "sm_tiered"):
        Events(namespace="run", rank=3, path=path).emit(sample(SaveSkipped))
        Events(namespace="run", rank=3, path=path).emit(sample(SaveFailed))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG, logging.ERROR]
    assert len(lines(path)) == 2


def test_the_json_holds_the_facts(path: Path) -> None:
    told = Events(namespace="run", rank=None, path=path)
    told.emit(Committed(step=20, tier="s3", secs=1.5, bytes=1024))
    told.emit(Pruned(tier="s3", steps=(1, 2)))
    committed, pruned = lines(path)
    assert {
        "event": "Committed",
        "rank": None,
        "step": 20,
        "tier": "s3",
        "secs": 1.5,
        "bytes": 1024,
    }.items() <= committed.items()
    assert pruned["steps"] == [1, 2]


def test_without_a_file_the_logger_alone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sm_tiered"):
        Events(namespace="run", rank=0).emit(SaveSkipped(step=5, reason="memory is full"))
    assert caplog.messages == ["step 5: save skipped: memory is full"]


def test_text_from_outside_forges_no_line_and_steers_no_terminal(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evil = "bad\nERROR forged\x1b[2J\u202e\u2028\udcff{step}%s"
    with caplog.at_level(logging.INFO, "sm_tiered"):
        Events(namespace="run", rank=0, path=path).emit(CandidateRefused(step=1, attempt=evil, reason=evil))
    [message] = caplog.messages
    assert message.isprintable()
    assert "{step}%s" in message
    [found] = lines(path)
    assert str(found["reason"]).isprintable()
    assert path.read_bytes().count(b"\n") == 1


def test_errors_are_told_with_their_type_and_cut_at_500_characters(path: Path) -> None:
    Events(namespace="run", rank=0, path=path).emit(SaveFailed(step=1, tier="s3", error=ValueError("x" * 9000)))
    [found] = lines(path)
    assert str(found["error"]).startswith("ValueError: xxx")
    assert len(str(found["error"])) == 501


def test_numbers_that_json_lacks_do_not_lose_the_event(path: Path) -> None:
    told = Events(namespace="run", rank=0, path=path)
    told.emit(Committed(step=1, tier="disk", bytes=0, secs=float("nan")))
    told.emit(SaveStaged(step=1, tiers=("m",), blocked_secs=None, bytes=1))  # type: ignore[arg-type]
    assert [found["event"] for found in lines(path)] == ["Committed", "SaveStaged"]


def test_the_file_is_for_its_owner_only_whatever_the_umask(path: Path) -> None:
    old = os.umask(0)
    try:
        Events(namespace="run", rank=0, path=path).emit(NothingSaved())
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    Events(namespace="run", rank=0, path=path).emit(NothingSaved())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_grows_too_long_is_put_aside_and_the_newest_pieces_are_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(event_log, "PIECES_KEPT", 3)
    told = Events(namespace="run", rank=0, path=path)
    path.with_name(path.name + ".old").write_text("not ours")
    for pid in range(100):
        told.emit(DrainerStarted(pid=pid))
    path.with_name(path.name + ".old").unlink()
    pieces = sorted(path.parent.iterdir(), key=lambda piece: int(piece.suffix[1:]) if piece != path else 10**6)
    assert len(pieces) == 4
    last = int(pieces[2].suffix[1:])
    assert [piece.name for piece in pieces] == [f"{path.name}.{n}" for n in (last - 2, last - 1, last)] + [path.name]
    pids = [found["pid"] for piece in pieces for found in lines(piece)]
    assert len(pids) > 20
    assert pids == list(range(100 - len(pids), 100))
    assert max(piece.stat().st_size for piece in pieces) <= 1000


def test_a_process_that_stopped_while_rotating_blocks_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_FILE_BYTES", 100)
    told = Events(namespace="run", rank=0, path=path)
    told.emit(DrainerStarted(pid=1))
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        told.emit(DrainerStarted(pid=2))
    told.emit(DrainerStarted(pid=3))
    assert [found["pid"] for found in lines(path.with_name(path.name + ".1"))] == [1, 2]
    assert [found["pid"] for found in lines(path)] == [3]


def emit_many(path: Path, first: int) -> None:
    told = Events(namespace="run", rank=0, path=path)
    for pid in range(first, first + 200):
        told.emit(DrainerStarted(pid=pid))


def test_processes_that_share_a_file_never_mix_lines(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=emit_many, args=(path, first)) for first in (0, 200, 400)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert sorted(int(str(found["pid"])) for found in lines(path)) == list(range(600))


@pytest.mark.parametrize("kind", ["directory", "no parent", "symlink", "pipe", "device"])
def test_a_file_that_can_not_be_written_is_given_up_once_and_training_goes_on(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "below" / "events.jsonl"
    target = tmp_path / "target"
    if kind != "no parent":
        path.parent.mkdir()
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        target.write_text("")
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        if not os.path.exists("/dev/full"):
            pytest.skip("no /dev/full here")
        path = Path("/dev/full")
    told = Events(namespace="run", rank=0, path=path)
    with caplog.at_level(logging.INFO, "sm_tiered"):
        for _ in range(3):
            told.emit(NothingSaved())
    given_up = [message for message in caplog.messages if "no longer written" in message]
    assert len(given_up) == 1
    assert len(caplog.messages) == 4
    if kind == "symlink":
        assert target.read_text() == ""


def test_a_line_that_is_written_by_half_is_a_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_log.os, "write", lambda _descriptor, line: len(line) - 1)
    Events(namespace="run", rank=0, path=path).emit(NothingSaved())
    assert any("no room for a whole line" in message for message in caplog.messages)


def test_after_close_the_file_stays_as_it_is(path: Path) -> None:
    told = Events(namespace="run", rank=0, path=path)
    told.emit(NothingSaved())
    told.close()
    told.close()
    told.emit(NothingSaved())
    assert len(lines(path)) == 1
