"""Log lines: their form, whose they are, and that handlers come and go as they were asked for."""

from __future__ import annotations

import logging
import logging.config
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import logs
from sm_tiered.errors import ConfigError
from sm_tiered.event_log import Events
from sm_tiered.events import CandidateRefused, DrainerStarted, NothingSaved, Restored, SaveAcknowledged, SaveFailed
from sm_tiered.log_files import LogFile, log_path
from sm_tiered.log_lines import LineFormatter
from sm_tiered.logs import install, to_console, to_file
from sm_tiered.settings import LogSettings

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"\[(?P<when>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z)\] \[(?P<namespace>[\w-]+)\] \[(?P<logger>[\w.]+)\] "
    r"\[(?P<level>[A-Z]+)\] \[(?P<file>[\w.]+):(?P<line>\d+)\] \[Rank (?P<rank>\d+|-)\] "
    r"(?:Step (?P<step>\d+): )?(?P<message>.*)",
    re.ASCII,
)
OURS = logging.getLogger("sm_tiered")
INTEGRATION = logging.getLogger("sm_tiered_accelerate.copies")


def parsed(text: str) -> list[dict[str, Any]]:
    found = [LINE.fullmatch(line) for line in text.splitlines()]
    assert all(found), text
    return [match.groupdict() for match in found if match]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Every test leaves the loggers as it found them."""
    names = ("", *logs._LOGGERS)

    def look() -> list[Any]:
        found = [logging.getLogger(name) for name in names]
        return [(logger.level, [*logger.handlers], logger.propagate, [*logger.filters]) for logger in found]

    before = look()
    yield
    assert look() == before


def record(message: str = "hello", *args: object, level: int = logging.INFO, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("some.logger", level, "/a/b/where.py", 12, message, args, None)
    vars(made).update({"created": 1_700_000_000.9996, **more})
    return made


# ---- the form


def test_a_line_has_the_form_that_is_promised() -> None:
    line = LineFormatter().format(record("step 240: staged %d bytes", 7, namespace="run", rank=3, step=240))
    assert line == (
        "[2023-11-14T22:13:20.999Z] [run] [some.logger] [INFO] [where.py:12] [Rank 3] Step 240: staged 7 bytes"
    )


def test_a_record_of_another_logger_gets_what_is_known_of_the_process() -> None:
    assert LineFormatter().format(record()).endswith(" [-] [some.logger] [INFO] [where.py:12] [Rank -] hello")
    known = LineFormatter(namespace="run", rank=0)
    assert known.format(record()).endswith(" [run] [some.logger] [INFO] [where.py:12] [Rank 0] hello")
    assert "[Rank -]" in known.format(record(rank=None))


def test_attributes_of_other_kinds_are_not_taken_for_ours() -> None:
    line = LineFormatter().format(record(namespace={"a": 1}, rank="first", step="last"))
    assert line.endswith(" [-] [some.logger] [INFO] [where.py:12] [Rank -] hello")


def test_what_comes_from_outside_forges_no_line_and_steers_no_terminal() -> None:
    evil = "a\nb\r\x1b[2J\u2028\u202e\x00\udcff"
    line = LineFormatter().format(record("%s", evil, namespace=evil, step=1))
    assert line.isprintable()
    assert r"Step 1: a\nb\r\x1b[2J\u2028\u202e\x00\udcff" in line


def test_a_traceback_stands_below_indented_and_can_not_forge_a_line() -> None:
    try:
        raise ValueError("first\n[2023] [run] forged\x1b[2J")
    except ValueError:
        made = record()
        made.exc_info = sys.exc_info()
    made.stack_info = "Stack:\n  here"
    first, *below = LineFormatter().format(made).splitlines()
    assert LINE.fullmatch(first)
    assert below[0] == "    Traceback (most recent call last):"
    assert below[-1] == "      here"
    assert all(line.startswith("    ") and line.isprintable() for line in below)


def test_a_logging_configuration_can_name_the_formatter() -> None:
    formatter = {"ours": {"()": "sm_tiered.log_lines.LineFormatter", "namespace": "run", "rank": 1}}
    made = logging.config.DictConfigurator({"version": 1, "formatters": formatter})
    assert "[run]" in made.configure_formatter(formatter["ours"]).format(record())


# ---- the console


def test_the_console_gets_the_events_with_the_place_that_told_them(capsys: pytest.CaptureFixture[str]) -> None:
    undo = to_console("INFO")
    told = Events(namespace="run", rank=0)
    told.emit(SaveAcknowledged(step=7, secs=0.5))
    told.emit(Restored(step=7, attempt="a", tier="s3", secs=1.0, bytes=1))
    told.emit(NothingSaved())
    Events(namespace="run", rank=None).emit(DrainerStarted(pid=5))
    undo()
    told.emit(NothingSaved())
    err = capsys.readouterr().err
    first, second, third, drainer = parsed(err)
    assert first | {"when": "", "line": ""} == {
        "when": "",
        "namespace": "run",
        "logger": "sm_tiered",
        "level": "INFO",
        "file": Path(__file__).name,
        "line": "",
        "rank": "0",
        "step": "7",
        "message": "acknowledged in memory after 0.500 s",
    }
    lines = Path(__file__).read_text().splitlines()
    assert "told.emit(SaveAcknowledged(" in lines[int(first["line"]) - 1]
    assert second["message"].startswith("restored step 7 of a")
    assert (third["step"], third["rank"]) == (None, "0")
    assert drainer["rank"] == "-"


def test_what_is_asked_for_twice_is_there_once_until_both_have_undone_it(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = to_console("WARNING"), to_console("DEBUG")
    OURS.debug("one")
    second()
    second()
    OURS.info("two")
    OURS.warning("three")
    first()
    OURS.error("four")
    assert [found["message"] for found in parsed(capsys.readouterr().err)] == ["one", "three"]


def test_whose_a_record_is_that_does_not_say_is_known_while_there_is_one_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = to_console(namespace="one", rank=1)
    OURS.info("x")
    second = to_console(namespace="two", rank=2)
    OURS.info("x")
    first()
    OURS.info("x")
    second()
    found = parsed(capsys.readouterr().err)
    assert [(entry["namespace"], entry["rank"]) for entry in found] == [("one", "1"), ("-", "-"), ("two", "2")]


def test_integrations_that_log_under_their_own_names_are_heard(capsys: pytest.CaptureFixture[str]) -> None:
    undo = to_console()
    INTEGRATION.info("copied")
    logging.getLogger("another").warning("not ours")
    undo()
    assert [entry["logger"] for entry in parsed(capsys.readouterr().err)] == ["sm_tiered_accelerate.copies"]


@pytest.mark.parametrize(("before", "root", "during"), [(0, 30, 20), (10, 30, 10), (30, 30, 20), (0, 10, 0)])
def test_the_level_of_the_logger_is_as_before_and_others_hear_no_less(before: int, root: int, during: int) -> None:
    top = logging.getLogger()
    levels = OURS.level, top.level
    OURS.setLevel(before)
    top.setLevel(root)
    try:
        undo = to_console("INFO")
        assert OURS.level == during
        undo()
        assert OURS.level == before
    finally:
        OURS.setLevel(levels[0])
        top.setLevel(levels[1])


def test_a_level_that_somebody_else_set_meanwhile_stays() -> None:
    undo = to_console("INFO")
    OURS.setLevel(logging.ERROR)
    undo()
    assert OURS.level == logging.ERROR
    OURS.setLevel(logging.NOTSET)


def test_handlers_of_the_root_logger_hear_what_they_heard(caplog: pytest.LogCaptureFixture) -> None:
    undo = to_console("INFO")
    Events(namespace="run", rank=0).emit(NothingSaved())
    undo()
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("level", ["LOUD", "info", "", 20])
def test_a_level_that_there_is_not_is_refused(level: Any, tmp_path: Path) -> None:
    for ask in (lambda: to_console(level), lambda: to_file(tmp_path, namespace="run", rank=0, level=level)):
        with pytest.raises(ConfigError, match="no level of a log") as told:
            ask()
        assert "DEBUG, INFO, WARNING, ERROR" in str(told.value)
    assert list(tmp_path.iterdir()) == []


# ---- files


def test_each_rank_and_the_drainer_have_a_file_that_is_theirs_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        undos = [to_file(tmp_path / "logs", namespace="run", rank=rank) for rank in (0, 1, None)]
    finally:
        os.umask(umask)
    for rank in (0, 1, None):
        Events(namespace="run", rank=rank).emit(SaveFailed(step=5, tier="s3", error=f"of {rank}"))
    Events(namespace="other", rank=0).emit(SaveFailed(step=5, tier="s3", error="elsewhere"))
    OURS.info("of nobody")
    for undo in undos:
        undo()
    folder = tmp_path / "logs" / "run"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for rank in (0, 1, None):
        path = log_path(tmp_path / "logs", namespace="run", rank=rank)
        assert path.parent == folder
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        failed, other = parsed(path.read_text())
        assert failed["message"] == f"save to s3 failed: of {rank}"
        assert other["message"] == "of nobody"
        assert {failed["rank"], other["rank"]} == {str(rank) if rank is not None else "-"}
        assert {failed["namespace"], other["namespace"]} == {"run"}
    assert len(list(folder.iterdir())) == 3


def test_a_file_is_opened_once_and_appended_to_by_the_next_launch(tmp_path: Path) -> None:
    for _ in range(2):
        undos = [to_file(tmp_path, namespace="run", rank=0) for _ in range(2)]
        [handler] = [handler for handler in OURS.handlers if isinstance(handler, LogFile)]
        OURS.info("once")
        file: Any = handler.stream
        for undo in undos:
            assert not file.closed
            undo()
        assert file.closed
        OURS.info("never")
    assert len(parsed(log_path(tmp_path, namespace="run", rank=0).read_text())) == 2


def test_a_file_rotates_and_some_old_ones_stay(tmp_path: Path) -> None:
    undo = to_file(tmp_path, namespace="run", rank=0, max_bytes=1000, kept=2)
    for pid in range(100):
        Events(namespace="run", rank=0).emit(DrainerStarted(pid=pid))
    undo()
    path = log_path(tmp_path, namespace="run", rank=0)
    files = [path.with_name(f"{path.name}.2"), path.with_name(f"{path.name}.1"), path]
    assert sorted(tmp_path.joinpath("run").iterdir()) == sorted(files)
    assert all(file.stat().st_size <= 1000 and stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    pids = [int(entry["message"].rpartition(" ")[2]) for file in files for entry in parsed(file.read_text())]
    assert pids == list(range(100 - len(pids), 100))


def test_a_log_that_can_not_be_put_aside_grows_on_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = log_path(tmp_path, namespace="run", rank=0)
    path.with_name(f"{path.name}.1").mkdir(parents=True)
    undo = to_file(tmp_path, namespace="run", rank=0, max_bytes=300, kept=1)
    for number in range(10):
        OURS.info("line %d", number)
    undo()
    told = [entry["message"] for entry in parsed(path.read_text())]
    assert [text for text in told if text.startswith("line")] == [f"line {number}" for number in range(10)]
    assert len([text for text in caplog.messages if "can't be put aside" in text]) == 1


def test_a_forked_child_never_rotates(tmp_path: Path) -> None:
    undo = to_file(tmp_path, namespace="run", rank=0, max_bytes=200)
    OURS.info("of the parent: %s", "x" * 100)
    if (pid := os.fork()) == 0:
        OURS.info("of the child: %s", "x" * 100)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    undo()
    [path] = (tmp_path / "run").iterdir()
    assert [entry["message"].split(":")[0] for entry in parsed(path.read_text())] == ["of the parent", "of the child"]


def test_a_full_disk_is_said_once_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    undo = to_file(tmp_path, namespace="run", rank=0)
    [handler] = [handler for handler in OURS.handlers if isinstance(handler, LogFile)]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(handler, "flush", full)
        for _ in range(3):
            OURS.info("hello")
    OURS.info("room again")
    undo()
    told = [text for text in caplog.messages if "lacks lines" in text]
    assert len(told) == 1
    assert "No space left" in told[0]
    assert parsed(log_path(tmp_path, namespace="run", rank=0).read_text())[-1]["message"] == "room again"


@pytest.mark.parametrize("kind", ["file as directory", "symlink", "pipe", "link as directory", "no permission"])
def test_a_place_that_is_not_ours_is_refused_and_a_job_goes_on_without(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = log_path(tmp_path / "logs", namespace="run", rank=0)
    target = tmp_path / "target"
    if kind == "file as directory":
        path.parent.parent.write_text("")
    elif kind == "link as directory":
        target.mkdir()
        path.parent.parent.mkdir()
        path.parent.symlink_to(target)
    elif kind == "no permission":
        path = log_path("/proc/nowhere", namespace="run", rank=0)
    else:
        path.parent.mkdir(parents=True)
        if kind == "symlink":
            path.symlink_to(target)
        else:
            os.mkfifo(path)
    directory = path.parent.parent
    with pytest.raises(ConfigError, match=r"rank-00000\.log"):
        to_file(directory, namespace="run", rank=0)
    install(LogSettings(path=str(directory)), namespace="run", rank=0)()
    [warned] = caplog.records
    assert warned.levelno == logging.WARNING
    assert not target.exists() or list(target.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"namespace": "../up"}, {"max_bytes": 0}, {"kept": 0}])
def test_what_can_not_be_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        to_file(tmp_path / "logs", **{"namespace": "run", "rank": 0, **wrong})
    assert not (tmp_path / "logs").exists()


def test_a_file_of_another_mode_is_made_ours_alone(tmp_path: Path) -> None:
    path = log_path(tmp_path, namespace="run", rank=0)
    path.parent.mkdir(mode=0o755)
    path.write_text("")
    path.chmod(0o644)
    to_file(tmp_path, namespace="run", rank=0)()
    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


# ---- what a recipe asks for


def test_a_recipe_asks_for_console_file_both_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(None, namespace="run", rank=0)()
    install(LogSettings(), namespace="run", rank=0)()
    assert not OURS.handlers
    undo = install(LogSettings(console=True, path=str(tmp_path), level="WARNING"), namespace="run", rank=0)
    OURS.info("quiet")
    OURS.warning("loud")
    undo()
    told = [capsys.readouterr().err, log_path(tmp_path, namespace="run", rank=0).read_text()]
    assert [[entry["message"] for entry in parsed(text)] for text in told] == [["loud"], ["loud"]]
    undo = install(LogSettings(console=True, path=str(tmp_path)), namespace="run", rank=None)
    OURS.info("the drainer's")
    undo()
    assert capsys.readouterr().err == ""


def test_threads_that_ask_and_undo_leave_nothing_behind(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        for _ in range(30):
            undos = [to_console("ERROR"), to_file(tmp_path, namespace="run", rank=rank % 2, level="ERROR")]
            OURS.debug("x")
            for undo in undos:
                undo()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not OURS.handlers


def test_importing_configures_nothing() -> None:
    code = (
        "import logging, sm_tiered.logs, sm_tiered.event_log\n"
        "for name in ('', 'sm_tiered'):\n"
        "    logger = logging.getLogger(name)\n"
        "    print(logger.handlers, logger.level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[] 30", "[] 0"]
    assert done.stderr == ""


def test_a_refused_candidate_with_an_evil_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    undo = to_console()
    Events(namespace="run", rank=0).emit(CandidateRefused(step=1, attempt="a\nb", reason="\x1b[31mred"))
    undo()
    [found] = parsed(capsys.readouterr().err)
    assert found["message"] == r"step 1 of a\nb is not restored: \x1b[31mred"
