"""What a fresh optimizer can't ask for: its ``state_dict()`` has no moments yet, and DCP loads what it is given.

A script that loads into it would go on with moments of zero, and nobody would tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

__all__ = ["fill_fresh_optimizers"]

Names = tuple[str, ...]

_logger = logging.getLogger("sm_tiered_dcp")


def fill_fresh_optimizers(
    planner: LoadPlanner, metadata: Metadata, read: Callable[[LoadPlan, LoadPlanner], object]
) -> None:
    """Put the stored state of each optimizer that has none yet into what *planner* loads.

    *read* reads a plan, as a storage reader does. Reads by this rank alone: not collective.
    """
    if not isinstance(planner, DefaultLoadPlanner):
        return
    given: Any = cast("Any", planner).original_state_dict
    for path, optimizer in _fresh(given, ()):
        stored = _stored_below(metadata, (*path, "state"))
        if not stored:
            continue
        if any(_is_cut(metadata, fqn) for fqn in stored):
            _logger.warning(
                "%s: the state given is empty, and the stored one is in shards: it is not loaded. Build the state with "
                "torch.distributed.checkpoint.state_dict.get_optimizer_state_dict before the load",
                ".".join(path),
            )
            continue
        values = _read(metadata, stored, read)
        for fqn, names in stored.items():
            _put(optimizer, names, values[fqn])


def _fresh(state: object, path: Names) -> Iterator[tuple[Names, dict[Any, Any]]]:
    """Yield each optimizer's state in *state* that is still empty."""
    if isinstance(state, list):
        for index, entry in enumerate(cast("list[object]", state)):
            yield from _fresh(entry, (*path, str(index)))
    if not isinstance(state, Mapping):
        return
    mapping = cast("Mapping[object, object]", state)
    groups = mapping.get("param_groups")
    if isinstance(groups, list) and mapping.get("state") == {} and isinstance(state, dict):
        yield path, cast("dict[Any, Any]", state)
        return
    for key, entry in mapping.items():
        yield from _fresh(entry, (*path, str(key)))


def _stored_below(metadata: Metadata, path: Names) -> dict[str, Names]:
    """Return what is stored below *path*, by name, each with the keys that lead on from there."""
    found: dict[str, Names] = {}
    for fqn, keys in cast("Mapping[str, tuple[object, ...]]", metadata.planner_data or {}).items():
        names = tuple(map(str, keys))
        if names[: len(path)] == path and len(names) > len(path):
            found[fqn] = names[len(path) :]
    return found


def _is_cut(metadata: Metadata, fqn: str) -> bool:
    stored = metadata.state_dict_metadata[fqn]
    return isinstance(stored, TensorStorageMetadata) and len(stored.chunks) > 1


def _read(
    metadata: Metadata, names: Mapping[str, Names], read: Callable[[LoadPlan, LoadPlanner], object]
) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for fqn in names:
        stored = metadata.state_dict_metadata[fqn]
        tensor = isinstance(stored, TensorStorageMetadata)
        wanted[fqn] = torch.empty(stored.size, dtype=stored.properties.dtype) if tensor else None
    planner: Any = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(wanted, metadata, is_coordinator=False)
    read(planner.create_local_plan(), planner)
    return wanted


def _put(optimizer: dict[Any, Any], names: Names, value: object) -> None:
    """Put *value* where *names* lead below the state; parameters are numbered as the groups number them."""
    groups = cast("list[Mapping[str, Any]]", optimizer["param_groups"])
    numbered = {str(number): number for group in groups for number in group.get("params", ())}
    inner: Any = optimizer["state"]
    keys: list[Any] = [numbered.get(names[0], names[0]), *names[1:]]
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
