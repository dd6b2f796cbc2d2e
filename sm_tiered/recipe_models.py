"""The tiers of a recipe as pydantic models: which keys there are, of which type, and the settings they stand for."""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from sm_tiered.errors import ConfigError
from sm_tiered.policies import OnException, SavePolicy, members_of, most_kept
from sm_tiered.recipe_fields import (
    check_bucket_uri,
    check_endpoint,
    check_positive,
    check_region,
    check_service,
    parse_size,
    shown,
)
from sm_tiered.recipe_policies import Directory, Flag, KeepSpec, Number, SaveSpec, Secs, Section, Size, Whole, located
from sm_tiered.settings import (
    HYPERPOD_URL,
    HyperPodSettings,
    LocalSettings,
    MemorySettings,
    S3Settings,
    TierSettings,
)

__all__ = ["HyperPodTier", "LocalTier", "MemoryTier", "S3Tier", "Tier"]


class _TierSection(Section):
    save: SaveSpec | None = None

    def save_policy(self) -> SavePolicy | None:
        """When to save there; None: when a save names the tier."""
        return self.save.policy() if self.save else None


class MemoryTier(_TierSection):
    """``kind: memory``."""

    kind: Literal["memory"]
    path: Directory = Field(default_factory=lambda: f"/dev/shm/sm_tiered-{os.getuid()}")
    budget: Size | None = None
    keep: KeepSpec = KeepSpec(latest=2)
    allow_disk: Flag = False

    @field_validator("save")
    @classmethod
    def _no_exception(cls, save: SaveSpec | None) -> SaveSpec | None:
        if save is not None and any(isinstance(policy, OnException) for policy in members_of(save.policy())):
            message = "on_exception brings what is whole in memory to other tiers: the memory tier has it"
            raise ConfigError(message, hint="Write it where a durable tier says when to save.")
        return save

    @field_validator("keep")
    @classmethod
    def _only_latest(cls, keep: KeepSpec) -> KeepSpec:
        if keep.latest is None:
            message = "the memory tier takes only {latest: n}: it recycles a fixed number of generations"
            raise ConfigError(message, hint="Write {latest: 2} here and keep others on a durable tier.")
        return keep

    def settings(self, name: str) -> TierSettings:
        """The tier's settings."""
        return MemorySettings(
            name=name,
            save=self.save_policy(),
            keep=self.keep.policy(),
            path=self.path,
            budget_bytes=parse_size(self.budget) if self.budget else None,
            allow_disk=self.allow_disk,
        )

    def place(self) -> tuple[str, ...]:
        """What no other tier may share."""
        return (self.path,)


class LocalTier(_TierSection):
    """``kind: local``."""

    kind: Literal["local"]
    path: Directory
    keep: KeepSpec = KeepSpec(latest=3)
    fsync: Flag = True

    def settings(self, name: str) -> TierSettings:
        """The tier's settings."""
        save, keep = self.save_policy(), self.keep.policy()
        return LocalSettings(name=name, save=save, keep=keep, path=self.path, fsync=self.fsync)

    def place(self) -> tuple[str, ...]:
        """What no other tier may share."""
        return (self.path,)


class Encryption(Section):
    """Server-side encryption with a key of one's own."""

    kms_key_id: str

    @field_validator("kms_key_id")
    @classmethod
    def _form(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9:/_-]{1,2048}", value, re.ASCII):
            raise ConfigError(f"{shown(value)} is no key id", hint="A key id, an alias/… or an ARN.")
        return value


class Retry(Section):
    """Budget of one operation."""

    attempts: Whole = 8
    deadline_secs: Secs = 120.0

    @field_validator("attempts")
    @classmethod
    def _range(cls, value: int) -> int:
        if not 1 <= value <= 100:
            raise ConfigError(f"must be 1 to 100, got {value}", hint="1 means no retry.")
        return value


