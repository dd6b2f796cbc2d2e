"""Python values as stock ``torch.save`` streams that load without unpickling code, and as fingerprints.

Only what ``torch.load(weights_only=True)`` reads is stored: None, bool, int, float, complex, str, bytes, bytearray,
list, tuple, dict, set, OrderedDict, Counter, torch.Size, dtypes, devices, tensors, and what the user allowed through
``torch.serialization.add_safe_globals``. Three things that it would refuse are stored as a dict with the key
``__sm_tiered__`` and come back as they were: NumPy arrays, NumPy scalars, and the empty bytes.
"""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any, cast

import numpy as np
import torch

from sm_tiered.errors import CorruptPartError, MismatchError, UnsafeValueError
from sm_tiered_dcp.fingerprints import fingerprint
from sm_tiered_dcp.leaves import lacks_storage
from sm_tiered_dcp.marks import MARK, marked, unmarked
from sm_tiered_dcp.proofs import LONGEST_INT_BITS
from sm_tiered_dcp.zips import check_zip

__all__ = ["MARK", "dump_value", "fingerprint", "load_stream", "load_value"]

_PLAIN = frozenset({type(None), bool, float, complex, str, bytearray, torch.Size, torch.dtype, torch.device})
_ZIP = b"PK\x03\x04"


def dump_value(path: str, value: object, *, allow_pickle: bool) -> bytes:
    """Return *value* as a stream for `load_value`, and for ``torch.load`` (NumPy arrays are marked dicts there).

    Tensors inside are stored at their own size, on the CPU.

    Raises:
        UnsafeValueError: something inside could only be stored by a pickle (with *allow_pickle*: not even so), or
            contains itself. The message names the place, which *path* begins.
    """
    try:
        return _dumped(_Checker(allow_pickle=allow_pickle).walk(value, path))
    except RecursionError as error:
        raise UnsafeValueError(f"{path}: nested too deeply to be stored", hint="Flatten it.") from error
    except _CycleError as error:
        raise UnsafeValueError(f"{error} and can't be stored", hint="Break the cycle.") from error


def load_value(data: bytes | bytearray | memoryview, *, allow_pickle: bool, what: str) -> Any:
    """Return the value that *data* holds; tensors come back on the CPU.

    Without *allow_pickle* no code that *data* names is run. With it, that is only done for what can't be loaded safely.

    Raises:
        MismatchError: the value needs a pickle, and *allow_pickle* is False.
        CorruptPartError: *data* is not such a stream.
    """
    stored = bytes(data)
    value = load_stream(io.BytesIO(stored), len(stored), allow_pickle=allow_pickle, what=what)
    try:
        # The key stands in the stream as it is, so most values need no look inside.
        return _Unmarker().walk(value, what) if MARK.encode() in stored else value
    except Exception as error:
        raise CorruptPartError(f"{what}: {_short(error)}", key=what) from error


def load_stream(stream: IO[bytes], length: int, *, allow_pickle: bool, what: str, checked: bool = False) -> Any:
    """Return the object that a ``torch.save`` stream of *length* bytes holds; see `load_value`.

    *checked*: `check_zip` was asked already.
    """
    start = stream.read(len(_ZIP))
    if start != _ZIP:
        raise CorruptPartError(f"{what}: {length} bytes that are no stored value", key=what)
    try:
        if not checked:
            check_zip(stream, length)
        return _loaded(stream, weights_only=True)
    except MemoryError:
        raise  # no damage
    except Exception as error:
        if not _is_refusal(error):
            raise CorruptPartError(f"{what}: {_short(error)}", key=what) from error
        if not allow_pickle:
            raise MismatchError(
                f"{what}: holds what only a pickle can load: {_short(error)}",
                hint="If you trust who wrote it, set allow_pickle: true.",
            ) from error
        return _unpickled(stream, what)


def _unpickled(stream: IO[bytes], what: str) -> object:
    try:
        return _loaded(stream, weights_only=False)
    except MemoryError:
        raise
    except Exception as error:
        raise MismatchError(
            f"{what}: {_short(error)}", hint="Is the code that defines the value importable here?"
        ) from error


