"""The compat config and the steps of its writer: bad input is refused where it is given, and says what is allowed."""

from __future__ import annotations

import copy
import logging
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sm_tiered.errors import ConfigError
from sm_tiered.settings import HYPERPOD_URL
from sm_tiered_dcp.compat import (
    SageMakerCheckpointConfig,
    SageMakerTieredStorageReader,
    SageMakerTieredStorageWriter,
    cluster,
)
from sm_tiered_dcp.compat.cluster import find_service
from sm_tiered_dcp.compat.recipe import recipe_of
from sm_tiered_dcp.compat.steps import step_of_save

BAD: list[tuple[str, object, str]] = [
    ("namespace", "", r"namespace is empty\. use 1 to 128 of A-Z a-z 0-9 _ -.*llama-7b-run3"),
    ("namespace", "../x", r"illegal character '\.' at 0"),
    ("namespace", "a/b", r"illegal character '/' at 1"),
    ("namespace", "a?b", r"illegal character '\?' at 1"),
    ("namespace", "a b", r"illegal character ' ' at 1"),
    ("namespace", "a\nb", r"'a\\nb' has an illegal character '\\n' at 1"),
    ("namespace", "ä", r"illegal character 'ä' at 0"),
    ("namespace", "-x", r"illegal character '-' at 0"),
    ("namespace", "a" * 129, r"too long: 129 > 128"),
    ("namespace", ".", r"illegal character"),
    ("namespace", "..", r"illegal character"),
    ("namespace", 5, r"namespace must be str, got int 5"),
    ("namespace", None, r"must be str, got NoneType"),
    ("namespace", b"x", r"must be str, got bytes"),
    ("namespace", "a\x00b", r"illegal character '\\x00' at 1"),
    ("namespace", "../cluster/reset?", r"illegal character"),
    ("world_size", 0, r"world_size must be 1 to 100000, got 0"),
    ("world_size", -1, r"got -1"),
    ("world_size", 10**6, r"got 1000000"),
    ("world_size", True, r"world_size must be int, got bool True"),
    ("world_size", 2.5, r"must be int, got float 2\.5"),
    ("world_size", "2", r"got str '2'\. Did you mean 2\?"),
    ("world_size", None, r"got NoneType.*dist\.get_world_size"),
    ("s3_tier_base_path", "bucket/p", r"s3_tier_base_path 'bucket/p' must start with s3://"),
    ("s3_tier_base_path", "s3://", r"names no bucket"),
    ("s3_tier_base_path", "s3://Bad_Bucket", r"'Bad_Bucket' can't be the name of a bucket.*3 to 63"),
    ("s3_tier_base_path", "S3://b", r"in lower case"),
    ("s3_tier_base_path", "https://b.s3.amazonaws.com", r"must start with s3://.*endpoint_url"),
    ("s3_tier_base_path", "s3://bucket//p", r"empty or dot segment"),
    ("s3_tier_base_path", "s3://bucket/../p", r"empty or dot segment"),
    ("s3_tier_base_path", "s3://key:secret@bucket/p", r"credentials in a uri \(value hidden\)"),
    ("s3_tier_base_path", 7, r"s3_tier_base_path must be str, got int"),
    ("s3_tier_base_path", Path("s3://bucket"), r"must be str, got PosixPath"),
    ("save_to_s3", "yes", r"save_to_s3 must be bool, got str 'yes'\. .*step % 50 == 0"),
    ("save_to_s3", 1, r"must be bool, got int"),
    ("save_to_s3", None, r"must be bool, got NoneType"),
    ("save_to_s3", np.array([True, False]), r"must be bool, got ndarray"),
    ("disk_tier_base_path", "/disk", r"disk_tier_base_path can't be used.*tier of kind local in a recipe"),
    ("save_to_disk", True, r"save_to_disk can't be used.*tier of kind local in a recipe"),
    ("s3_path_strategy", "ray", r"s3_path_strategy can't be 'ray'\. Leave it out: it isn't needed"),
    ("s3_path_strategy", object(), r"it isn't needed"),
    ("logger", "app", r"logger must be a logging\.Logger, got str 'app'"),
    ("save_to_S3", True, r"has no 'save_to_S3'\. Did you mean save_to_s3\?"),
    ("region", "us-east-1", r"has no 'region'"),
]