class S3Tier(_TierSection):
    """``kind: s3``."""

    hints = {
        "bucket": "Write uri: s3://bucket/prefix.",
        "path": "Write uri: s3://bucket/prefix.",
        "prefix": "Write uri: s3://bucket/prefix.",
        "sse_kms_key_id": "Write sse: {kms_key_id: …}.",
    }

    kind: Literal["s3"]
    uri: str
    keep: KeepSpec = KeepSpec(latest=3)
    endpoint_url: str | None = None
    allow_http: Flag = False
    region: str | None = None
    profile: str | None = None
    force_path_style: Flag = False
    sse: Encryption | None = None
    part_size: Size = "32MiB"
    throughput_gbps: Number = 100.0
    reader: Literal["boto3", "crt"] = "boto3"
    request_timeout_secs: Secs = 30.0
    retry: Retry = Retry()

    @model_validator(mode="after")
    def _fields_fit(self) -> S3Tier:
        for name, value in (("uri", self.uri), ("endpoint_url", self.endpoint_url), ("region", self.region)):
            try:
                if value is not None:
                    self._check(name, value)
            except ConfigError as error:
                raise located(error, name) from error
        return self

    def _check(self, name: str, value: str) -> None:
        if name == "uri":
            check_bucket_uri(value)
        elif name == "endpoint_url":
            check_endpoint(value, allow_http=self.allow_http)
        else:
            check_region(value, compatible=self.endpoint_url is not None)

    @field_validator("profile")
    @classmethod
    def _profile_form(cls, value: str | None) -> str | None:
        if value is not None and not (value.isprintable() and 1 <= len(value) <= 128):
            raise ConfigError(f"{shown(value)} is no profile", hint="The name of a profile in ~/.aws/config.")
        return value

    @field_validator("part_size")
    @classmethod
    def _part_size_range(cls, value: str) -> str:
        if not 5 * 2**20 <= parse_size(value) <= 5 * 2**30:
            raise ConfigError(
                f"must be 5MiB to 5GiB, got {shown(value)}", hint="S3 takes no other; 32MiB is a good one."
            )
        return value

    @field_validator("throughput_gbps")
    @classmethod
    def _throughput_range(cls, value: float) -> float:
        return check_positive(value, most=10_000)

    def settings(self, name: str) -> TierSettings:
        """The tier's settings."""
        bucket, prefix = check_bucket_uri(self.uri)
        return S3Settings(
            name=name,
            save=self.save_policy(),
            keep=self.keep.policy(),
            bucket=bucket,
            prefix=prefix,
            endpoint_url=self.endpoint_url,
            region=self.region,
            profile=self.profile,
            force_path_style=self.force_path_style,
            sse_kms_key_id=self.sse.kms_key_id if self.sse else None,
            part_bytes=parse_size(self.part_size),
            throughput_gbps=self.throughput_gbps,
            reader=self.reader,
            request_timeout_secs=self.request_timeout_secs,
            retry_attempts=self.retry.attempts,
            retry_deadline_secs=self.retry.deadline_secs,
        )

    def place(self) -> tuple[str, ...]:
        """What no other tier may share."""
        return (*check_bucket_uri(self.uri), self.endpoint_url or "")


class ServiceRetry(Retry):
    """Budget of one request to a service that is soon asked again."""

    attempts: Whole = 3
    deadline_secs: Secs = 10.0


class HyperPodTier(_TierSection):
    """``kind: hyperpod``."""

    kind: Literal["hyperpod"]
    url: str = HYPERPOD_URL
    keep: KeepSpec = KeepSpec(latest=3)
    unreachable: Literal["skip", "raise"] = "skip"
    connect_timeout_secs: Secs = 3.0
    request_timeout_secs: Secs = 30.0
    retry: ServiceRetry = ServiceRetry()
    commit_deadline_secs: Secs = 120.0

    @field_validator("url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        return check_service(value)

    @field_validator("keep")
    @classmethod
    def _has_a_bound(cls, keep: KeepSpec) -> KeepSpec:
        if most_kept(keep.policy()) is None:
            message = "the cluster's memory holds a fixed number of checkpoints, and this policy has no limit"
            raise ConfigError(message, hint="Write {latest: 3} here and keep others on a durable tier.")
        return keep

    def settings(self, name: str) -> TierSettings:
        """The tier's settings."""
        return HyperPodSettings(
            name=name,
            save=self.save_policy(),
            keep=self.keep.policy(),
            url=self.url,
            unreachable=self.unreachable,
            connect_timeout_secs=self.connect_timeout_secs,
            request_timeout_secs=self.request_timeout_secs,
            retry_attempts=self.retry.attempts,
            retry_deadline_secs=self.retry.deadline_secs,
            commit_deadline_secs=self.commit_deadline_secs,
        )

    def place(self) -> tuple[str, ...]:
        """What no other tier may share."""
        return (self.url,)


Tier = Annotated[MemoryTier | LocalTier | S3Tier | HyperPodTier, Field(discriminator="kind")]
"""Any tier, told apart by its kind."""
