"""What the bytes of a tensor mean as numbers, for every dtype that is stored; without torch.

NumPy has no bfloat16 and no 8 and 4 bit floats: the first is the upper half of a float32, the others are looked up.
Formats: OCP 8-bit floating point, revision 1.0 (E4M3, E5M2); OCP Microscaling, version 1.0 (E8M0, E2M1);
https://arxiv.org/abs/2206.02915 (the ``fnuz`` kinds).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

__all__ = ["decoded", "is_integer"]

_NATIVE = {"float16": "f2", "float32": "f4", "float64": "f8", "complex64": "c8", "complex128": "c16"}
_INTEGERS = {
    "bool": "u1",
    **{f"{sign}int{8 * width}": f"{sign or 'i'}{width}" for sign in ("", "u") for width in (1, 2, 4, 8)},
}


def is_integer(dtype: str) -> bool:
    """Whether numbers of *dtype* are integers; a bool is one."""
    return dtype in _INTEGERS


def decoded(dtype: str, data: bytearray) -> Any:
    """Return the numbers in *data* as a NumPy array of one dimension.

    Integers are of their own kind, all else is float64 or complex128: none of it loses a digit.
    """
    import numpy

    np: Any = numpy
    with np.errstate(invalid="ignore"):  # a NaN that signals becomes one that doesn't
        return _decoded(np, dtype, data)


def _decoded(np: Any, dtype: str, data: bytearray) -> Any:
    if dtype in _INTEGERS:
        return np.frombuffer(data, dtype=f"<{_INTEGERS[dtype]}")
    if dtype in _NATIVE:
        found = np.frombuffer(data, dtype=f"<{_NATIVE[dtype]}")
        return found.astype(np.complex128 if dtype.startswith("complex") else np.float64)
    if dtype == "bfloat16":
        halves = np.frombuffer(data, dtype="<u2").astype(np.uint32)
        return (halves << 16).view(np.float32).astype(np.float64)
    if dtype == "complex32":
        return np.frombuffer(data, dtype="<f2").astype(np.float64).view(np.complex128)
    return _table(dtype)[np.frombuffer(data, dtype=np.uint8)].reshape(-1)


@cache
def _table(dtype: str) -> Any:
    """The number, or the two, that each byte stands for."""
    import numpy

    np: Any = numpy
    if dtype == "float8_e8m0fnu":
        return np.array([math.nan if code == 255 else 2.0 ** (code - 127) for code in range(256)])
    if dtype == "float4_e2m1fn_x2":
        small = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        both = small + [-value for value in small]
        return np.array([[both[code & 15], both[code >> 4]] for code in range(256)])
    return np.array([_float8(dtype, code) for code in range(256)])


def _float8(dtype: str, code: int) -> float:
    mantissa_bits = 3 if "e4m3" in dtype else 2
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    sign = -1.0 if code & 0x80 else 1.0
    highest = (1 << (7 - mantissa_bits)) - 1
    if dtype.endswith("fnuz"):
        if code == 0x80:
            return math.nan
        bias = (highest + 1) // 2
    else:
        bias = highest // 2
        if mantissa_bits == 3 and code & 0x7F == 0x7F:
            return math.nan
        if mantissa_bits == 2 and exponent == highest:
            return math.nan if mantissa else sign * math.inf
    fraction = mantissa / (1 << mantissa_bits)
    return sign * (fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
