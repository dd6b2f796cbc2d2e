"""How a compat script ends with a save to S3 under way: it waits when it is done, and not when it has failed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy
from tests.integrations.test_compat import on_s3, slow_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
import torch
import torch.distributed.checkpoint as dcp
from sm_tiered_dcp.compat import SageMakerCheckpointConfig, SageMakerTieredStorageWriter, logs

logs.DIRECTORY = sys.argv[1]
config = SageMakerCheckpointConfig(
    namespace="run-1", world_size=1, s3_tier_base_path=sys.argv[2], save_to_s3=True
)
future = dcp.async_save({"w": torch.ones(50, 3)}, storage_writer=SageMakerTieredStorageWriter(config, step=1))
assert future.exception() is None
print("saved", flush=True)
"""
ENDS = {
    "raises": "raise RuntimeError('the training failed')",
    "raises under a hook": "sys.excepthook = lambda *_: None\nraise RuntimeError('the training failed')",
    "raises while it handles": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    raise SystemError('worse')",
}


class Running:
    """One script that has saved step 1, of which S3 has nothing yet."""

    def __init__(self, child: subprocess.Popen[str], gate: threading.Event) -> None:
        self.child, self.gate = child, gate
        self._lines: list[str] = []
        assert child.stdout is not None
        self._reader = threading.Thread(target=lambda: self._lines.extend(child.stdout or ()), daemon=True)
        self._reader.start()

    def until(self, word: str, secs: float = 60.0) -> str:
        """Return all that was printed, once *word* was."""
        end = time.monotonic() + secs
        while word not in (told := "".join(self._lines)):
            assert time.monotonic() < end, told
            time.sleep(0.02)
        return told

    def ended_within(self, secs: float) -> int | None:
        try:
            return self.child.wait(secs)
        except subprocess.TimeoutExpired:
            return None


@pytest.fixture
def start(
    s3_settings: S3Settings, s3_client: S3Client, tmp_path: Path, memory_dir: Path
) -> Iterator[Callable[[str], Running]]:
    """Return what starts a script with a last line of its own, at an S3 that takes no write before its gate is open."""
    gate = threading.Event()
    with FaultProxy(s3_settings.endpoint_url or "", [slow_until(gate)]) as proxy, children() as started:

        def start(last: str) -> Running:
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integrations")]),
                "CHECKPOINT_MEMORY": str(memory_dir),
                "SM_TIERED__TIERS__MEMORY__ALLOW_DISK": "true",
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL_S3": proxy.url,
            }
            base = f"s3://{s3_settings.bucket}/{s3_settings.prefix}"
            command = [sys.executable, "-W", "ignore", "-c", SCRIPT + last, str(tmp_path / "log"), base]
            child = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
            )
            started.append(child)
            return Running(child, gate)

        try:
            yield start
        finally:
            gate.set()


@contextmanager
def children() -> Iterator[list[subprocess.Popen[str]]]:
    found: list[subprocess.Popen[str]] = []
    try:
        yield found
    finally:
        for child in found:
            child.kill()
            child.wait()


@pytest.mark.parametrize("way", ENDS)
def test_a_script_that_has_failed_ends_soon_and_the_drainer_goes_on(
    way: str, start: Callable[[str], Running], s3_settings: S3Settings, s3_client: S3Client
) -> None:
    run = start(ENDS[way])
    run.until("saved")
    assert run.ended_within(15.0) == 1
    assert on_s3(s3_settings, s3_client) == []
    run.gate.set()
    end = time.monotonic() + 60.0
    while on_s3(s3_settings, s3_client) != [1] and time.monotonic() < end:
        time.sleep(0.1)
    assert on_s3(s3_settings, s3_client) == [1]


@pytest.mark.parametrize(("last", "status"), [("", 0), ("sys.exit(1)", 1)], ids=["is done", "exits with a status"])
def test_a_script_whose_end_looks_like_any_other_waits_and_says_how_long_and_how_that_is_ended(
    last: str, status: int, start: Callable[[str], Running], s3_settings: S3Settings, s3_client: S3Client
) -> None:
    run = start(last)
    told = " ".join(run.until("goes on without this process").split())
    assert "waiting until S3 has step 1, for 1800 s at most (drain_timeout_secs); a signal ends the wait" in told
    assert run.ended_within(1.0) is None
    run.gate.set()
    assert run.ended_within(60.0) == status
    assert on_s3(s3_settings, s3_client) == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait(number: signal.Signals, start: Callable[[str], Running]) -> None:
    run = start("sys.exit(1)")
    run.until("goes on without this process")
    run.child.send_signal(number)
    assert run.ended_within(15.0) is not None
