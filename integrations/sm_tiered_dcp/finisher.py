"""Composes what readers need from the records of a checkpoint: DCP's `.metadata`, and `index.json` without pickle.

Both are functions of the records alone: whoever composes them gets the same bytes.

``python -m sm_tiered_dcp.finisher DIR`` does it for the record files in DIR and leaves both files there.
"""

from __future__ import annotations

import gc
import io
import json
import math
import os
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from sm_tiered import layout
from sm_tiered.errors import FormatError, TieredError
from sm_tiered.manifest import FORMAT, record_from_json
from sm_tiered.records import Item, Record
from sm_tiered_dcp.leaves import stock_path
from sm_tiered_dcp.tensor_reads import dtype_named

__all__ = [
    "compose",
    "compose_files",
    "index_bytes",
    "metadata_bytes",
    "metadata_from_records",
]

_PICKLE_PROTOCOL = 4
"""Fixed: the default differs between Python releases."""

_Path: TypeAlias = tuple[str | int, ...]


@dataclass(slots=True)
class _Value:
    """One name of the state and where it is stored."""

    path: _Path
    dtype: str | None
    shape: tuple[int, ...]
    chunks: dict[tuple[int, ...], Item] = field(default_factory=dict[tuple[int, ...], Item])
    """By where they begin in the whole tensor; a Python value is one chunk, without a shape."""


def compose(records: Sequence[Record], directory_id: str = "") -> tuple[Metadata, dict[str, object]]:
    """Return DCP's metadata and the index of the checkpoint that *records* tell of.

    *directory_id* is what the metadata names as the checkpoint's place; readers ignore it.

    Raises:
        FormatError: the records don't make one checkpoint, contradict each other, or leave a hole in a tensor.
    """
    values = _merged(records)
    return _metadata(records[0], values, directory_id), _index(records[0], values)


def compose_files(records: Sequence[Record]) -> dict[str, bytes]:
    """Return the files for other readers, by name.

    Raises:
        FormatError: as `compose`.
    """
    metadata, index = compose(records)
    return {layout.METADATA: metadata_bytes(metadata), layout.INDEX: index_bytes(index)}


def metadata_from_records(records: Sequence[Record]) -> Metadata:
    """Return DCP's metadata of the checkpoint that *records* tell of: what load planners ask for.

    Raises:
        FormatError: as `compose`.
    """
    return _metadata(records[0], _merged(records), "")


def metadata_bytes(metadata: Metadata) -> bytes:
    """Return `.metadata`. The same metadata, made by `compose` anywhere, gives the same bytes."""
    stream = io.BytesIO()
    pickle.Pickler(stream, protocol=_PICKLE_PROTOCOL).dump(metadata)
    return stream.getvalue()


def index_bytes(index: Mapping[str, object]) -> bytes:
    """Return `index.json`."""
    return json.dumps(index, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _merged(records: Sequence[Record]) -> dict[str, _Value]:
    """Bring the items of all ranks together, by name; of equal chunks the lowest rank's is taken."""
    _check_complete(records)
    values: dict[str, _Value] = {}
    for record in sorted(records, key=lambda record: record.rank):
        replicas = {part.name for part in record.parts if part.replica}
        for item in (item for table in record.tables for item in table.items):
            if item.part not in replicas:
                _add(values, item, record.rank)
    for fqn, value in values.items():
        _check_covered(fqn, value)
    return values


def _check_complete(records: Sequence[Record]) -> None:
    if not records:
        raise FormatError("no records, no checkpoint")
    first = records[0]
    ranks = sorted(record.rank for record in records)
    if ranks != list(range(first.world)):
        raise FormatError(f"{first.checkpoint} has {first.world} ranks, records are of ranks {ranks[:8]}")
    for record in records:
        same = (record.namespace, record.checkpoint, record.world) == (first.namespace, first.checkpoint, first.world)
        if not same:
            raise FormatError(
                f"rank {record.rank} tells of {record.checkpoint}, rank {first.rank} of {first.checkpoint}"
            )
        if record.failed is not None:
            raise FormatError(f"rank {record.rank} failed to write {record.checkpoint}: {record.failed[:200]}")


def _add(values: dict[str, _Value], item: Item, rank: int) -> None:
    value = values.get(item.fqn)
    if value is None:
        value = values[item.fqn] = _Value(path=item.path, dtype=item.dtype, shape=item.shape)
    elif (value.dtype, value.shape, value.path) != (item.dtype, item.shape, item.path):
        raise FormatError(
            f"{item.fqn} is {_told(item.dtype, item.shape)} at {list(item.path)} on rank {rank}, "
            f"{_told(value.dtype, value.shape)} at {list(value.path)} on a lower one"
        )
    known = value.chunks.get(item.offsets)
    if known is None or (known.sizes != item.sizes and not math.prod(known.sizes)):
        value.chunks[item.offsets] = item
    elif known.sizes != item.sizes and math.prod(item.sizes):
        raise FormatError(f"{item.fqn}: chunks of {list(known.sizes)} and {list(item.sizes)} at {list(item.offsets)}")


def _told(dtype: str | None, shape: tuple[int, ...]) -> str:
    return "a Python value" if dtype is None else f"{dtype} {list(shape)}"


def _check_covered(fqn: str, value: _Value) -> None:
    stored = sum(math.prod(item.sizes) for item in value.chunks.values())
    if stored != math.prod(value.shape):
        raise FormatError(f"{fqn}: chunks hold {stored} elements, {list(value.shape)} has {math.prod(value.shape)}")


class _Canonical:
    """Equal strings and shapes as one object each: a pickle depends on which objects are the same."""

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, ...], torch.Size] = {}
        self._paths: dict[_Path, _Path] = {}
        self._properties: dict[str, TensorProperties] = {}

    def text(self, value: str) -> str:
        # By sys.intern, because names of attributes stand in the pickle too.
        return sys.intern(value)

    def size(self, value: tuple[int, ...]) -> torch.Size:
        found = self._sizes.get(value)
        if found is None:
            found = self._sizes[value] = torch.Size(value)
        return found

    def path(self, value: _Path) -> _Path:
        found = self._paths.get(value)
        if found is None:
            # A list in between: tuple(some tuple) would be that object, which may be shared or not.
            keys = [self.text(key) if isinstance(key, str) else key for key in value]
            found = self._paths[value] = tuple(keys)
        return found

    def properties(self, dtype: str) -> TensorProperties:
        found = self._properties.get(dtype)
        if found is None:
            found = self._properties[dtype] = TensorProperties(dtype=dtype_named(dtype))
        return found


