"""The header of safetensors files, written and read by hand, for those who have no torch loaded.

The format: 8 bytes with the length of the header, little-endian; the header, JSON that ends in spaces so that the data
begins at a multiple of 8; the data of the tensors, row-major, without gaps.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from sm_tiered.errors import FormatError
from sm_tiered.stored_tensors import ITEM_BYTES

__all__ = ["LENGTH_BYTES", "MAX_HEADER_BYTES", "Listed", "header_bytes", "header_length", "parse_header"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the library reads at most."""
_METADATA = "__metadata__"

_NAMES: Mapping[str, str] = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}
_KINDS = {dtype: kind for kind, dtype in _NAMES.items()}
_BY_TWOS = "float4_e2m1fn_x2"
"""The format counts the numbers of it, torch the bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One tensor of a file."""

    name: str
    dtype: str
    """As records name it."""
    shape: tuple[int, ...]
    """In elements, as torch counts them."""
    start: int
    """First byte inside the file."""


def header_bytes(tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return what stands before the data of *tensors*: name, dtype as records name it, and shape of each, in order.

    Raises:
        FormatError: the format knows no such dtype or name, or the header would be too long.
    """
    fields: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in _KINDS or name == _METADATA:
            what = f"dtype {dtype}" if dtype not in _KINDS else "a tensor of that name"
            raise FormatError(f"{name}: safetensors knows no {what}", hint="Leave it out: --only, --prefix.")
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        if dtype == _BY_TWOS and shape:
            shape = (*shape[:-1], shape[-1] * 2)
        fields[name] = {"dtype": _KINDS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"a header of {len(text)} bytes is more than safetensors reads", hint="Use smaller shards.")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def header_length(start: bytes, file_size: int, what: str) -> int:
    """Return how long the header is that the first bytes of a file, *start*, begin; without these 8 bytes.

    Raises:
        FormatError: it can't be.
    """
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if len(start) < LENGTH_BYTES or not 2 <= length <= min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        raise FormatError(f"{what} is no safetensors file: a header of {length} bytes does not fit")
    return length


def parse_header(text: bytes, file_size: int, what: str) -> list[Listed]:
    """Return the tensors that a header, *text* without its length, lists; *what* names the file.

    Raises:
        FormatError: it is no such header, or what it lists does not fit into *file_size* bytes.
    """
    try:
        fields = cast(object, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is no safetensors file: {str(error)[:120]}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{what} is no safetensors file: its header is no JSON object")
    base = LENGTH_BYTES + len(text)
    entries = cast("dict[str, object]", fields).items()
    return [_listed(name, entry, base, file_size, what) for name, entry in entries if name != _METADATA]


def _listed(name: str, entry: object, base: int, file_size: int, what: str) -> Listed:
    facts = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    kind, shape, place = facts.get("dtype"), _counts(facts.get("shape")), _counts(facts.get("data_offsets"))
    dtype = _NAMES.get(kind) if isinstance(kind, str) else None
    if dtype is None or shape is None or place is None or len(place) != 2:
        raise FormatError(f"{what}: {name[:80]!r} is not described as safetensors does it: {str(facts)[:120]}")
    if dtype == _BY_TWOS and shape:
        shape = (*shape[:-1], shape[-1] // 2)
    start, end = place
    if end - start != math.prod(shape) * ITEM_BYTES[dtype] or base + end > file_size:
        raise FormatError(f"{what}: {name[:80]!r}, {dtype} {list(shape)}, does not fit into bytes {start} to {end}")
    return Listed(name=name, dtype=dtype, shape=shape, start=base + start)


def _counts(value: object) -> tuple[int, ...] | None:
    found = cast("list[object]", value) if isinstance(value, list) else [None]
    numbers = tuple(n for n in found if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
    return numbers if len(numbers) == len(found) else None
