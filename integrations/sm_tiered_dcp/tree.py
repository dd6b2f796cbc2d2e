"""A nested state as named leaves, under the names that stock DCP gives the same dict, so that its readers find them.

Tensors and Python values come apart: tensors are planned and copied, values are stored as bytes. What differs by rank
stands under names of its own, because DCP keeps one rank's value of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import xxhash
from torch.distributed.tensor import DTensor

from sm_tiered.errors import StructureError
from sm_tiered_dcp.leaves import (
    PER_RANK,
    PLAIN,
    Archive,
    Kind,
    Path,
    check_state,
    check_tensor,
    holds_leaves,
    identity,
    is_flat_list,
    kind_of,
    local_tensors,
    path_step,
    per_rank_name,
    raise_duplicate,
    state_of,
    stock_path,
)

__all__ = [
    "PER_RANK",
    "Flat",
    "Path",
    "TensorLeaf",
    "ValueLeaf",
    "flatten",
    "per_rank_name",
    "signature",
    "stock_path",
    "values_signature",
]


_DTENSOR: Any = DTensor
_DICT: Any = dict
"""Not narrowed by type checkers: a DTensor's local tensor has no public name that costs as little."""


class TensorLeaf(NamedTuple):
    """A tensor of the state, live: not a copy."""

    path: Path
    value: Any
    """A torch.Tensor, DTensor or ShardedTensor."""


class ValueLeaf(NamedTuple):
    """A Python value of the state, live: not a copy."""

    path: Path
    value: object


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """The leaves of a state by name."""

    tensors: dict[str, TensorLeaf]
    values: dict[str, ValueLeaf]
    per_rank_tensors: dict[str, TensorLeaf]
    """Of this rank alone, under names that hold its number; so are the next."""
    per_rank_values: dict[str, ValueLeaf]
    archives: dict[str, ValueLeaf]
    """Of the `Archive` leaves, what they hold."""
    tied: dict[str, str]
    """Names in `tensors` that are exact aliases of an earlier one, with its name: the bytes are stored once."""


def flatten(state: Mapping[str, Any], *, rank: int) -> Flat:
    """Return the leaves of *state*. ``state_dict()`` of each Stateful object is called once.

    Raises:
        StructureError: the state can't be one checkpoint; the message names the place.
    """
    shared, own = _Walk(), _Walk(own=True)
    try:
        for key, value in check_state(state).items():
            if key == PER_RANK:
                own.place(per_rank_name(rank), (PER_RANK, f"{rank:05d}"), value)
            else:
                shared.place(key, (key,), value)
    except RecursionError as error:
        raise StructureError("the state is nested too deeply; does a container hold itself?") from error
    for walk in (shared, own):
        walk.check_names()
    return Flat(
        tensors=shared.tensors,
        values=shared.values,
        per_rank_tensors=own.tensors,
        per_rank_values=own.values,
        archives=shared.archives,
        tied=shared.ties(),
    )


class _Named(NamedTuple):
    """The names of a mapping's entries, kept from save to save."""

    keys: list[str]
    entries: list[tuple[str, Path]]


_KNOWN: dict[Path, _Named] = {}
_KNOWN_MOST = 100_000
"""Mappings to remember; more than that is no state that is saved again and again."""


def _entries(name: str, path: Path, mapping: Mapping[Any, object]) -> list[tuple[str, Path]] | None:
    """Return name and path of each entry, or None if the mapping is a leaf."""
    keys = list(mapping)
    known = _KNOWN.get(path)
    if known is not None and known.keys == keys:
        return known.entries
    if not holds_leaves(mapping):
        return None
    entries: list[tuple[str, Path]] = [(f"{name}.{key}", (*path, path_step(key))) for key in keys]
    # An int key equals a bool or a float, which are no keys to go by: only what equals a str is a str.
    if all(type(key) is str for key in keys):
        if len(_KNOWN) >= _KNOWN_MOST:
            _KNOWN.clear()
        _KNOWN[path] = _Named(keys, entries)
    return entries


