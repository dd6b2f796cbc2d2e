"""Tiers: places where checkpoints live. `open_tier` is the one way to get one from settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sm_tiered.errors import ConfigError
from sm_tiered.settings import HyperPodSettings, LocalSettings, MemorySettings, S3Settings, TierSettings
from sm_tiered.tiers.base import Blob, Chunks, Entry, Tier
from sm_tiered.tiers.shares import Share, ShareTier

if TYPE_CHECKING:
    from sm_tiered.tiers.wrappers import Retry

__all__ = ["Blob", "Chunks", "Entry", "Share", "ShareTier", "Tier", "abort_stale_uploads", "open_tier"]


def open_tier(settings: TierSettings, namespace: str, *, on_retry: Callable[[Retry], None] | None = None) -> Tier:
    """Return the tier that *settings* describe, rooted at *namespace*; nothing is asked of it yet.

    What is behind a network comes wrapped in a `RetryingTier`, which tells *on_retry* of each try that it repeats.

    Raises:
        ConfigError: no tier is of that kind, or a setting can't be used.
    """
    if isinstance(settings, MemorySettings):
        from sm_tiered.tiers.memory import MemoryTier

        return MemoryTier(settings, namespace)
    if isinstance(settings, LocalSettings):
        from sm_tiered.tiers.local import LocalTier

        return LocalTier(settings, namespace)
    if isinstance(settings, S3Settings):
        from sm_tiered.tiers.s3 import S3Tier
        from sm_tiered.tiers.wrappers import RetryingTier

        return RetryingTier(
            S3Tier(settings, namespace),
            attempts=settings.retry_attempts,
            deadline_secs=settings.retry_deadline_secs,
            on_retry=on_retry,
        )
    if isinstance(settings, HyperPodSettings):
        from sm_tiered.tiers.hyperpod import HyperPodTier
        from sm_tiered.tiers.retrying_shares import RetryingShareTier

        return RetryingShareTier(
            HyperPodTier(settings, namespace),
            attempts=settings.retry_attempts,
            deadline_secs=settings.retry_deadline_secs,
            on_retry=on_retry,
        )
    raise ConfigError(f"tier {settings.name!r}: no tier is made from {type(settings).__name__}")


def abort_stale_uploads(tier: Tier, older_than_secs: float, *, count_only: bool = False) -> int:
    """Abort this namespace's unfinished uploads that are older, where *tier* or what it wraps knows such.

    Returns how many; *count_only*: aborts none.

    Raises:
        TierError: the tier could not be asked.
    """
    abort: Callable[..., int] | None = getattr(tier, "abort_stale_uploads", None)
    if abort is not None:
        return abort(older_than_secs, count_only=count_only)
    inner: Tier | None = getattr(tier, "inner", None)
    return 0 if inner is None else abort_stale_uploads(inner, older_than_secs, count_only=count_only)
