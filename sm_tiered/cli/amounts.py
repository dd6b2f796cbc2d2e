"""Amounts that people type: durations, sizes and counts."""

from __future__ import annotations

import math
import re

from sm_tiered.cli.output import clean
from sm_tiered.errors import ConfigError

__all__ = ["bytes_of", "check_count", "check_number", "secs_of"]

_SECS = {"": 1, "s": 1, "min": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d{1,12}(?:\.\d{1,9})?) ?([a-z]*)", re.ASCII)


def secs_of(option: str, value: str) -> float:
    """Return the seconds that a duration such as ``6h`` means.

    Raises:
        ConfigError: it is none, or not above 0.
    """
    found = _DURATION.fullmatch(value.strip().lower())
    secs = float(found[1]) * _SECS.get(found[2], 0) if found else 0.0
    if not secs > 0:
        hint = "A number above 0 and one of s, min, h, d, e.g. 6h; without a unit: seconds."
        raise ConfigError(f"{option}: {clean(value)[:40]!r} is no duration", hint=hint)
    return secs


def bytes_of(option: str, value: str) -> int:
    """Return the bytes that a size such as ``14GiB`` means.

    Raises:
        ConfigError: it is none.
    """
    from sm_tiered.recipe_fields import parse_size

    try:
        return parse_size(value)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error.message}", hint=error.hint) from error


def check_count(option: str, value: int, *, least: int = 1, most: int) -> int:
    """Return *value*.

    Raises:
        ConfigError: it is not from *least* to *most*.
    """
    if not least <= value <= most:
        raise ConfigError(f"{option} is {value}", hint=f"Allowed: {least} to {most:,}.")
    return value


def check_number(option: str, value: float, *, least: float = 0.0) -> float:
    """Return *value*.

    Raises:
        ConfigError: it is not finite, or below *least*; 0 itself is none where *least* is 0.
    """
    if not math.isfinite(value) or value < least or (least == 0.0 and value == 0.0):
        raise ConfigError(f"{option} is {value}", hint=f"Allowed: {'above' if least == 0.0 else 'at least'} {least:g}.")
    return value
