"""Tensors inside whole files of a checkpoint, which other programs wrote: found by the files' own headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from sm_tiered import safetensors_format as safetensors
from sm_tiered.records import Record
from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_tensors import Stored, StoredChunk, StoredTensor, StoredValue, natural, stored_in

__all__ = ["stored_with_files"]

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: verified bytes of the file."""


def stored_with_files(records: Iterable[Record], chunks: VerifiedChunks) -> Stored:
    """Return what *records* tell of a checkpoint, and the tensors inside its files; those files are no values then.

    Raises:
        FormatError: a tensor is not whole, or a file is not what its name says.
        TierError: a file's header can't be read, or is damaged.
    """
    stored = stored_in(records)
    tensors: dict[str, StoredTensor] = dict(stored.tensors)
    values: dict[str, StoredValue] = {}
    for name, value in stored.values.items():
        found = _tensors_of(value, chunks)
        if found is None:
            values[name] = value
        else:
            tensors.update(found)
    return Stored(tensors={name: tensors[name] for name in sorted(tensors, key=natural)}, values=values)


def _tensors_of(value: StoredValue, chunks: VerifiedChunks) -> Mapping[str, StoredTensor] | None:
    """Return the tensors inside *value*, or None where it is of no kind that can be looked into."""

    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        chunks.read_into(value.part, value.offset + offset, memoryview(buffer))
        return bytes(buffer)

    if value.is_file and value.part.endswith(".safetensors"):
        return _in_safetensors(value, read)
    return None


def _in_safetensors(value: StoredValue, read: Read) -> dict[str, StoredTensor]:
    file = value.part
    length = safetensors.header_length(read(0, min(safetensors.LENGTH_BYTES, value.length)), value.length, file)
    listed = safetensors.parse_header(read(safetensors.LENGTH_BYTES, length), value.length, file)
    found: dict[str, StoredTensor] = {}
    for one in listed:
        chunk = StoredChunk(part=file, start=value.offset + one.start, offsets=(0,) * len(one.shape), sizes=one.shape)
        tensor = StoredTensor(
            name=f"{file}:{one.name}",
            path=(file, one.name),
            dtype=one.dtype,
            shape=one.shape,
            chunks=(chunk,) if 0 not in one.shape else (),
            file=file,
        )
        found[tensor.name] = tensor
    return found
