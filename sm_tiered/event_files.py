"""Files of events: which a launch and a node write to, and which of them are brought to the durable tiers.

Every launch has a file for each rank, and every life of a node's memory directory one for its drainers, so none ever
takes the place of another. Who commits publishes: of each launch the file of the lowest rank here, which is rank 0
where it lives, and the drainers' one. All ranks tell alike what a ledger needs, so a job of thousands of ranks leaves
two files for each launch. What is full is published once, the rest where it has grown.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sm_tiered import layout
from sm_tiered.errors import KeyNotFoundError
from sm_tiered.layout import EventFile
from sm_tiered.tiers.base import Entry, Tier
from sm_tiered.tiers.shares import ShareTier

__all__ = ["LAUNCHES_KEPT", "OLD_BYTES_KEPT", "Publisher", "begin_launch", "of_drainer", "telling"]

LAUNCHES_KEPT = 64
"""Of so many earlier launches a rank leaves its files in memory."""
OLD_BYTES_KEPT = 16 * 1024 * 1024
"""So much of theirs, in all; the oldest launches go."""
_PUBLISHED_BYTES = 32 * 1024 * 1024
"""A longer piece is none of ours."""


def begin_launch(root: Path, *, launch: str, rank: int) -> Path:
    """Return the file that *rank* of *launch* tells its events to, below the namespace's directory *root*.

    *launch* begins with 8 hex digits. What earlier launches of this rank left beyond what is kept is removed.
    """
    events = root / layout.EVENTS
    _remove_old(events, rank)
    file = EventFile(rank=rank, utc_secs=int(time.time()), nonce=launch[:8])
    return events / layout.event_file_name(file)


def of_drainer(root: Path) -> Path:
    """Return the file that the drainers of the memory directory *root* tell their events to."""
    events = root / layout.EVENTS
    drainers = [file for file in _files(events) if file.rank is None and file.nonce]
    new = EventFile(rank=None, utc_secs=int(time.time()), nonce=secrets.token_hex(4))
    chosen = max(drainers, key=lambda file: file.utc_secs, default=new)
    return events / layout.event_file_name(chosen._replace(piece=0))


def telling(entries: Iterable[Entry]) -> list[tuple[Entry, EventFile]]:
    """Return those of *entries* that tell a run's story: of each launch its lowest rank's, and the drainers'."""
    found = [(entry, file) for entry in entries if (file := _parsed(entry)) is not None]
    lowest: dict[str, int] = {}
    for _, file in found:
        if file.rank is not None:
            lowest[file.nonce] = min(file.rank, lowest.get(file.nonce, file.rank))
    return [(entry, file) for entry, file in found if file.rank is None or file.rank == lowest[file.nonce]]


class Publisher:
    """Brings the events of one node to durable tiers."""

    def __init__(self, memory: Tier) -> None:
        self._memory = memory
        self._sizes: dict[int, tuple[Tier, dict[str, int]]] = {}
        """By tier, for two recipes may call theirs alike: what stands there, by key."""

    def publish(self, tier: Tier) -> None:
        """Bring to *tier* what has grown since the last time, if it keeps files.

        Lines are only ever added, so what is as long as here is the same.

        Raises:
            TierError: *tier* did not take it.
        """
        if isinstance(tier, ShareTier):
            return
        if id(tier) not in self._sizes:
            self._sizes[id(tier)] = tier, {entry.key: entry.size for entry in tier.list(f"{layout.EVENTS}/")}
        _, sizes = self._sizes[id(tier)]
        for entry, file in telling(self._memory.list(f"{layout.EVENTS}/")):
            if not file.nonce or not 0 < entry.size <= _PUBLISHED_BYTES or sizes.get(entry.key) == entry.size:
                continue
            with suppress(KeyNotFoundError):  # just put aside: the next time, it has its new name
                data = self._memory.get(entry.key, max_bytes=2 * _PUBLISHED_BYTES).data
                tier.put(entry.key, data)
                sizes[entry.key] = len(data)


def _parsed(entry: Entry) -> EventFile | None:
    return layout.parse_event_file_name(entry.key.removeprefix(f"{layout.EVENTS}/"))


def _files(events: Path) -> list[EventFile]:
    with suppress(OSError):  # no events were told there yet, or none can be: telling says so
        return [file for name in os.listdir(events) if (file := layout.parse_event_file_name(name)) is not None]
    return []


def _remove_old(events: Path, rank: int) -> None:
    files = [file for file in _files(events) if file.rank == rank and file.nonce]
    newest_first = sorted({(file.utc_secs, file.nonce) for file in files}, reverse=True)
    room, kept = OLD_BYTES_KEPT, 0
    for launch in newest_first:
        paths = [events / layout.event_file_name(file) for file in files if (file.utc_secs, file.nonce) == launch]
        with suppress(OSError):  # what can't be removed stands in nobody's way
            room -= sum(path.stat().st_size for path in paths)
            kept += 1
            if kept > LAUNCHES_KEPT or room < 0:
                for path in paths:
                    path.unlink()
