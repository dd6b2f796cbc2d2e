"""The predecessor's metadata, a pickle, read as data: its opcodes are followed, and nothing that it names is called.

Classes stay names, and only those that DCP's metadata is made of are known; what they would make is a `Made`. Another
name ends the reading. So there is nothing that a hostile pickle could run, or change in this process. How much of this
process's memory and time one takes has an end too: nothing is made whose hash, text or comparison would be deep.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sm_tiered.errors import FormatError

__all__ = ["MAX_BYTES", "Made", "Named", "read_pickle"]

MAX_BYTES = 256 * 1024 * 1024
"""Longer metadata is refused: as long is that of two million chunks of tensors."""

_METADATA = "torch.distributed.checkpoint.metadata"
_OLD_METADATA = "torch.distributed._shard.sharded_tensor.metadata"
_PACKAGE = "amzn_sagemaker_checkpointing.checkpointing.filesystem"
_KNOWN: Mapping[str, str] = {
    **{
        f"{_METADATA}.{name}": name
        for name in (
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            *("MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    },
    f"{_OLD_METADATA}.TensorProperties": "TensorProperties",
    f"{_OLD_METADATA}.MEM_FORMAT_ENCODING": "_MEM_FORMAT_ENCODING",
    f"{_PACKAGE}.filesystem._SageMakerStorageInfo": "StorageInfo",  # 1.0
    f"{_PACKAGE}.storage_info._SageMakerStorageInfo": "StorageInfo",  # 1.1
    "torch.Size": "Size",
    "torch.serialization._get_layout": "layout",
    "collections.OrderedDict": "OrderedDict",
    "pathlib.PosixPath": "Path",
}
"""What may be named, and what it is called here."""
_DTYPES = frozenset(
    {
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"),
    }
)
_MOST_OPCODES, _MOST_MADE = 150_000_000, 60_000_000
"""As many, and as many objects, as metadata of `MAX_BYTES` has that a save wrote."""
_LONGEST_INT_BYTES = 16
_HINT = "Nothing of it was run. Import an older step, or from the other place that it was saved to."


@dataclass(frozen=True, slots=True)
class Named:
    """A class, or a dtype: its name."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """What a class would make: the class's name, what it would be called with, and the state it would be given."""

    name: str
    arguments: tuple[object, ...]
    state: object = None


_MARK = object()


class _Outer(tuple[Any, ...]):
    """A tuple that holds tuples: what ``torch.Size`` is called with is one. A tuple that would hold it is refused."""

    __slots__ = ()


def read_pickle(data: bytes, what: str) -> object:
    """Return the object that *data* pickles, made of plain values, `Named` and `Made`.

    Raises:
        FormatError: it names something that is no part of DCP's metadata, or is no such pickle. *what* names it.
    """
    if len(data) > MAX_BYTES:
        raise FormatError(
            f"{what} is {len(data)} bytes long, above {MAX_BYTES}",
            hint="Load it with the library that wrote it, and save it with this one.",
        )
    machine = _Machine(what)
    try:
        for count, (name, argument) in enumerate(_opcodes(data)):
            if name == "STOP":
                return machine.stack[-1]
            if count > _MOST_OPCODES or machine.made > _MOST_MADE:
                raise ValueError("it makes too much")
            machine.step(name, argument)
    except FormatError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = " ".join(str(error).split())[:120]
        raise FormatError(f"{what} is no pickled DCP metadata: {type(error).__name__}: {said}", hint=_HINT) from error
    raise FormatError(f"{what} is no pickled DCP metadata: it does not end", hint=_HINT)


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each; an unknown one is refused before its argument is read."""
    stream = io.BytesIO(data)
    while code := stream.read(1):
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise ValueError(f"an opcode {code!r}")
        yield opcode.name, None if opcode.arg is None else opcode.arg.reader(stream)


class _Machine:
    """The stack machine that a pickle is written for, without any means to call or import."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.stack: list[Any] = []
        self.made = 0
        """How many objects were made."""
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do what an opcode says."""
        if name in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > 8 * _LONGEST_INT_BYTES:
                raise ValueError("an integer that is too long")
            self._push(argument)
        elif name in _FRESH:
            self._push(_FRESH[name]())
        elif name == "MEMOIZE":
            self._remember(len(self._memo))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._remember(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "GLOBAL":
            self._push(self._named(*str(argument).split(" ", 1)))
        elif name not in ("PROTO", "FRAME"):
            self._combine(name)

    def _push(self, value: Any) -> None:
        self.made += 1
        self.stack.append(value)

    def _remember(self, place: int) -> None:
        # A pickler remembers an object once, when it has made it.
        if len(self._memo) > self.made:
            raise ValueError("more is remembered than was made")
        self._memo[place] = self.stack[-1]

    def _combine(self, name: str) -> None:
        """Opcodes that make one thing of several."""
        stack = self.stack
        if name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = stack[-int(name[-1]) :]
            del stack[-int(name[-1]) :]
            self._push(_tuple(items))
        elif name == "TUPLE":
            self._push(_tuple(self._above_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._above_mark()
            _of(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._above_mark()
            _of(stack[-1], dict).update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif name == "STACK_GLOBAL":
            attribute, module = _of(stack.pop(), str), _of(stack.pop(), str)
            self._push(self._named(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, kind = _of(stack.pop(), tuple), _of(stack.pop(), Named)
            self._push(_made(kind, arguments))
        else:
            assert name == "BUILD", name
            state = stack.pop()
            _of(stack[-1], Made).state = state

    def _named(self, module: str, attribute: str) -> Named:
        if module == "torch" and attribute in _DTYPES:
            return Named(attribute)
        known = _KNOWN.get(f"{module}.{attribute}")
        if known is None:
            raise FormatError(
                f"{self._what} names {f'{module}.{attribute}'[:120]!r}, which is no part of DCP's metadata",
                hint="Nothing of it was run. If you did not put it there, somebody else can write to that place.",
            )
        return Named(known)

    def _above_mark(self) -> list[Any]:
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items


_PUSHED = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES"),
    }
)
_FRESH: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}


_OTHERS = frozenset(
    {
        *("PROTO", "FRAME", "STOP", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
        *("STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"),
    }
)
_OPCODES: Mapping[bytes, pickletools.OpcodeInfo] = {
    opcode.code.encode("latin-1"): opcode
    for opcode in pickletools.opcodes
    if opcode.name in _PUSHED or opcode.name in _FRESH or opcode.name in _OTHERS
}
"""All that a pickle of metadata has, by code."""


def _tuple(items: list[Any]) -> tuple[Any, ...]:
    kinds = set(map(type, items))
    if _Outer in kinds:
        raise ValueError("tuples in tuples in tuples")
    return _Outer(items) if tuple in kinds else tuple(items)


def _key(value: Any) -> Any:
    # A Made is hashed as itself. Hashing a tuple goes as deep as it is, without an end that Python would see.
    if type(value) not in (str, Made):
        raise ValueError(f"a {type(value).__name__} as the key of a dict")
    return value


def _of(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")  # noqa: TRY004 - damage
    return value


def _made(kind: Named, arguments: tuple[Any, ...]) -> object:
    if kind.name == "Size":
        return tuple(_of(size, int) for size in _of(arguments[0], tuple))
    if kind.name == "OrderedDict":
        if arguments:
            raise ValueError("an OrderedDict that is called with something")
        return {}
    return Made(kind.name, arguments)