class _Walk:
    """The leaves found so far."""

    def __init__(self, own: bool = False) -> None:
        self._own = own
        self.tensors: dict[str, TensorLeaf] = {}
        self.values: dict[str, ValueLeaf] = {}
        self.archives: dict[str, ValueLeaf] = {}
        self._pointers: dict[int, str] = {}
        self._repeated: list[str] = []
        self._placements: set[object] = set()
        """Those of tensors that were found well."""

    def place(self, name: str, path: Path, value: Any) -> None:
        """Add the leaves of *value*."""
        kind = kind_of(value)
        if kind <= Kind.SHARDED:
            self._place_tensor(name, path, value, kind)
        elif kind == Kind.MAPPING and (entries := _entries(name, path, value)) is not None:
            self._place_entries(entries, value.values())
        elif kind == Kind.LIST and not is_flat_list(value):
            self._place_entries([(f"{name}.{index}", (*path, index)) for index in range(len(value))], value)
        elif kind == Kind.STATEFUL:
            self.place(name, path, state_of(name, value))
        elif kind == Kind.ARCHIVE:
            self._place_archive(name, path, value)
        else:
            if name in self.values:
                raise_duplicate(name, self.values[name].path, path)
            # An empty OrderedDict or Counter is an empty dict: what it was is not worth a pickle.
            self.values[name] = ValueLeaf(path, {} if kind == Kind.MAPPING and not value else value)

    def _place_entries(self, entries: Iterable[tuple[str, Path]], values: Iterable[Any]) -> None:
        # The hot loop: a save of thousands of tensors waits for it, so the usual ones are done here, without a call.
        tensors, pointers, placements = self.tensors, self._pointers, self._placements
        for (name, path), value in zip(entries, values, strict=True):
            local = value
            if type(value) is _DICT and (below := _entries(name, path, value)) is not None:
                self._place_entries(below, value.values())
                continue
            if type(value) is _DTENSOR and value._spec.placements in placements:
                local = value._local_tensor
            if type(local) not in PLAIN or name in tensors or local.is_quantized or local.is_nested:
                self.place(name, path, value)
                continue
            try:
                pointer = local.data_ptr()
            except RuntimeError:  # no storage: sparse, or fake
                pointer = 0
            if not pointer:
                check_tensor(name, value)
            else:
                # Beyond a storage that was freed or cut lies nothing, or what is not the tensor's.
                offset = local.storage_offset()
                end = local.nbytes + offset * local.element_size() if offset else local.nbytes
                if local.untyped_storage().nbytes() < end or not local.is_contiguous():
                    check_tensor(name, value)
                if pointers.setdefault(pointer, name) is not name:
                    self._repeated.append(name)
            tensors[name] = TensorLeaf(path, value)

    def _place_tensor(self, name: str, path: Path, value: Any, kind: int) -> None:
        if name in self.tensors:
            raise_duplicate(name, self.tensors[name].path, path)
        if self._own and kind != Kind.TENSOR:
            message = f"{name} is a {type(value).__name__}, and {PER_RANK} holds what belongs to this rank alone"
            raise StructureError(message, hint="Give it another top-level key, or pass its local tensor")
        check_tensor(name, value)
        if kind == Kind.DTENSOR:
            self._placements.add(value.placements)
        if kind != Kind.SHARDED:
            pointer = _pointer(value)
            if pointer and self._pointers.setdefault(pointer, name) is not name:
                self._repeated.append(name)
        self.tensors[name] = TensorLeaf(path, value)

    def _place_archive(self, name: str, path: Path, archive: Archive) -> None:
        if self._own:
            message = f"{name} is an Archive, and {PER_RANK} holds small values"
            raise StructureError(message, hint="Give it another top-level key")
        if name in self.archives:
            raise_duplicate(name, self.archives[name].path, path)
        self.archives[name] = ValueLeaf(path, archive.value)

    def check_names(self) -> None:
        """Refuse a name that two leaves share, and NULs: paths need them."""
        kinds: tuple[Mapping[str, TensorLeaf | ValueLeaf], ...] = (self.tensors, self.values, self.archives)
        for one, other in combinations(kinds, 2):
            for name in one.keys() & other.keys():
                raise_duplicate(name, one[name].path, other[name].path)
        if any("\0" in "".join(kind) for kind in kinds):
            name = next(name for kind in kinds for name in kind if "\0" in name)
            raise StructureError(f"a key of {name!r} has a NUL character in it", hint="Rename the key")

    def ties(self) -> dict[str, str]:
        """Return each exact alias with the first name of the same bytes."""
        firsts: dict[object, str] = {}
        tied: dict[str, str] = {}
        suspects = dict.fromkeys(self._pointers[_pointer(self.tensors[name].value)] for name in self._repeated)
        for name in (*suspects, *self._repeated):
            first = firsts.setdefault(_identity(self.tensors[name].value), name)
            if first != name:
                tied[name] = first
        return tied


def _pointer(value: Any) -> int:
    return local_tensors(value)[0].data_ptr()


def _identity(value: Any) -> object:
    """`identity`, and of a DTensor which part it is."""
    place = identity(local_tensors(value)[0])
    return (*place, value.placements, value.device_mesh, value.shape) if kind_of(value) == Kind.DTENSOR else place


def signature(flat: Flat, *, world: int = 1) -> int:
    """Return a hash of 63 bits of all that a plan depends on: it is equal as long as the plan holds.

    These are the tensors' names, whole and local shapes, dtypes, placements and ties, and the world.
    """
    marks: dict[object, str] = {}
    meshes: dict[int, str] = {}
    texts = [str(world)]
    for leaves in (flat.tensors, flat.per_rank_tensors):
        for name, (path, value) in leaves.items():
            if type(value) in PLAIN:
                facts: object = (len(path), value.dtype, value.shape)
            elif type(value) is _DTENSOR:
                local, spec = value._local_tensor, value._spec
                # The mesh by its id: it is alive here, and to hash it costs more than all the rest.
                facts = (len(path), local.dtype, local.shape, spec.shape, spec.placements, id(spec.mesh))
            else:
                facts = (len(path), id(value))
            mark = marks.get(facts)
            if mark is None:
                mark = marks[facts] = _mark(path, value, meshes)
            texts += name, mark
    return _hash(texts + [f"{name}={first}" for name, first in flat.tied.items()] + [f"{n}:" for n in flat.archives])


def _mark(path: Path, value: Any, meshes: dict[int, str]) -> str:
    kind = kind_of(value)
    facts = [len(path), value.dtype, value.size()]
    if kind == Kind.SHARDED:
        facts += [shard.metadata for shard in value.local_shards()]
    elif kind == Kind.DTENSOR:
        facts += [value._local_tensor.size(), value.placements, _mesh_text(value.device_mesh, meshes)]
    return repr(facts)


def _mesh_text(mesh: Any, known: dict[int, str]) -> str:
    """Return what *mesh* is; to ask costs half a millisecond, so it is done once for each in *known*."""
    if id(mesh) not in known:
        known[id(mesh)] = repr((mesh.mesh.tolist(), mesh.mesh_dim_names))
    return known[id(mesh)]


def values_signature(flat: Flat) -> int:
    """Return a hash of 63 bits of the names of Python values and of archives, those of one rank alone left out."""
    return _hash([*sorted(flat.values), *(f"{name}=" for name in sorted(flat.archives))])


def _hash(texts: Iterable[str]) -> int:
    return xxhash.xxh3_64_intdigest("\0".join(texts).encode()) >> 1
