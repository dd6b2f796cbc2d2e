"""What a pickle may hold, found out by trying: without the numbers of any tensor, so that it costs little."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch

from sm_tiered.errors import UnsafeValueError
from sm_tiered_dcp.leaves import PLAIN

__all__ = ["LONGEST_INT_BITS", "blamed", "loads_safely", "pickles"]

LONGEST_INT_BITS = 255 * 8 - 1
"""Longer ones take another pickle opcode, which safe loading doesn't know."""


def loads_safely(value: object) -> bool:
    """Whether ``torch.load(weights_only=True)`` reads what ``torch.save`` makes of *value*."""
    try:
        torch.load(_hollow(value), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is, it does not load
        return False
    return True


def pickles(value: object) -> bool:
    """Whether ``torch.save`` takes *value*."""
    try:
        _hollow(value)
    except Exception:  # noqa: BLE001 - whatever it is, it does not pickle
        return False
    return True


def blamed(value: object, path: str, works: Callable[[object], bool], what: str, hint: str) -> UnsafeValueError:
    """Return the error that names the innermost value inside *value*, at *path*, that does not work."""
    seen = {id(value)}
    while True:
        for place, inner in _entries(value, path):
            if id(inner) not in seen and not works(inner):
                seen.add(id(inner))
                value, path = inner, place
                break
        else:
            break
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return UnsafeValueError(f"{path}: {name} {what}", hint=hint)


def _entries(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, inner in cast("Mapping[object, object]", value).items():
            yield f"{path}[{key!r}]", inner
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(cast("list[object]", value)):
            yield f"{path}[{index}]", inner


class _Hollow(pickle.Pickler):
    """Pickles tensors that are nothing but numbers as ones without."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) not in PLAIN or vars(value):
            return NotImplemented
        empty: Any = torch.empty(0)
        return empty.__reduce_ex__(2)


class _HollowModule:
    __name__ = "pickle"
    Pickler = _Hollow


def _hollow(value: object) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(value, stream, pickle_module=_HollowModule)
    stream.seek(0)
    return stream
