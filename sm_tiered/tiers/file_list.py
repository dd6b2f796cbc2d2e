"""Whose a file is where its name does not tell: each rank lists what it is going to write, before it writes any.

Parts of ours bear their rank in their names. Files that another program shall find bear the names that it looks for.
Whoever takes a rank's share back, after a crash too, finds its files by this list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.parts import PartSource
from sm_tiered.records import CheckpointId, Record
from sm_tiered.sealed_json import FORMAT, MAX_BYTES, Json, dump, list_of, parsed, sealed, text
from sm_tiered.tiers.base import Tier

__all__ = ["FileList", "put_file_list", "read_file_lists"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileList:
    """The names of one rank's files in one checkpoint, relative to its directory."""

    recycled: tuple[str, ...] = ()
    """In memory these are files of the arena."""
    fresh: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.recycled + self.fresh

    def to_json(self) -> bytes:
        """Return it as the bytes of its file."""
        fields = {"format": FORMAT, "kind": "files", "recycled": list(self.recycled), "fresh": list(self.fresh)}
        return sealed(dump(fields))

    @classmethod
    def from_json(cls, data: bytes | memoryview) -> FileList:
        """Return the list that *data* holds.

        Raises:
            FormatError: it holds none, or a name that can't be a part's.
        """
        return parsed(data, "files", cls._built)

    @classmethod
    def _built(cls, fields: Json) -> FileList:
        recycled, fresh = (
            tuple(layout.check_part_name(text(name)) for name in list_of(fields, kind))
            for kind in ("recycled", "fresh")
        )
        return cls(recycled=recycled, fresh=fresh)


def put_file_list(tier: Tier, record: Record, parts: Iterable[PartSource]) -> None:
    """Say on *tier* which of *parts*, that the rank of *record* is about to write, have names that do not tell so."""
    named = [part for part in parts if layout.is_named(part.name)]
    if not named:
        return
    files = FileList(
        recycled=tuple(part.name for part in named if part.recycled),
        fresh=tuple(part.name for part in named if not part.recycled),
    )
    tier.put(layout.in_dir(record.checkpoint, layout.file_list_name(record.rank)), files.to_json())


def read_file_lists(tier: Tier, checkpoint: CheckpointId, ranks: Collection[int] | None = None) -> dict[int, FileList]:
    """Return the lists of *ranks* (None: of all) on *tier*. A damaged one is none: its files stay where they are."""
    lists: dict[int, FileList] = {}
    for entry in tier.list(f"{layout.checkpoint_dir(checkpoint)}/files-"):
        rank = layout.parse_file_list_name(entry.key.rpartition("/")[2])
        if rank is None or (ranks is not None and rank not in ranks):
            continue
        try:
            lists[rank] = FileList.from_json(tier.get(entry.key, max_bytes=MAX_BYTES).data)
        except (KeyNotFoundError, CorruptPartError, FormatError):
            continue
    return lists
