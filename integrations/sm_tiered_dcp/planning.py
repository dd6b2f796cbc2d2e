"""Which rank stores which tensor: DCP's own planner, asked once for a structure.

The plan holds while names, shapes, dtypes, placements and the world stay the same on all ranks; a steady-state save
asks for nothing but the tensors' present storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from sm_tiered import layout
from sm_tiered.errors import StructureError, error_from_json, error_to_json, typed
from sm_tiered.group import Group
from sm_tiered.parts import PartSource
from sm_tiered.records import ItemTable
from sm_tiered_dcp.dcp_parts import TensorEntry, TensorLayout, TensorPart, layout_tensors
from sm_tiered_dcp.group import GlooGroup
from sm_tiered_dcp.leaves import Kind, kind_of

__all__ = [
    "KEPT_VALUES_PART",
    "VALUES_PART",
    "PlannedPart",
    "TensorPlan",
    "lay_out_plan",
    "local_tensor",
    "plan_tensors",
]

_SMALL_BYTES = 1024 * 1024
_MAIN, VALUES_PART, _REPLICA, KEPT_VALUES_PART = 0, 1, 2, 3
"""Numbers of a rank's parts: planned tensors, Python values; of each what the node keeps besides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedPart:
    """One part, laid out; the tensors that go into it are looked up at each save."""

    layout: TensorLayout
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    """For each entry, the tensor's name and where its chunk begins in the whole tensor."""
    table: ItemTable
    """The items of *layout*, and again under the names of their aliases."""

    def bind(self, tensors: Mapping[str, Any]) -> PartSource:
        """Return the part over the present values of *tensors*."""
        return _Bound(
            self.layout.source([local_tensor(tensors[fqn], offsets) for fqn, offsets in self.sources]), self.table
        )


