"""Fingerprints of Python values, the same in every process: how ranks find out that they hold different ones."""

from __future__ import annotations

import io
import pickle
import struct
from collections import Counter, OrderedDict
from typing import Any, cast

import numpy as np
import torch
import xxhash

from sm_tiered_dcp.tensor_reads import own_bytes

__all__ = ["fingerprint"]

_FLOAT = struct.Struct("<cd").pack


def fingerprint(value: object) -> int:
    """Return a 63-bit hash of the content of *value*: types, order of sequences, bits of floats and tensors.

    Equal values have equal fingerprints whatever objects they are made of; the order of a dict doesn't count. 1, 1.0
    and True differ, and so do 0.0 and -0.0. Of a type that is not plain data, the pickle counts.
    """
    out = bytearray()
    _encode(value, out, ())
    return xxhash.xxh3_64_intdigest(bytes(out)) >> 1


def _encode(value: Any, out: bytearray, above: tuple[int, ...]) -> None:
    """Append to *out* bytes that no other value has; each begins with what says where it ends."""
    kind = cast("type[object]", type(value))
    if kind is float:
        out += _FLOAT(b"f", value)
    elif kind is int:
        out += b"i%x;" % value
    elif kind is str:
        _append(out, b"s", value.encode("utf-8", "surrogatepass"))
    elif value is None or kind is bool:
        out += {None: b"N", True: b"T", False: b"F"}[value]
    elif kind is bytes or kind is bytearray:
        _append(out, b"b" if kind is bytes else b"a", value)
    elif isinstance(value, (list, tuple, dict, set, frozenset)):
        if id(cast("Any", value)) in above:
            out += b"c%x;" % (len(above) - above.index(id(cast("Any", value))))
        else:
            _encode_container(cast("Any", value), kind, out, (*above, id(cast("Any", value))))
    else:
        _encode_leaf(value, out)


def _append(out: bytearray, tag: bytes, data: Any) -> None:
    out += b"%b%x;" % (tag, len(data))
    out += data


def _encode_container(value: Any, kind: type[object], out: bytearray, within: tuple[int, ...]) -> None:
    _append(out, b"[", kind.__qualname__.encode())
    out += b"%x;" % len(value)
    if kind is dict or kind is Counter or issubclass(kind, (set, frozenset)):
        entries: list[bytes] = []
        for entry in value.items() if issubclass(kind, dict) else value:
            encoded = bytearray()
            _encode(entry, encoded, within)
            entries.append(bytes(encoded))
        out += b"".join(sorted(entries))
    elif kind is OrderedDict or issubclass(kind, (list, tuple)):
        for entry in value.items() if issubclass(kind, dict) else value:
            _encode(entry, out, within)
    else:  # a dict of a user's class may hold more than its entries
        _append(out, b"o", _pickled(value))


def _encode_leaf(value: Any, out: bytearray) -> None:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type != "meta":
        own = value.detach().resolve_conj().resolve_neg().contiguous().cpu()
        _append(out, b"t", f"{own.dtype} {tuple(own.shape)}".encode())
        out += xxhash.xxh3_128_digest(cast("bytes", own_bytes(own)))
        return
    if isinstance(value, (np.ndarray, np.generic)):
        array: Any = np.asarray(cast("Any", value), order="C")
        if not array.dtype.hasobject:
            _append(out, b"n", f"{type(cast('Any', value)).__name__} {array.dtype.str} {array.shape}".encode())
            out += xxhash.xxh3_128_digest(array.tobytes())
            return
    _append(out, b"o", type(cast("Any", value)).__qualname__.encode())
    _append(out, b"p", _pickled(cast("Any", value)))


def _pickled(value: object) -> bytes:
    """A pickle without a memo: what is equal, not what is the same object, decides."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=4)
    pickler.fast = True
    try:
        pickler.dump(value)
    except Exception:  # can't be pickled, so it can't be stored either; that is told where it is dumped
        return b""
    return stream.getvalue()
