"""Tensors of a checkpoint, however many ranks hold them, as few safetensors files: planned, then written in place.

Every file is laid out before a byte is read; then windows of tensors go to where they belong, in any order, by any
number of threads. Memory is bounded by the windows, never by a tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sm_tiered.safetensors_format import header_bytes
from sm_tiered.stored_reads import WINDOW_BYTES, TensorReader, windows
from sm_tiered.stored_tensors import ITEM_BYTES, StoredTensor

__all__ = [
    "INDEX_NAME",
    "SINGLE_NAME",
    "Batch",
    "FilePlan",
    "batches",
    "index_json",
    "plan_files",
    "untied",
    "write_batch",
]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """One file: its header, and where the data of each tensor goes."""

    name: str
    header: bytes = field(repr=False)
    entries: tuple[tuple[str, StoredTensor, int], ...]
    """Name in the file, the tensor, and its first byte in the file; ascending."""
    size: int
    """Of the whole file, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A run of a file's bytes that is filled at once."""

    file: int
    position: int
    """First byte inside the file."""
    length: int
    """In bytes."""
    pieces: tuple[tuple[StoredTensor, int, int], ...]
    """Tensor, first and end element; one after the other."""


def untied(tensors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return *tensors* without names that only repeat another's bytes, and those names, each with the one that is kept.

    What is kept is the name that was saved; where that is not among *tensors*, the first.
    """
    names = {tensor.name: name for name, tensor in tensors.items()}
    kept: dict[str, StoredTensor] = {}
    ties: dict[str, str] = {}
    for name, tensor in tensors.items():
        saved_as = tensor.alias_of or tensor.name
        first = names.setdefault(saved_as, name)
        if first == name:
            kept[name] = tensor
        else:
            ties[name] = first
    return kept, ties


def plan_files(tensors: Mapping[str, StoredTensor], ties: Mapping[str, str], max_bytes: int) -> list[FilePlan]:
    """Return the files that hold *tensors*, each with at most *max_bytes* of data unless one tensor is more.

    *ties* (a name, and the one that is kept) go into the metadata of the file that holds what is kept, as
    ``safetensors.torch.save_model`` does it.

    Raises:
        FormatError: a tensor can't stand in a safetensors file.
    """
    groups: list[dict[str, StoredTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.bytes > max_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.bytes
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [
        _plan_file(SINGLE_NAME if count == 1 else name, group, ties) for name, group in zip(names, groups, strict=True)
    ]


def _plan_file(name: str, tensors: Mapping[str, StoredTensor], ties: Mapping[str, str]) -> FilePlan:
    # Wide elements first, so that all are aligned; then as they are stored, so that each byte is read once.
    ordered = sorted(tensors.items(), key=lambda pair: (-ITEM_BYTES[pair[1].dtype], _place(pair[1])))
    metadata = {"format": "pt"} | {alias: kept for alias, kept in ties.items() if kept in tensors and alias != "format"}
    header = header_bytes([(key, tensor.dtype, tensor.shape) for key, tensor in ordered], metadata)
    entries: list[tuple[str, StoredTensor, int]] = []
    end = len(header)
    for key, tensor in ordered:
        entries.append((key, tensor, end))
        end += tensor.bytes
    return FilePlan(name=name, header=header, entries=tuple(entries), size=end)


def _place(tensor: StoredTensor) -> tuple[str, int]:
    return (tensor.chunks[0].part, tensor.chunks[0].start) if tensor.chunks else ("", 0)


def batches(files: Sequence[FilePlan], batch_bytes: int = WINDOW_BYTES) -> Iterator[Batch]:
    """Yield all data of *files* in batches of at most *batch_bytes*."""
    for number, plan in enumerate(files):
        position, length = len(plan.header), 0
        pieces: list[tuple[StoredTensor, int, int]] = []
        for tensor, first, end in _pieces(plan, batch_bytes):
            size = (end - first) * ITEM_BYTES[tensor.dtype]
            if pieces and length + size > batch_bytes:
                yield Batch(file=number, position=position, length=length, pieces=tuple(pieces))
                position, length, pieces = position + length, 0, []
            pieces.append((tensor, first, end))
            length += size
        if pieces:
            yield Batch(file=number, position=position, length=length, pieces=tuple(pieces))


def _pieces(plan: FilePlan, batch_bytes: int) -> Iterator[tuple[StoredTensor, int, int]]:
    for _, tensor, _ in plan.entries:
        yield from ((tensor, first, end) for first, end in windows(tensor, batch_bytes))


def write_batch(batch: Batch, reader: TensorReader, descriptor: int) -> None:
    """Read what *batch* needs, verified, and write it to where it belongs in the open file *descriptor*.

    Raises:
        TierError: it could not be read, or is damaged.
        OSError: it could not be written.
    """
    buffer = memoryview(bytearray(batch.length))
    at = 0
    for tensor, first, end in batch.pieces:
        size = (end - first) * ITEM_BYTES[tensor.dtype]
        reader.read_into(tensor, first, end, buffer[at : at + size])
        at += size
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], batch.position + done)


def index_json(files: Sequence[FilePlan]) -> bytes:
    """Return the index that tells in which of *files* each tensor is, as other programs look for it."""
    weights = {name: plan.name for plan in files for name, _, _ in plan.entries}
    total = sum(tensor.bytes for plan in files for _, tensor, _ in plan.entries)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
