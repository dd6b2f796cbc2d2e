"""The compat writer and reader in one process: steps, S3 when it is asked for, failures that are told, nothing left."""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from sm_tiered.errors import ConfigError, TieredError, TierRefusedError, TierUnavailableError
from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy, Rule
from sm_tiered_dcp.compat import (
    SageMakerCheckpointConfig,
    SageMakerTieredStorageReader,
    SageMakerTieredStorageWriter,
    load_guard,
    logs,
    session,
)
from sm_tiered_dcp.engine import _engines
from tests.integrations.predecessor_made import NAMESPACE, made

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

DOWN = Rule(kind="status", status=503)


def slow_until(gate: threading.Event) -> Rule:
    """An S3 that answers no write until *gate* is set."""
    return Rule(kind="strip", match=("PUT ",), then=lambda: gate.wait(60))


@pytest.fixture(autouse=True)
def environment(memory_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory of this test's own, and no session left after it."""
    monkeypatch.setenv("CHECKPOINT_MEMORY", str(memory_dir))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(logs, "DIRECTORY", str(tmp_path / "log"))
    if not str(memory_dir).startswith("/dev/shm"):
        monkeypatch.setenv("SM_TIERED__TIERS__MEMORY__ALLOW_DISK", "true")
    load_guard._guards.clear()
    yield
    end_sessions(forget=True)


def end_sessions(*, forget: bool = False) -> None:
    while session._sessions:
        session._sessions.popitem()[1].close()
    assert not _engines
    if forget:  # as in another process
        load_guard._guards.clear()


def s3_config(settings: S3Settings, monkeypatch: pytest.MonkeyPatch, **given: Any) -> SageMakerCheckpointConfig:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", given.pop("endpoint", settings.endpoint_url))
    base = f"s3://{settings.bucket}/{settings.prefix}"
    return SageMakerCheckpointConfig(namespace="run-1", world_size=1, s3_tier_base_path=base, **given)


def state(value: float = -1.0) -> dict[str, Any]:
    return {"w": torch.full((50, 3), value), "epoch": int(value)}


def save(config: SageMakerCheckpointConfig, value: float, **options: Any) -> SageMakerTieredStorageWriter:
    writer = SageMakerTieredStorageWriter(config, **options)
    future: Any = dcp.async_save(state(value), storage_writer=writer)
    assert future.exception() is None
    return writer


def load(config: SageMakerCheckpointConfig, step: int | None = None, **options: Any) -> tuple[float, int | None]:
    target, reader = state(), SageMakerTieredStorageReader(config, step=step)
    dcp.load(target, storage_reader=reader, **options)
    value = target["w"][0, 0].item()
    assert target["w"].eq(value).all()
    assert target["epoch"] == value
    return value, reader.step


def fails(call: Callable[[], object]) -> str:
    """Return the text of what DCP raises; it derives from BaseException."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit, AssertionError))
    return str(caught.value)


def test_steps_are_given_or_stand_in_the_path_and_step_0_is_one() -> None:
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    assert save(config, 1.0, step=0).step == 0
    assert load(config) == (1.0, 0)
    assert save(config, 2.0, path="step_10/checkpoint").step == 10
    assert load(config) == (2.0, 10)
    assert save(config, 3.0, path="step_5/checkpoint", step=20).step == 20
    assert load(config) == (3.0, 20)
    assert load(config, step=10) == (2.0, 10)
    with pytest.raises(ConfigError, match="Invalid step value"):
        SageMakerTieredStorageWriter(config, path="checkpoint")
    text = fails(lambda: load(config, step=7))
    assert "step 7 is on no tier" in text
    save(config, 4.0, step=30)  # that a named step isn't there keeps nobody from going on


def test_a_checkpoint_id_may_name_the_step_but_no_other_one_and_any_other_name_is_but_a_name() -> None:
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    writer = SageMakerTieredStorageWriter(config, step=10)
    for name in ("step_10", "runs/x/step_10/", "/mnt/checkpoints", "s3://bucket/x"):
        dcp.save(state(1.0), storage_writer=writer, checkpoint_id=name)
    assert load(config) == (1.0, 10)
    text = fails(lambda: dcp.save(state(2.0), storage_writer=writer, checkpoint_id="step_20"))
    assert "step=10 differ" in text
    assert load(config, checkpoint_id="step_10") == (1.0, 10)
    assert load(config) == (1.0, 10), "what the refused save held is nowhere"


def on_s3(settings: S3Settings, client: Any) -> list[int]:
    found = client.list_objects_v2(Bucket=settings.bucket, Prefix=f"{settings.prefix}/run-1/step_")
    keys = [entry["Key"] for entry in found.get("Contents", [])]
    return sorted(int(key.split("step_")[1][:10]) for key in keys if key.endswith("/manifest.json"))


@pytest.mark.parametrize("way", ["async", pytest.param("sync", marks=pytest.mark.long)])
def test_save_to_s3_counts_as_it_is_when_the_save_is_called(
    way: str, s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = s3_config(s3_settings, monkeypatch)

    def save_now(writer: Any, value: float) -> None:
        if way == "async":
            assert dcp.async_save(state(value), storage_writer=writer).exception() is None  # type: ignore[union-attr]
        else:
            dcp.save(state(value), storage_writer=writer)

    config.save_to_s3 = False
    writer = SageMakerTieredStorageWriter(config, step=1)
    config.save_to_s3 = True
    save_now(writer, 1.0)
    config.save_to_s3 = False  # while step 1 is on its way
    assert writer.handle is not None
    assert writer.handle.tiers == ("memory", "s3")
    config.save_to_s3 = True
    writer = SageMakerTieredStorageWriter(config, step=2)
    config.save_to_s3 = False
    save_now(writer, 2.0)
    config.save_to_s3 = True  # too late for step 2
    assert writer.handle is not None
    assert writer.handle.tiers == ("memory",)
    session._sessions[os.getpid(), "run-1"].finish()
    assert on_s3(s3_settings, s3_client) == [1]


def test_s3_that_is_down_holds_up_no_save_and_is_told_by_a_later_future(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SM_TIERED__TIERS__S3__RETRY", "{attempts: 2, deadline_secs: 2}")
    monkeypatch.setenv("SM_TIERED__COMMIT_DEADLINE_SECS", "3")
    with FaultProxy(s3_settings.endpoint_url or "", [DOWN]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url)
        config.save_to_s3 = True
        save(config, 1.0, step=1)
        config.save_to_s3 = False
        failure, step = None, 1
        end = time.monotonic() + 60
        while failure is None and time.monotonic() < end:
            step += 1
            writer = SageMakerTieredStorageWriter(config, step=step)
            future: Any = dcp.async_save(state(float(step)), storage_writer=writer)
            failure = future.exception()
            time.sleep(0.05)
        for words in (f"step {step} is saved, but an earlier save failed", "step 1, tier s3"):
            assert words in str(failure)
        assert "Step 1: save to s3 failed" in (Path(logs.DIRECTORY) / "run-1_checkpointing.log").read_text()
        assert load_in_memory(config) == (float(step), step)
        assert on_s3(s3_settings, s3_client) == []
        save(config, 99.0, step=99)  # told once


def load_in_memory(config: SageMakerCheckpointConfig) -> tuple[float, int]:
    """Look at what is in memory alone: without S3, what is newest can't be told."""
    from sm_tiered_dcp import TieredStorageReader

    values = session._sessions[os.getpid(), config.namespace].recipe.values()
    end_sessions()
    values["unreachable"] = "use_memory"
    target, reader = state(), TieredStorageReader(values)
    dcp.load(target, storage_reader=reader)
    reader.close()
    assert reader.step is not None
    return target["w"][0, 0].item(), reader.step


def test_a_load_that_could_not_ask_s3_is_no_fresh_start_until_it_is_repeated(
    s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SM_TIERED__TIERS__S3__RETRY", "{attempts: 2, deadline_secs: 2}")
    with FaultProxy(s3_settings.endpoint_url or "", [DOWN]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url)
        for _ in range(2):
            text = fails(lambda: load(config))
            assert "tier s3 did not answer" in text
            with pytest.raises(TierUnavailableError, match=r"s3 did not answer.*repeat the load.*a new namespace"):
                SageMakerTieredStorageWriter(config, step=0)
        proxy.rules = []
        assert "nothing was ever saved in namespace 'run-1'. This is a first run" in fails(lambda: load(config))
        save(config, 1.0, step=0)
        assert load(config) == (1.0, 0)


def test_a_load_that_does_not_fit_is_no_fresh_start() -> None:
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    save(config, 1.0, step=5)
    reader = SageMakerTieredStorageReader(config)
    text = fails(lambda: dcp.load({"other": torch.zeros(2)}, storage_reader=reader))
    assert "Missing key" in text
    with pytest.raises(Exception, match=r"the last load did not end.*repeat the load"):
        SageMakerTieredStorageWriter(config, step=0)
    assert load(config) == (1.0, 5)
    save(config, 2.0, step=6)


def test_a_reader_that_can_not_be_made_is_no_fresh_start_either(memory_dir: Path) -> None:
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    save(config, 1.0, step=5)
    end_sessions()
    memory_dir.chmod(0o755)
    with pytest.raises(TierRefusedError, match="0755|755"):
        SageMakerTieredStorageReader(config)
    memory_dir.chmod(0o700)
    with pytest.raises(TierRefusedError, match="repeat the load"):
        SageMakerTieredStorageWriter(config, step=0)
    assert load(config) == (1.0, 5)
    save(config, 2.0, step=6)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(kind="status", match=("PUT ",), status=403, code="AccessDenied"), ("s3:PutObject",)),
        pytest.param(Rule(kind="status", status=403, code="ExpiredToken"), ("expired",), marks=pytest.mark.long),
        pytest.param(Rule(kind="status", status=404, code="NoSuchBucket"), ("bucket",), marks=pytest.mark.long),
    ],
    ids=["no permission", "expired credentials", "no bucket"],
)
def test_what_s3_refuses_is_told_by_the_next_future_with_what_to_do(
    rule: Rule, words: tuple[str, ...], s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_settings.endpoint_url or "", [rule]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url)
        config.save_to_s3 = True
        writer = save(config, 1.0, step=1)
        config.save_to_s3 = False
        assert writer.handle is not None
        with pytest.raises(TieredError):
            writer.handle.wait("s3", timeout=60)
        future: Any = dcp.async_save(state(2.0), storage_writer=SageMakerTieredStorageWriter(config, step=2))
        text = str(future.exception())
        for word in ("step 2 is saved, but an earlier save failed", *words):
            assert word.lower() in text.lower()


