"""What ``ckpt_path`` may say: ``tiered://latest`` or ``tiered://step/500``, in the namespace of the recipe."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sm_tiered.errors import ConfigError

__all__ = ["SCHEME", "Wanted", "parse_uri", "step_uri"]

SCHEME = "tiered://"
_STEP = re.compile(r"step/(\d{1,10})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which checkpoint a URI names."""

    step: int | None
    """None: the newest complete one, or none where nothing was ever saved."""


def step_uri(step: int) -> str:
    """Return the URI of *step*."""
    return f"{SCHEME}step/{step}"


def parse_uri(path: object) -> Wanted | None:
    """Return what *path* names, or None where it is a path and no URI of ours.

    Raises:
        ConfigError: it has our scheme and says something else.
    """
    text = str(path)
    # A Path swallows one of the two slashes.
    if not text.startswith((SCHEME, "tiered:/")):
        return None
    rest = text.removeprefix("tiered:").lstrip("/")
    if rest == "latest":
        return Wanted(step=None)
    found = _STEP.fullmatch(rest)
    if found is None:
        raise ConfigError(
            f"{text!r} names no checkpoint", hint=f"Use '{SCHEME}latest' or '{SCHEME}step/<n>', e.g. '{step_uri(500)}'."
        )
    return Wanted(step=int(found[1]))