@dataclass(frozen=True, slots=True)
class _Bound:
    """A `TensorPart` whose items may stand under several names."""

    part: TensorPart
    table: ItemTable
    recycled: bool = True

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def size(self) -> int:
        return self.part.size

    @property
    def replica(self) -> bool:
        return self.part.replica

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        self.part.write(buffer, cache)

    def chunks(self) -> Iterator[memoryview]:
        return self.part.chunks()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What this rank stores."""

    parts: tuple[PlannedPart, ...]


def local_tensor(value: Any, offsets: tuple[int, ...]) -> torch.Tensor:
    """Return the plain tensor behind *value*: a tensor, a DTensor's local one, a ShardedTensor's shard at *offsets*."""
    kind = kind_of(value)
    if kind == Kind.SHARDED:
        found = cast("Iterable[Any]", value.local_shards())
        return next(shard.tensor for shard in found if tuple(shard.metadata.shard_offsets) == offsets)
    # Not `to_local()`, which builds a graph, and costs as much as the rest of a save of many small tensors.
    return cast("torch.Tensor", value._local_tensor if kind == Kind.DTENSOR else value)


def plan_tensors(
    tensors: Mapping[str, Any],
    paths: Mapping[str, tuple[str | int, ...]],
    tied: Mapping[str, str],
    group: Group,
    nodes: Sequence[str | None],
) -> TensorPlan:
    """Plan with all ranks. Collective.

    Args:
        tensors: by name, on this rank.
        paths: where each stood in the state.
        tied: names that are exact aliases, with the name that is stored.
        group: all ranks.
        nodes: for each rank, its node: replicated tensors are stored once in the job and kept once on each node.
    """
    tied = _agreed_ties(tensors, tied, group)
    stored = {fqn: value for fqn, value in tensors.items() if fqn not in tied}
    planner: Any = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    local = _or_error(lambda: _planned_here(planner, stored, coordinator=group.rank == 0))
    if isinstance(group, GlooGroup):
        gathered = group.gather_to_first(local)
        shares = _shares(planner, gathered, nodes) if gathered is not None else None
        share = group.scatter_from_first(shares)
    else:
        share = _shares(planner, [local], nodes)[0]
    if isinstance(share, dict):
        raise error_from_json(cast("dict[str, object]", share))
    own, kept = cast("tuple[list[WriteItem], list[WriteItem]]", share)
    return lay_out_plan(own, kept, paths, tied, group.rank)


def _agreed_ties(tensors: Mapping[str, Any], tied: Mapping[str, str], group: Group) -> dict[str, str]:
    """Return the ties of all ranks: one whose shard is empty can't tell, and takes the others' word."""
    empty = [
        fqn for fqn, value in tensors.items() if kind_of(value) != Kind.SHARDED and not local_tensor(value, ()).numel()
    ]
    views = [(dict(ties), set(names)) for ties, names in group.gather([dict(tied), empty])]
    proposed = {alias: first for ties, _ in reversed(views) for alias, first in ties.items()}
    return {
        alias: first
        for alias, first in proposed.items()
        if all(ties.get(alias) == first or {alias, first} <= names for ties, names in views)
    }


def _planned_here(planner: Any, stored: Mapping[str, Any], *, coordinator: bool) -> SavePlan:
    planner.set_up_planner(stored, is_coordinator=coordinator)
    return planner.create_local_plan()


def _or_error(action: Callable[[], object]) -> object:
    """What *action* gives, or its error as plain values: it goes where the result would, so that no rank waits."""
    try:
        return action()
    except Exception as error:
        return error_to_json(typed(error))


def _shares(planner: Any, plans: list[Any], nodes: Sequence[str | None]) -> list[Any]:
    """What each rank gets: its share, or on all alike the first error."""
    failed: object = next((plan for plan in plans if not isinstance(plan, SavePlan)), None)
    found: Any = failed if failed is not None else _or_error(lambda: _share_out(planner, plans, nodes))
    return cast("list[Any]", found) if isinstance(found, list) else [found] * len(plans)


def lay_out_plan(
    own: Sequence[WriteItem],
    kept: Sequence[WriteItem],
    paths: Mapping[str, tuple[str | int, ...]],
    tied: Mapping[str, str],
    rank: int,
) -> TensorPlan:
    """Return the parts for what a rank stores for the job and what it keeps for its node."""
    parts = [_lay_out(_MAIN, own, paths, tied, rank)]
    if kept:
        parts.append(_lay_out(_REPLICA, kept, paths, tied, rank))
    return TensorPlan(parts=tuple(part for part in parts if part.sources))


def _share_out(
    planner: Any, plans: list[SavePlan], nodes: Sequence[str | None]
) -> list[tuple[list[WriteItem], list[WriteItem]]]:
    """For each rank, what it stores for the job and what it keeps for its node."""
    _check_alike(plans)
    chosen, _ = planner.create_global_plan(_small_from_lowest(plans))
    own = [list(plan.items) for plan in chosen]
    kept: list[list[WriteItem]] = [[] for _ in plans]
    for node in set(nodes):
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        there = {item.index for rank in ranks for item in own[rank]}
        loads = {rank: sum(map(_bytes, own[rank])) for rank in ranks}
        missing: dict[Any, list[tuple[int, WriteItem]]] = {}
        for rank in ranks:
            for item in plans[rank].items:
                if item.index not in there:
                    missing.setdefault(item.index, []).append((rank, item))
        for holders in missing.values():
            small = _bytes(holders[0][1]) <= _SMALL_BYTES
            rank, item = holders[0] if small else min(holders, key=lambda holder: loads[holder[0]])
            kept[rank].append(item)
            loads[rank] += _bytes(item)
    return list(zip(own, kept, strict=True))


def _small_from_lowest(plans: list[SavePlan]) -> list[SavePlan]:
    """Leave a small replicated tensor to the lowest rank that has it; DCP spreads only the large ones.

    Running statistics of a normalisation differ by rank between two forward passes, and DDP takes those of rank 0: of
    mean and variance from two ranks nobody ever had both.
    """
    seen: set[Any] = set()
    thinned: list[SavePlan] = []
    for plan in plans:
        thinned.append(replace(plan, items=[i for i in plan.items if i.index not in seen or _bytes(i) > _SMALL_BYTES]))
        seen.update(item.index for item in plan.items)
    return thinned


def _check_alike(plans: Sequence[SavePlan]) -> None:
    """A name is one tensor: of what ranks call alike, all but one would be lost if it were not."""
    known: dict[str, tuple[int, object]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None
            facts = (tuple(item.tensor_data.size), str(item.tensor_data.properties.dtype))
            first, same = known.setdefault(item.index.fqn, (rank, facts))
            if same != facts:
                raise StructureError(
                    f"{item.index.fqn}: rank {first} has {same}, rank {rank} has {facts}",
                    hint="A tensor outside per_rank is one tensor: make it a DTensor, or put it under 'per_rank'.",
                    rank=rank,
                )


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _lay_out(
    number: int,
    items: Sequence[WriteItem],
    paths: Mapping[str, tuple[str | int, ...]],
    tied: Mapping[str, str],
    rank: int,
) -> PlannedPart:
    entries = [_entry(item, paths) for item in items]
    made = layout_tensors(layout.part_name(rank, number), entries, replica=number == _REPLICA)
    aliases: dict[str, list[str]] = {}
    for alias, first in tied.items():
        aliases.setdefault(first, []).append(alias)
    extra = [
        replace(item, fqn=alias, path=paths[alias]) for item in made.table.items for alias in aliases.get(item.fqn, ())
    ]
    return PlannedPart(
        layout=made,
        sources=tuple((entry.fqn, entry.offsets) for entry in entries),
        table=ItemTable(items=(*made.table.items, *extra)) if extra else made.table,
    )


def _entry(item: WriteItem, paths: Mapping[str, tuple[str | int, ...]]) -> TensorEntry:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return TensorEntry(
        fqn=item.index.fqn,
        path=paths[item.index.fqn],
        dtype=item.tensor_data.properties.dtype,
        sizes=tuple(chunk.sizes),
        offsets=tuple(chunk.offsets),
        shape=tuple(item.tensor_data.size),
    )
