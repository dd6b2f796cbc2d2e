"""`sm-tiered watch`: a real running job, and event files and queues as jobs leave them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered import layout
from sm_tiered.cli.app import app
from sm_tiered.cli.event_tail import EventTail
from sm_tiered.layout import EventFile
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    local_tier,
    memory_tier,
    write_checkpoint,
    write_recipe,
)
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
_JOB = """
import sys, time
from sm_tiered.group import SoloGroup
from sm_tiered.pulse import Pulse
from sm_tiered.recipe import Recipe
from sm_tiered.testing.plain import PlainEngine

engine, pulse = PlainEngine(Recipe.load(sys.argv[1]).settings(), SoloGroup()), Pulse(0)
for step in range(1, 100000):
    pulse.beat(step, engine.store.events)
    if step % 5 == 0:
        engine.save(step, bytes(1_000_000), ["memory", "local"] if step % 20 == 0 else ["memory"])
    time.sleep(0.04)
"""
"""A training without torch: real saves, a real drainer."""


def environment() -> dict[str, str]:
    """This process's, with the package on the path."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "SM_TIERED_DRAINER_IDLE_SECS": "1"}


def run(*arguments: object, columns: int = 80) -> Result:
    """Run ``watch`` in this process."""
    result = CliRunner().invoke(app, ["watch", *map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def seen(recipe: Path, *, status: int = 0) -> Any:
    """One look, as JSON, with the tiers by name."""
    result = run(recipe, "--json")
    assert (result.exit_code, result.stderr) == (status, "")
    look = json.loads(result.stdout)
    return look | {"tiers": {tier["name"]: tier for tier in look["tiers"]}}


# ---- a real job


@pytest.fixture(scope="module")
def job() -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A recipe with memory and local tiers, and a training that saves to both until it is killed."""
    with tempfile.TemporaryDirectory(prefix="sm_tiered-test-") as name:
        base = Path(name)
        recipe = write_recipe(base, memory=base / "memory", local=base / "local")
        with subprocess.Popen([sys.executable, "-c", _JOB, str(recipe)], env=environment()) as process:
            try:
                yield recipe, process
            finally:
                process.kill()
                process.wait()
        lock = base / "memory" / NAMESPACE / ".locks" / "drainer"
        from sm_tiered.locks import probe

        wait_until(lambda: probe(lock) is None, "the drainer lives on")


def test_a_running_job_is_seen_from_outside(job: tuple[Path, subprocess.Popen[bytes]]) -> None:
    recipe, process = job
    wait_until(lambda: seen(recipe)["tiers"]["local"]["bytes_per_sec"], "no commit was told of")
    look = seen(recipe)
    memory, local = look["tiers"]["memory"], look["tiers"]["local"]
    assert (look["namespace"], look["trainers"]) == (NAMESPACE, [process.pid])
    assert look["step"] >= memory["newest"] >= local["newest"] >= 20
    assert memory["newest"] % 5 == 0
    assert look["training"]["ended"] is None
    assert look["training"]["blocked_secs"] > 0
    assert memory["age_secs"] < 30
    assert local["behind_steps"] == look["step"] - local["newest"]
    assert local["bytes_per_sec"] > 0


@pytest.mark.parametrize("columns", [80, 120])
def test_the_text_fits_its_window(job: tuple[Path, subprocess.Popen[bytes]], columns: int) -> None:
    recipe, process = job
    wait_until(lambda: seen(recipe)["tiers"]["local"]["newest"], "nothing was committed")
    result = run(recipe, "--once", columns=columns)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert lines[0] == NAMESPACE
    assert lines[1].startswith(f"1 trainer alive here (pid {process.pid}), step ")
    assert [line.split()[0] for line in lines if line.startswith(("memory ", "local "))] == ["memory", "local"]


def _watch(recipe: Path, **options: Any) -> subprocess.Popen[Any]:
    command = [sys.executable, "-m", "sm_tiered.cli.app", "watch", str(recipe), "--interval", "0.2"]
    settings = {**environment(), "TERM": "xterm", "COLUMNS": "100"}
    return subprocess.Popen(command, env=settings, cwd="/", **options)


def test_elsewhere_it_is_a_line_each_time_until_ctrl_c(job: tuple[Path, subprocess.Popen[bytes]]) -> None:
    recipe, _ = job
    wait_until(lambda: seen(recipe)["tiers"]["memory"]["newest"], "nothing was saved")
    with _watch(recipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"")
    whole = b"".join(lines).decode()
    assert whole.count("1 trainer alive here") >= 2
    assert "memory: step " in whole
    assert "\x1b" not in whole


def test_a_pipe_that_closes_ends_it(job: tuple[Path, subprocess.Popen[bytes]]) -> None:
    with _watch(job[0], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 128 + signal.SIGPIPE
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_on_a_terminal_it_is_one_picture_that_changes(job: tuple[Path, subprocess.Popen[bytes]]) -> None:
    recipe, _ = job
    master, slave = pty.openpty()
    with _watch(recipe, stdout=slave, stderr=subprocess.PIPE) as process:
        os.close(slave)
        out = b""
        end = time.monotonic() + 60
        while out.count(b"trainer alive here") < 3 and time.monotonic() < end:
            out += os.read(master, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while piece := os.read(master, 65536):
                out += piece
        except OSError:
            pass  # the other side is closed
        assert process.stderr is not None
        err = process.stderr.read()
        assert (process.wait(30), err) == (130, b"")
    os.close(master)
    assert b"trainer alive here" in out
    assert b"\x1b[" in out
    assert out.rstrip().endswith(b"\x1b[?25h")  # the cursor is given back


def test_a_job_that_was_killed_is_told(job: tuple[Path, subprocess.Popen[bytes]]) -> None:
    recipe, process = job
    wait_until(lambda: seen(recipe)["step"], "nothing was saved")
    process.kill()
    process.wait()
    look = seen(recipe)
    assert (look["trainers"], look["training"]["ended"]) == ([], None)
    assert "no trainer is alive here, step" in run(recipe, "--once").stdout


# ---- events, line by line


@pytest.fixture
def tell(tmp_path: Path) -> Callable[..., Path]:
    """Append events, or bytes, to an event file of the memory tier."""

    def append(*lines: dict[str, Any] | bytes, nonce: str = "0" * 8, rank: int | None = 0, piece: int = 0) -> Path:
        file = EventFile(rank=rank, utc_secs=1_700_000_000, nonce=nonce, piece=piece)
        path = tmp_path / "memory" / NAMESPACE / layout.EVENTS / layout.event_file_name(file)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(tmp_path / "memory", 0o700)
        with path.open("ab") as opened:
            for line in lines:
                head = {"namespace": NAMESPACE, "rank": rank}
                opened.write(line if isinstance(line, bytes) else json.dumps(head | line).encode() + b"\n")
        return path

    return append


def progress(when: float, step: int) -> dict[str, Any]:
    """The event of that name."""
    return {"time": when, "event": "Progress", "step": step}


def test_only_new_whole_lines_are_taken_in(tell: Callable[..., Path], tmp_path: Path) -> None:
    tail = EventTail(memory_tier(tmp_path / "memory"))
    assert tail.look().step is None
    tell(progress(1000.0, 10), b"no json\n", b'{"time": 1001, "event": "Progress", "na')
    assert tail.look().step == 10
    tell(b'mespace": "run-1", "rank": 0, "step": 11}\n')
    assert tail.look().step == 11
    tell(progress(1010.0, 31))
    heard = tail.look()
    assert heard.steps_per_sec == pytest.approx(21 / 10)
    assert tail.look() is heard


def test_a_file_that_was_put_aside_is_read_on_and_a_new_launch_begins_anew(
    tell: Callable[..., Path], tmp_path: Path
) -> None:
    tail = EventTail(memory_tier(tmp_path / "memory"))
    path = tell(*(progress(1000.0 + n, n) for n in range(1, 20)))
    assert tail.look().step == 19
    aside = EventFile(rank=0, utc_secs=1_700_000_000, nonce="0" * 8, piece=1)
    path.rename(path.with_name(layout.event_file_name(aside)))
    tell(progress(1100.0, 25))
    assert tail.look().step == 25
    tell({"time": 1101.0, "event": "TrainingEnded", "step": 25, "how": "failed"})
    assert tail.look().ended == "failed"
    tell(progress(2000.0, 3), nonce="1" * 8)
    heard = tail.look()
    assert (heard.step, heard.ended, heard.steps_per_sec) == (3, None, None)


def test_a_large_file_is_read_from_its_end(tell: Callable[..., Path], tmp_path: Path) -> None:
    tell(progress(1.0, 7), b"x" * 3_000_000 + b"\n", progress(2.0, 8))
    tail = EventTail(memory_tier(tmp_path / "memory"))
    assert tail.look().step == 8


# ---- what is on its way


def test_what_is_queued_and_how_far_it_is_is_told(
    tell: Callable[..., Path], tmp_path: Path, s3_settings: S3Settings
) -> None:
    memory = memory_tier(tmp_path / "memory")
    now = time.time()
    tell(
        progress(now - 10, 100),
        progress(now, 150),
        {"time": now, "event": "DurableSkipped", "step": 110, "tier": "s3", "reason": "the drain is busy"},
        {"time": now - 1, "event": "SaveSkipped", "step": 130, "reason": "no room \x1b[31m"},
    )
    tell({"time": now - 60, "event": "Committed", "step": 60, "tier": "s3", "secs": 2.0, "bytes": 4000}, rank=None)
    for step in (100, 120):
        write_checkpoint(memory, checkpoint(step), durable=False, size=4096)
        for rank in (0, 1):
            entry = {
                "checkpoint": layout.checkpoint_dir(checkpoint(step)),
                **{"rank": rank, "tier": "s3", "world": 2, "recipe": "0" * 32, "finisher": "", "deadline_at": now + 99},
            }
            kind = "commit" if (step, rank) == (100, 0) else "promote"
            name = f"{kind}-{layout.checkpoint_dir(checkpoint(step))}-{rank:05d}-s3.json"
            memory.put(f"{layout.QUEUE}/{name}", json.dumps(entry).encode())
    sending = {"checkpoint": layout.checkpoint_dir(checkpoint(100)), "rank": 1, "tier": "s3", "bytes": 1024}
    memory.put(f"{layout.QUEUE}/sending-{sending['tier']}.json", json.dumps(sending).encode())
    tier = open_tier(s3_settings, NAMESPACE)
    write_checkpoint(tier, checkpoint(40), durable=True, saved_at=now - 100)
    tier.close()
    more = (
        f"  s3: {{kind: s3, uri: 's3://{s3_settings.bucket}/{s3_settings.prefix}', region: us-east-1, "
        f"force_path_style: true, endpoint_url: '{s3_settings.endpoint_url}'}}\n"
    )
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local", more=more)
    look = seen(recipe)
    s3 = look["tiers"]["s3"]
    assert (look["step"], look["training"]["steps_per_sec"]) == (150, pytest.approx(5.0))
    # The event is newer than what the listing showed, and the commit of another node may be newer than both.
    assert (s3["newest"], s3["behind_steps"], s3["skipped"]) == (60, 90, 1)
    assert s3["on_its_way"] == [
        {"step": 100, "bytes": 4096 + 1024, "of_bytes": 8192},
        {"step": 120, "bytes": 0, "of_bytes": 8192},
    ]
    assert s3["bytes_per_sec"] == 2000.0
    assert (look["tiers"]["memory"]["newest"], look["tiers"]["local"]["newest"]) == (120, None)
    shown = run(recipe, "--once", columns=120)
    assert "step 100 on its way 62 % of 8.0 KiB, 1 more queued, 2.0 KiB/s, 1 skipped" in shown.stdout
    assert "no drainer is alive here" in shown.stdout
    assert r"SaveSkipped of step 130: no room \x1b[31m" in shown.stdout
    assert "\x1b" not in shown.stdout


def test_a_tier_that_does_not_answer_is_told_and_exit_1(tmp_path: Path) -> None:
    write_checkpoint(local_tier(tmp_path / "elsewhere"), checkpoint(20), durable=True)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / NAMESPACE).symlink_to(tmp_path / "elsewhere" / NAMESPACE)
    look = seen(write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local"), status=1)
    assert look["tiers"]["local"]["error"]["kind"] == "TierRefusedError"
    assert look["tiers"]["memory"]["error"] is None
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "local", "recipe.yaml"]


def test_an_interval_is_a_number_above_nothing(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    for value in ("0", "-1", "nan", "0.01"):
        result = run(recipe, "--interval", value)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "--interval" in result.stderr
