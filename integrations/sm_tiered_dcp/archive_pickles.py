"""The pickle inside a ``torch.save`` file, and which tensor's data each of the file's records is.

A file's records are its storages. `PickleModule` lets ``torch.save`` number them, and remembers how each tensor was
pickled; `pickle_again` makes the next pickle from that, as long as the tensors stand where they stood.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import IO, Any, cast

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

from sm_tiered.errors import StructureError, UnsafeValueError
from sm_tiered_dcp.frames import blank
from sm_tiered_dcp.leaves import identity, lacks_storage, no_storage
from sm_tiered_dcp.proofs import LONGEST_INT_BITS

__all__ = ["Entry", "MovedError", "PickleModule", "Pickled", "pickle_again"]

_PAD_BYTES = 4096
"""Pickles end at multiples of this, so that a counter with one digit more moves nothing; unpicklers stop before."""

_PROTOCOL = 2
"""``torch.save``'s own."""

_STORAGES = (torch.UntypedStorage, torch.storage.TypedStorage)


class MovedError(Exception):
    """A pickle holds a tensor that the last one did not, or that stands elsewhere now."""


@dataclass(slots=True, eq=False)
class _Numbered:
    """A storage in a pickle that is made again: what torch named it by, without the storage."""

    name: tuple[Any, ...] = ()
    record: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """How one tensor is pickled; it does not keep the tensor alive."""

    function: Any
    arguments: tuple[Any, ...]
    """For the function, after the storage."""
    storage: _Numbered
    whole: bool
    """Whether its storage is copied as it is, rather than its numbers in order."""

    @property
    def reduced(self) -> tuple[Any, ...]:
        """What a pickler is given; hooks are each tensor's own."""
        own: list[Any] = [OrderedDict() if type(given) is OrderedDict else given for given in self.arguments]
        return self.function, (self.storage, *own)


@dataclass(slots=True)
class Pickled:
    """What a pickle holds."""

    data: bytes = b""
    """The pickle, padded."""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """By record, what its data is copied from."""
    entries: dict[object, Entry] = field(default_factory=dict[object, Entry])
    """By what tells a tensor from others, how it is pickled."""
    named: set[object] = field(default_factory=set[object])
    """What decides whether it can be loaded safely: classes, functions, the types of what is not plain data."""

    def meet(self, obj: Any) -> None:
        """Take note of an object that a pickler meets."""
        kind = cast("type[object]", type(obj))
        if kind is int:
            if obj.bit_length() > LONGEST_INT_BITS:
                self.named.add("a long int")
        elif kind not in _PLAIN_DATA:
            self.named.add(kind)
            if isinstance(obj, (type, FunctionType, BuiltinFunctionType)):
                self.named.add(obj)


_PLAIN_DATA = frozenset({type(None), bool, float, complex, str, bytes, tuple, list, dict, torch.Size, torch.Tensor})


def pickle_again(value: object, entries: dict[object, Entry]) -> Pickled:
    """Return the pickle of *value*, whose tensors are among *entries*.

    Raises:
        MovedError: they are not.
    """
    stream, made = io.BytesIO(), Pickled(entries=entries)
    _Again(stream, made).dump(value)
    made.data = _padded(stream)
    return made


class _Again(pickle.Pickler):
    def __init__(self, stream: IO[bytes], made: Pickled) -> None:
        super().__init__(stream, _PROTOCOL)
        self._made = made

    def persistent_id(self, obj: Any) -> Any:
        # Asked of every object there is.
        if type(obj) in _PLAIN_DATA:
            return None
        if type(obj) is _Numbered:
            return obj.name
        if isinstance(obj, _STORAGES):
            raise MovedError
        self._made.meet(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor) or not _is_plain(obj):
            return NotImplemented
        entry = self._made.entries.get(_place(obj))
        if entry is None:
            raise MovedError
        record = entry.storage.record
        if record not in self._made.tensors:
            self._made.tensors[record] = _bytes_of(obj.untyped_storage()) if entry.whole else obj.detach()
        return entry.reduced


