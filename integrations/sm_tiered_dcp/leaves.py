"""What counts as a leaf of a nested state, and what the leaves are called: the rules of stock DCP, and where we differ.

Stock joins the keys with dots, goes into every mapping, and into a list if it holds a tensor or a mapping. Here an
empty dict is a leaf (stock drops it), so is one with other keys than str and int, and Stateful objects are asked for
their state wherever they stand, not only at the top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sm_tiered.errors import StructureError

__all__ = [
    "PER_RANK",
    "PLAIN",
    "Archive",
    "Kind",
    "Path",
    "Stateful",
    "check_state",
    "check_tensor",
    "dict_key",
    "goes_in",
    "holds_leaves",
    "holds_python",
    "identity",
    "is_flat_list",
    "kind_of",
    "lacks_storage",
    "local_tensors",
    "no_storage",
    "overlaps_itself",
    "path_step",
    "per_rank_name",
    "raise_duplicate",
    "state_for",
    "state_of",
    "stock_path",
]

PER_RANK = "per_rank"
"""The top-level key whose values belong to one rank."""


class Archive:
    """A leaf of a state: *value* is stored whole, as one file that ``torch.load`` reads, and comes back as one.

    For what another program shall find as its own file; its tensors can't be resharded. Rank 0's is stored and comes
    back on every rank; in the memory of each further node one rank keeps its own. So hold the same on all ranks.
    """

    def __init__(self, value: Any = None) -> None:
        """Hold *value*; None where it is to be restored."""
        self.value = value

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Archive is a leaf of a state: it stands in dicts and lists only")


PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose bytes are their own storage's."""

Path = tuple[str | int, ...]
"""The keys that lead to a leaf: a str for a dict's key, an int for a list's index.

A dict's int key is a NUL and its digits: an index and an int key must be told apart to build a container anew.
"""

_INT_KEY = "\0"
_KEYS = frozenset({str, int})


@runtime_checkable
class Stateful(Protocol):
    """What DCP calls Stateful: modules, optimizers, schedulers, loaders."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any) -> Any: ...


class Kind:
    """How a value is treated. Plain ints: to compare members of an enum costs more than the rest of a leaf."""

    TENSOR, DTENSOR, SHARDED, MAPPING, LIST, STATEFUL, LEAF, ARCHIVE = range(1, 9)


_KINDS: dict[type, int] = {
    **dict.fromkeys(PLAIN, Kind.TENSOR),
    DTensor: Kind.DTENSOR,
    ShardedTensor: Kind.SHARDED,
    dict: Kind.MAPPING,
    list: Kind.LIST,
    Archive: Kind.ARCHIVE,
    **dict.fromkeys((int, float, str, bool, bytes, tuple, complex, type(None)), Kind.LEAF),
}
_SCALARS = frozenset(known for known, kind in _KINDS.items() if kind == Kind.LEAF)


def kind_of(value: object) -> int:
    """Return the `Kind` of *value*."""
    return _KINDS.get(type(value)) or _classify(value)


def _classify(value: object) -> int:
    if isinstance(value, ShardedTensor):
        return Kind.SHARDED
    if isinstance(value, torch.Tensor):
        return Kind.DTENSOR if isinstance(value, DTensor) else Kind.TENSOR
    if isinstance(value, Archive):
        return Kind.ARCHIVE
    if isinstance(value, Stateful) and not isinstance(value, type):
        return Kind.STATEFUL
    if isinstance(value, Mapping):
        return Kind.MAPPING
    return Kind.LIST if isinstance(value, list) else Kind.LEAF


def holds_leaves(mapping: Mapping[Any, object]) -> bool:
    """Whether *mapping* is gone into."""
    return bool(mapping) and _KEYS.issuperset(map(type, mapping))


def is_flat_list(values: Collection[object]) -> bool:
    """Whether a list is one leaf: it holds nothing with a name of its own at any depth of lists."""
    if _SCALARS.issuperset(map(type, values)):
        return True
    for entry in values:
        kind = kind_of(entry)
        if kind == Kind.LIST:
            if not is_flat_list(cast("list[object]", entry)):
                return False
        elif kind != Kind.LEAF:
            return False
    return True


def goes_in(value: Any) -> bool:
    """Whether *value* is a container whose entries have names of their own."""
    kind = kind_of(value)
    return (kind == Kind.MAPPING and holds_leaves(value)) or (kind == Kind.LIST and not is_flat_list(value))


def holds_python(value: Any) -> bool:
    """Whether *value* is a Python value, or a container of nothing else: no tensor or Stateful object has a name."""
    if not goes_in(value):
        return kind_of(value) in (Kind.MAPPING, Kind.LIST, Kind.LEAF)
    return all(map(holds_python, value.values() if kind_of(value) == Kind.MAPPING else value))


def path_step(key: str | int) -> str:
    """Return a dict's *key* as it stands in a path."""
    return key if type(key) is str else f"{_INT_KEY}{key}"


def dict_key(step: str) -> str | int:
    """Return the dict's key that stands in a path as *step*."""
    return int(step[1:]) if step.startswith(_INT_KEY) else step


def stock_path(path: Path) -> Path:
    """Return *path* as stock DCP writes it: a dict's int key is its digits."""
    return tuple(step.lstrip(_INT_KEY) if isinstance(step, str) else step for step in path)


def per_rank_name(rank: int) -> str:
    """Return the name under which the values of *rank* alone are stored."""
    return f"{PER_RANK}.{rank:05d}"