@pytest.mark.parametrize(("name", "value", "words"), BAD, ids=[f"{name}={value!r:.20}" for name, value, _ in BAD])
def test_a_value_that_can_not_be_used_is_refused_when_it_is_given_and_when_it_is_set(
    name: str, value: object, words: str
) -> None:
    good: dict[str, Any] = {"namespace": "run-1", "world_size": 1, "s3_tier_base_path": "s3://bucket/p"}
    config = SageMakerCheckpointConfig(**good)
    before = copy.copy(config)
    with pytest.raises(ConfigError, match=words) as caught:
        setattr(config, name, value)
    assert caught.value.hint
    assert "secret" not in str(caught.value).replace("a secret", "")
    assert config == before
    if name not in ("save_to_S3", "region"):
        with pytest.raises(ConfigError, match=words):
            SageMakerCheckpointConfig(**{**good, name: value})
    assert not torch.distributed.is_initialized()


def test_the_parameters_stand_in_the_predecessors_order_and_have_its_defaults() -> None:
    config = SageMakerCheckpointConfig("run-1", 1, "", "s3://bucket/p", None, True, False, logging.getLogger("app"))
    assert (config.s3_tier_base_path, config.save_to_s3) == ("s3://bucket/p", True)
    plain = SageMakerCheckpointConfig(namespace="run-1", world_size=1)
    assert (plain.s3_tier_base_path, plain.save_to_s3, plain.logger) == ("", False, None)
    for numpy_or_torch in (np.bool_(True), torch.tensor(True)):
        config.save_to_s3 = numpy_or_torch  # type: ignore[assignment]
        assert config.save_to_s3 is True
    assert pickle.loads(pickle.dumps(config)) == config
    config.s3_tier_base_path = "s3://bucket/p/"
    assert config.s3_base == "s3://bucket/p"


class DefaultS3PathStrategy:
    """As the predecessor's is called."""

    def __init__(self, base_path: str) -> None:
        self.base_path = base_path


class RayS3PathStrategy(DefaultS3PathStrategy):
    """As the predecessor's is called."""


@pytest.mark.parametrize("kind", [DefaultS3PathStrategy, RayS3PathStrategy])
def test_a_path_strategy_of_the_predecessor_tells_only_the_base_path(kind: Any) -> None:
    config = SageMakerCheckpointConfig("run-1", 1, s3_path_strategy=kind("s3://bucket/p"), save_to_s3=True)
    assert config.s3_base == "s3://bucket/p"
    config.s3_tier_base_path = "s3://bucket/q"
    with pytest.raises(ConfigError, match=r"both s3_tier_base_path and s3_path_strategy.*Leave s3_path_strategy out"):
        _ = config.s3_base
    with pytest.raises(ConfigError, match="must start with s3://"):
        SageMakerCheckpointConfig("run-1", 1, s3_path_strategy=kind("bucket/p"))


def test_save_to_s3_needs_an_s3_path() -> None:
    with pytest.raises(ConfigError, match="save_to_s3=True needs s3_tier_base_path.*s3://bucket/prefix"):
        SageMakerCheckpointConfig("run-1", 1, save_to_s3=True)


STEPS: list[tuple[object, object, int | str]] = [
    ("step_100/checkpoint", -1, 100),
    ("/path/step_100/checkpoint", -1, 100),
    ("step_42", -1, 42),
    ("runs/global_step_7/", -1, 7),
    (Path("runs/step_9/x"), -1, 9),
    ("step_0", -1, 0),
    ("step_100/checkpoint", 5, 5),
    ("any/path/here", 0, 0),
    ("", np.int64(3), 3),
    ("step_8", None, 8),
    ("", -1, r"Invalid step value: no step is given, and path '' names none\. .*step_100/checkpoint"),
    ("any/path/here", -1, "Invalid step value"),
    ("step_x", -1, "Invalid step value"),
    ("step_12b/x", -1, "Invalid step value"),
    ("misstep_12x", -1, "Invalid step value"),
    ("step_99999999999", -1, "Invalid step value"),
    (None, None, "Invalid step value"),
    ("step_1/step_2", -1, r"names several steps: \[1, 2\]"),
    (5, -1, "path must be str, got int"),
    ("step_5", -2, "step -2 is out of range"),
    ("", 10**10, "out of range"),
    ("step_5", True, "step must be an int, got bool"),
    ("step_5", 1.5, r"got float 1\.5"),
    ("step_5", "7", r"got str '7'\. Did you mean 7"),
]


