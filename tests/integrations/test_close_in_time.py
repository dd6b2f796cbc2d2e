"""A training ends in time although its S3 never answers, and is told of what was not brought there."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered import drainer, layout, streaming
from sm_tiered.errors import DeadlineExceededError, TierUnavailableError
from sm_tiered.locks import probe
from sm_tiered.saving import Saver
from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import NAMESPACE, pause, recipe, start, tell

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

DRAIN_SECS = 0.5
SLACK_SECS = 2.0
"""What an end may take besides: this machine has other work."""


def state() -> dict[str, Any]:
    return {"w": torch.full((50,), 1.0), "epoch": 1}


@pytest.fixture
def silent_s3() -> Iterator[dict[str, Any]]:
    """An S3 tier whose endpoint takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(128)
        yield {
            "kind": "s3",
            "uri": "s3://bucket/prefix",
            "endpoint_url": f"http://127.0.0.1:{server.getsockname()[1]}",
            "region": "us-east-1",
            "force_path_style": True,
            "request_timeout_secs": 0.3,
            "retry": {"attempts": 2, "deadline_secs": 0.4},
            "save": "on_end",
        }


def drainer_pid(memory: Path) -> int | None:
    holder = probe(memory / NAMESPACE / layout.LOCKS / drainer.DRAINER_LOCK)
    return holder.pid if holder else None


@pytest.fixture
def memory(memory_dir: Path) -> Iterator[Path]:
    """Where the memory tier is; the drainer that works on it in vain is ended afterwards."""
    yield memory_dir
    pid = drainer_pid(memory_dir)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def which(tmp_path: Path, memory: Path, silent_s3: dict[str, Any]) -> dict[str, Any]:
    return recipe(tmp_path, memory, disk=None, tiers={"s3": silent_s3}, drain_timeout_secs=DRAIN_SECS)


def test_a_close_waits_for_the_drain_no_longer_than_the_recipe_says(which: dict[str, Any], memory: Path) -> None:
    checkpointer = TieredCheckpointer.from_recipe(which)
    handle = checkpointer.save(1, state())
    handle.wait("memory")
    begun = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"not complete after 0\.5 s .step 1, tier s3.*in the background"):
        checkpointer.close()
    assert DRAIN_SECS <= time.monotonic() - begun < DRAIN_SECS + SLACK_SECS
    assert drainer_pid(memory) is not None, "the drain goes on without us"
    checkpointer.close()
    # Everything was let go of all the same: the namespace is free for the next launch.
    following = TieredCheckpointer.from_recipe({**which, "unreachable": "use_memory"})
    target = {"w": torch.zeros(50), "epoch": 0}
    assert following.restore(target) == 1
    assert target["w"].eq(1.0).all()
    following.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait for the drain took."""
    took: list[float] = []
    real = Saver.wait

    def timed(saver: Saver, timeout_secs: float) -> None:
        begun = time.monotonic()
        try:
            real(saver, timeout_secs)
        finally:
            took.append(time.monotonic() - begun)

    monkeypatch.setattr(Saver, "wait", timed)
    return took


@pytest.mark.parametrize("save", ["on_end", {"every_n_steps": 11}])
def test_leaving_waits_for_the_drain_once_and_gives_it_up_in_time(
    save: Any, which: dict[str, Any], memory: Path, waits: list[float]
) -> None:
    """Counted, because a second wait of the same length could pass for a slow machine."""
    which["tiers"]["memory"]["save"] = {"every_n_steps": 10}
    which["tiers"]["s3"]["save"] = save
    begun = 0.0

    def train() -> None:
        nonlocal begun
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            for step in (10, 11):
                checkpointer.maybe_save(step, state())
            begun = time.monotonic()

    with pytest.raises(DeadlineExceededError, match=r"step 11, tier s3"):
        train()
    assert DRAIN_SECS <= time.monotonic() - begun < DRAIN_SECS + SLACK_SECS
    assert len(waits) == 1
    assert drainer_pid(memory) is not None, "the drain goes on without us"


def test_leaving_with_an_error_of_the_training_waits_for_no_drain(
    which: dict[str, Any], memory: Path, waits: list[float]
) -> None:
    def train() -> None:
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            checkpointer.save(1, state()).wait("memory")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert not waits
    assert drainer_pid(memory) is not None, "the drain goes on without us"


def _leave(rank: int, which: dict[str, Any], broken: bool) -> None:
    """Rank 1 never brings its share, so that rank 0 can't commit what both streamed."""
    if rank == 1:
        streaming.stream = lambda *_arguments, **_options: pause()
    begun = 0.0
    try:
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            checkpointer.save(1, state())
            begun = time.monotonic()
            if broken:
                raise ZeroDivisionError
    except (DeadlineExceededError, ZeroDivisionError) as error:
        tell((type(error).__name__, time.monotonic() - begun))


@pytest.mark.parametrize("broken", [False, True])
def test_leaving_does_not_go_on_waiting_for_a_rank_that_never_comes(broken: bool, tmp_path: Path) -> None:
    job = start(2, _leave, recipe(tmp_path, None, drain_timeout_secs=DRAIN_SECS), broken)
    kind, secs = job.heard(0)
    job.kill(1)
    job.wait()
    assert kind == ("ZeroDivisionError" if broken else "DeadlineExceededError")
    assert secs < (0.0 if broken else DRAIN_SECS) + SLACK_SECS


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_without_memory_the_save_is_given_up_in_time_and_told_as_the_recipe_says(
    on_error: str, tmp_path: Path, silent_s3: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"stream_timeout_secs": 0.5, "drain_timeout_secs": DRAIN_SECS, "on_error": on_error}
    which = recipe(tmp_path, None, disk=None, tiers={"s3": silent_s3}, **limits)
    checkpointer = TieredCheckpointer.from_recipe(which)
    begun = time.monotonic()
    handle = checkpointer.save(1, state())
    assert isinstance(handle.exception("s3"), TierUnavailableError | DeadlineExceededError)
    if on_error == "raise":
        with pytest.raises((TierUnavailableError, DeadlineExceededError), match="tier s3"):
            checkpointer.close()
    else:
        checkpointer.close()
    assert time.monotonic() - begun < 6 * DRAIN_SECS + SLACK_SECS
    told = f"step 1: save to s3 failed: {handle.exception('s3')}"
    assert caplog.messages.count(told) == 1, caplog.messages
