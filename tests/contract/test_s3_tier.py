"""The contract, over a real S3 endpoint: S3 itself, its wrappers, and both clients for reads and uploads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from sm_tiered.settings import S3Settings
from sm_tiered.testing.contract import TierContract
from sm_tiered.testing.faults import FaultyTier
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.s3 import S3Tier
from sm_tiered.tiers.wrappers import MeteredTier, RetryingTier

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ROOT = "some/prefix/run-1/"


class S3Contract(TierContract):
    """The contract with a look into the bucket past the tier. One tier a class, an empty bucket a test."""

    changes: ClassVar[dict[str, Any]] = {}
    made: tuple[Tier, S3Settings] | None = None
    client: S3Client
    bucket: str

    def make(self, settings: S3Settings) -> Tier:
        return S3Tier(settings, "run-1")

    @pytest.fixture
    def tier(self, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client) -> Iterator[Tier]:
        cls = type(self)
        if cls.made is None:
            settings = make_s3_settings(**self.changes)
            cls.made = self.make(settings), settings
        tier, settings = cls.made
        self.client, self.bucket = s3_client, settings.bucket
        yield tier
        for item in s3_client.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            s3_client.delete_object(Bucket=self.bucket, Key=item.get("Key", ""))

    def raw_read(self, tier: Tier, key: str) -> bytes | None:
        try:
            return self.client.get_object(Bucket=self.bucket, Key=ROOT + key)["Body"].read()
        except self.client.exceptions.NoSuchKey:
            return None

    def raw_keys(self, tier: Tier) -> list[str]:
        found = self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        return [item.get("Key", "").removeprefix(ROOT) for item in found]

    def raw_write(self, tier: Tier, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=ROOT + key, Body=data)


class TestS3Tier(S3Contract):
    """S3 bare."""


class TestWrappedS3Tier(S3Contract):
    """As `open_tier` returns it, inside wrappers that do nothing."""

    def make(self, settings: S3Settings) -> Tier:
        tier = open_tier(settings, "run-1")
        assert isinstance(tier, RetryingTier)
        return MeteredTier(FaultyTier(tier))


class TestS3TierByTheOtherClients(S3Contract):
    """Loads through s3torchconnector; uploads through boto3, which can send encryption headers."""

    changes: ClassVar[dict[str, Any]] = {
        "reader": "crt",
        "sse_kms_key_id": "alias/some-key",
        "part_bytes": 5 * 1024 * 1024,
    }
