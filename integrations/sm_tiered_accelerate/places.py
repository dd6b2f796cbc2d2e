"""What `save_state` and `load_state` are told of places, where the tiers decide: a path, or ``s3://…``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sm_tiered import layout
from sm_tiered.errors import ConfigError
from sm_tiered.records import CheckpointId
from sm_tiered.settings import LocalSettings, MemorySettings, S3Settings, Settings

__all__ = ["Destination", "destination", "is_s3", "wanted"]

_S3 = "s3://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where one save goes."""

    tiers: tuple[str, ...] | None = None
    """None: to all tiers of the recipe, as if it had named none."""
    copy_to: Path | None = None
    """A directory that gets the same files."""


def destination(output_dir: object, settings: Settings) -> Destination:
    """Return what *output_dir*, given to ``save_state``, means.

    Raises:
        ConfigError: it is in a place where the tiers keep theirs, or a bucket that the recipe does not name.
    """
    if output_dir is None:
        return Destination()
    if not isinstance(output_dir, (str, os.PathLike)):
        raise ConfigError(
            f"output_dir must be a path, got {type(output_dir).__name__} {output_dir!r}", hint="None means the tiers."
        )
    text = os.fsdecode(cast("str | os.PathLike[str]", output_dir))
    if is_s3(text):
        tier = _s3_tier(text, settings, "output_dir")
        memory = settings.memory
        return Destination(tiers=(memory.name, tier.name) if memory is not None else (tier.name,))
    path = Path(text).expanduser().absolute()
    for tier in settings.tiers:
        root = Path(tier.path) if isinstance(tier, (LocalSettings, MemorySettings)) else None
        if root is not None and root in (path, *path.parents):
            raise ConfigError(
                f"output_dir {text!r} lies in tier {tier.name!r}, at {root}",
                hint="Leave output_dir out: every save goes to the tiers. A path elsewhere gets a copy.",
            )
    return Destination(copy_to=path)


def wanted(input_dir: str, settings: Settings) -> CheckpointId | None:
    """Return the checkpoint that *input_dir*, ``s3://…``, names; None: the newest.

    Raises:
        ConfigError: a bucket that the recipe does not name, another namespace, or no checkpoint's directory.
    """
    tier = _s3_tier(input_dir, settings, "input_dir")
    rest = _key(input_dir).removeprefix(tier.prefix).strip("/")
    namespace, _, name = rest.partition("/")
    if rest in ("", settings.namespace):
        return None
    found = layout.parse_checkpoint_dir(name)
    if found is None or namespace != settings.namespace:
        raise ConfigError(
            f"input_dir {input_dir!r} names no checkpoint of namespace {settings.namespace!r}",
            hint="Leave it out for the newest, or end it with <namespace>/step_<10 digits>-<attempt>; "
            "`sm-tiered ls` shows them.",
        )
    return found


def is_s3(text: str) -> bool:
    """Return whether *text* is a URI of S3."""
    # A Path swallows one of the two slashes.
    return text.startswith((_S3, "s3:/"))


def _key(uri: str) -> str:
    return uri.removeprefix("s3:").lstrip("/").partition("/")[2]


def _s3_tier(uri: str, settings: Settings, what: str) -> S3Settings:
    tiers = [tier for tier in settings.durable if isinstance(tier, S3Settings)]
    bucket = uri.removeprefix("s3:").lstrip("/").partition("/")[0]
    for tier in tiers:
        if bucket == tier.bucket and f"{_key(uri)}/".startswith(f"{tier.prefix}/" if tier.prefix else ""):
            return tier
    have = ", ".join(f"s3://{tier.bucket}/{tier.prefix}" for tier in tiers) or "no S3 tier"
    raise ConfigError(
        f"{what} {uri!r} is in no tier of the recipe, which has {have}",
        hint="Leave it out, or name that bucket and prefix; the recipe decides where checkpoints go.",
    )
