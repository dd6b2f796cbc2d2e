"""Spot instances: one rank is told, all stop at one step, which is in memory first and in S3 before they are gone."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.recipes.launching import RECIPES, Launch, launched, lose_memory, s3_steps, torchrun
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

NOTICE = '{"action": "terminate", "time": "2026-11-27T10:02:00Z"}'


class Metadata(ThreadingHTTPServer):
    """An instance's metadata, version 2: no answer without a session of its own."""

    daemon_threads = True
    notice: str | None = None
    answers = True
    sessions = looks = 0

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    @property
    def metadata(self) -> Metadata:
        return cast("Metadata", self.server)

    def do_PUT(self) -> None:
        self.metadata.sessions += 1
        asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._send(200 if asked and self.metadata.answers else 403, "session-1")

    def do_GET(self) -> None:
        self.metadata.looks += 1
        if self.headers["X-aws-ec2-metadata-token"] != "session-1":
            self._send(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or self.metadata.notice is None:
            self._send(404, "")
        else:
            self._send(200, self.metadata.notice)

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    """A server of it on loopback, which AWS's own variable names."""
    with Metadata() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        yield server
        server.shutdown()
        thread.join(10)


@contextmanager
def told_to_stop(run: Launch) -> Iterator[None]:
    """What happens inside stops *run*: every rank exits with 143, after the same step."""
    yield
    assert run.end() == [143, 143], run.text


def stopped_after(run: Launch) -> int:
    """The step that *run* says it stopped after, in its last line."""
    last = r"^told to stop after step (\d+); waiting for the durable tiers\nstopped after step \1\n\Z"
    found = re.search(last, run.text, re.MULTILINE)
    assert found is not None, run.text
    return int(found[1])


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(240)
def test_a_sigterm_or_a_notice_to_one_rank_stops_all_after_one_step_that_s3_has(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client, metadata: Metadata
) -> None:
    memory = memory_dir / "tier"
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory), "TRAINING_JOB_NAME": "lm-4"}
    options = ("--steps=1000000", "--spot")
    with launched(tmp_path, "spot.yaml", *options, env=env) as first, told_to_stop(first):
        first.reach(20)
        os.kill(first.job.pid(1), signal.SIGTERM)
    step = stopped_after(first)
    assert s3_steps(s3_client, bucket["CHECKPOINTS"])[-1] == step, "it was to be there before they ended"
    happened = list(events(memory / "lm-4", step))
    assert happened.index("SaveAcknowledged") < happened.index("Committed")
    assert len(list(memory.glob(f"lm-4/step_{step:010d}-*/record-*.json"))) == 2

    lose_memory(memory, "lm-4")
    with launched(tmp_path, "spot.yaml", *options, env=env) as second, told_to_stop(second):
        second.reach(step + 10)
        metadata.notice = NOTICE
    assert second.restored() == (step, "s3")
    assert f"spot interruption notice: {NOTICE}" in second.text
    assert s3_steps(s3_client, bucket["CHECKPOINTS"])[-1] == stopped_after(second) > step


def events(directory: Path, step: int) -> Iterator[str]:
    """The names of what happened to *step*, in order."""
    lines = [json.loads(line) for path in directory.glob("events/*.jsonl") for line in path.read_text().splitlines()]
    for event in sorted(lines, key=lambda event: event["time"]):
        if event.get("step") == step:
            yield event["event"]


@pytest.mark.long
@pytest.mark.timeout(240)
def test_torchrun_hands_a_sigterm_on_and_waits_as_long_as_it_is_told(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory_dir / "tier")}
    told = ("--shutdown-timeout=110",)
    with torchrun(tmp_path, "spot.yaml", "--steps=1000000", env=env, launcher=told) as running:
        assert running.stdout is not None
        while not running.stdout.readline().startswith("step 20: "):
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        printed, _ = running.communicate(timeout=110)
    assert running.returncode == 1
    stopped = re.search(r"^stopped after step (\d+)\n\Z", printed, re.MULTILINE)
    assert stopped is not None, printed
    assert s3_steps(s3_client, bucket["CHECKPOINTS"])[-1] == int(stopped[1])


@pytest.mark.xdist_group("ranks")
@pytest.mark.timeout(240)
def test_a_drain_that_takes_too_long_is_said_and_does_not_keep_the_script(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    text = (RECIPES / "spot.yaml").read_text()
    assert text.count("drain_timeout_secs: 100") == 1
    recipe = tmp_path / "hurried.yaml"
    recipe.write_text(text.replace("drain_timeout_secs: 100", "drain_timeout_secs: 0.01"))
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory_dir / "tier")}
    with launched(tmp_path, str(recipe), "--steps=1000000", env=env) as run:
        run.reach(10)
        os.kill(run.job.pid(0), signal.SIGTERM)
        assert run.end() == [1, 1], run.text
    assert re.search(r"^rank 0: .*not complete after 0.0 s .*It goes on in the background", run.text, re.MULTILINE)
    assert "Traceback" not in run.text
    # The drainer outlives it.
    wait_until(lambda: s3_steps(s3_client, bucket["CHECKPOINTS"]), "the drainer did not go on", secs=60)


@pytest.fixture
def spot_notice(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of that name beside the scripts."""
    monkeypatch.syspath_prepend(str(RECIPES))
    import spot_notice

    yield spot_notice
    del sys.modules["spot_notice"]


def test_the_notice_is_told_once_and_only_when_it_is_there(spot_notice: Any, metadata: Metadata) -> None:
    assert spot_notice.noticed() is None
    told: list[str] = []
    thread = spot_notice.watch(lambda: told.append("stop"), every_secs=0.01)
    looks = metadata.looks
    wait_until(lambda: metadata.looks > looks + 2, "nobody looks")
    assert told == []
    metadata.notice = NOTICE
    assert spot_notice.noticed() == NOTICE
    thread.join(10)
    assert not thread.is_alive()
    assert told == ["stop"]


def test_metadata_that_falls_silent_for_a_while_is_asked_again(spot_notice: Any, metadata: Metadata) -> None:
    metadata.answers = False
    told: list[str] = []
    thread = spot_notice.watch(lambda: told.append("stop"), every_secs=0.1)
    wait_until(lambda: metadata.sessions > 2, "it gave up at once")
    metadata.answers, metadata.notice = True, NOTICE
    thread.join(10)
    assert told == ["stop"]


def test_a_machine_without_metadata_trains_all_the_same(
    spot_notice: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="refused"):
        spot_notice.noticed()
    told: list[str] = []
    thread = spot_notice.watch(lambda: told.append("stop"), every_secs=0.001)
    thread.join(10)
    assert not thread.is_alive()
    assert told == []
    assert "spot interruption notices are not heeded" in caplog.text
