"""Whole files as the content of a checkpoint: each stands there under the name that another program looks for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CorruptPartError
from sm_tiered.records import ItemTable
from sm_tiered_dcp.packed_part import whole_file

__all__ = ["BytesFile", "DiskFile", "DiskPart", "File", "FileSet", "SafetensorsFile", "TorchFile"]


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What ``torch.save`` would write of *value*; its tensors are copied once."""

    value: Any = field(repr=False)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """What ``safetensors.torch.save_file`` would write, copied once."""

    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class BytesFile:
    """These bytes."""

    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class DiskFile:
    """A file that stands somewhere; it is copied, and not needed any more when the save has returned."""

    path: str


File = TorchFile | SafetensorsFile | BytesFile | DiskFile


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSet:
    """What one rank brings to a checkpoint, by name: a path relative to the checkpoint's directory, with slashes."""

    own: Mapping[str, File] = field(default_factory=dict[str, File])
    """This rank's alone: no other rank may bring a file of such a name."""
    shared: Mapping[str, File] = field(default_factory=dict[str, File])
    """The same on every rank. Rank 0's are stored; on each further node one rank's are kept in memory."""
    release: Callable[[], None] = _nothing
    """Called when the files are no longer needed."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiskPart:
    """A file on its way from where it stands into a checkpoint. A `sm_tiered.parts.PartSource`."""

    name: str
    path: str
    size: int
    replica: bool
    recycled: bool

    @property
    def table(self) -> ItemTable:
        """The one item: all of the file."""
        return whole_file(self.name, self.name, (self.name,), self.size)

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*; nothing is kept in *cache*.

        Raises:
            CorruptPartError: the file has become shorter.
        """
        cache.clear()  # should tensors ever come into these bytes again, what surrounds them is gone
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            while done < self.size:
                count = file.readinto(buffer[done:])
                if not count:
                    raise CorruptPartError(f"{self.path} ends after {done} of {self.size} bytes: it is being written")
                done += count

    def chunks(self) -> Iterator[memoryview]:
        """Yield the file in pieces of 8 MiB."""
        left = self.size
        with open(self.path, "rb", buffering=0) as file:
            while left and (piece := file.read(min(left, CHUNK_BYTES))):
                left -= len(piece)
                yield memoryview(piece)

    @classmethod
    def of(cls, name: str, file: DiskFile, *, replica: bool, large: int) -> DiskPart:
        """Return *file* as the part *name*; from *large* bytes on it goes into a file of the arena."""
        size = os.stat(file.path).st_size
        return cls(name=name, path=file.path, size=size, replica=replica, recycled=size >= large)