def check_state(state: object) -> Mapping[str, Any]:
    """Return *state* if it can be one checkpoint.

    Raises:
        StructureError: not a mapping, empty, or with a key that is no string or takes a reserved name.
    """
    if isinstance(state, Stateful) or not isinstance(state, Mapping):
        hint = "Pass a dict that names it, such as {'model': model}" if isinstance(state, Stateful) else "Pass a dict"
        raise StructureError(f"the state is a {type(state).__name__}, not a mapping", hint=hint)
    if not state:
        raise StructureError("the state is empty: there is nothing to save or restore", hint="Pass {'model': model}")
    for key in cast("Mapping[object, object]", state):
        if type(key) is not str:
            message = f"state has the key {key!r} of type {type(key).__name__}, not str"
            raise StructureError(message, hint=f"Use {str(key)!r}")
        if key.startswith(f"{PER_RANK}."):
            message = f"state has the key {key!r}, and names that begin with '{PER_RANK}.' are reserved"
            raise StructureError(message, hint=f"Put values of one rank into state[{PER_RANK!r}]")
    return cast("Mapping[str, Any]", state)


def state_of(name: str, value: Stateful) -> Any:
    """Return the state dict of *value*."""
    state = value.state_dict()
    if state is value:
        raise StructureError(f"state_dict() of {name}, a {type(value).__name__}, returns the object itself")
    return state


def state_for(name: str, value: Any, stored: Collection[str]) -> Any:
    """Return the state dict of a Stateful object for a load of the names *stored*, which are relative to it.

    An object that creates state lazily has ``state_dict_for(stored)`` for this; the others are asked as for a save.
    """
    ask = getattr(value, "state_dict_for", None)
    return ask(stored) if callable(ask) else state_of(name, value)


def overlaps_itself(value: Any) -> bool:
    """Return whether numbers of tensor *value* may share a place, as in an expanded one: it can be read, not filled.

    Exact for all that slicing, transposing and expanding makes of a dense tensor; other strides count as overlapping
    when a step along one dimension does not clear all smaller ones.
    """
    return any(_overlaps(local) for local in local_tensors(value) if local.numel() and not local.is_contiguous())


def _overlaps(local: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in _extents(local) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _extents(local: torch.Tensor) -> Iterable[tuple[int, int]]:
    return zip(local.shape, local.stride(), strict=True)


def local_tensors(value: Any) -> list[Any]:
    """Return what of a tensor of any kind is in this process, live: one tensor, or a ShardedTensor's shards."""
    kind = kind_of(value)
    if kind == Kind.SHARDED:
        return [shard.tensor for shard in value.local_shards()]
    return [value._local_tensor if kind == Kind.DTENSOR else value]


def identity(local: Any) -> tuple[Any, ...]:
    """Equal for two tensors in this process only if they are the same numbers in the same place."""
    place = (local.data_ptr(), local.shape, local.stride(), local.dtype, local.device)
    return (*place, local.is_conj(), local.is_neg())


def lacks_storage(local: Any) -> bool:
    """Return whether a dense tensor reaches beyond its storage; to touch its numbers could kill the process."""
    if local.layout is not torch.strided or not local.numel():
        return False
    last = local.storage_offset() + sum((size - 1) * stride for size, stride in _extents(local))
    return local.untyped_storage().nbytes() < (last + 1) * local.element_size()


def check_tensor(name: str, value: Any) -> None:
    """Refuse a tensor that isn't a box of numbers in storage of its own.

    Raises:
        StructureError: on the meta device, sparse, quantized, nested, a wrapper, freed, or a sum that ranks still owe.
    """
    for local in local_tensors(value):
        for what, found, hint in (
            ("has no storage yet", is_lazy(local), "Run the model once first"),
            ("is on the meta device and has no data", local.is_meta, "Materialise it with to_empty() first"),
            ("is quantized", local.is_quantized, "Give its int_repr(), scale and zero point"),
            ("is nested", local.is_nested, "Give its values() and offsets()"),
            (f"has the layout {local.layout}", local.layout is not torch.strided, "Give its indices and values"),
            ("wraps other tensors", is_traceable_wrapper_subclass(local), "Give the tensors that it wraps"),
        ):
            if found:
                message = f"{name}, a {type(value).__name__}, {what}: it can't be saved or restored"
                raise StructureError(message, hint=hint)
        if lacks_storage(local):
            raise no_storage(name, value)
    if kind_of(value) == Kind.DTENSOR and any(placement.is_partial() for placement in value.placements):
        message = f"{name}, a DTensor, has a pending sum: placements {value.placements}"
        raise StructureError(message, hint="Call redistribute() or full_tensor() first")


def no_storage(name: str, value: object) -> StructureError:
    """Return the error that says that *value* reaches beyond its storage."""
    message = f"{name}, a {type(value).__name__}, is larger than its storage, which was freed or resized"
    return StructureError(message, hint="Save or restore while it has its data: FSDP frees what is gathered")


def raise_duplicate(name: str, one: Path, other: Path) -> NoReturn:
    """Say which two places of a state have one name."""
    message = f"two values have the name {name!r}: {_show(one)} and {_show(other)}"
    raise StructureError(message, hint="Rename one of the keys; names are the keys joined by dots")


def _show(path: Path) -> str:
    return "state" + "".join(f"[{dict_key(step) if isinstance(step, str) else step!r}]" for step in path)
