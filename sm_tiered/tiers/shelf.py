"""Where a rank's arena files stand: hidden while they are free, in a step's directory while they are published."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

from sm_tiered import layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import TierUnavailableError
from sm_tiered.records import CheckpointId
from sm_tiered.tiers import safeio
from sm_tiered.tiers.file_list import FileList, read_file_lists
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.tiers.slot import SlotFile, free_path

__all__ = ["Shelf"]

_RECYCLED = (0, 2)
"""Numbers of DCP parts that are arena files: a rank's share, what its node keeps besides. Whole files all are."""
_FREE = re.compile(r"(\d{1,6})-[0-9a-f]{8}", re.ASCII)
_TRIES = 16


class Shelf:
    """Moves one rank's files, and those of *ranks* that are no more, in the directory of a memory tier."""

    def __init__(self, tier: MemoryTier, rank: int) -> None:
        self._tier, self.rank = tier, rank
        self._root = str(tier.root)
        self._free = f"{self._root}/{layout.ARENA}"
        self._also: Collection[int] = ()

    def create(self) -> SlotFile:
        """Make an empty hidden file, and the directories if somebody deleted them."""
        try:
            return SlotFile.create(self._free, self.rank)
        except FileNotFoundError:
            self._tier.make_dirs()
            return SlotFile.create(self._free, self.rank)

    def left_behind(self, also: Collection[int]) -> Iterator[tuple[SlotFile, CheckpointId | None]]:
        """Yield the files of earlier processes of this rank and of the ranks *also*, from now on its own."""
        self._also = also
        for name in sorted(os.listdir(self._free)):
            found = _FREE.fullmatch(name)
            if found and self._ours(int(found[1])) and (file := SlotFile.adopt(f"{self._free}/{name}")):
                yield file, None
        for checkpoint in sorted(c for c in map(layout.parse_checkpoint_dir, os.listdir(self._root)) if c):
            self._sweep(checkpoint)
            self._remove_empty(checkpoint)  # what died between making it and filling it, or emptying and removing it
            for name in self._parts(checkpoint, recycled=True):
                if file := SlotFile.adopt(self._path(checkpoint, name)):
                    yield file, checkpoint

    def has_record(self, checkpoint: CheckpointId, path: str) -> bool:
        """Whether the rank that wrote *path* also wrote its record of *checkpoint*."""
        name = self._name(checkpoint, path)
        part = layout.parse_part_name(name)
        ranks = [part.rank] if part is not None else self._listing(checkpoint, name)
        return any(os.path.lexists(self._path(checkpoint, layout.record_name(rank))) for rank in ranks)

    def publish(self, file: SlotFile, checkpoint: CheckpointId, name: str) -> None:
        """Move *file* into the directory of *checkpoint*, which is made when missing."""
        target = self._path(checkpoint, layout.check_part_name(name))
        crashpoint("publish.before_rename")
        for _ in range(_TRIES):
            self._make_dirs(checkpoint, name)
            # Another rank may take the directory for an empty one and remove it.
            with suppress(FileNotFoundError):
                file.rename(target)
                crashpoint("publish.after_rename")
                return
            if not os.path.lexists(file.path):
                break
        raise TierUnavailableError(
            f"the arena's file {file.path} is gone",
            hint="Leave the memory tier's directory alone while the job runs.",
            tier=self._tier.name,
            step=checkpoint.step,
        )

    def withdraw(self, checkpoint: CheckpointId, files: Iterable[SlotFile]) -> None:
        """Take this rank's share of *checkpoint* back: the record first, so that it never promises what is going."""
        for rank in map(layout.parse_record_name, self._listed(checkpoint)):
            if rank is not None and self._ours(rank):
                with suppress(FileNotFoundError):
                    os.unlink(self._path(checkpoint, layout.record_name(rank)))
        crashpoint("recycle.after_unpublish")
        kept = {self._name(checkpoint, file.path): file for file in files}
        lists = [layout.file_list_name(rank) for rank in self._file_lists(checkpoint)]
        names = {layout.METADATA, layout.INDEX, *self._parts(checkpoint)} - set(kept) - set(lists)
        self._unlink(checkpoint, names)
        for file in kept.values():
            # Also one that has a second name: unlinked, it would look like nobody else's.
            with suppress(FileNotFoundError):
                file.rename(free_path(self._free, self.rank))
        self._unlink(checkpoint, lists)  # last: until here they tell whose the rest is
        crashpoint("recycle.after_rename")
        self._remove_empty(checkpoint)

    def remove(self, file: SlotFile) -> None:
        """Delete the name that *file* has here, if it is still this file's."""
        with suppress(FileNotFoundError):
            if os.stat(file.path, follow_symlinks=False).st_ino == file.inode:
                os.unlink(file.path)

    def _ours(self, rank: int) -> bool:
        return rank == self.rank or rank in self._also

    def _listed(self, checkpoint: CheckpointId) -> list[str]:
        try:
            return sorted(os.listdir(self._path(checkpoint)))
        except FileNotFoundError:
            return []

    def _parts(self, checkpoint: CheckpointId, *, recycled: bool = False) -> list[str]:
        """The parts in the directory of *checkpoint* that are this rank's; *recycled*: only arena files."""
        found = {name: layout.parse_part_name(name) for name in self._listed(checkpoint)}
        ours = {name: part for name, part in found.items() if part is not None and self._ours(part.rank)}
        stock = [name for name, part in ours.items() if not recycled or part.kind == "ckpt" or part.number in _RECYCLED]
        lists = self._file_lists(checkpoint).values()
        return stock + [name for found in lists for name in (found.recycled if recycled else found.names)]

    def _file_lists(self, checkpoint: CheckpointId) -> dict[int, FileList]:
        """Whose names do not tell that they are this rank's."""
        ranks = map(layout.parse_file_list_name, self._listed(checkpoint))
        ours = {rank for rank in ranks if rank is not None and self._ours(rank)}
        return read_file_lists(self._tier, checkpoint, ours) if ours else {}

    def _listing(self, checkpoint: CheckpointId, name: str) -> list[int]:
        return [rank for rank, found in self._file_lists(checkpoint).items() if name in found.names]

    def _name(self, checkpoint: CheckpointId, path: str) -> str:
        return path.removeprefix(f"{self._path(checkpoint)}/")

    def _unlink(self, checkpoint: CheckpointId, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):
                os.unlink(self._path(checkpoint, name))

    def _remove_empty(self, checkpoint: CheckpointId) -> None:
        """Remove the directories of *checkpoint* that hold nothing; other ranks' files may still be there."""
        for directory, _, _ in os.walk(self._path(checkpoint), topdown=False):
            with suppress(OSError):
                os.rmdir(directory)

    def _path(self, checkpoint: CheckpointId, name: str = "") -> str:
        directory = f"{self._root}/{layout.checkpoint_dir(checkpoint)}"
        return f"{directory}/{name}" if name else directory

    def _make_dirs(self, checkpoint: CheckpointId, name: str) -> None:
        """Make the directory of *checkpoint*, and those in it that lead to *name*."""
        path = self._path(checkpoint)
        for segment in ("", *name.split("/")[:-1]):
            path = f"{path}/{segment}" if segment else path
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                continue
            except FileNotFoundError:
                self._tier.make_dirs()
                return
            os.chmod(path, 0o700)  # whatever the umask

    def _sweep(self, checkpoint: CheckpointId) -> None:
        """Remove what died half-written."""
        for path, _, _ in os.walk(self._path(checkpoint)):
            with suppress(FileNotFoundError):
                directory = safeio.open_dir(path, tier=self._tier.name)
                try:
                    safeio.sweep(directory)
                finally:
                    os.close(directory)