def _metadata(first: Record, values: Mapping[str, _Value], directory_id: str) -> Metadata:
    same = _Canonical()
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    paths: dict[str, _Path] = {}
    for name, value in values.items():
        if any(item.is_file for item in value.chunks.values()):
            continue  # another program's: DCP would unpickle it
        fqn = same.text(name)
        paths[fqn] = same.path(stock_path(value.path))
        if value.dtype is None:
            described[fqn] = BytesStorageMetadata()
            stored[MetadataIndex(fqn)] = _storage_info(value.chunks[()], same)
            continue
        chunks: list[ChunkStorageMetadata] = []
        for offsets, item in value.chunks.items():
            index = MetadataIndex(fqn, index=len(chunks))
            object.__setattr__(index, "offset", same.size(offsets))  # its __init__ would make an equal one each time
            stored[index] = _storage_info(item, same)
            chunks.append(ChunkStorageMetadata(offsets=same.size(offsets), sizes=same.size(item.sizes)))
        described[fqn] = TensorStorageMetadata(
            properties=same.properties(value.dtype), size=same.size(value.shape), chunks=chunks
        )
    return Metadata(
        state_dict_metadata=described,
        planner_data=paths,
        storage_data=stored,
        storage_meta=StorageMeta(
            checkpoint_id=same.text(directory_id), save_id=same.text(layout.checkpoint_dir(first.checkpoint))
        ),
        version=getattr(filesystem, "CURRENT_DCP_VERSION", None),
    )


def _storage_info(item: Item, same: _Canonical) -> _StorageInfo:
    return _StorageInfo(relative_path=same.text(item.part), offset=item.offset, length=item.length)


def _index(first: Record, values: Mapping[str, _Value]) -> dict[str, object]:
    return {
        "format": FORMAT,
        "kind": "index",
        "namespace": first.namespace,
        "step": first.checkpoint.step,
        "attempt": str(first.checkpoint.attempt),
        "world": first.world,
        "values": {fqn: _index_entry(value) for fqn, value in values.items()},
    }


def _index_entry(value: _Value) -> dict[str, object]:
    if value.dtype is None:
        item = value.chunks[()]
        return {"path": list(value.path), "bytes": {"part": item.part, "offset": item.offset, "length": item.length}}
    chunks = [
        {
            "offsets": list(offsets),
            "sizes": list(item.sizes),
            "part": item.part,
            "offset": item.offset,
            "length": item.length,
            "payload": item.payload,
        }
        for offsets, item in value.chunks.items()
    ]
    return {"path": list(value.path), "dtype": value.dtype, "shape": list(value.shape), "chunks": chunks}


def _record_files(directory: Path) -> Iterator[Record]:
    for path in sorted(directory.iterdir()):
        rank = layout.parse_record_name(path.name)
        if rank is None:
            continue
        record = record_from_json(path.read_bytes())
        if record.rank != rank:
            raise FormatError(f"{path.name} is the record of rank {record.rank}")
        yield record


def main(arguments: Sequence[str]) -> int:
    """Compose the files for the records in the directory named by *arguments*; return the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m sm_tiered_dcp.finisher DIR\n")
        return 2
    directory = Path(arguments[0])
    try:
        for name, data in compose_files(list(_record_files(directory))).items():
            handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(handle, "wb") as file:
                file.write(data)
    except (TieredError, OSError) as error:
        sys.stderr.write(f"{directory}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    gc.disable()  # the process ends before there is garbage worth looking for; looking takes longer than composing
    sys.exit(main(sys.argv[1:]))
