"""Tensors inside whole files of a checkpoint, which other programs wrote: found by the files' own headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sm_tiered import safetensors_format as safetensors
from sm_tiered.records import Record
from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_tensors import Stored, StoredChunk, StoredTensor, StoredValue, in_order, natural, stored_in
from sm_tiered.torch_files import look_into

__all__ = ["stored_with_files"]

Read = Callable[[int, int], bytes]
"""``read(offset, length)``: verified bytes of the file."""

_TORCH_NAMES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


def stored_with_files(records: Iterable[Record], chunks: VerifiedChunks) -> Stored:
    """Return what *records* tell of a checkpoint, and what is inside its files: safetensors, and those of torch.save.

    A torch.save file becomes its tensors, and its pickle as a value; a file of another kind stays a value.

    Raises:
        FormatError: a tensor is not whole, or a file is not what its name says.
        TierError: a file's header can't be read, or is damaged.
    """
    stored = stored_in(records)
    tensors: dict[str, StoredTensor] = {}
    odd: dict[str, StoredTensor] = {}
    values: dict[str, StoredValue] = {}
    for name, value in stored.values.items():
        read = _reader(value, chunks)
        if value.is_file and value.part.endswith(".safetensors"):
            tensors.update(_in_safetensors(value, read))
            continue
        inside = look_into(value, read) if _may_be_torch(value, chunks) else None
        if inside is None:
            values[name] = value
            continue
        tensors.update(inside.tensors)
        odd.update(inside.odd)
        values[inside.rest.name] = inside.rest
    every = {**stored.tensors, **in_order(tensors)}
    return Stored(tensors={name: every[name] for name in sorted(every, key=natural)}, values=values, odd=odd)


def _reader(value: StoredValue, chunks: VerifiedChunks) -> Read:
    def read(offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        chunks.read_into(value.part, value.offset + offset, memoryview(buffer))
        return bytes(buffer)

    return read


def _may_be_torch(value: StoredValue, chunks: VerifiedChunks) -> bool:
    """Whether *value* is all of a file whose name says that torch.save may have written it."""
    whole = value.offset == 0 and value.length == chunks.part(value.part).size
    return whole and value.part.endswith(_TORCH_NAMES)


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
