"""What the Hugging Face Trainer writes as one ``checkpoint-N``, on its way into the tiers."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sm_tiered.errors import StructureError
from sm_tiered_dcp.files import DiskFile, FileSet
from sm_tiered_dcp.tiered_files import TieredFiles

__all__ = ["STATE_FILE", "Dealt", "Detour", "Intake", "deal", "whose"]

STATE_FILE = "trainer_state.json"
"""In each checkpoint of the Trainer, and in those of no other program."""

_WRITTEN_BY = re.compile(r"(?:.*/)?(?:rng_state_(\d{1,6})\.pth|__(\d{1,6})_\d+\.distcp)", re.ASCII)
"""What names the rank that wrote it."""


class _Elsewhere(str):
    """A directory in the place of the one that was meant; a pickle, as ``training_args.bin`` is, has that one."""

    meant: str

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.meant,)


class Detour:
    """Lets the Trainer write its next checkpoint in another place than it was told."""

    def __init__(self) -> None:
        self._meant: list[tuple[Any, str, Any]] = []
        """What is changed, and how it was before."""
        self._put: list[tuple[Any, str]] = []
        """Methods that are ours for a while."""

    @property
    def taken(self) -> bool:
        """Whether it writes elsewhere now."""
        return bool(self._meant)

    def take(self, args: Any, directory: Path, **others: Any) -> None:
        """Let *args*, the Trainer's, say that *directory* is the place to write to, and *others*, until `end`."""
        self.end()
        elsewhere = _Elsewhere(directory)
        elsewhere.meant = args.output_dir
        for name, value in {"output_dir": elsewhere, **others}.items():
            self._meant.append((args, name, getattr(args, name)))
            setattr(args, name, value)

    def write_on_each_node(self, model: Any) -> None:
        """Let *model* be written by all ranks that are told to: transformers (5.23) has rank 0 alone write it."""
        if hasattr(model, "should_save_on_this_rank"):
            model.should_save_on_this_rank = bool
            self._put.append((model, "should_save_on_this_rank"))

    def end(self) -> None:
        """Give everything back as it was. Can be called many times."""
        while self._meant:
            setattr(*self._meant.pop())
        while self._put:
            delattr(*self._put.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealt:
    """What one rank brings of the files that all ranks together have written, by name."""

    own: tuple[str, ...]
    shared: tuple[str, ...]
    """Rank 0's; what other nodes have of them is kept there."""


def deal(told: Sequence[Collection[str]], rank: int) -> Dealt:
    """Return what *rank* brings; *told* is what each rank sees.

    What names a rank is that rank's, anything else the lowest one's that sees it. Left out are files of ranks that
    this job has not: a launch of more left them there.
    """
    own, shared = list[str](), list[str]()
    for name in sorted({name for names in told for name in names}):
        found = _WRITTEN_BY.fullmatch(name)
        named = int(found[1] or found[2]) if found is not None else None
        if named is not None and named >= len(told):
            continue
        seen = [other for other, names in enumerate(told) if name in names]
        owner = named if named in seen else seen[0]
        if owner == 0 and named is None:
            shared.append(name)
        elif owner == rank:
            own.append(name)
    return Dealt(own=tuple(own), shared=tuple(shared))


def whose(name: str) -> int | None:
    """Return the rank that alone reads the file *name*; None: all may, as they may read each other's shards."""
    found = _WRITTEN_BY.fullmatch(name)
    return int(found[1]) if found is not None and found[1] is not None else None


@dataclass(slots=True, kw_only=True)
class Intake:
    """One checkpoint of the Trainer, to be taken in when this rank has written its files."""

    files: TieredFiles
    directory: Path
    staged: bool
    """Whether nobody else wants it: it is removed then."""
    _dealt: Dealt = field(default=Dealt(own=(), shared=()))

    def take(self, step: int) -> FileSet:
        """Return what this rank brings, once all ranks have written theirs. Collective.

        Raises:
            OSError: the files can't be listed.
            StructureError: the Trainer wrote no state of its own.
        """
        self.files.gather(None)  # until then files come and go here
        names, failure = list[str](), None
        try:
            names = _names(self.directory)
        except OSError as error:  # the others must not wait for it
            failure = error
        told = self.files.gather(names)
        if failure is not None:
            raise failure
        if not any(STATE_FILE in seen for seen in told):
            raise StructureError(
                f"the Trainer wrote no {STATE_FILE} into {self.directory.name}",
                hint="A subclass that saves in a way of its own has to write it: nothing can go on from the rest.",
                step=step,
            )
        self._dealt = deal(told, self.files.rank)
        shared = [name for name in self._dealt.shared if name in names]
        own = self._found(self._dealt.own)
        return FileSet(own=own, shared=self._found(shared), release=self._release)

    def _found(self, names: Sequence[str]) -> dict[str, DiskFile]:
        return {name: DiskFile(str(self.directory / name)) for name in names}

    def _release(self) -> None:
        """Remove what this rank alone reads on this node, if nobody else wants it; the last rank does the directory."""
        if not self.staged:
            return
        first = self.files.rank == self.files.ranks_here[0]
        for name in (*self._dealt.own, *(self._dealt.shared if first else ())):
            (self.directory / name).unlink(missing_ok=True)
        for directory, _, _ in os.walk(self.directory, topdown=False):
            # Other ranks may not be done with theirs.
            with suppress(OSError):
                os.rmdir(directory)


def _names(directory: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise error

    walked = os.walk(directory, onerror=refuse)
    return [Path(place, name).relative_to(directory).as_posix() for place, _, names in walked for name in names]
