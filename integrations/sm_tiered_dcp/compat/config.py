"""`SageMakerCheckpointConfig`: where checkpoints live, as the predecessor's users write it; checked at each change."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed

from sm_tiered.errors import ConfigError
from sm_tiered.layout import MAX_WORLD, check_namespace
from sm_tiered.recipe_fields import check_bucket_uri, closest, shown

__all__ = ["SageMakerCheckpointConfig", "check_config", "check_kind", "check_world"]

dist: Any = torch.distributed  # its functions are only partly typed

_STRATEGIES = ("DefaultS3PathStrategy", "RayS3PathStrategy")
"""The predecessor's two, told by name: its package need not be installed."""
_LOCAL = "Name a tier of kind local in a recipe, for sm_tiered_dcp.TieredStorageWriter."


@dataclass
class SageMakerCheckpointConfig:
    """The predecessor's parameters. Fields may be set at any time, ``save_to_s3`` between saves most of all.

    ``save_to_s3`` counts as it is when ``dcp.save`` or ``dcp.async_save`` is called: what is set later is for later
    saves. A value that can't be used raises ConfigError where it is set; that ``save_to_s3`` has no path, which may
    be set after it, only where a writer is made.
    """

    namespace: str
    """Names the run: A-Z a-z 0-9 _ -."""
    world_size: int
    """All processes of the job, not its data-parallel replicas."""
    disk_tier_base_path: str = ""
    """Not taken, as with the predecessor."""
    s3_tier_base_path: str = ""
    """``s3://bucket/prefix``; empty: nothing is saved to or looked for in S3."""
    s3_path_strategy: Any = None
    """Not needed: keys are our own, and what the predecessor wrote is found in both of its layouts."""
    save_to_s3: bool = False
    """Whether the next save goes to S3 too."""
    save_to_disk: bool = False
    """Not taken, as with the predecessor."""
    logger: logging.Logger | None = None
    """Gets our lines instead of the console."""

    def __post_init__(self) -> None:
        if self.save_to_s3:
            self.check_s3()

    def __setattr__(self, name: str, value: object) -> None:
        check = _CHECKS.get(name)
        if check is None:
            guess = closest(name, _CHECKS)
            hint = f"Did you mean {guess}?" if guess else f"There are {', '.join(_CHECKS)}."
            raise ConfigError(f"SageMakerCheckpointConfig has no {shown(name)}", hint=hint)
        super().__setattr__(name, check(value))

    @property
    def s3_base(self) -> str:
        """The ``s3://`` address below which this run's checkpoints stand; empty without S3."""
        given = str(getattr(self.s3_path_strategy, "base_path", ""))
        if given and self.s3_tier_base_path:
            raise ConfigError(
                "both s3_tier_base_path and s3_path_strategy are given", hint="Leave s3_path_strategy out."
            )
        return self.s3_tier_base_path or given

    def check_s3(self) -> None:
        """Raise ConfigError when ``save_to_s3`` has no place to save to."""
        if not self.s3_base:
            raise ConfigError(
                "save_to_s3=True needs s3_tier_base_path", hint="Give it, e.g. s3_tier_base_path='s3://bucket/prefix'."
            )


def check_config(config: object) -> SageMakerCheckpointConfig:
    """Return *config* when it is one, and fits the job as it is now.

    Raises:
        ConfigError: otherwise.
    """
    checked = check_kind(config)
    check_world(checked.world_size, of_now=True)
    return checked


def check_kind(config: object) -> SageMakerCheckpointConfig:
    """Return *config* when it is one.

    Raises:
        ConfigError: otherwise.
    """
    if not isinstance(config, SageMakerCheckpointConfig):
        hint = "Pass sm_tiered_dcp.compat.SageMakerCheckpointConfig(namespace=…, world_size=…)."
        raise ConfigError(f"checkpoint_config must be a SageMakerCheckpointConfig, got {shown(config)}", hint=hint)
    return config


def check_world(value: object, *, of_now: bool = False) -> int:
    """Return *value* when it can be the number of processes; *of_now*: of a job without a process group it is 1.

    Raises:
        ConfigError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        guess = isinstance(value, str) and value.isascii() and value.isdigit()
        hint = f"Did you mean {value}?" if guess else "Pass dist.get_world_size()."
        raise ConfigError(f"world_size must be int, got {type(value).__name__} {shown(value)}", hint=hint)
    if not 1 <= value <= MAX_WORLD:
        raise ConfigError(
            f"world_size must be 1 to {MAX_WORLD}, got {shown(value)}", hint="Pass dist.get_world_size()."
        )
    started = bool(dist.is_available() and dist.is_initialized())
    ranks = dist.get_world_size() if started else 1
    if value != ranks and (started or of_now):
        has = f"the process group has {ranks} ranks" if started else "there is no process group"
        raise ConfigError(
            f"world_size={value} but {has}",
            hint="Count processes, not data-parallel replicas: pass dist.get_world_size().",
        )
    return value


def _address(value: object) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        hint = "Write s3_tier_base_path='s3://bucket/prefix'."
        raise ConfigError(f"s3_tier_base_path must be str, got {type(value).__name__} {shown(value)}", hint=hint)
    try:
        bucket, prefix = check_bucket_uri(value)
    except ConfigError as error:
        raise ConfigError(f"s3_tier_base_path {error.message}", hint=error.hint) from None
    return f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"


def _flag(value: object) -> bool:
    kind: Any = value
    if isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", "")) in ("bool", "torch.bool") and getattr(kind, "ndim", None) == 0:
        return bool(kind)
    hint = "Write e.g. save_to_s3 = step % 50 == 0."
    raise ConfigError(f"save_to_s3 must be bool, got {type(value).__name__} {shown(value)}", hint=hint)


def _no_disk(value: object) -> Any:
    if value not in (None, "", False):
        raise ConfigError(f"disk_tier_base_path can't be used here, got {shown(value)}", hint=_LOCAL)
    return ""


def _no_disk_saves(value: object) -> bool:
    if value not in (None, False):
        raise ConfigError(f"save_to_disk can't be used here, got {shown(value)}", hint=_LOCAL)
    return False


def _strategy(value: object) -> Any:
    base: object = getattr(value, "base_path", None)
    if value is not None and (type(value).__name__ not in _STRATEGIES or not isinstance(base, str)):
        hint = "Leave it out: it isn't needed. Where keys lie is ours; both of the predecessor's layouts are read."
        raise ConfigError(f"s3_path_strategy can't be {shown(value)}", hint=hint)
    if base:
        _address(base)
    return value


def _logger(value: object) -> Any:
    if value is None or isinstance(value, logging.Logger):
        return value
    if isinstance(value, logging.LoggerAdapter):
        adapted: Any = value  # pyright: ignore[reportUnknownVariableType]
        return _logger(adapted.logger)
    hint = "Pass logging.getLogger('my-app')."
    raise ConfigError(f"logger must be a logging.Logger, got {type(value).__name__} {shown(value)}", hint=hint)


_CHECKS: dict[str, Callable[[object], Any]] = {
    "namespace": check_namespace,
    "world_size": check_world,
    "disk_tier_base_path": _no_disk,
    "s3_tier_base_path": _address,
    "s3_path_strategy": _strategy,
    "save_to_s3": _flag,
    "save_to_disk": _no_disk_saves,
    "logger": _logger,
}
