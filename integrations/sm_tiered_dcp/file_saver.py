"""Saving whole files: a function that is called only where something is due gives them, then they are copied."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import torch

from sm_tiered import layout
from sm_tiered.agreement import Request
from sm_tiered.errors import FormatError, StructureError
from sm_tiered.handle import SaveHandle
from sm_tiered.parts import PartSource
from sm_tiered_dcp.archive import Packed, Packer
from sm_tiered_dcp.collector import collector_paused
from sm_tiered_dcp.engine import Engine, fits
from sm_tiered_dcp.files import BytesFile, DiskFile, DiskPart, File, FileSet, SafetensorsFile, TorchFile
from sm_tiered_dcp.frames import Frame
from sm_tiered_dcp.packed_part import PackedPart
from sm_tiered_dcp.safetensors_frame import pack_safetensors

__all__ = ["FileSaver", "Saved", "TakeFiles"]

TakeFiles = Callable[[int], FileSet]
"""Given the step, returns what this rank saves of it; called on all ranks together."""

_LARGE_BYTES = 1024 * 1024
"""From here on a file is worth one of the arena, which stays mapped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """Where one rank's files of a save stand in a tier."""

    directory: str
    """Relative to the namespace."""
    names: tuple[str, ...]
    """Of what is stored, not of what is kept for the node besides."""


@dataclass(slots=True)
class FileSaver:
    """Packs files for one engine; knows the sizes that room was made for."""

    engine: Engine
    newest: Saved | None = None
    """What this rank saved last."""
    _names: frozenset[str] = frozenset()
    """Those of the last plan."""
    _is_planned: bool = False
    _planned: dict[str, int] = field(default_factory=dict[str, int])
    """How many bytes room was made for, by name."""
    _packers: dict[str, Packer] = field(default_factory=dict[str, Packer])
    _keeps: bool = False
    """Whether this rank keeps, for its node, what rank 0 stores for the job."""

    def save(
        self,
        step: int,
        state: TakeFiles,
        *,
        tiers: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        urgent: bool = False,
    ) -> SaveHandle:
        """Save what *state* returns as *step*; when this returns all may change. Collective.

        Raises:
            ConfigError: the step or a tier's name can't be used.
            StructureError: two ranks bring files of one name, or a name can't be used.
        """
        begun = time.monotonic()
        step, named = layout.check_step(step), self.engine.tiers(tiers)
        taken: FileSet | None = None
        parts: list[PartSource] = []
        failure: Exception | None = None
        with torch.no_grad(), collector_paused():
            try:
                try:
                    taken = state(step)
                    parts = self._parts(taken)
                except Exception as error:  # told to all ranks before anybody raises
                    failure = error
                failure = failure or self.engine.saver.deliver()
                agreement = self.engine.saver.agree(self._request(step, named, urgent, parts, failure))
                if agreement.structure_changed:
                    assert taken is not None
                    parts = self._plan(taken, step)
                    in_memory = agreement.in_memory and not self.engine.store.over_budget
                    agreement = replace(agreement, in_memory=in_memory)
                handle = self.engine.saver.save(agreement, parts, metrics=metrics or {}, begun=begun)
                names = tuple(part.name for part in parts if not part.replica)
                self.newest = Saved(directory=layout.checkpoint_dir(agreement.checkpoint), names=names)
                return handle
            finally:
                if taken is not None:
                    taken.release()

    def _request(
        self, step: int, tiers: frozenset[str], urgent: bool, parts: Sequence[PartSource], failure: Exception | None
    ) -> Request:
        if failure is not None:
            return Request(step=step, tiers=tiers, failure=failure)
        large = {part.name: part.size for part in parts if part.recycled}
        names = frozenset(part.name for part in parts)
        changed = not self._is_planned or names != self._names or not fits(large, self._planned)
        size = None if changed else max((*large.values(), *self._planned.values()), default=0)
        return Request(step=step, tiers=tiers, urgent=urgent, structure_changed=changed, size=size)

    def _plan(self, taken: FileSet, step: int) -> list[PartSource]:
        """See with all ranks that names are used once, and that the generations fit. Collective."""
        group, memory = self.engine.group, self.engine.store.tiers.memory
        mine = sorted(taken.own) + (sorted(taken.shared) if group.rank == 0 else [])
        told = group.gather((memory.node_key() if memory else None, mine))
        nodes = [node for node, _ in told]
        _check_once([names for _, names in told])
        here = nodes[group.rank]
        self._keeps = here is not None and here != nodes[0] and nodes.index(here) == group.rank
        parts = self._parts(taken)
        first, self._is_planned = not self._is_planned, True
        self._names = frozenset(part.name for part in parts)
        self._planned = {part.name: part.size for part in parts if part.recycled}
        self.engine.make_room(list(self._planned.values()), first=first)
        return parts

    def _parts(self, taken: FileSet) -> list[PartSource]:
        rank = self.engine.group.rank
        stores = rank == 0 or self._keeps
        twice = sorted(taken.own.keys() & taken.shared.keys())
        if twice:
            raise StructureError(f"{twice[0]!r} is brought as this rank's own and as shared", hint="Bring it once.")
        parts = [self._part(name, file, replica=False) for name, file in taken.own.items()]
        if stores:
            parts += [self._part(name, file, replica=rank != 0) for name, file in taken.shared.items()]
        self._packers = {name: packer for name, packer in self._packers.items() if name in {p.name for p in parts}}
        return parts

    def _part(self, name: str, file: File, *, replica: bool) -> PartSource:
        try:
            layout.check_part_name(name)
        except FormatError as error:
            raise StructureError(error.message, hint=error.hint) from error
        if not layout.is_named(name):
            raise StructureError(f"a file can't be called {name!r}", hint="That is how parts of a state are called.")
        if isinstance(file, DiskFile):
            return DiskPart.of(name, file, replica=replica, large=_LARGE_BYTES)
        packed = self._packed(name, file)
        recycled = packed.frame.size >= _LARGE_BYTES
        return PackedPart(name=name, fqn=name, path=(name,), packed=packed, replica=replica, recycled=recycled)

    def _packed(self, name: str, file: TorchFile | SafetensorsFile | BytesFile) -> Packed:
        if isinstance(file, BytesFile):
            size = len(file.data)
            return Packed(frame=Frame(size=size, pieces=((0, file.data),), holes=()), tensors=())
        if isinstance(file, TorchFile):
            # What may be in it is for the program to say that reads it: that one unpickles, never we.
            packer = self._packers.setdefault(name, Packer(name, allow_pickle=True))
            return packer.pack(file.value)
        return pack_safetensors(name, file.tensors, file.metadata)


def _check_once(names: Sequence[Sequence[str]]) -> None:
    """Of two files under one name all but one would be lost; a file that is a directory, too, can't be."""
    owners: dict[str, int] = {}
    known = {name for own in names for name in own}
    for name in sorted(known):
        above = known & {str(parent) for parent in PurePosixPath(name).parents}
        if above:
            raise StructureError(f"{min(above)!r} is a file, and the directory of {name!r}", hint="Rename one of them.")
    for rank, own in enumerate(names):
        for name in own:
            if owners.setdefault(name, rank) != rank:
                raise StructureError(
                    f"ranks {owners[name]} and {rank} both bring a file {name!r}",
                    hint="Give each rank's file a name of its own.",
                    rank=rank,
                )
