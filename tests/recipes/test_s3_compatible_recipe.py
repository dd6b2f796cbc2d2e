"""An S3-compatible store: the recipe as it stands, against moto over HTTP on loopback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.testing.proxy import FaultProxy, Rule
from tests.recipes.launching import launched, lose_memory, s3_steps

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]


def environment(bucket: dict[str, str], memory: Path, endpoint: str | None = None) -> dict[str, str]:
    """What a person who has such a store sets; nothing of AWS's but the credentials."""
    return {
        "CHECKPOINTS": bucket["CHECKPOINTS"],
        "S3_ENDPOINT": endpoint or bucket["AWS_ENDPOINT_URL"],
        "CHECKPOINT_MEMORY": str(memory / "tier"),
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
    }


def test_it_goes_on_from_the_store_after_the_node_is_lost(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    env = environment(bucket, memory_dir)
    with launched(tmp_path, "s3_compatible.yaml", "--steps=12", env=env) as first:
        assert first.end() == [0, 0], first.text
    assert s3_steps(s3_client, bucket["CHECKPOINTS"]) == [12]
    lose_memory(memory_dir / "tier", "s3-compatible")
    with launched(tmp_path, "s3_compatible.yaml", "--steps=1000000", env=env) as second:
        second.reach(20)
        second.kill()
    assert second.restored() == (12, "store")


def test_a_store_that_ignores_conditions_gets_no_commit_and_the_training_goes_on(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    ignoring = Rule(kind="strip", headers=(("if-none-match", ""), ("if-match", "")))
    with FaultProxy(bucket["AWS_ENDPOINT_URL"], rules=[ignoring]) as proxy:
        env = environment(bucket, memory_dir, proxy.url)
        with launched(tmp_path, "s3_compatible.yaml", "--steps=12", env=env) as run:
            assert run.end() == [0, 0], run.text
    assert "step 10: loss" in run.text
    assert s3_steps(s3_client, bucket["CHECKPOINTS"]) == []
    assert "the store ignores If-None-Match" in run.text
