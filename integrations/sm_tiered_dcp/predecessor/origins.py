"""Where to import from, as a person writes it: ``s3://bucket/prefix``, or the address of the cluster's service."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

from sm_tiered.errors import ConfigError
from sm_tiered.layout import check_namespace
from sm_tiered.policies.keep import Latest
from sm_tiered.recipe_fields import check_bucket_uri, check_service
from sm_tiered.settings import HyperPodSettings, S3Settings, Settings
from sm_tiered.tiers.s3 import S3Tier
from sm_tiered.tiers.wrappers import RetryingTier
from sm_tiered_dcp.predecessor.daemon import DaemonSource
from sm_tiered_dcp.predecessor.outside import Outside
from sm_tiered_dcp.predecessor.sources import Source, TierSource

__all__ = ["open_daemon", "open_origin", "open_s3"]

_NAME = "predecessor"


def open_origin(origin: str, namespace: str, settings: Settings) -> Source:
    """Return what the predecessor may have left below *origin* in *namespace*; nothing is asked of it yet.

    How the place is reached (endpoint, region, profile, timeouts) is taken from the recipe's tier of that kind.

    Raises:
        ConfigError: *origin* is neither an S3 path nor an address, or *namespace* can't be one.
    """
    check_namespace(namespace)
    if origin.lower().startswith("s3:"):
        with _naming_the_option():
            bucket, prefix = check_bucket_uri(origin)
        return Outside(open_s3(_alike(settings, bucket), bucket, prefix, namespace))
    if origin.startswith(("http://", "https://")):
        known = next((tier for tier in settings.tiers if isinstance(tier, HyperPodSettings)), None)
        base = known or HyperPodSettings(name=_NAME, save=None, keep=Latest(1))
        with _naming_the_option():
            url = check_service(origin)
        return Outside(open_daemon(replace(base, name=_NAME, url=url), namespace))
    raise ConfigError(
        f"--from: {origin[:80]!r} is no place to import from",
        hint="Write its s3_tier_base_path, s3://bucket/prefix, or the address of the service, http://HOST:9200.",
    )


@contextmanager
def _naming_the_option() -> Generator[None, None, None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"--from: {error.message}", hint=error.hint) from error


def open_s3(settings: S3Settings, bucket: str, prefix: str, namespace: str) -> Source:
    """Return what is below that prefix, asked as the tier of *settings* is.

    The predecessor puts a slash behind its base path, also behind one that ends in a slash: both are looked into.
    """
    base = f"{prefix}/" if prefix else ""
    there = replace(settings, bucket=bucket, prefix=prefix)
    tiers = [
        RetryingTier(
            S3Tier(there, namespace, root=f"{base}{slash}{namespace}/"),
            attempts=settings.retry_attempts,
            deadline_secs=settings.retry_deadline_secs,
        )
        for slash in ("", "/")
    ]
    return TierSource(tiers, "s3://" + "/".join(filter(None, (bucket, prefix, namespace))))


def open_daemon(settings: HyperPodSettings, namespace: str) -> Source:
    """Return what the service of *settings* keeps."""
    return DaemonSource(settings, namespace)


def _alike(settings: Settings, bucket: str) -> S3Settings:
    """The recipe's S3 tier in that bucket, else its first one, else none: AWS's own settings then."""
    known = [tier for tier in settings.tiers if isinstance(tier, S3Settings)]
    same = [tier for tier in known if tier.bucket == bucket]
    default = S3Settings(name=_NAME, save=None, keep=Latest(1), bucket=bucket, prefix="")
    return next(iter([*same, *known]), default)
