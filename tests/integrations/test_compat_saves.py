"""Saves of the compat writer that meet something else: another stager, process, logger or config than usual."""

from __future__ import annotations

import logging
import pickle
import threading
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from sm_tiered.errors import ConfigError, SaveError
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy
from sm_tiered_dcp.compat import SageMakerCheckpointConfig, SageMakerTieredStorageWriter, session
from sm_tiered_dcp.compat.turns import Turns
from sm_tiered_dcp.engine import _engines
from tests.integrations.test_compat import (
    end_sessions,
    environment,  # noqa: F401 - a fixture that all tests use
    fails,
    load,
    on_s3,
    s3_config,
    save,
    slow_until,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def config(namespace: str = "run-1", **given: Any) -> SageMakerCheckpointConfig:
    return SageMakerCheckpointConfig(namespace=namespace, world_size=1, **given)


def turns() -> Turns:
    (held,) = session._sessions.values()
    return held.turns


def test_a_writer_that_outlives_its_engine_ends_no_other() -> None:
    writer = save(config(), 1.0, step=1)
    (held,) = session._sessions.values()
    end_sessions()
    save(config(), 2.0, step=2)
    (engine,) = _engines.values()
    held.lease.end()
    writer.close()
    assert list(_engines.values()) == [engine]
    assert not engine.closed
    assert load(config()) == (2.0, 2)


def test_a_process_group_that_is_made_anew_has_an_engine_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    found: list[object] = []
    for step in range(2):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            save(config(), float(step), step=step)
            found += _engines.values()
            turns()._failure = SaveError(f"what became of step {step}")
            assert load(config()) == (float(step), step)
        finally:
            if step:
                end_sessions()
            torch.distributed.destroy_process_group()
    assert len(set(map(id, found))) == 2
    assert caplog.text.count("what became of step 0") == 1, "the first session is not left without a word"


def test_save_to_s3_without_a_place_on_s3_is_told_by_the_future(s3_settings: S3Settings) -> None:
    given = config()
    writer = SageMakerTieredStorageWriter(given, step=1)
    given.s3_tier_base_path = f"s3://{s3_settings.bucket}/later"
    given.save_to_s3 = True
    future: Any = dcp.async_save(state(1.0), storage_writer=writer)
    assert "there was no s3_tier_base_path when this writer was made" in str(future.exception())
    text = fails(lambda: dcp.save(state(1.0), storage_writer=writer))
    assert "there was no s3_tier_base_path when this writer was made" in text


def test_a_save_that_no_thread_of_dcps_comes_to_is_not_waited_for() -> None:
    writer = SageMakerTieredStorageWriter(config(), step=1)
    found: list[Exception] = []

    def is_sent() -> None:
        try:
            pickle.dumps(writer)
        except ConfigError as error:
            found.append(error)

    stays = threading.Event()
    for target in (lambda: None, is_sent, threading.Thread(target=stays.wait, name="sm_tiered-x", daemon=True).start):
        writer.stage(state(1.0))
        thread = threading.Thread(target=target)
        thread.start()
        writer.synchronize_staging()
        assert not thread.is_alive()
    stays.set()
    assert "AsyncCheckpointerType.THREAD" in str(found[0])


def test_another_stager_is_refused_before_any_collective() -> None:
    writer = SageMakerTieredStorageWriter(config(), step=1)
    future: Any = dcp.async_save(state(1.0), storage_writer=writer, async_stager=BlockingAsyncStager())
    assert "was given an async_stager of its own" in str(future.exception())
    assert turns().on_their_way() == []
    save(config(), 1.0, step=1)


class Fails(dcp.DefaultSavePlanner):
    """Fails before a byte is written."""

    def create_local_plan(self) -> Any:
        raise RuntimeError("no plan")


def test_what_kept_one_save_from_being_staged_keeps_no_other() -> None:
    writer = SageMakerTieredStorageWriter(config(), step=1)
    bad: Any = dcp.async_save({"x": lambda: 0}, storage_writer=writer, planner=Fails())
    assert "no plan" in str(bad.exception())
    dcp.save(state(1.0), storage_writer=writer)
    assert load(config()) == (1.0, 1)


def test_an_async_save_under_another_id_says_which_step_is_saved() -> None:
    writer = SageMakerTieredStorageWriter(config(), step=9)
    future: Any = dcp.async_save(state(1.0), storage_writer=writer, checkpoint_id="step_10")
    assert "step=9 differ" in str(future.exception())
    assert "Step 9 is saved" in str(future.exception())
    assert load(config()) == (1.0, 9)


# ---- S3


def test_an_s3_that_is_down_is_waited_for_by_no_save_and_its_turn_is_not_lost(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with FaultProxy(s3_settings.endpoint_url or "", [slow_until(gate)]) as proxy:
        given = s3_config(s3_settings, monkeypatch, endpoint=proxy.url, save_to_s3=True)
        first = save(given, 1.0, step=1)
        with monkeypatch.context() as patch:
            patch.setattr(SaveHandle, "wait", lambda *_, **__: pytest.fail("it waited"))
            second = save(given, 2.0, step=2)
        given.save_to_s3 = False
        assert second.handle is not None
        assert (second.handle.tiers, turns().owed) == (("memory",), 2)
        gate.set()
        assert first.handle is not None
        first.handle.wait("s3")
        with pytest.raises(BaseException):  # noqa: B017, PT011 - DCP's own derives from it
            dcp.save({"x": lambda: 0}, storage_writer=SageMakerTieredStorageWriter(given, step=3))
        assert turns().owed == 2, "the save that was to take its place has failed"
        save(given, 4.0, step=4)
        assert turns().owed is None
        session._finish_all()
        assert on_s3(s3_settings, s3_client) == [1, 4]


def test_failures_do_not_pile_up_where_only_dcp_save_is_used(caplog: pytest.LogCaptureFixture) -> None:
    save(config(), 1.0, step=1)
    for step in range(2, 5):
        failed = SaveHandle(step=step, nudge=lambda: None)
        failed.add("memory", TierState(), 1.0)
        failed.settle("memory", SaveError(f"step {step} is lost"))
        turns()._open.append((failed, "memory"))
    with caplog.at_level(logging.ERROR, logger="sm_tiered_dcp"):
        dcp.save(state(5.0), storage_writer=SageMakerTieredStorageWriter(config(), step=5))
    assert "an earlier save failed (and 2 more): step 2 is lost" in caplog.text
    assert turns().failures() == (None, 0)


def test_all_sessions_are_finished_at_the_end_whatever_happens_to_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for namespace in ("run-1", "run-2"):
        save(config(namespace), 1.0, step=1)
        for held in session._sessions.values():
            held.turns._failure = SaveError(f"of {held.recipe.namespace}")
    look = Turns.look

    def fails_once(self: Turns) -> None:
        monkeypatch.setattr(Turns, "look", look)
        raise OSError("the disk is gone")

    monkeypatch.setattr(Turns, "look", fails_once)
    with caplog.at_level(logging.ERROR, logger="sm_tiered_dcp"):
        session._finish_all()
    assert "the disk is gone" in caplog.text
    assert "of run-2" in caplog.text, "one without S3 tells what failed too"


# ---- logs


def test_two_namespaces_with_one_logger_tell_each_line_once() -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("a-trainer-of-two")
    logger.addHandler(Keep())
    logger.setLevel(logging.INFO)
    for namespace in ("run-1", "run-2"):
        save(config(namespace, logger=logger), 1.0, step=240)
    assert sum("step 240: staged" in line for line in lines) == 2
    session._sessions.popitem()[1].close()
    save(config(logger=logger), 1.0, step=241)
    assert sum("step 241: staged" in line for line in lines) == 1, "the other is still told"


def test_a_logger_without_handlers_swallows_no_warning_and_none_is_told_of_the_file_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = logging.getLogger("a-silent-trainer")
    silent.propagate = False
    for step, logger in enumerate((silent, None, silent, None)):
        save(config(logger=logger), float(step), step=step)
    assert capsys.readouterr().err.count("log file:") == 0
    save(config(logger=silent), 4.0, step=4)
    logging.getLogger("sm_tiered_dcp").warning("something is wrong")
    assert capsys.readouterr().err.count("something is wrong") == 1
