"""safetensors files with holes where the data goes: byte for byte what ``safetensors.torch.save_file`` writes.

The format: 8 bytes with the length of the header, little-endian; the header, JSON that ends in spaces so that the data
begins at a multiple of 8; the data of the tensors, row-major, without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sm_tiered.errors import StructureError
from sm_tiered_dcp.archive import Packed
from sm_tiered_dcp.frames import Frame, Hole
from sm_tiered_dcp.leaves import lacks_storage

__all__ = ["pack_safetensors"]

_LENGTH_BYTES = 8
_ALIGNMENT = 8


def pack_safetensors(name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> Packed:
    """Return *tensors* as the file *name*, ready to be written. Nothing is copied yet.

    Raises:
        StructureError: a tensor is none that the format knows, shares its storage with another, or lacks it.
    """
    _check(name, tensors)
    ordered = sorted(tensors.items(), key=lambda pair: (-_kinds()[pair[1].dtype].order, pair[0]))
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata is not None else {}
    ends: list[tuple[int, int]] = []
    end = 0
    for key, tensor in ordered:
        start, end = end, end + tensor.nbytes
        ends.append((start, end))
        fields[key] = {"dtype": _kinds()[tensor.dtype].name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = _header(fields)
    holes = tuple(
        Hole(offset=len(header) + start, length=stop - start, record=key)
        for (key, _), (start, stop) in zip(ordered, ends, strict=True)
        if stop > start
    )
    frame = Frame(size=len(header) + end, pieces=((0, header),), holes=holes)
    return Packed(frame=frame, tensors=tuple(tensor.detach() for _, tensor in ordered if tensor.nbytes))


def _header(fields: Mapping[str, object]) -> bytes:
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _check(name: str, tensors: Mapping[str, Any]) -> None:
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.dtype not in _kinds():
            what = f"{tensor.dtype} {tensor.layout}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise StructureError(
                f"{name}: {key} ({what}) can't stand in a safetensors file",
                hint="Save with safe_serialization=False.",
            )
        if is_traceable_wrapper_subclass(tensor):
            message = f"{name}: {key} is a {type(tensor).__name__}, which wraps other tensors"
            raise StructureError(message, hint="Save with safe_serialization=False.")
        if tensor.is_meta or lacks_storage(tensor):
            raise StructureError(f"{name}: {key} has no data", hint="Materialise the model before it is saved.")
    _check_apart(name, {key: tensor for key, tensor in tensors.items() if tensor.nbytes})


def _check_apart(name: str, tensors: Mapping[str, Any]) -> None:
    """Refuse tensors that share memory: the format knows no ties, and what is loaded would no longer be tied."""
    extents = sorted((str(tensor.device), tensor.data_ptr(), _reach(tensor), key) for key, tensor in tensors.items())
    for (device, start, length, one), (other_device, other_start, _, other) in itertools.pairwise(extents):
        if device == other_device and other_start < start + length:
            raise StructureError(
                f"{name}: {one} and {other} share memory, and safetensors knows no ties",
                hint="Save with safe_serialization=False.",
            )


def _reach(tensor: torch.Tensor) -> int:
    """How many bytes lie between the first and the end of the last that belong to *tensor*."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


class _Kind:
    """How the format names a dtype, and where tensors of it stand among the others."""

    __slots__ = ("name", "order")

    def __init__(self, name: str, order: int) -> None:
        self.name, self.order = name, order


@cache
def _kinds() -> Mapping[torch.dtype, _Kind]:
    """Every dtype that the library writes as it is. Names and order are asked of it: one file holds one of each."""
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    ones: dict[str, torch.Tensor] = {}
    known: dict[str, torch.dtype] = {}
    for dtype in dtypes:
        try:
            tensor = torch.zeros(1, dtype=torch.uint8).new_empty(dtype.itemsize).view(dtype)
            save({"x": tensor})
        except (KeyError, RuntimeError, SafetensorError):
            continue  # a dtype that the library does not know, or torch can't make
        ones[str(dtype)], known[str(dtype)] = tensor, dtype
    written = save(ones)
    length = int.from_bytes(written[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(written[_LENGTH_BYTES : _LENGTH_BYTES + length])
    by_place = sorted(header, key=lambda key: -header[key]["data_offsets"][0])
    return {
        known[key]: _Kind(header[key]["dtype"], order)
        for order, key in enumerate(by_place)
        if header[key]["shape"] == [1]  # of those that torch packs by twos it tells another shape
    }
