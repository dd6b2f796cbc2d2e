"""JSON that ends with its own digest, and its fields read strictly: what is not exactly ours is a `FormatError`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from sm_tiered import checksum
from sm_tiered.errors import ConfigError, FormatError, TieredError

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "Json",
    "digest_of",
    "dump",
    "integer",
    "integers",
    "list_of",
    "mapping",
    "number",
    "parsed",
    "sealed",
    "text",
]

FORMAT = 1
"""Version of records, manifests, attempt records and file lists; a reader refuses what is newer."""

MAX_BYTES = 256 * 1024 * 1024
"""Longer files are refused unread."""

_SEAL_BYTES = len(',"xxh3_128":"' + 32 * "0" + '"}')
_LIMIT = 2**62
"""Numbers are below it."""

_T = TypeVar("_T")
Json = Mapping[str, object]
"""The fields of a JSON object."""


def dump(value: object) -> str:
    """Return *value* as JSON: the same value always gives the same text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sealed(text: str) -> bytes:
    """Return the JSON object *text* with its own digest as the last field."""
    body = text[:-1].encode()
    return body + _seal(body)


def _seal(body: bytes) -> bytes:
    return f',"xxh3_128":"{checksum.digest(body)}"}}'.encode()


def parsed(data: bytes | memoryview, kind: str | tuple[str, ...], build: Callable[[Json], _T]) -> _T:
    """Return what *build* makes of the fields of *data*, a sealed object of *kind*.

    Raises:
        FormatError: it is none, is damaged, or is of a newer release.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(f"a file of {len(data)} bytes is no record: at most {MAX_BYTES} are read")
    whole = bytes(data)
    try:
        found = cast(object, json.loads(whole))
        fields = mapping(found)
        if fields.get("kind") not in (kind if isinstance(kind, tuple) else (kind,)):
            raise FormatError(f"kind is {str(fields.get('kind'))[:40]!r}, expected {kind}")
        version = integer(fields, "format")
        if version > FORMAT:
            raise FormatError(
                f"format {version} is newer than this release reads ({FORMAT})", hint="Upgrade sm-tiered."
            )
        if _seal(whole[:-_SEAL_BYTES]) != whole[-_SEAL_BYTES:]:
            raise FormatError("damaged: it differs from its own digest", hint="Use another copy, or an older step.")
        return build(fields)
    except TieredError as error:
        if isinstance(error, ConfigError):
            raise FormatError(error.message) from error
        raise
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise FormatError(f"not a {kind}: {type(error).__name__} {str(error)[:200]}") from error


def mapping(value: object) -> Json:
    """Return *value*, a JSON object."""
    if not isinstance(value, dict):
        raise FormatError(f"a JSON object was expected, got {type(value).__name__}")
    return cast("dict[str, object]", value)


def list_of(fields: Json, name: str) -> Sequence[object]:
    """Return the list in field *name*."""
    value = fields[name]
    if not isinstance(value, list):
        raise FormatError(f"{name} must be a list")
    return cast("list[object]", value)


def integer(fields: Json, name: str, *, low: int = 0, below: int = _LIMIT) -> int:
    """Return the integer in field *name*, at least *low*."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value < below:
        raise FormatError(f"{name} must be an integer of at least {low}, below {below}, got {str(value)[:40]!r}")
    return value


def integers(fields: Json, name: str) -> tuple[int, ...]:
    """Return the list of integers in field *name*, none negative."""
    values = list_of(fields, name)
    for value in values:
        # Thousands of them are read at a time: only what is wrong takes the long way to its message.
        if type(value) is not int or not 0 <= value < _LIMIT:
            integer({name: value}, name)
    return cast("tuple[int, ...]", tuple(values))


def number(value: object) -> float:
    """Return *value*, a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FormatError(f"a finite number was expected, got {str(value)[:40]!r}")
    return float(value)


def text(value: object) -> str:
    """Return *value*, a string."""
    if not isinstance(value, str):
        raise FormatError(f"a string was expected, got {type(value).__name__}")
    return value


def digest_of(value: object) -> str:
    """Return *value*, an XXH3-128 in 32 hex digits."""
    found = text(value)
    if len(found) != 32 or set(found) - set("0123456789abcdef"):
        raise FormatError(f"{found[:40]!r} is no XXH3-128 digest")
    return found