def _dumped(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _loaded(stream: IO[bytes], *, weights_only: bool) -> object:
    stream.seek(0)
    return cast(object, torch.load(stream, map_location="cpu", weights_only=weights_only))


def _is_refusal(error: Exception) -> bool:
    """Whether safe loading met something that it doesn't run, rather than damage."""
    return isinstance(error, pickle.UnpicklingError)


def _short(error: BaseException) -> str:
    """The first sentence that says something; torch explains at length how to switch safety off."""
    text = str(error)
    _, found, reason = text.partition("WeightsUnpickler error: ")
    return f"{type(error).__name__}: {(reason if found else text).strip().split(chr(10))[0][:200]}"


def _is_plain(value: object) -> bool:
    """Whether *value* is surely stored as it is: spares most values the making of a path."""
    kind = type(value)
    return kind in _PLAIN or (kind is int and -(2**63) < cast(int, value) < 2**63)


class _CycleError(ValueError):
    """A container holds itself."""


class _Walker:
    """Rebuilds a tree of values where a leaf changes; what is the same object stays the same object."""

    def __init__(self) -> None:
        self._done: dict[int, tuple[object, object]] = {}
        self._open: set[int] = set()

    def walk(self, value: object, path: str) -> object:
        """Return *value*, or what stands for it."""
        raise NotImplementedError

    def inside(self, value: Any, path: str, build: Callable[[Any, str], object]) -> object:
        """Return what *build* makes of a container, once for each."""
        key = id(value)
        if key in self._done:
            return self._done[key][1]
        if key in self._open:
            raise _CycleError(f"{path}: contains itself")
        self._open.add(key)
        result = build(value, path)
        self._open.discard(key)
        self._done[key] = (value, result)  # with the value itself, so that its id stays taken
        return result

    def sequence(self, value: Any, path: str) -> object:
        """A list or a tuple."""
        items = [item if _is_plain(item) else self.walk(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return items if type(value) is list else tuple(items)

    def mapping(self, value: Any, path: str) -> object:
        """A dict or an OrderedDict."""
        items = {key: item if _is_plain(item) else self.walk(item, f"{path}[{key!r}]") for key, item in value.items()}
        if all(items[key] is item for key, item in value.items()):
            return value
        return OrderedDict(items) if type(value) is OrderedDict else items


class _Checker(_Walker):
    """Finds what can't be stored, and turns into marked dicts what needs to be."""

    def __init__(self, *, allow_pickle: bool) -> None:
        super().__init__()
        self._allow_pickle = allow_pickle

    def walk(self, value: object, path: str) -> object:
        kind = type(value)
        if _is_plain(value):
            return value
        if kind is int and cast(int, value).bit_length() <= LONGEST_INT_BITS:
            return value
        if kind is bytes:
            return value or {MARK: "bytes"}
        if kind is list or kind is tuple:
            return self.inside(value, path, self.sequence)
        if kind is dict or kind is OrderedDict:
            return self.inside(value, path, self._dict)
        if kind is set or kind is Counter:
            return self.inside(value, path, self._members)
        if isinstance(value, torch.Tensor):
            return self.inside(value, path, self._tensor)
        if kind is np.ndarray or isinstance(value, np.generic):
            return self.inside(value, path, marked)
        return self._prove(value, path)

    def _dict(self, value: dict[object, object], path: str) -> object:
        if MARK in value:
            raise UnsafeValueError(f"{path}: the key {MARK!r} is reserved", hint="Rename it.")
        self._keys(value, path)
        if isinstance(value, OrderedDict) and vars(value):
            return self._prove(cast(object, value), path)
        return self.mapping(value, path)

    def _members(self, value: Any, path: str) -> object:
        """A set or a Counter."""
        self._keys(value, path)
        if type(value) is Counter:
            self._keys(cast("Counter[object]", value).values(), path)
        return cast(object, value)

    def _keys(self, keys: Iterable[object], path: str) -> None:
        """What is hashed stays as it is: nothing can stand for it."""
        for key in keys:
            if not _is_plain(key) and self.walk(key, f"{path} key {key!r}") is not key:
                raise UnsafeValueError(
                    f"{path}: the key {key!r} ({type(key).__name__}) can't be stored safely",
                    hint="Use a plain int, float or str.",
                )

    def _tensor(self, value: torch.Tensor, path: str) -> object:
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            return self._prove(value, path)
        faults = {
            f"a {value.layout} tensor": value.layout is not torch.strided,
            "a quantized tensor": value.is_quantized,
            "a nested tensor": value.is_nested,
            "a tensor without data (meta)": value.device.type == "meta",
            "a tensor whose storage was freed or resized": not value.is_nested and lacks_storage(value),
        }
        for fault, is_so in faults.items():
            if is_so:
                raise UnsafeValueError(f"{path}: {fault} can't be stored", hint="Make it a dense tensor.")
        if vars(value):
            self._prove(value, path)
        return _own_tensor(value)

    def _prove(self, value: object, path: str) -> object:
        """For types that the walk doesn't know: try it."""
        kind = type(value)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        try:
            stored = _dumped(value)
        except Exception as error:
            raise UnsafeValueError(
                f"{path}: {name} can't be stored, not even by a pickle: {_short(error)}", hint="Remove it."
            ) from error
        if self._allow_pickle:
            return value
        try:
            _loaded(io.BytesIO(stored), weights_only=True)
        except Exception as error:
            raise UnsafeValueError(
                f"{path}: {name} can't be stored safely", hint="Remove it or set allow_pickle: true."
            ) from error
        return value


def _own_tensor(value: torch.Tensor) -> torch.Tensor:
    """Return *value* on the CPU, in a storage of no more than its own size."""
    if (
        value.device.type == "cpu"
        and value.untyped_storage().nbytes() == value.nbytes
        and not (value.is_conj() or value.is_neg())
    ):
        return value
    own = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    if type(value) is torch.nn.Parameter:
        return torch.nn.Parameter(own, requires_grad=value.requires_grad)
    return own.requires_grad_(value.requires_grad)


class _Unmarker(_Walker):
    """Turns marked dicts back into what they stand for."""

    def walk(self, value: object, path: str) -> object:
        kind = type(value)
        if kind is list or kind is tuple:
            return self.inside(value, path, self.sequence)
        if kind is dict and MARK in cast("dict[object, object]", value):
            return self.inside(value, path, unmarked)
        if kind is dict or kind is OrderedDict:
            return self.inside(value, path, self.mapping)
        return value
