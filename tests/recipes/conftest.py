"""What the recipes that save to S3, or to a cluster's memory, share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from sm_tiered.testing.daemon import StandInDaemon
from tests.accelerate.conftest import SLOW_TO_LOAD
from tests.lightning.conftest import LIGHTNING
from tests.scripts import preload

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the scripts' ranks are forked from has loaded all frameworks, where any of these tests is to be run."""
    if any(Path(__file__).parent in item.path.parents for item in items):
        preload(*LIGHTNING, *SLOW_TO_LOAD)


@pytest.fixture
def bucket(s3_client: S3Client, s3_endpoint: str) -> dict[str, str]:
    """The environment that brings a recipe to a new, empty bucket, as a person with another endpoint would set it."""
    name = f"recipes-{uuid4().hex[:12]}"
    s3_client.create_bucket(Bucket=name)
    return {"CHECKPOINTS": f"s3://{name}/runs", "AWS_ENDPOINT_URL": s3_endpoint, "AWS_REGION": "us-east-1"}


@pytest.fixture
def service() -> Iterator[StandInDaemon]:
    """A stand-in for the checkpoint service of a HyperPod cluster."""
    with StandInDaemon() as running:
        yield running


@pytest.fixture
def cluster(service: StandInDaemon) -> dict[str, str]:
    """The environment that brings the HyperPod recipe to it."""
    return {"SM_TIERED__TIERS__CLUSTER__URL": service.url}
