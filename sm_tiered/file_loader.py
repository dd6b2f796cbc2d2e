"""Restoring a checkpoint of whole files: verified, brought to each node once, and handed out as a directory."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sm_tiered import layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import MismatchError
from sm_tiered.group import Group
from sm_tiered.handout import Handout
from sm_tiered.nearest import ItemSource, Sources
from sm_tiered.records import Attempt
from sm_tiered.resolve import Candidate
from sm_tiered.sources import Span
from sm_tiered.voted_load import Read

__all__ = ["FileLoader", "Get"]

Get = Callable[[str], bytes]
"""Returns the bytes of a file by its name."""


class FileLoader:
    """A `sm_tiered.voted_load.Loader`: *use* is called with a directory that holds all files under their names."""

    def __init__(
        self,
        use: Callable[[Path], None],
        *,
        group: Group,
        here: Sequence[int],
        base: Path | None,
        called: Callable[[int], str],
        inspect: Callable[[Get], None],
        first: Sequence[str],
        whose: Callable[[str], int | None],
        attempt: Attempt | None,
        resized: bool,
    ) -> None:
        """Make one. Collective.

        Args:
            use: called once everything is verified and in place; what it raises ends the restore on all ranks.
            group: all ranks.
            here: those that share this node's memory, ascending.
            base: a directory in it, or None where there is none.
            called: the directory's name, by step.
            inspect: called before anything is placed, with what returns the files named in *first*; may refuse.
            first: names of files that every rank reads itself.
            whose: of a file that one rank alone reads, that rank; nodes without it do without the file.
            attempt: the one that the checkpoint must be of, if that matters.
            resized: whether a checkpoint of another number of ranks will do.
        """
        self._use, self._group, self._here, self._called = use, group, here, called
        self._inspect, self._first, self._resized = inspect, frozenset(first), resized
        token = str(group.gather(secrets.token_hex(8))[0])
        self._handout = Handout(base, group.rank, token)
        self.room = self._handout.room
        self._whose, self._attempt = whose, attempt
        self._files: dict[str, ItemSource] = {}
        self._dealt = set[str]()
        """Of the files, those that this rank brings to its node."""
        self._mine: list[str] = []
        """And those that it needs itself."""
        self._step = 0

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Return what this rank brings to its node: the ranks there share the files out, by size."""
        self._handout.open()
        nearest = Sources(candidate.records, candidate.near)
        self._files = {source.item.fqn: source for source in nearest if source.item.is_file}
        self._step = candidate.checkpoint.step
        self._check(candidate)
        shared = sorted(self._shared(), key=lambda name: (-self._files[name].item.length, name))
        self._dealt = set(shared[self._here.index(self._group.rank) :: len(self._here)])
        self._mine = sorted(self._dealt | (self._first & self._files.keys()) | self._own().keys())
        sources = map(self._files.__getitem__, self._mine)
        return {(source.rank, source.item.part): [(0, source.item.length)] for source in sources}

    def _check(self, candidate: Candidate) -> None:
        saved, found = len(candidate.records), candidate.checkpoint
        if self._attempt is not None and found.attempt != self._attempt:
            raise MismatchError(
                f"the present timeline's step {found.step} is of attempt {found.attempt}, not of {self._attempt}",
                hint="Leave the attempt out, or use a namespace of its own for what goes on from there.",
            )
        if not self._files:
            raise MismatchError(
                f"{candidate.checkpoint} holds a state, and no files under names of their own",
                hint="Restore it with what saved it, such as TieredCheckpointer; a fresh start needs a new namespace.",
            )
        if saved != self._group.world and not self._resized:
            raise MismatchError(
                f"the checkpoint is of {saved} ranks, this job has {self._group.world}: each has files of its own",
                hint=f"Start {saved} processes, or set `allow_partial: true` where every rank may do without its own.",
            )

    def _shared(self) -> list[str]:
        """What the ranks of this node see alike."""
        readers = {name: self._whose(name) for name in self._files if layout.parse_own_name(name) is None}
        return [name for name, rank in readers.items() if rank is None or rank in self._here]

    def _own(self) -> dict[str, str]:
        """This rank's own files: where they stand, and what it calls them."""
        parsed = {name: layout.parse_own_name(name) for name in self._files}
        return {name: own[1] for name, own in parsed.items() if own is not None and own[0] == self._group.rank}

    def check(self, read: Read) -> None:
        """Verify what was not verified when it was opened, and let the program refuse."""
        byte = memoryview(bytearray(1))
        for source in map(self._files.__getitem__, self._mine):
            if read.file(source.rank, source.item.part) is None:
                for offset in range(0, source.item.length, CHUNK_BYTES):
                    read(source.rank, source.item.part, offset, byte)
        self._inspect(lambda name: self._bytes(name, read))

    def _bytes(self, name: str, read: Read) -> bytes:
        source = self._files.get(name)
        if source is None or name not in self._mine:
            raise MismatchError(f"the checkpoint has no file {name!r}", hint="It was saved by another program.")
        buffer = bytearray(source.item.length)
        read(source.rank, source.item.part, 0, memoryview(buffer))
        return bytes(buffer)

    def place(self, read: Read) -> None:
        """Let the files stand where the ranks of this node find them."""
        for name in sorted(self._dealt):
            self._handout.share(name, self._path(name, read))
        mine = {called: self._path(name, read) for name, called in self._own().items()}
        self._directory = self._handout.view(self._called(self._step), self._shared(), mine)

    def _path(self, name: str, read: Read) -> str:
        source = self._files[name]
        found = read.file(source.rank, source.item.part)
        if found is not None:
            return found
        path = self._handout.new_file()
        buffer = memoryview(bytearray(min(CHUNK_BYTES, source.item.length)))
        with path.open("wb") as file:
            for offset in range(0, source.item.length, CHUNK_BYTES):
                view = buffer[: min(CHUNK_BYTES, source.item.length - offset)]
                read(source.rank, source.item.part, offset, view)
                file.write(view)
        return str(path)

    def finish(self) -> None:
        """Let the program read: every rank has placed its files."""
        self._use(self._directory)

    def close(self) -> None:
        """Remove the directory; to be called when nobody on this node reads any more. Can be called many times."""
        self._handout.close()
