"""No training begins anew over what is there, whatever its load failed of; what a fresh optimizer gets back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from sm_tiered.errors import CheckpointNotFoundError, ConfigError, RestoreError, SaveError, TieredError
from sm_tiered.settings import S3Settings
from sm_tiered_dcp.compat import SageMakerCheckpointConfig, SageMakerTieredStorageReader, SageMakerTieredStorageWriter
from tests.integrations.test_compat import (
    end_sessions,
    environment,  # noqa: F401 - a fixture that all tests use
    fails,
    load,
    s3_config,
    save,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def config() -> SageMakerCheckpointConfig:
    return SageMakerCheckpointConfig(namespace="run-1", world_size=1)


class Broken:
    """As a user's own state that can't be read, or be set."""

    def __init__(self, where: str) -> None:
        self.where = where

    def state_dict(self) -> dict[str, Any]:
        if self.where == "state_dict":
            raise RuntimeError("this state can't be read")
        return state()

    def load_state_dict(self, given: object) -> None:
        raise RuntimeError("this state can't be set")


FAILED: dict[str, Callable[[SageMakerCheckpointConfig], object]] = {
    "a step that is text": lambda given: SageMakerTieredStorageReader(given, step="5"),  # type: ignore[arg-type]
    "an id of two steps": lambda given: load(given, checkpoint_id="step_1/step_2"),
    "an id without a step": lambda given: load(given, checkpoint_id="/mnt/checkpoints"),
    "an id that a typo hides": lambda given: load(given, checkpoint_id="step-5"),
    "a named step that is not there": lambda given: load(given, step=7),
    "an id of a step that is not there": lambda given: load(given, checkpoint_id=7),
    "a state that can't be read": lambda given: dcp.load(
        {"x": Broken("state_dict")}, storage_reader=SageMakerTieredStorageReader(given), checkpoint_id="step_5"
    ),
}


@pytest.mark.parametrize("way", FAILED)
def test_whatever_a_load_failed_of_no_save_follows_until_one_has_ended_well(way: str) -> None:
    given = config()
    save(given, 1.0, step=5)
    end_sessions(forget=True)
    fails(lambda: FAILED[way](given))
    with pytest.raises(TieredError, match="would start from scratch.*repeat the load"):
        SageMakerTieredStorageWriter(given, step=6)
    assert load(given) == (1.0, 5)
    save(given, 2.0, step=6)


def test_a_load_that_never_came_to_the_reader_is_said(caplog: pytest.LogCaptureFixture) -> None:
    given = config()
    reader = SageMakerTieredStorageReader(given)
    with pytest.raises(RuntimeError, match="can't be read"):
        dcp.load({"x": Broken("state_dict")}, storage_reader=reader)
    save(given, 1.0, step=5)
    assert caplog.text.count("nothing was loaded, though a reader was made") == 1
    SageMakerTieredStorageReader(given)
    save(given, 1.0, step=6)
    assert caplog.text.count("nothing was loaded, though a reader was made") == 1


def test_an_id_of_a_load_may_be_the_steps_number() -> None:
    given = config()
    save(given, 1.0, step=5)
    save(given, 2.0, step=6)
    assert load(given, checkpoint_id=5) == (1.0, 5)
    assert load(given, checkpoint_id="runs/step_5") == (1.0, 5)
    assert load(given, step=5, checkpoint_id="/mnt/checkpoints") == (1.0, 5)
    text = fails(lambda: load(given, checkpoint_id="/mnt/checkpoints"))
    assert "names no step" in text
    assert "checkpoint_id='step_500'" in text


def test_a_load_that_failed_is_not_forgotten_when_the_config_changes(
    s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config()
    save(given, 1.0, step=5)
    end_sessions(forget=True)
    with pytest.raises(ConfigError):
        SageMakerTieredStorageReader(given, step="5")  # type: ignore[arg-type]
    given.s3_tier_base_path = s3_config(s3_settings, monkeypatch).s3_tier_base_path
    with pytest.raises(TieredError, match="repeat the load"):
        SageMakerTieredStorageWriter(given, step=0)


def test_a_save_before_the_newest_step_that_was_loaded_is_refused() -> None:
    given = config()
    save(given, 1.0, step=50)
    end_sessions(forget=True)
    reader = SageMakerTieredStorageReader(given)
    with pytest.raises(RuntimeError, match="can't be set"):
        dcp.load({"x": Broken("load_state_dict")}, storage_reader=reader, planner=anything())
    with pytest.raises(SaveError, match=r"step 0 is to be saved, but step 50 was loaded.*Load again.*step=…"):
        SageMakerTieredStorageWriter(given, step=0)
    save(given, 1.0, step=50)  # the step that was loaded may be saved again
    save(given, 2.0, step=60)
    assert load(given, step=50) == (1.0, 50)
    save(given, 3.0, step=55)  # back on purpose
    assert load(given) == (3.0, 55)


def anything() -> Any:
    """A planner that does not mind what is missing."""
    return dcp.DefaultLoadPlanner(allow_partial_load=True)


def test_a_named_step_that_is_not_there_ends_no_training_that_is_under_way() -> None:
    given = config()
    save(given, 1.0, step=5)
    assert "step 7 is on no tier" in fails(lambda: load(given, step=7))
    save(given, 2.0, step=6)
    reader = SageMakerTieredStorageReader(given, step=9)
    reader.reset()
    with pytest.raises(CheckpointNotFoundError):
        reader.read_metadata()
    save(given, 3.0, step=7)


# ---- fresh optimizers


def stateful() -> dict[str, Any]:
    """As an optimizer with history: lists of tensors, dicts in lists, and numbers for keys."""
    history = [torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)]
    blocks = {0: torch.ones(3), 1: torch.zeros(3)}
    moments = [{"a": torch.ones(1), "b": 1}, {"a": torch.zeros(1), "b": 2}]
    first = {"history": history, "alphas": [0.1, 0.2], "blocks": blocks, "moments": moments, "step": 3, "none": None}
    return {"state": {0: first, 1: {"step": 4}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("way", ["async", "sync"])
def test_a_fresh_optimizer_gets_the_very_containers_that_were_saved(way: str) -> None:
    given, saved = config(), {"optimizers": [stateful()]}
    writer = SageMakerTieredStorageWriter(given, step=1)
    if way == "async":
        assert dcp.async_save(saved, storage_writer=writer).exception() is None  # type: ignore[union-attr]
    else:
        dcp.save(saved, storage_writer=writer)
    target = {"optimizers": [{"state": {}, "param_groups": [{"lr": 0.0, "params": [0, 1]}]}]}
    dcp.load(target, storage_reader=SageMakerTieredStorageReader(given))
    assert same(target["optimizers"][0]["state"], stateful()["state"])


def test_an_optimizer_with_state_for_some_parameters_only_is_refused() -> None:
    given = config()
    saved = {"optimizer": {"state": {n: {"m": torch.ones(2)} for n in (0, 1)}, "param_groups": [{"params": [0, 1]}]}}
    assert dcp.async_save(saved, storage_writer=SageMakerTieredStorageWriter(given, step=1)).exception() is None  # type: ignore[union-attr]
    half = {"optimizer": {"state": {0: {"m": torch.zeros(2)}}, "param_groups": [{"params": [0, 1]}]}}
    text = fails(lambda: dcp.load(half, storage_reader=SageMakerTieredStorageReader(given)))
    assert "optimizer: there is state for 1 parameters, and none for '1', which has some in the checkpoint" in text
    assert half["optimizer"]["state"][0]["m"].eq(0.0).all(), "nothing was placed"
    with pytest.raises(RestoreError, match="get_optimizer_state_dict.*repeat the load"):
        SageMakerTieredStorageWriter(given, step=2)
    fewer = {"optimizer": {"state": {0: {"m": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}}
    dcp.load(fewer, storage_reader=SageMakerTieredStorageReader(given))
    assert fewer["optimizer"]["state"][0]["m"].eq(1.0).all(), "another rank's parameters are not asked for"
