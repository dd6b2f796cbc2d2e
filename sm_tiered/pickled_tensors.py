"""Where the tensors of a ``torch.save`` pickle stand: its opcodes are followed, and nothing that they name is run.

Classes and functions stay names. What they would make is opaque, but for the few by which torch puts tensors together
from storages, and for OrderedDict.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

__all__ = ["Pickled", "Storage", "pickled_tensors"]

_DTYPES = {
    **{"FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool", "UntypedStorage": ""},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128"},
}
_DEEPEST, _MOST_VALUES = 64, 1_000_000
"""A pickle is small, and can hold itself, or one list in very many places."""


@dataclass(frozen=True, slots=True)
class Storage:
    """A record of the file that holds numbers."""

    dtype: str
    """As records name it; empty where the tensor tells."""
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pickled:
    """A tensor in a pickle; all in elements."""

    path: tuple[str | int, ...]
    """The keys that lead to it."""
    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Global:
    """The name of a class, a function or a dtype."""

    name: str


class _Opaque:
    """What is made by a call that nobody makes."""


@dataclass(slots=True)
class _Tensor:
    storage: Storage
    dtype: str
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()


def pickled_tensors(data: bytes) -> list[Pickled]:
    """Return the tensors in the pickle *data*, in its order, by the keys of the dicts and lists that lead to them.

    Raises:
        ValueError: it is no pickle, or has opcodes that ``torch.save`` does not write.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return list(_found_in(machine.stack[-1]))
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"no pickle of torch.save: {type(error).__name__}: {error}") from error
    raise ValueError("the pickle does not end")


def _found_in(value: object) -> Iterator[Pickled]:
    waiting: list[tuple[object, tuple[str | int, ...]]] = [(value, ())]
    for _ in range(_MOST_VALUES):
        if not waiting:
            return
        here, path = waiting.pop()
        if isinstance(here, _Tensor):
            yield Pickled(
                path=path,
                storage=here.storage,
                dtype=here.dtype,
                start=here.start,
                shape=here.shape,
                strides=here.strides,
            )
            continue
        inside: list[tuple[object, object]] = []
        if isinstance(here, dict):
            inside = list(cast("dict[object, object]", here).items())
        elif isinstance(here, (list, tuple)):
            inside = list(enumerate(cast("list[object]", here)))
        if len(path) == _DEEPEST and inside:
            raise ValueError("a pickle whose values are nested too deeply")
        for key, entry in reversed(inside):
            waiting.append((entry, (*path, key if isinstance(key, int) else str(key))))
    raise ValueError("a pickle whose values hold each other too often")


class _Machine:
    """The stack machine that a pickle is written for."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do what an opcode says."""
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _MADE:
            self.stack.append(_MADE[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            self.stack.append(self._memo[int(argument)])
        elif name == "GLOBAL":
            self.stack.append(_Global(str(argument).replace(" ", ".")))
        elif name not in ("PROTO", "FRAME"):
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Opcodes that make one thing of several."""
        stack = self.stack
        if name in ("TUPLE", "APPENDS", "SETITEMS", "ADDITEMS"):
            items = self._above_mark()
            stack.append(tuple(items)) if name == "TUPLE" else self._fill(stack[-1], name, items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items, stack[-count:] = stack[-count:], []
            self._fill(stack[-1], f"{name}S", items)
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_Global(f"{stack[-2]}.{stack[-1]}")]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_called(stack[-2], stack[-1])]
        elif name == "BUILD":
            stack.pop()
        elif name == "BINPERSID":
            stack[-1] = _stored(stack[-1])
        elif name == "POP":
            stack.pop()
        else:
            raise ValueError(f"an opcode {name}")

    def _above_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _fill(self, target: Any, name: str, items: list[Any]) -> None:
        if isinstance(target, _Opaque):
            return
        if name == "APPENDS":
            target.extend(items)
        elif name == "ADDITEMS":
            target.update(id(item) for item in items)  # no tensor is looked for in a set
        else:
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if isinstance(key, (str, int, float, tuple)) else repr(key)] = value


_PUSHED = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "INT", "LONG", "FLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING"),
    }
)
_MADE: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


def _stored(name: Any) -> object:
    kind, storage, key, *_ = name
    known = isinstance(storage, _Global) and storage.name.rpartition(".")[2] in _DTYPES
    if kind != "storage" or not known:
        raise ValueError("a storage of an unknown kind")
    return Storage(_DTYPES[storage.name.rpartition(".")[2]], str(key))


def _called(function: Any, arguments: Any) -> object:
    name = function.name if isinstance(function, _Global) else ""
    if name == "collections.OrderedDict":
        return dict(arguments[0]) if arguments else {}
    if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
        return arguments[0]
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
        storage, start, shape, strides = arguments[:4]
        dtype = arguments[6].name.removeprefix("torch.") if name.endswith("v3") else storage.dtype
        if not isinstance(storage, Storage) or not all(isinstance(n, int) for n in (start, *shape, *strides)):
            raise ValueError("a tensor that is put together in an unknown way")
        return _Tensor(storage, dtype, start, tuple(shape), tuple(strides))
    return _Opaque()
