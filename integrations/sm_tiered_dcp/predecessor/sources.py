"""Where checkpoints of the predecessor are looked for: a place that lists steps and gives metadata and shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import xxhash

from sm_tiered.errors import KeyNotFoundError, TierRefusedError
from sm_tiered.tiers.base import Entry, Tier
from sm_tiered_dcp.predecessor import layout
from sm_tiered_dcp.predecessor.layout import METADATA, SHARD
from sm_tiered_dcp.predecessor.shards import Shard
from sm_tiered_dcp.predecessor.unpickling import MAX_BYTES

__all__ = ["Listed", "Source", "TierSource"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One step as a listing shows it."""

    step: int
    name: str
    """Where it is, for people; tells two of one step apart."""
    finished: bool
    """Whether its metadata is there, which the predecessor writes last of all."""
    saved_at: float | None = None
    """UTC seconds since the epoch by the place's clock, when the metadata was written; None: it can't tell."""
    newer: tuple[int, ...] = ()
    """Ranks whose shard was written after the metadata."""


class Source(Protocol):
    """One namespace of the predecessor's."""

    @property
    def title(self) -> str:
        """Where it is, for people."""
        ...

    def listed(self) -> Sequence[Listed]:
        """Return every step of which something is there, newest first.

        Raises:
            TierError: the place did not answer or refused.
        """
        ...

    def sizes(self, step: Listed) -> Mapping[int, int]:
        """Return the size, in bytes, of each shard that is there, by rank; also of those that no metadata names."""
        ...

    def identity(self, step: Listed, ends: Mapping[int, int], *, again: bool = False) -> str:
        """Return 32 hex digits that tell this save of *step*, by the ranks of *ends*, from any other.

        They are others as soon as anything of it was written anew or deleted. *ends*: how long each rank's shard must
        be; not much more is received. *again*: nothing that was learnt before is believed.
        """
        ...

    def metadata(self, step: Listed) -> bytes:
        """Return the pickled metadata.

        Raises:
            KeyNotFoundError: it is not there.
            CorruptPartError: it differs from its checksum, or is far too long.
        """
        ...

    def shard(self, step: Listed, rank: int, *, end: int) -> AbstractContextManager[Shard]:
        """Open the shard of *rank*, whose own checksum, where there is one, is right.

        *end*: where, by the metadata, the last value in it ends. A place that is not read in pieces is not believed to
        end there: it may send little more.

        Raises:
            KeyNotFoundError: it is not there.
            CorruptPartError: it differs from its checksum, or is far longer than *end*.
        """
        ...

    def close(self) -> None:
        """Free connections. Can be called many times."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _TierShard:
    """An object of a tier."""

    tier: Tier
    key: str
    title: str
    size: int
    compared: bool = False
    """What the place itself may know of its objects is not ours to see."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if len(buffer):
            self.tier.read_into(self.key, offset, buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    """An object of a tier."""

    tier: Tier
    entry: Entry


_Files = dict[tuple[int, str], _File]
"""By rank and name."""


class TierSource:
    """The predecessor's keys below its namespace, in both layouts, read through *tiers*, which are rooted there."""

    def __init__(self, tiers: Sequence[Tier], title: str) -> None:
        self._tiers, self._title = tiers, title
        self._files: dict[str, _Files] = {}

    @property
    def title(self) -> str:
        """Where it is, for people."""
        return self._title

    def listed(self) -> Sequence[Listed]:
        """Return every step of which something is there, newest first."""
        self._files = {}
        steps: dict[tuple[int, bool, int], _Files] = {}
        for number, tier in enumerate(self._tiers):
            try:
                self._list(tier, number, steps)
            except TierRefusedError:
                if number == 0:  # a permission may be for the first of these places alone
                    raise
        # Of one step in both layouts the default one comes first.
        return [self._one(*key, steps[key]) for key in sorted(steps, key=lambda key: (-key[0], *key[1:]))]

    def _list(self, tier: Tier, number: int, steps: dict[tuple[int, bool, int], _Files]) -> None:
        for name in tier.list_dirs(""):
            if not (layout.is_rank_dir(name) or layout.is_step_dir(name)):
                continue
            for entry in tier.list(f"{name}/"):
                place = layout.parse_key(entry.key)
                if place is not None:
                    files = steps.setdefault((place.step, place.by_step, number), {})
                    files[place.rank, place.name] = _File(tier=tier, entry=entry)

    def _one(self, step: int, by_step: bool, number: int, files: _Files) -> Listed:
        name = f"step_{step}" + (" (by step)" if by_step else "") + (" (behind two slashes)" if number else "")
        self._files[name] = files
        metadata = self._metadata_file(name)
        at = None if metadata is None else metadata.entry.modified_at
        shards = {rank: file.entry for (rank, kind), file in sorted(files.items()) if kind == SHARD}
        return Listed(
            step=step,
            name=name,
            finished=metadata is not None,
            saved_at=at,
            newer=tuple(rank for rank, entry in shards.items() if at is not None and entry.modified_at > at),
        )

    def sizes(self, step: Listed) -> Mapping[int, int]:
        """Return the size, in bytes, of each shard that is there, by rank."""
        return {rank: file.entry.size for (rank, kind), file in self._files[step.name].items() if kind == SHARD}

    def identity(self, step: Listed, ends: Mapping[int, int], *, again: bool = False) -> str:
        """Return 32 hex digits that tell this save of *step* from any other: by sizes, times and versions of files."""
        metadata = self._metadata_file(step.name)
        wanted = [self._files[step.name].get((rank, SHARD)) for rank in sorted(ends)]
        found = xxhash.xxh3_128(self._title.encode())
        for file in (metadata, *wanted):
            entry = None if file is None else _asked_again(file) if again else file.entry
            facts = ("gone",) if entry is None else (entry.key, entry.size, entry.modified_at, entry.version)
            found.update(repr(facts).encode())
        return found.hexdigest()

    def _metadata_file(self, name: str) -> _File | None:
        """Beside the shard of the rank that coordinated: that is rank 0, but for a save of some ranks only."""
        found = sorted(key for key in self._files[name] if key[1] == METADATA)
        return self._files[name][found[0]] if found else None

    def metadata(self, step: Listed) -> bytes:
        """Return the pickled metadata."""
        file = self._metadata_file(step.name)
        if file is None:
            raise KeyNotFoundError(
                f"{self._title}: step {step.step} has no metadata",
                hint="Its save never ended. Import another step.",
                step=step.step,
            )
        return file.tier.get(file.entry.key, max_bytes=MAX_BYTES).data

    def shard(self, step: Listed, rank: int, *, end: int) -> AbstractContextManager[Shard]:
        """Open the shard of *rank*; torch's own checksums are inside it, and it is read in pieces."""
        del end  # of what stands behind it nothing is ever asked for
        file = self._files[step.name].get((rank, SHARD))
        if file is None:
            raise KeyNotFoundError(
                f"{self._title}: step {step.step} has no shard of rank {rank}",
                hint="Import an older step.",
                step=step.step,
                rank=rank,
            )
        title = f"{self._title}/{file.entry.key}"
        return nullcontext(_TierShard(tier=file.tier, key=file.entry.key, title=title, size=file.entry.size))

    def close(self) -> None:
        """Free the tiers' connections."""
        for tier in self._tiers:
            tier.close()


def _asked_again(file: _File) -> Entry | None:
    return next((entry for entry in file.tier.list(file.entry.key) if entry.key == file.entry.key), None)