@pytest.mark.parametrize(("path", "step", "found"), STEPS)
def test_the_step_is_given_or_stands_in_the_path(path: object, step: object, found: int | str) -> None:
    if isinstance(found, int):
        assert step_of_save(path, step) == found
        return
    with pytest.raises(ConfigError, match=found) as caught:
        step_of_save(path, step)
    assert caught.value.hint


def test_what_is_no_config_and_what_does_not_fit_the_job_is_refused() -> None:
    makers: list[Callable[[Any], object]] = [
        lambda config: SageMakerTieredStorageWriter(config, step=1),
        lambda config: SageMakerTieredStorageReader(config),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="must be a SageMakerCheckpointConfig, got a mapping"):
            make({"namespace": "x"})
        with pytest.raises(ConfigError, match=r"world_size=2 but there is no process group.*Count processes"):
            make(SageMakerCheckpointConfig("run-of-2", 2))


def test_the_recipe_has_the_tiers_that_are_wanted_and_the_environment_goes_over_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = SageMakerCheckpointConfig("run-1", 1)
    assert list(recipe_of(config, None).tiers) == ["memory"]
    config.s3_tier_base_path = "s3://bucket/p"
    monkeypatch.setenv("CHECKPOINT_MEMORY", "/dev/shm/elsewhere")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("SM_TIERED__TIERS__S3__KEEP", "{latest: 5}")
    recipe = recipe_of(config, "http://127.0.0.1:9200")
    values: Any = recipe.values()["tiers"]
    assert list(values) == ["memory", "cluster", "s3"]
    assert values["memory"]["path"] == "/dev/shm/elsewhere"
    assert values["cluster"]["url"] == "http://127.0.0.1:9200"
    assert values["s3"]["uri"] == "s3://bucket/p"
    assert (values["s3"]["endpoint_url"], values["s3"]["force_path_style"]) == ("http://minio:9000", True)
    assert values["s3"]["keep"] == {"latest": 5}


def test_the_service_is_looked_for_by_name_and_one_that_is_not_there_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(code: int) -> Callable[..., Any]:
        def getaddrinfo(*_: object) -> Any:
            raise socket.gaierror(code, "no such name")

        return getaddrinfo

    assert find_service({"SM_TIERED_HYPERPOD_URL": ""}) is None
    assert find_service({"SM_TIERED_HYPERPOD_URL": "http://127.0.0.1:9200/"}) == "http://127.0.0.1:9200"
    with pytest.raises(ConfigError, match=r"SM_TIERED_HYPERPOD_URL: .*scheme missing"):
        find_service({"SM_TIERED_HYPERPOD_URL": "localhost"})
    assert find_service({}) is None, "outside of Kubernetes nobody is asked"
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    monkeypatch.setattr(socket, "getaddrinfo", fails(socket.EAI_AGAIN))
    assert find_service(pod) == HYPERPOD_URL, "it may be there, and hold the newest checkpoint"
    assert not caplog.messages
    monkeypatch.setattr(cluster, "_PATIENCE_SECS", 0.2)
    monkeypatch.setattr(cluster, "_POLL_SECS", 0.02)
    answers = iter([socket.EAI_NONAME, socket.EAI_NONAME, socket.EAI_AGAIN])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: fails(next(answers))())
    assert find_service(pod) == HYPERPOD_URL, "its pods may start together with this one"
    assert not caplog.messages
    monkeypatch.setattr(socket, "getaddrinfo", fails(socket.EAI_NONAME))
    assert find_service(pod) is None
    assert "not enabled" in caplog.text
    assert "TieredStorageConfig {Mode: Enable}" in caplog.text
