"""Copies of tensors' data: into views of a mapping, or in order through a small buffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import cast

import torch

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered_dcp.tensor_reads import row_major

__all__ = ["Piece", "copy_tensors", "in_chunks", "kept_views"]

Piece = tuple[int, "bytes | torch.Tensor"]
"""A length in bytes, and what has so many: bytes, or a tensor of which they are the data in row-major order."""

_ASYNC_DEVICES = frozenset({"cuda", "xpu"})
"""Devices whose copies to the host run in a stream that can be waited for."""

_VIEWS = object()
"""Key of what is kept with a mapping."""

_copy_all = cast("Callable[..., None]", vars(torch)["_foreach_copy_"])


def kept_views(
    cache: dict[object, object], owner: object, make: Callable[[], list[torch.Tensor]]
) -> list[torch.Tensor]:
    """Return what *make* made for *owner* when the mapping of *cache* was last written, or makes now.

    One key for all kinds of parts: who finds another's there can't count on anything in these bytes.
    """
    known = cast("tuple[object, list[torch.Tensor]] | None", cache.get(_VIEWS))
    if known is None or known[0] != owner:
        cache.clear()  # before the first byte: should this fail, nothing is known
        known = cache[_VIEWS] = (owner, make())
    return known[1]


def copy_tensors(
    views: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], devices: frozenset[torch.device]
) -> None:
    """Copy each tensor to its view; when this returns, all have arrived. *devices*: the tensors', the CPU apart."""
    if not devices:
        if tensors:
            # One call for all: it loops in C++, without the interpreter and without its lock.
            _copy_all(list(views), list(tensors))
        return
    queued = [device for device in devices if device.type in _ASYNC_DEVICES]
    pairs = list(zip(views, tensors, strict=True))
    try:
        for view, tensor in pairs:
            if not tensor.is_cpu:
                view.copy_(tensor, non_blocking=tensor.device.type in _ASYNC_DEVICES)
        for view, tensor in pairs:  # while the others' copies run
            if tensor.is_cpu:
                view.copy_(tensor)
    finally:
        for device in queued:
            torch.get_device_module(device).current_stream(device).synchronize()


def in_chunks(pieces: Iterable[Piece], size: int) -> Iterator[memoryview]:
    """Yield *pieces*, *size* bytes together, through a buffer of at most 8 MiB; each view is valid until the next."""
    buffer = memoryview(bytearray(min(CHUNK_BYTES, size)))
    at = 0
    for length, source in pieces:
        done = 0
        while done < length:
            count = min(length - done, len(buffer) - at)
            _take(source, done, buffer[at : at + count])
            done, at = done + count, at + count
            if at == len(buffer):
                yield buffer
                at = 0
    if at:
        yield buffer[:at]


def _take(source: bytes | torch.Tensor, start: int, buffer: memoryview) -> None:
    """Fill *buffer* from byte *start* of *source* on."""
    if isinstance(source, bytes):
        buffer[:] = source[start : start + len(buffer)]
        return
    # Payloads and the buffer's end are aligned, so no element is cut in two.
    filled = torch.frombuffer(buffer, dtype=torch.uint8).view(source.dtype)
    first, at = start // source.dtype.itemsize, 0
    for piece in row_major(source, first, first + filled.numel()):
        filled[at : at + piece.numel()].view(piece.shape).copy_(piece)
        at += piece.numel()
