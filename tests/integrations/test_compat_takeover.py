"""A compat job that takes over what the predecessor left, from a place that is slow or never answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.errors import TieredError
from sm_tiered.settings import S3Settings
from sm_tiered_dcp.compat import SageMakerTieredStorageWriter, adoption
from tests.integrations.predecessor_made import NAMESPACE, made
from tests.integrations.test_compat import (
    end_sessions,
    environment,  # noqa: F401 - a fixture that all tests use
    fails,
    load,
    s3_config,
    state,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def put_old(settings: S3Settings, client: Any, tmp_path: Path, step: int) -> None:
    """Let the predecessor have saved *step* to S3."""
    made(state(float(step))).put(tmp_path / "old", step)
    old = tmp_path / "old" / NAMESPACE
    for path in old.rglob("*"):
        if path.is_file():
            key = f"{settings.prefix}/run-1/{path.relative_to(old)}"
            client.put_object(Bucket=settings.bucket, Key=key, Body=path.read_bytes())


def test_a_takeover_that_never_returns_ends_the_load_with_the_commit_deadline_and_no_training_begins(
    s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_old(s3_settings, s3_client, tmp_path, 40)
    monkeypatch.setenv("SM_TIERED__COMMIT_DEADLINE_SECS", "1")
    monkeypatch.setattr(adoption, "_GRACE_SECS", 0.5)
    config, gate = s3_config(s3_settings, monkeypatch), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: gate.wait(60))
        began = time.monotonic()
        text = fails(lambda: load(config))
        assert time.monotonic() - began < 10.0
        assert "longer than commit_deadline_secs, 1 s: a call in it does not return" in text
        with pytest.raises(TieredError, match="would start from scratch"):
            SageMakerTieredStorageWriter(config, step=0)
        gate.set()
    monkeypatch.delenv("SM_TIERED__COMMIT_DEADLINE_SECS")
    end_sessions(forget=True)
    assert load(config) == (40.0, 40)
