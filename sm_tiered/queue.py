"""The queue between trainers and the drainer: small files in the memory tier, so that it outlives both.

An entry says "promote what this rank wrote of this checkpoint to this tier". While its bytes are needed it is called
``promote-…``, once they are on the tier ``commit-…``; it goes when a result is written::

    .queue/promote-<checkpoint>-<rank>-<tier>.json
    .queue/result-<checkpoint>-<tier>.json           committed, or the error
    .queue/recipe-<digest>.json                      the recipe that the drainer opens the tier with
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import cast

from sm_tiered import checksum, layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import FormatError, KeyNotFoundError, TieredError, error_from_json, error_to_json
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.base import Tier

__all__ = ["RESULTS_KEPT", "Entry", "Queue", "Result"]

_NAME = re.compile(r"(promote|commit)-(step_[0-9a-f_a-]+)-(\d{5})-([a-z][a-z0-9_]{0,31})\.json", re.ASCII)
RESULTS_KEPT = 64
"""Results that a node keeps; a save whose own is older has been told long ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One rank's share of one promotion."""

    checkpoint: CheckpointId
    rank: int
    tier: str
    world: int
    recipe: str
    """Digest of the recipe text."""
    finisher: str
    """Module that makes the files for other readers; empty: none are made."""
    deadline_at: float
    """UTC seconds by this node's clock: when the promotion is given up."""
    patient: bool = True
    """Whether a tier that does not answer is asked until then; else its own retries are all."""
    place: int = 0
    """Of the tier in the recipe: of one checkpoint the nearest tier comes first."""
    sent: bool = False
    """Parts and record are on the tier; what is left is the commit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a promotion ended on this node."""

    error: TieredError | None
    """None: committed."""


class Queue:
    """The queue directory of one node's memory tier."""

    def __init__(self, memory: Tier) -> None:
        self._memory = memory

    def put_recipe(self, text: str) -> str:
        """Leave *text* for the drainer and return its digest."""
        found = checksum.digest(text.encode())
        self._memory.put(f"{layout.QUEUE}/recipe-{found}.json", text.encode())
        return found

    def recipe(self, found: str) -> str:
        """Return the recipe text with that digest."""
        return self._memory.get(f"{layout.QUEUE}/recipe-{found}.json").data.decode()

    def put(self, entry: Entry) -> None:
        """Add *entry*."""
        fields = asdict(entry)
        del fields["sent"]
        fields["checkpoint"] = layout.checkpoint_dir(entry.checkpoint)
        crashpoint("enqueue.before")
        self._memory.put(_key(entry), json.dumps(fields).encode())
        crashpoint("enqueue.after")

    def entries(self) -> list[Entry]:
        """Return what is waiting, oldest checkpoint and nearest tier first; other files are left alone."""
        found: list[Entry] = []
        for listed in self._memory.list(f"{layout.QUEUE}/"):
            name = _NAME.fullmatch(listed.key.removeprefix(f"{layout.QUEUE}/"))
            if name is None:
                continue
            try:
                found.append(_entry(self._memory.get(listed.key).data, sent=name[1] == "commit"))
            except (FormatError, KeyNotFoundError):
                continue
        return sorted(found, key=lambda entry: (entry.checkpoint, entry.place, entry.tier, entry.rank))

    def mark_sent(self, entry: Entry) -> None:
        """Say that the entry's bytes are on the tier and may be recycled; one that was taken out stays out."""
        try:
            data = self._memory.get(_key(entry)).data
        except KeyNotFoundError:
            return
        self._memory.put(_key(entry).replace("/promote-", "/commit-"), data)
        self._memory.delete([_key(entry)])

    def remove(self, entry: Entry) -> None:
        """Take *entry* out."""
        promote = f"{layout.QUEUE}/promote-{_stem(entry)}"
        self._memory.delete([promote, promote.replace("/promote-", "/commit-")])

    def put_result(self, checkpoint: CheckpointId, tier: str, error: TieredError | None) -> None:
        """Tell the trainers of this node how the promotion ended, and forget old results."""
        fields = {"error": error_to_json(error) if error else None}
        self._memory.put(_result_key(checkpoint, tier), json.dumps(fields).encode())
        results = list(self._memory.list(f"{layout.QUEUE}/result-"))
        results.sort(key=lambda entry: entry.modified_at)
        self._memory.delete(entry.key for entry in results[:-RESULTS_KEPT])

    def result(self, checkpoint: CheckpointId, tier: str) -> Result | None:
        """Return how the promotion ended, or None while it is not known."""
        try:
            data = self._memory.get(_result_key(checkpoint, tier)).data
        except KeyNotFoundError:
            return None
        try:
            error = cast("dict[str, Mapping[str, object] | None]", json.loads(data)).get("error")
            return Result(error=error_from_json(error) if error else None)
        except (ValueError, AttributeError) as cause:
            # Not "not known yet": a save would wait for its deadline.
            damaged = FormatError(f"how the promotion ended can't be read: {cause}", step=checkpoint.step, tier=tier)
            return Result(error=damaged)


def _stem(entry: Entry) -> str:
    return f"{layout.checkpoint_dir(entry.checkpoint)}-{entry.rank:05d}-{entry.tier}.json"


def _key(entry: Entry) -> str:
    return f"{layout.QUEUE}/{'commit' if entry.sent else 'promote'}-{_stem(entry)}"


def _result_key(checkpoint: CheckpointId, tier: str) -> str:
    return f"{layout.QUEUE}/result-{layout.checkpoint_dir(checkpoint)}-{tier}.json"


def _entry(data: bytes, *, sent: bool) -> Entry:
    try:
        fields = cast("dict[str, object]", json.loads(data))
        checkpoint = layout.parse_checkpoint_dir(str(fields["checkpoint"]))
        if checkpoint is None:
            raise FormatError(f"{fields['checkpoint']!r} names no checkpoint")
        return Entry(
            checkpoint=checkpoint,
            rank=int(str(fields["rank"])),
            tier=str(fields["tier"]),
            world=int(str(fields["world"])),
            recipe=str(fields["recipe"]),
            finisher=str(fields["finisher"]),
            deadline_at=float(str(fields["deadline_at"])),
            patient=fields.get("patient", True) is not False,
            place=int(str(fields.get("place", 0))),
            sent=sent,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"not a queue entry: {error}") from error