def test_a_save_whose_turn_on_s3_did_not_come_is_made_up_for_at_the_end(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    with FaultProxy(s3_settings.endpoint_url or "", [slow_until(gate)]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url, save_to_s3=True)
        for step in (1, 2, 3):
            save(config, float(step), step=step)
        config.save_to_s3 = False
        writer = save(config, 4.0, step=4)
        assert writer.handle is not None
        assert writer.handle.tiers == ("memory",)
        assert "step 2: not promoted to s3: step 3 takes its place" in caplog.text
        gate.set()
        session._finish_all()
        assert "step 3: not promoted to s3: step 4 takes its place" in caplog.text
        assert on_s3(s3_settings, s3_client) == [1, 4]


@pytest.mark.long
def test_the_save_after_it_takes_the_place_of_one_whose_turn_on_s3_did_not_come(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = threading.Event()
    with FaultProxy(s3_settings.endpoint_url or "", [slow_until(gate)]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url, save_to_s3=True)
        first = save(config, 1.0, step=1)
        save(config, 2.0, step=2)
        config.save_to_s3 = False
        gate.set()
        assert first.handle is not None
        first.handle.wait("s3")
        save(config, 3.0, step=3)
        assert "step 2: not promoted to s3: step 3 takes its place" in caplog.text
        session._finish_all()
        assert on_s3(s3_settings, s3_client) == [1, 3]


def test_a_training_that_has_failed_ends_at_once(s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultProxy(s3_settings.endpoint_url or "", [DOWN]) as proxy:
        config = s3_config(s3_settings, monkeypatch, endpoint=proxy.url, save_to_s3=True)
        save(config, 1.0, step=1)
        monkeypatch.setattr(session.Session, "finish", lambda _: pytest.fail("it waited for S3"))
        monkeypatch.setattr(sys, "last_value", RuntimeError("the training failed"), raising=False)
        session._finish_all()


@pytest.mark.parametrize("by_step", [False, True], ids=["default layout", "Ray's layout"])
def test_where_nothing_of_ours_is_what_the_predecessor_wrote_is_taken_and_training_goes_on_from_it(
    by_step: bool, s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for step in (40, 50):
        made(state(float(step))).put(tmp_path / "old", step, by_step=by_step)
    for path in (tmp_path / "old" / NAMESPACE).rglob("*"):
        if path.is_file():
            key = f"{s3_settings.prefix}/run-1/{path.relative_to(tmp_path / 'old' / NAMESPACE)}"
            s3_client.put_object(Bucket=s3_settings.bucket, Key=key, Body=path.read_bytes())
    config = s3_config(s3_settings, monkeypatch)
    assert load(config) == (50.0, 50)
    assert on_s3(s3_settings, s3_client) == [50]
    save(config, 60.0, step=60)
    assert load(config) == (60.0, 60)
    assert load(config, step=40) == (40.0, 40)
    assert load(config) == (60.0, 60)


def count() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def test_40_writers_and_readers_leave_no_file_no_socket_and_no_thread(
    s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = s3_config(s3_settings, monkeypatch)
    kept: list[Any] = []
    before = (0, 0)
    for step in range(45):
        config.save_to_s3 = step == 0
        kept += [save(config, float(step), step=step), SageMakerTieredStorageReader(config)]
        if step == 4:
            session._sessions[os.getpid(), "run-1"].finish()
            load(config)
            before = count()
    session._sessions[os.getpid(), "run-1"].finish()
    load(config)
    after = count()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1]
    assert len(_engines) == 1


def test_a_fresh_optimizer_gets_its_moments() -> None:
    def make() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        return model, torch.optim.AdamW([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.5}])

    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    model, optimizer = make()
    for _ in range(3):
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    for step, way in enumerate(("async", "sync")):
        writer = SageMakerTieredStorageWriter(config, step=step)
        saved = {"model": model.state_dict(), "all": {"optimizer": optimizer.state_dict()}}
        if way == "async":
            assert dcp.async_save(saved, storage_writer=writer).exception() is None  # type: ignore[union-attr]
        else:
            dcp.save(saved, storage_writer=writer)
        other, fresh = make()
        target = {"model": other.state_dict(), "all": {"optimizer": fresh.state_dict()}}
        assert target["all"]["optimizer"]["state"] == {}
        dcp.load(target, storage_reader=SageMakerTieredStorageReader(config))
        fresh.load_state_dict(target["all"]["optimizer"])
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert optimizer.state[mine].keys() == fresh.state[theirs].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(value.equal(fresh.state[theirs][name]) for name, value in optimizer.state[mine].items())


def test_lines_go_to_the_users_logger_once_and_to_the_file() -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("a-trainer")
    logger.addHandler(Keep())
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1, logger=logger)
    logger.setLevel(logging.INFO)
    save(config, 1.0, step=240)
    assert sum("step 240: acknowledged in memory" in line for line in lines) == 1
    path = Path(logs.DIRECTORY) / "run-1_checkpointing.log"
    text = path.read_text()
    assert " [Rank 0] Step 240: staged " in text
    assert "] [run-1] [sm_tiered] [INFO] [" in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config.logger = None
    save(config, 2.0, step=250)
    assert not any("step 250" in line for line in lines)
    assert "Step 250: staged" in path.read_text()
    end_sessions()
    assert not [handler for handler in logging.getLogger("sm_tiered").handlers if isinstance(handler, logs._SharedLog)]


def test_a_log_that_can_not_be_written_is_written_elsewhere_and_that_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(logs, "DIRECTORY", str(tmp_path / "file" / "log"))
    monkeypatch.setattr(logs.tempfile, "gettempdir", lambda: str(tmp_path))
    config = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    for step in range(3):
        save(config, 1.0, step=step)
    elsewhere = tmp_path / f"sm_tiered-{os.getuid()}" / "sagemaker_checkpointing" / "run-1_checkpointing.log"
    assert "Step 2: staged" in elsewhere.read_text()
    printed = capsys.readouterr().err
    assert printed.count("no log can be written to") == 1
    assert str(elsewhere.parent) in printed


def test_a_log_rotates_and_the_other_ranks_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logs._SharedLog(tmp_path / "x.log", rotates=True)
    first.maxBytes = 200
    other = logs._SharedLog(tmp_path / "x.log", rotates=False)
    other.maxBytes = 200
    record = logging.LogRecord("sm_tiered", logging.INFO, "x.py", 1, "a line of the log", (), None)
    for _ in range(30):
        other.handle(record)
        first.handle(record)
    lines = sum(len(path.read_text().splitlines()) for path in tmp_path.glob("x.log*"))
    assert (tmp_path / "x.log.1").exists()
    assert not (tmp_path / "x.log.5").exists()
    assert 10 <= lines < 60
    assert (tmp_path / "x.log").stat().st_size <= 400
    other.handle(record)
    assert (tmp_path / "x.log").read_text().endswith("a line of the log\n")
    first.close()
    other.close()


@pytest.mark.long
def test_another_base_path_for_the_same_namespace_lets_the_first_go(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = s3_config(s3_settings, monkeypatch)
    save(config, 1.0, step=1)
    config.s3_tier_base_path = f"s3://{s3_settings.bucket}/elsewhere"
    assert load(config) == (1.0, 1)
    config.save_to_s3 = True
    save(config, 2.0, step=2)
    session._sessions[os.getpid(), "run-1"].finish()
    found = s3_client.list_objects_v2(Bucket=s3_settings.bucket, Prefix="elsewhere/run-1/step_0000000002-")
    assert found["KeyCount"] > 0
    assert len(_engines) == 1
