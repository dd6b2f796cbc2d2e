"""Reading events back: the files of all tiers as one sequence. What they hold is data from outside, so it is checked.

A line that is no event, half a line among them, is counted and left out; a line that stands on several tiers counts
once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, cast

from sm_tiered import layout
from sm_tiered.errors import ConfigError, CorruptPartError, KeyNotFoundError
from sm_tiered.event_files import telling
from sm_tiered.layout import EventFile
from sm_tiered.tiers.base import Entry, Tier

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_PIECE_BYTES",
    "MAX_TOTAL_BYTES",
    "Piece",
    "Reading",
    "Told",
    "merge",
    "of_paths",
    "of_tier",
]

MAX_LINE_BYTES = 64 * 1024
MAX_PIECE_BYTES = 32 * 1024 * 1024
MAX_TOTAL_BYTES = 256 * 1024 * 1024
"""What is read in all; the newest files first."""
_MAX_TIME = 1e11
_MAX_KIND = 64

Each = Callable[[Callable[[Entry], bytes | None], Sequence[Entry]], Iterable[bytes | None]]
"""Applies a function to each, in order, like `map`; several at once where that is worth it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One event, as it was told."""

    time: float
    """UTC seconds since the epoch, by the teller's clock."""
    kind: str
    """The name of its class in `sm_tiered.events`, or of one that another release has."""
    rank: int | None
    """None: a drainer."""
    launch: str
    """The same for all that one launch told; empty where the file does not tell."""
    namespace: str
    facts: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One file's lines."""

    where: str
    """For messages."""
    file: EventFile | None
    """None: its name does not tell."""
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """All that was found."""

    events: tuple[Told, ...] = ()
    """In the order of time."""
    files: int = 0
    bytes: int = 0
    bad_lines: int = 0
    left_out: tuple[str, ...] = ()
    """What was not read, and why."""


@dataclass(slots=True, kw_only=True)
class _Budget:
    total: int
    left: int
    left_out: list[str] = field(default_factory=list[str])

    def take(self, where: str, size: int) -> bool:
        """Whether there is room for it; what there is none for is noted."""
        if size > MAX_PIECE_BYTES:
            self.left_out.append(f"{where} is longer than {MAX_PIECE_BYTES} bytes")
        elif size > self.left:
            self.left_out.append(f"{where}: {self.total} bytes of newer events are read already")
        else:
            self.left -= size
            return True
        return False


def of_tier(tier: Tier, *, each: Each = map, max_bytes: int = MAX_TOTAL_BYTES) -> tuple[list[Piece], tuple[str, ...]]:
    """Return the files of events on *tier* that tell the run's story, and what was left out, newest first.

    Raises:
        TierError: it did not answer.
    """
    budget = _Budget(total=max_bytes, left=max_bytes)
    found = sorted(telling(tier.list(f"{layout.EVENTS}/")), key=lambda pair: pair[0].modified_at, reverse=True)
    chosen = [(entry, file) for entry, file in found if budget.take(f"{tier.name}: {entry.key}", entry.size)]

    def read(entry: Entry) -> bytes | None:
        try:
            return tier.get(entry.key, max_bytes=MAX_PIECE_BYTES).data
        except KeyNotFoundError:
            return None  # put aside or removed since
        except CorruptPartError:
            budget.left_out.append(f"{tier.name}: {entry.key} grew beyond {MAX_PIECE_BYTES} bytes")
            return None

    bodies = each(read, [entry for entry, _ in chosen])
    pieces = [
        Piece(where=f"{tier.name}: {entry.key}", file=file, data=data)
        for (entry, file), data in zip(chosen, bodies, strict=True)
        if data is not None
    ]
    return pieces, tuple(budget.left_out)


def of_paths(paths: Iterable[Path], *, max_bytes: int = MAX_TOTAL_BYTES) -> tuple[list[Piece], tuple[str, ...]]:
    """Return the files of events that *paths* name: each a file, or a directory of them.

    Raises:
        ConfigError: one of them can't be read, or a directory holds none.
    """
    budget = _Budget(total=max_bytes, left=max_bytes)
    pieces: list[Piece] = []
    for path in paths:
        for chosen in _in_directory(path) if path.is_dir() else [path]:
            try:
                size = chosen.stat().st_size
                if budget.take(str(chosen), size):
                    with chosen.open("rb") as opened:
                        data = opened.read(MAX_PIECE_BYTES)
                    file = layout.parse_event_file_name(chosen.name)
                    pieces.append(Piece(where=str(chosen), file=file, data=data))
            except OSError as error:
                raise ConfigError(f"{chosen}: {error.strerror}", hint="Name a file or directory of events.") from error
    return pieces, tuple(budget.left_out)


def _in_directory(path: Path) -> list[Path]:
    """The files of events in *path*, or in its ``events``."""
    for directory in (path, path / layout.EVENTS):
        try:
            with os.scandir(directory) as scanned:
                entries = [
                    Entry(key=found.name, size=(facts := found.stat()).st_size, modified_at=facts.st_mtime)
                    for found in scanned
                    if found.is_file()
                ]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}") from error
        found = sorted(telling(entries), key=lambda pair: pair[0].modified_at, reverse=True)
        if found:
            return [directory / entry.key for entry, _ in found]
    hint = "Give the `events` directory of a namespace, files of it, or a recipe."
    raise ConfigError(f"{path} holds no files of events", hint=hint)


def merge(pieces: Iterable[Piece], *, left_out: Iterable[str] = ()) -> Reading:
    """Return what *pieces* hold, as one sequence."""
    events: list[Told] = []
    seen: set[tuple[str, bytes]] = set()
    files = size = bad = 0
    for piece in pieces:
        files, size = files + 1, size + len(piece.data)
        # Lines move from piece to piece when one is put aside, and a tier may have an older state of each.
        stem = piece.file.stem if piece.file is not None else ""
        launch = piece.file.nonce if piece.file is not None and piece.file.rank is not None else ""
        for line in piece.data.split(b"\n"):
            if not line or (stem, line) in seen:
                continue
            seen.add((stem, line))
            told = _parse(line, launch)
            if told is None:
                bad += 1
            else:
                events.append(told)
    events.sort(key=lambda told: told.time)
    return Reading(events=tuple(events), files=files, bytes=size, bad_lines=bad, left_out=tuple(left_out))


def _parse(line: bytes, launch: str) -> Told | None:
    """Return the event that *line* tells, or None when it is none."""
    if len(line) > MAX_LINE_BYTES:
        return None
    try:
        found = cast(object, json.loads(line, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    facts = cast("dict[str, object]", found)
    when, kind, rank, namespace = (facts.pop(name, None) for name in ("time", "event", "rank", "namespace"))
    if isinstance(when, bool) or not isinstance(when, (int, float)) or not 0 <= when < _MAX_TIME:
        return None
    if not isinstance(kind, str) or not 0 < len(kind) <= _MAX_KIND or not isinstance(namespace, str):
        return None
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < layout.MAX_WORLD):
        return None
    if not math.isfinite(when):
        return None
    return Told(time=float(when), kind=kind, rank=rank, launch=launch, namespace=namespace, facts=facts)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")
