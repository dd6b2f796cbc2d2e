"""What a fresh optimizer can't ask for: its ``state_dict()`` has no moments yet, and DCP loads what it is given.

A script that loads into it would go on with moments of zero, and nobody would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from sm_tiered.errors import MismatchError

__all__ = ["FreshOptimizer", "find_fresh_optimizers"]

Keys = tuple[object, ...]
_Read = Callable[[LoadPlan, LoadPlanner], object]

_HINT = (
    "Give the load the whole state: torch.distributed.checkpoint.state_dict.get_optimizer_state_dict(model, optimizer) "
    "builds it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreshOptimizer:
    """A state dict without moments, and what is stored for it."""

    given: dict[Any, Any]
    stored: Mapping[str, Keys]
    """Names, each with the keys that lead to its value below ``state``."""

    def fill(self, metadata: Metadata, read: _Read) -> None:
        """Put the stored state in. *read* reads a plan, as a storage reader does. Not collective."""
        values = _read(metadata, self.stored, read)
        numbers = _numbers(self.given)
        state: dict[Any, Any] = self.given["state"]
        for fqn, (name, *keys) in self.stored.items():
            number = numbers.get(str(name), name)
            if keys:
                _put(state.setdefault(number, _made_for(keys[0])), keys, values[fqn])
            else:
                state[number] = values[fqn]


def find_fresh_optimizers(planner: LoadPlanner, metadata: Metadata) -> list[FreshOptimizer]:
    """Return the optimizers in what *planner* loads whose stored state they could not ask for.

    Raises:
        MismatchError: one has state for some of its parameters only, or its stored state is in shards.
    """
    if not isinstance(planner, DefaultLoadPlanner):
        return []
    given: Any = cast("Any", planner).original_state_dict
    found: list[FreshOptimizer] = []
    for path, optimizer in _optimizers(given, ()):
        stored, state = _stored_below(metadata, (*path, "state")), optimizer["state"]
        lacking = _lacking(optimizer, stored)
        if state and lacking:
            raise MismatchError(
                f"{'.'.join(path)}: there is state for {len(state)} parameters, and none for {lacking[0]!r}, which has "
                "some in the checkpoint",
                hint=_HINT,
            )
        if not state and stored:
            cut = next((fqn for fqn in stored if _is_cut(metadata, fqn)), None)
            if cut is not None:
                raise MismatchError(f"{'.'.join(path)}: the state is empty, and {cut} is stored in shards", hint=_HINT)
            found.append(FreshOptimizer(given=optimizer, stored=stored))
    return found


def _optimizers(state: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    if isinstance(state, list):
        for index, entry in enumerate(cast("list[object]", state)):
            yield from _optimizers(entry, (*path, str(index)))
    if not isinstance(state, Mapping):
        return
    mapping = cast("Mapping[object, object]", state)
    if isinstance(mapping.get("param_groups"), list) and isinstance(mapping.get("state"), dict):
        yield path, cast("dict[Any, Any]", state)
        return
    for key, entry in mapping.items():
        yield from _optimizers(entry, (*path, str(key)))


def _numbers(optimizer: Mapping[Any, Any]) -> dict[str, object]:
    """The optimizer's own names of its parameters, by their text: in a checkpoint all keys of a dict are text."""
    groups = cast("list[Mapping[str, Any]]", optimizer["param_groups"])
    return {str(number): number for group in groups for number in group.get("params", ())}


def _lacking(optimizer: Mapping[Any, Any], stored: Mapping[str, Keys]) -> list[str]:
    """The parameters of *optimizer* that have state in the checkpoint and none in it."""
    given = {str(key) for key in optimizer["state"]}
    names = dict.fromkeys(str(keys[0]) for keys in stored.values())
    return [name for name in names if name in _numbers(optimizer) and name not in given]


def _stored_below(metadata: Metadata, path: tuple[str, ...]) -> dict[str, Keys]:
    """Return what is stored below *path*, by name, each with the keys that lead on from there."""
    found: dict[str, Keys] = {}
    for fqn, keys in cast("Mapping[str, Keys]", metadata.planner_data or {}).items():
        if tuple(map(str, keys[: len(path)])) == path and len(keys) > len(path):
            found[fqn] = keys[len(path) :]
    return found


def _is_cut(metadata: Metadata, fqn: str) -> bool:
    stored = metadata.state_dict_metadata[fqn]
    return isinstance(stored, TensorStorageMetadata) and len(stored.chunks) > 1


def _read(metadata: Metadata, names: Mapping[str, Keys], read: _Read) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for fqn in names:
        stored = metadata.state_dict_metadata[fqn]
        tensor = isinstance(stored, TensorStorageMetadata)
        wanted[fqn] = torch.empty(stored.size, dtype=stored.properties.dtype) if tensor else None
    planner: Any = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(wanted, metadata, is_coordinator=False)
    read(planner.create_local_plan(), planner)
    return wanted


def _put(container: Any, keys: Sequence[object], value: object) -> None:
    """Put *value* where *keys* lead: below a parameter an int is a place in a list, and text is the key of a dict."""
    key: Any = keys[0]
    if isinstance(container, list):
        container += [None] * (key + 1 - len(cast("list[Any]", container)))
    else:
        key = _dict_key(key)
        container.setdefault(key, None)
    if len(keys) == 1:
        container[key] = value
        return
    if container[key] is None:
        container[key] = _made_for(keys[1])
    _put(container[key], keys[1:], value)


def _made_for(key: object) -> Any:
    return [] if isinstance(key, int) else {}


def _dict_key(key: object) -> object:
    """The number that *key* is the text of: inside of an optimizer nobody writes numbers as text."""
    text = str(key)
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else key