class PickleModule:
    """What ``torch.save`` takes for a pickle module. *path* names the archive in errors."""

    __name__ = "pickle"

    def __init__(self, path: str) -> None:
        self.pickled = Pickled()
        self._path = path
        self._blanks: dict[object, torch.Tensor] = {}
        self._numbered: dict[object, _Numbered] = {}
        self._waiting: list[tuple[Entry, torch.Tensor]] = []

    @property
    def Pickler(self) -> type[pickle.Pickler]:  # noqa: N802 - torch asks for it by this name
        """The class that torch derives its own from."""
        module = self

        class Pickler(pickle.Pickler):
            def __init__(self, file: IO[bytes], protocol: int) -> None:
                super().__init__(file, protocol)
                self._file = file

            def __init_subclass__(cls) -> None:
                named = cast("Any", cls).persistent_id

                def persistent_id(self: Any, obj: Any) -> Any:
                    if isinstance(obj, _STORAGES):
                        return module.name_of(obj, lambda: named(self, obj))
                    module.pickled.meet(obj)
                    return None

                cast("Any", cls).persistent_id = persistent_id

            def reducer_override(self, obj: Any) -> Any:
                return module.reduced(obj) if isinstance(obj, torch.Tensor) else NotImplemented

            def dump(self, obj: Any) -> None:
                super().dump(obj)
                module.pickled.data = _padded(cast(io.BytesIO, self._file))
                module.finish()

        return Pickler

    def name_of(self, storage: Any, ask: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return torch's name for *storage*, and remember it."""
        numbered = self._number(storage)
        if not numbered.name:
            numbered.name = ask()
            numbered.record = f"data/{numbered.name[2]}"
            self.pickled.tensors[numbered.record] = _bytes_of(_untyped(storage))
        return numbered.name

    def _number(self, storage: Any) -> _Numbered:
        return self._numbered.setdefault((_untyped(storage)._cdata, getattr(storage, "dtype", None)), _Numbered())

    def reduced(self, value: torch.Tensor) -> Any:
        """Return how *value* is pickled: as torch does it, but on the CPU, and of a view its own numbers alone."""
        if isinstance(value, (DTensor, ShardedTensor)):
            message = f"{self._path}: holds a {type(value).__name__}, of which this rank has only a part"
            raise StructureError(message, hint="Store its full_tensor(), or put it into the state by its name.")
        if not _is_plain(value):
            return NotImplemented
        if value.is_meta:
            raise UnsafeValueError(f"{self._path}: a tensor on the meta device has no data to store")
        if lacks_storage(value):
            raise no_storage(self._path, value)
        place = _place(value)
        turned = value.is_conj() or value.is_neg()
        whole = value.is_cpu and value.untyped_storage().nbytes() == value.nbytes and not turned
        stored: Any = value if whole else self._blank(place, value)
        reduced = stored.__reduce_ex__(_PROTOCOL)
        function, (storage, *arguments) = reduced
        entry = Entry(function, tuple(arguments), self._number(storage), whole)
        self.pickled.entries[place] = entry
        self._waiting.append((entry, value))
        return reduced

    def _blank(self, place: object, value: torch.Tensor) -> torch.Tensor:
        found = self._blanks.setdefault(place, blank(value.dtype, tuple(value.shape)))
        return found.detach().requires_grad_() if value.requires_grad else found

    def finish(self) -> None:
        """Put what blanks stand for in their place: all have their names now."""
        for entry, value in self._waiting:
            if not entry.whole:
                self.pickled.tensors[entry.storage.record] = value.detach()

    def forget(self) -> None:
        """Let go of tensors: a class is garbage that waits for the collector, and nothing large may hang on it."""
        self._waiting.clear()
        self._blanks.clear()
        self.pickled = Pickled()


def _padded(stream: io.BytesIO) -> bytes:
    stream.write(bytes(-stream.tell() % _PAD_BYTES))
    return stream.getvalue()


def _is_plain(value: torch.Tensor) -> bool:
    """Whether *value* is numbers in a storage and nothing else; torch knows how to take others apart."""
    dense = type(value) is torch.Tensor and value.layout is torch.strided
    return dense and not value.is_nested and not value.is_quantized and not vars(value)


def _place(value: torch.Tensor) -> object:
    storage: Any = value.untyped_storage()
    return storage._cdata, storage.nbytes(), value.requires_grad, *identity(value)


def _untyped(storage: Any) -> Any:
    return getattr(storage, "_untyped_storage", storage)


def _bytes_of(storage: Any) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
