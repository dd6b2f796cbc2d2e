"""Dicts that stand for NumPy values, which safe loading would refuse, inside a stored value."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch

from sm_tiered.errors import UnsafeValueError
from sm_tiered_dcp.tensor_reads import own_bytes

__all__ = ["MARK", "marked", "unmarked"]

MARK = "__sm_tiered__"
"""Key of a dict that stands for a value of another type."""

_KINDS = frozenset("?biufcSUmM")
"""Of NumPy dtypes that can be stored: numbers, bool, text, dates."""


def _is_storable(dtype: Any) -> bool:
    """Not objects and records; nor long doubles, which have padding and mean something else elsewhere."""
    return not dtype.hasobject and dtype.kind in _KINDS and dtype.char not in "gG"


def marked(value: Any, path: str) -> dict[str, object]:
    """Return the dict that stands for a NumPy array or scalar."""
    array = cast("Any", np.asarray(value, order="C"))
    dtype = array.dtype
    if not _is_storable(dtype):
        raise UnsafeValueError(
            f"{path}: a NumPy value of dtype {dtype} can't be stored safely",
            hint="Use numbers, bool, text or dates, or lists of them.",
        )
    try:
        data = cast("torch.Tensor", cast("Any", torch).from_numpy(array.copy()))
    except (TypeError, ValueError):  # text, dates, foreign byte order: what torch has no dtype for
        data = torch.frombuffer(bytearray(array.tobytes() or b"\0"), dtype=torch.uint8)[: array.nbytes].clone()
    scalar = isinstance(value, np.generic)
    return {MARK: "scalar" if scalar else "array", "dtype": dtype.str, "shape": list(array.shape), "data": data}


def unmarked(value: dict[str, Any], path: str) -> object:
    """Return what the dict stands for.

    Raises:
        ValueError: `marked` doesn't make such dicts. Forged ones may raise others too.
    """
    kind = value[MARK]
    if kind == "bytes":
        return b""
    described, data = cast(object, value["dtype"]), cast(object, value["data"])
    shape = tuple(cast("list[int]", value["shape"]))
    if kind not in ("array", "scalar") or not isinstance(described, str) or not isinstance(data, torch.Tensor):
        raise ValueError(f"{path}: {kind!r} stands for nothing")
    dtype = np.dtype(described)
    if not _is_storable(dtype):
        raise ValueError(f"{path}: dtype {dtype} is never stored")
    fits = all(type(length) is int and length >= 0 for length in shape)
    if not fits or not math.prod(shape) * dtype.itemsize == data.nbytes <= data.untyped_storage().nbytes():
        raise ValueError(f"{path}: {dtype} {shape} isn't {data.nbytes} bytes long")
    array = cast("Any", np.empty(shape, dtype))
    if data.nbytes:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(own_bytes(data.contiguous()), np.uint8)
    return array[()] if kind == "scalar" else array
