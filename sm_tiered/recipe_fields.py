"""Checks of single recipe fields: sizes, paths, addresses. Nothing here touches a disk or the network."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from sm_tiered.errors import ConfigError

__all__ = [
    "MAX_SECS",
    "check_bucket_uri",
    "check_endpoint",
    "check_path",
    "check_positive",
    "check_region",
    "check_service",
    "closest",
    "is_secret",
    "parse_size",
    "shown",
]

MAX_SECS = 30 * 24 * 3600
"""No wait is longer, in seconds."""

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?) ?([A-Za-z]*)", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", re.ASCII)
_BUCKET_RULE = "A bucket has 3 to 63 of a-z 0-9 . - and begins and ends with a letter or digit."
_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=+@,:~-]+", re.ASCII)
_PRINTABLE = re.compile(r"[!-~]+", re.ASCII)
_DIRECTIONS = ("north", "south", "east", "west", "central", "northeast", "northwest", "southeast", "southwest")
_REGION = re.compile(rf"([a-z]{{2}}(?:-(?:gov|iso[a-z]?))?)-({'|'.join(_DIRECTIONS)})-([1-9]\d?)", re.ASCII)
_ANY_REGION = re.compile(r"[a-z0-9][a-z0-9-]{0,62}", re.ASCII)
_SECRET_VALUE = re.compile(
    r"(?:AKIA|ASIA)[A-Z0-9]{12}|://[^/]*@|X-Amz-|BEGIN [A-Z ]*PRIVATE"
    r"|\b(?:gh[a-z]|hf|github_pat)_[A-Za-z0-9_]{20}|\bey[A-Za-z0-9_-]{8,}\.ey"
    r"|(?i:secret|passw(?:or)?d|token|api_?key)=",
    re.ASCII,
)
_SECRET_KEY = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*\d)[A-Za-z0-9+/]{40}", re.ASCII)


def is_secret(text: str) -> bool:
    """Return whether *text* looks like credentials of a kind that is known."""
    return _SECRET_VALUE.search(text) is not None or _SECRET_KEY.fullmatch(text) is not None


def shown(value: object) -> str:
    """Return *value* for a message: short, on one line; a container or what looks like a secret only by its kind."""
    if value is None:
        return "nothing"
    if isinstance(value, (bool, int, float)):
        return repr(value) if isinstance(value, bool) or abs(value) < 2**64 else "a huge number"
    if isinstance(value, str):
        if is_secret(value):
            return "a value that is hidden, for it looks like a secret"
        return repr(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"


def closest(word: object, known: Iterable[str]) -> str | None:
    """Return the one of *known* that *word* is most likely a misspelling of."""
    text = str(word).lower()
    found = difflib.get_close_matches(text, list(known), n=1, cutoff=0.6 if len(text) > 2 else 0.5)
    return found[0] if found else None


def parse_size(text: str) -> int:
    """Return the bytes that a size such as ``16GiB`` means.

    Raises:
        ConfigError: no unit, an unknown one, or nothing left of it.
    """
    found = _SIZE.fullmatch(text.strip())
    hint = "A number and one of B, KiB, MiB, GiB, TiB, e.g. '16GiB'."
    if not found:
        raise ConfigError(f"{shown(text)} is no size", hint=hint)
    number, unit = found.groups()
    if unit not in _UNITS:
        wrong = f"unit missing in {shown(text)}" if not unit else f"unit {unit!r} is unknown"
        guess = f"{unit[0].upper()}iB" if unit and unit[0].upper() in "KMGT" else "GiB"
        raise ConfigError(wrong, hint=f"Did you mean '{number}{guess}'? {hint}")
    size = int(float(number) * _UNITS[unit])
    if not 1 <= size < 2**62:
        raise ConfigError(f"{shown(text)} is out of range", hint=hint)
    return size


def check_positive(value: float, *, most: float = MAX_SECS) -> float:
    """Return *value* when it is finite, above 0 and at most *most*.

    Raises:
        ConfigError: otherwise.
    """
    if not (math.isfinite(value) and 0 < value <= most):
        raise ConfigError(
            f"must be above 0 and at most {most:g}, got {shown(value)}", hint="Give a number in that range."
        )
    return value


def check_path(value: str) -> str:
    """Return *value* as an absolute path; a relative one stands for one below the current directory.

    Raises:
        ConfigError: it is empty, an address, or holds control characters.
    """
    if not value.strip():
        raise ConfigError("is empty", hint="Name a directory.")
    if "://" in value:
        raise ConfigError(f"{shown(value)} is an address, not a directory", hint="For S3 use kind: s3 with uri:.")
    if not value.isprintable():
        raise ConfigError(f"{shown(value)} holds control characters", hint="Name a directory.")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ConfigError(f"{shown(value)}: that home directory is not known", hint="Write the path in full.")
    return os.path.abspath(expanded)


def check_bucket_uri(value: str) -> tuple[str, str]:
    """Return bucket and prefix (no slash at its ends) of an ``s3://bucket/prefix``.

    Raises:
        ConfigError: it is none; says which part is wrong.
    """
    hint = "Write s3://bucket/prefix."
    if not value.startswith("s3://"):
        if value[:5].lower() == "s3://":
            raise ConfigError(f"{shown(value)} must start with s3:// in lower case", hint=hint)
        if re.match(r"https?://", value, re.IGNORECASE):
            hint = "Give uri: s3://bucket/prefix, and the address of an S3-compatible store as endpoint_url."
        raise ConfigError(f"{shown(value)} must start with s3://", hint=hint)
    bucket, _, prefix = value.removeprefix("s3://").partition("/")
    if "@" in bucket:
        raise ConfigError("credentials in a uri (value hidden)", hint="They come from AWS's own chain only.")
    if not bucket:
        raise ConfigError(f"{shown(value)} names no bucket", hint=hint)
    if not _BUCKET.fullmatch(bucket) or re.search(r"\.\.|\.-|-\.", bucket) or _is_address(bucket):
        raise ConfigError(f"{shown(bucket)} can't be the name of a bucket", hint=_BUCKET_RULE)
    prefix = prefix.removesuffix("/")
    for segment in prefix.split("/") if prefix else []:
        if segment in ("", ".", ".."):
            raise ConfigError(f"{shown(value)} has an empty or dot segment", hint=hint)
        if not _SEGMENT.fullmatch(segment):
            raise ConfigError(
                f"{shown(segment)} has a character that a prefix may not hold", hint="Use A-Z a-z 0-9 _ . -"
            )
    if len(prefix) > 700:
        raise ConfigError(f"the prefix is too long: {len(prefix)} > 700 characters", hint="S3 keys end at 1024 bytes.")
    return bucket, prefix


def check_endpoint(value: str, *, allow_http: bool) -> str:
    """Return *value* when it can be the address of an S3-compatible store. What may be a secret is never repeated.

    Raises:
        ConfigError: otherwise.
    """
    host = _check_address(value, hint="Write https://host:port; credentials come from AWS's own chain only.")
    if value.startswith("http:") and not allow_http and not _is_loopback(host):
        raise ConfigError(f"{shown(value)}: plain http leaves this machine", hint="Use https, or set allow_http: true.")
    return value


def check_service(value: str) -> str:
    """Return *value* when it can be the address of a cluster's own service, which answers plain http.

    Raises:
        ConfigError: otherwise; what may be a secret is not repeated.
    """
    hint = "Write http://host:port, without a path: the service takes no credentials."
    _check_address(value, hint=hint)
    if urlsplit(value).path not in ("", "/"):
        raise ConfigError(f"{shown(value)} has a path", hint=hint)
    return value.rstrip("/")


def _check_address(value: str, *, hint: str) -> str:
    """Return the host of the http or https address *value*."""
    if "@" in value:
        raise ConfigError("credentials in a URL (value hidden)", hint=hint)
    if "?" in value or "#" in value:
        raise ConfigError("a URL with a query (value hidden)", hint=hint)
    scheme, separator, _ = value.partition("://")
    if not separator or not _PRINTABLE.fullmatch(value):
        raise ConfigError(
            f"{shown(value)}: scheme missing",
            hint=f"Did you mean 'https://{value[:60]}'?" if value.isprintable() else hint,
        )
    try:
        host, port = urlsplit(value).hostname, urlsplit(value).port
    except ValueError as error:
        raise ConfigError(f"{shown(value)} is no URL: {error}", hint=hint) from error
    if scheme not in ("http", "https") or not host or port == 0:
        raise ConfigError(f"{shown(value)} is no http or https address", hint=hint)
    return host


def check_region(value: str, *, compatible: bool) -> str:
    """Return *value* when it has the form of an AWS region; of a *compatible* store's any short name will do.

    Raises:
        ConfigError: otherwise.
    """
    if _REGION.fullmatch(value) or (compatible and _ANY_REGION.fullmatch(value)):
        return value
    parts = re.fullmatch(r"(.+)-([a-z]+)-(\d+)", value)
    swapped = [way for way in _DIRECTIONS if parts and sorted(way) == sorted(parts[2])]
    direction = swapped[0] if swapped else closest(parts[2], _DIRECTIONS) if parts else None
    guess = f"Did you mean '{parts[1]}-{direction}-{parts[3]}'?" if parts and direction else "E.g. us-east-1."
    raise ConfigError(f"{shown(value)} is no known form of a region", hint=guess)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)
