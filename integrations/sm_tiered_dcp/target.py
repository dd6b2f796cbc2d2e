"""What a restore fills: the user's state, opened against the names that a checkpoint holds.

Tensors are filled in place. Python containers without tensors become what was stored, whatever they hold now, and stay
the same objects. Stateful objects are asked for their state once, and given it back filled. Until `Target.finish`
nothing of the state is changed but the tensors that the caller fills.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

import torch

from sm_tiered.errors import MismatchError, StructureError
from sm_tiered_dcp.leaves import (
    PER_RANK,
    Archive,
    Kind,
    Path,
    check_state,
    check_tensor,
    dict_key,
    goes_in,
    holds_python,
    kind_of,
    overlaps_itself,
    path_step,
    per_rank_name,
    raise_duplicate,
    state_for,
    stock_path,
)

__all__ = ["Stored", "Target"]

_LISTED = 10
"""How many names an error lists."""


class Stored(NamedTuple):
    """One stored name."""

    path: Path
    is_tensor: bool
    is_archive: bool = False


class _Slot(NamedTuple):
    """A place in the state that becomes what was stored."""

    parent: Any
    key: str | int
    current: object
    leaves: list[tuple[Path, str]]
    """For each stored leaf, its path from here and its name."""


class Target:
    """A state to be filled from one checkpoint: `open`, fill `tensors`, `assign_values`, `finish`."""

    def __init__(self, state: Mapping[str, Any], *, rank: int = 0) -> None:
        self._state, self._rank = state, rank
        self.tensors: dict[str, Any] = {}
        """Live tensors to be filled, by stored name; detached, so that they may be written in place."""
        self.wanted_values: tuple[str, ...] = ()
        """Names of the Python values that `assign_values` expects."""
        self._archives: dict[str, Archive] = {}
        self.missing: tuple[str, ...] = ()
        """Asked for, not stored."""
        self.unexpected: tuple[str, ...] = ()
        """Stored, not asked for. What containers without tensors hold is always asked for."""
        self._opened = False
        self._stored = _Index({})
        self._slots: list[_Slot] = []
        self._loads: list[tuple[Any, list[Any]]] = []
        self._missing: list[str] = []
        self._values: dict[str, object] = {}
        self._paths: dict[str, Path] = {}

    def open(self, stored: Mapping[str, Stored], *, stored_rank: int | None = None) -> None:
        """Ask the state for what it holds and match it with *stored*. Calls ``state_dict()``; changes nothing.

        Args:
            stored: what the checkpoint holds, by name.
            stored_rank: the saved rank whose ``per_rank`` values this rank takes; None leaves these as they are.

        Raises:
            StructureError: the state can't be filled.
            MismatchError: a tensor stands where a Python value was stored, or the reverse.
        """
        if self._opened:
            raise StructureError("a target is opened once", hint="Make another for the next candidate")
        self._opened = True
        own = None if stored_rank is None else per_rank_name(stored_rank)
        ours = {name: found for name, found in stored.items() if _is_ours(name, own)}
        self._stored = _Index(ours)
        state = check_state(self._state)
        # Sorted, for state_dict() may be collective; what is this rank's alone comes last, so that nothing after
        # the restored random state draws from it.
        try:
            for key in sorted(state, key=lambda name: (name == PER_RANK, name)):
                if key != PER_RANK:
                    self._visit(key, (key,), state[key], state, key)
                elif own is not None:
                    self._visit(own, (PER_RANK, own.removeprefix(f"{PER_RANK}.")), state[key], state, key)
        except RecursionError as error:
            raise StructureError("the state is nested too deeply; does a container hold itself?") from error
        self.wanted_values = (*(name for slot in self._slots for _, name in slot.leaves), *self._archives)
        self.missing = tuple(sorted(self._missing))
        self.unexpected = tuple(sorted(ours.keys() - self.tensors.keys() - set(self.wanted_values)))

    def _visit(self, name: str, path: Path, value: Any, parent: Any, key: str | int) -> None:
        kind = kind_of(value)
        if kind <= Kind.SHARDED:
            self._want_tensor(name, path, value)
        elif kind == Kind.ARCHIVE:
            self._want_archive(name, path, value)
        elif kind == Kind.STATEFUL:
            self._open_stateful(name, path, value)
        elif holds_python(value):
            self._want_values(name, path, value, parent, key)
        else:
            self._visit_entries(name, path, value)

    def _visit_entries(self, name: str, path: Path, container: Any) -> None:
        for key, entry in container.items() if kind_of(container) == Kind.MAPPING else enumerate(container):
            step = key if isinstance(container, list) else path_step(key)
            self._visit(f"{name}.{key}", (*path, step), entry, container, key)

    def _want_tensor(self, name: str, path: Path, value: Any) -> None:
        self._claim(name, path)
        check_tensor(name, value)
        if overlaps_itself(value):
            message = f"{name}: its numbers share places, as an expanded tensor's do: it can't be filled"
            raise self._error(message, hint="Put its contiguous() there")
        found = self._stored.names.get(name)
        if found is None:
            self._missing.append(name)
        elif not found.is_tensor:
            raise self._error(f"{name}: a Python value was saved, the state has a {type(value).__name__}")
        else:
            detached = kind_of(value) != Kind.SHARDED and value.requires_grad
            self.tensors[name] = value.detach() if detached else value

    def _want_archive(self, name: str, path: Path, archive: Archive) -> None:
        self._claim(name, path)
        found = self._stored.names.get(name)
        if found is None:
            self._missing.append(name)
        elif not found.is_archive:
            what = "tensor" if found.is_tensor else "Python value"
            raise self._error(f"{name}: a {what} was saved, the state has an Archive")
        else:
            self._archives[name] = archive

    def _open_stateful(self, name: str, path: Path, value: Any) -> None:
        names = [found[len(name) + 1 :] for found in self._stored.below(name)]
        # A copy: what state_dict() returns may be the object's own dict, and load_state_dict() may clear it first.
        box = [_copied(state_for(name, value, names))]
        self._visit(name, path, box[0], box, 0)
        self._loads.append((value, box))

    def _want_values(self, name: str, path: Path, value: Any, parent: Any, key: str | int) -> None:
        found = self._stored.names.get(name)
        if found is not None and found.is_tensor:
            raise self._error(f"{name}: a tensor was saved, the state has a {type(value).__name__}")
        below = [] if found else self._stored.below(name)
        leaves = [((), name)] if found else self._stored.leaves(path, below)
        with_tensors = any(self._stored.names[leaf].is_tensor for leaf in below)
        if (with_tensors or not leaves) and goes_in(value):
            self._visit_entries(name, path, value)
            return
        self._claim(name, path)
        if with_tensors and kind_of(value) != Kind.LEAF and not value:
            return  # An empty container, and tensors to go into it: these are unexpected, and that says it all.
        if with_tensors or not leaves:
            self._missing.append(name)
        elif not isinstance(parent, (MutableMapping, list)):
            message = f"{name} can't be set: it stands in a {type(cast('object', parent)).__name__}"
            raise StructureError(message, hint="Use a dict or a list")
        else:
            self._slots.append(_Slot(parent, key, value, leaves))

    def _claim(self, name: str, path: Path) -> None:
        if name in self._paths:
            raise_duplicate(name, self._paths[name], path)
        self._paths[name] = path

    def _error(self, message: str, hint: str | None = None) -> MismatchError:
        return MismatchError(message, hint=hint or "Pass a state with the structure that was saved", rank=self._rank)

    def check(self, name: str, shape: Iterable[int], dtype: object) -> None:
        """Compare a tensor to be filled with the whole shape and the dtype that were stored.

        Raises:
            MismatchError: they differ.
        """
        value = self.tensors[name]
        saved = (tuple(shape), str(dtype).removeprefix("torch."))
        has = (tuple(value.size()), str(value.dtype).removeprefix("torch."))
        if saved != has:
            raise self._error(f"{name}: saved {saved[0]} {saved[1]}, state has {has[0]} {has[1]}")

    def check_names(self) -> None:
        """Refuse a checkpoint that holds less, or more, than the state asks for.

        Raises:
            MismatchError: naming what is missing and what is unexpected.
        """
        told = [
            f"{len(names)} {what}: {', '.join(sorted(names)[:_LISTED])}{', …' if len(names) > _LISTED else ''}"
            for names, what in ((self.missing, "not in the checkpoint"), (self.unexpected, "not in the state"))
            if names
        ]
        if told:
            raw = any(isinstance(value, torch.optim.Optimizer) for value in self._state.values())
            hint = "Pass a state with the structure that was saved, or set allow_partial to load what fits"
            if raw and self.unexpected:
                hint = "An optimizer has no state before its first step: wrap model and optimizer in a TrainState"
            raise self._error(f"state and checkpoint do not fit: {'; '.join(told)}", hint)

    def assign_values(self, values: Mapping[str, object]) -> None:
        """Take the loaded Python values; the state gets them in `finish`.

        Raises:
            MismatchError: a wanted value is not among them.
        """
        absent = [name for name in self.wanted_values if name not in values]
        if absent:
            raise self._error(f"{len(absent)} values were not loaded: {', '.join(absent[:_LISTED])}")
        self._values = {name: values[name] for name in self.wanted_values}

    def finish(self) -> None:
        """Put the Python values where they belong and call ``load_state_dict`` on each Stateful object."""
        used: set[int] = set()
        for slot in self._slots:
            new = _built([(path, self._values[name]) for path, name in slot.leaves])
            slot.parent[slot.key] = _replaced(slot.current, new, used)
        for name, archive in self._archives.items():
            archive.value = self._values[name]
        for value, box in self._loads:
            value.load_state_dict(box[0])


class _Index:
    """Stored names, with a look below one."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.names = stored
        self._sorted = sorted(stored)
        self._order = {name: position for position, name in enumerate(stored)}

    def below(self, name: str) -> list[str]:
        """Return the names inside the container *name*."""
        first, end = f"{name}.", f"{name}/"  # "/" is the character after "."
        return self._sorted[bisect_left(self._sorted, first) : bisect_left(self._sorted, end)]

    def leaves(self, path: Path, names: Iterable[str]) -> list[tuple[Path, str]]:
        """Return those of *names* that stand below *path*, with their paths from there, in the order of storing."""
        depth, place = len(path), _spelled(path)
        found = [(self.names[name].path, name) for name in sorted(names, key=self._order.__getitem__)]
        return [(inner[depth:], name) for inner, name in found if _spelled(inner[:depth]) == place and inner[depth:]]


