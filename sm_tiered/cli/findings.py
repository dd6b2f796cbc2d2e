"""What ``sm-tiered doctor`` finds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sm_tiered.errors import TieredError

__all__ = ["Finding", "Level", "Mount", "existing", "failed", "missing_dirs", "mount_of", "ok", "warn"]

_ESCAPED = re.compile(r"\\([0-7]{3})", re.ASCII)


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    area: str
    """``machine``, ``versions``, or the name of a tier."""
    check: str
    level: Level
    text: str
    fix: str | None = None
    """What to change."""


def ok(area: str, check: str, text: str, fix: str | None = None) -> Finding:
    """Return that it is all right; *fix* says how it could be better."""
    return Finding(area=area, check=check, level=Level.OK, text=text, fix=fix)


def warn(area: str, check: str, text: str, fix: str | None = None) -> Finding:
    """Return that it may go wrong."""
    return Finding(area=area, check=check, level=Level.WARN, text=text, fix=fix)


def failed(area: str, check: str, error: TieredError | str, fix: str | None = None) -> Finding:
    """Return that it does not work."""
    text = error.message if isinstance(error, TieredError) else error
    hint = error.hint if isinstance(error, TieredError) else None
    return Finding(area=area, check=check, level=Level.FAIL, text=text, fix=fix or hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system."""

    point: str
    kind: str
    options: frozenset[str]

    def option(self, name: str) -> str | None:
        """Return the value of ``name=value``."""
        return next((text.partition("=")[2] for text in self.options if text.startswith(f"{name}=")), None)


def mount_of(path: Path, *, table: str = "/proc/self/mounts") -> Mount | None:
    """Return the file system that *path* is on, or will be; None where the kernel does not tell."""
    there = existing(path).resolve()
    try:
        lines = Path(table).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found = [mount for mount in map(_mount, lines) if mount is not None and _holds(mount.point, there)]
    # Of several on one point the last one is what is seen.
    return max(enumerate(found), key=lambda pair: (len(pair[1].point), pair[0]), default=(0, None))[1]


def existing(path: Path) -> Path:
    """Return *path*, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())


def missing_dirs(paths: Iterable[Path]) -> list[Path]:
    """Return which of *paths* and of the directories above are not there, the deepest first."""
    every = {place for path in paths for place in (path, *path.parents) if not os.path.lexists(place)}
    return sorted(every, key=lambda place: len(place.parts), reverse=True)


def _mount(line: str) -> Mount | None:
    fields = line.split(" ")
    if len(fields) < 4:
        return None
    point = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), fields[1])
    return Mount(point=point, kind=fields[2], options=frozenset(fields[3].split(",")))


def _holds(point: str, path: Path) -> bool:
    return path == Path(point) or Path(point) in path.parents