def _is_ours(name: str, own: str | None) -> bool:
    """Whether *name* is no other rank's alone."""
    return not name.startswith(f"{PER_RANK}.") or (own is not None and (name == own or name.startswith(f"{own}.")))


def _spelled(path: Path) -> tuple[str, ...]:
    """What stock DCP wrote does not tell an int key from its digits."""
    return tuple(map(str, stock_path(path)))


def _copied(value: Any) -> Any:
    """Return *value* with containers of its own, around the same tensors and objects."""
    kind = kind_of(value)
    if kind == Kind.LIST:
        return [_copied(entry) for entry in value]
    if kind != Kind.MAPPING:
        return value
    # copy() keeps what an OrderedDict carries besides: a module's _metadata.
    made: Any = copy.copy(cast("Any", value)) if isinstance(value, dict) else dict(value)
    for key in made:
        made[key] = _copied(made[key])
    return made


def _built(leaves: list[tuple[Path, object]]) -> Any:
    """Return the container that has *leaves* at their paths."""
    if not leaves[0][0]:
        return leaves[0][1]
    groups: dict[str | int, list[tuple[Path, object]]] = {}
    for path, value in leaves:
        groups.setdefault(path[0], []).append((path[1:], value))
    if all(isinstance(step, int) for step in groups):
        return [_built(groups[step]) for step in sorted(groups)]
    return {dict_key(str(step)): _built(group) for step, group in groups.items()}


def _replaced(current: object, new: object, used: set[int]) -> Any:
    """Return *current* with the contents of *new* if it can hold them, else *new*.

    A container that the state holds twice is filled once: the two may have been saved with different contents.
    """
    held, made = cast("tuple[Any, Any]", (current, new))
    as_list = isinstance(current, list) and isinstance(new, list)
    as_dict = isinstance(current, MutableMapping) and isinstance(new, dict)
    if not (as_list or as_dict) or id(held) in used:
        return made
    used.add(id(held))
    if as_list:
        held[:] = made
        return held
    contents = cast("dict[object, object]", new)
    entries = {key: _replaced(held.get(key), entry, used) for key, entry in contents.items()}
    held.clear()
    held.update(entries)
    return held
