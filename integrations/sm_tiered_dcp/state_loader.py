"""Loading a checkpoint into a state: a `sm_tiered.voted_load.Loader` over nested tensors, values and Statefuls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, cast

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan

from sm_tiered import layout
from sm_tiered.errors import ConfigError, MismatchError, RestoreError, StructureError
from sm_tiered.group import Group
from sm_tiered.nearest import ItemSource, Sources
from sm_tiered.records import CheckpointId, Item
from sm_tiered.resolve import Candidate
from sm_tiered.settings import Settings
from sm_tiered.sources import Span
from sm_tiered.voted_load import Read
from sm_tiered_dcp.finisher import metadata_from_records
from sm_tiered_dcp.leaves import PER_RANK, check_state
from sm_tiered_dcp.loading import PartStream, read_plan_spans, read_tensor, read_value, source_of
from sm_tiered_dcp.target import Stored, Target
from sm_tiered_dcp.values import load_stream, load_value

__all__ = ["PerRankRule", "StateLoader"]

PerRankRule = Callable[[int, int, int], "int | None"]
"""``rule(rank, world, saved_world)``: the saved rank whose ``per_rank`` values this rank takes, or None for its own."""


class StateLoader:
    """Plans, places and hands over one rank's share of a restore."""

    def __init__(
        self,
        state: Mapping[str, Any],
        settings: Settings,
        group: Group,
        per_rank: PerRankRule | None,
        without: Sequence[str] = (),
    ) -> None:
        self._state, self._settings, self._group, self._rule = state, settings, group, per_rank
        if isinstance(without, str):
            raise ConfigError(f"without must be a list of names, got {without!r}", hint=f"Give [{without!r}].")
        self._without = tuple(without)
        self._target: Target | None = None
        self._planned: CheckpointId | None = None
        self._values: dict[str, object] = {}
        self._sources: Sources | None = None
        self._plan = LoadPlan([])
        self._planner: Any = _planner()

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Open the state and return what this rank reads of *candidate*.

        Asked again for the same checkpoint, with other sources, it does not open the state again: ``state_dict()`` may
        be collective, and the other ranks are not asked again.
        """
        self._sources = Sources(candidate.records, candidate.near)
        if self._planned != candidate.checkpoint:
            self._open(candidate)
            self._planned = candidate.checkpoint
        assert self._target is not None
        spans = read_plan_spans(self._plan, self._sources)
        for fqn in self._target.wanted_values:
            source = self._sources.get(fqn)
            spans.setdefault((source.rank, source.item.part), []).append((source.item.offset, source.item.length))
        return spans

    def _open(self, candidate: Candidate) -> None:
        items = {
            item.fqn: item for record in candidate.records for item in record.items if not self._is_left_out(item.fqn)
        }
        stored = {fqn: Stored(item.path, item.payload is not None, _is_archive(item)) for fqn, item in items.items()}
        target = self._target = Target(self._state, rank=self._group.rank)
        try:
            check_state(self._state)
            target.open(stored, stored_rank=self._stored_rank(candidate, stored))
        except StructureError as error:
            # No older checkpoint would fit such a state either.
            raise MismatchError(error.message, hint=error.hint, rank=self._group.rank) from error
        if not self._settings.allow_partial:
            target.check_names()
        for fqn in target.tensors:
            target.check(fqn, items[fqn].shape, items[fqn].dtype)
        self._planner = _planner()
        self._planner.set_up_planner(
            target.tensors, metadata_from_records(candidate.records), is_coordinator=self._group.rank == 0
        )
        self._plan = self._planner.create_local_plan()

    def _is_left_out(self, name: str) -> bool:
        return any(name == one or name.startswith(f"{one}.") for one in self._without)

    def _stored_rank(self, candidate: Candidate, stored: Mapping[str, Stored]) -> int | None:
        """Return the saved rank whose own values this rank takes; None leaves them. All ranks raise alike."""
        saved_world, rank, world = len(candidate.records), self._group.rank, self._group.world
        held, asked = any(fqn.startswith(f"{PER_RANK}.") for fqn in stored), PER_RANK in self._state
        chosen = self._by_rule(world, saved_world) if self._rule is not None else None
        if chosen == [None] * world or not (held or asked):
            return None
        if held != asked:
            own = self._state.get(PER_RANK)
            if self._settings.allow_partial or (isinstance(own, Mapping) and not own):
                return None
            raise MismatchError(
                f"the {'checkpoint' if held else 'state'} has per_rank values, the other has none",
                hint="Give the state what was saved, restore(..., per_rank=lambda *_: None) to leave each rank's own, "
                "or set `allow_partial: true`.",
            )
        if chosen is not None:
            return chosen[rank]
        if saved_world != world:
            raise MismatchError(
                f"the checkpoint's per_rank values are of {saved_world} ranks, this job has {world}",
                hint="Pass restore(..., per_rank=rule): rule(rank, world, saved_world) returns the saved rank to take, "
                "or None to keep this rank's own values.",
            )
        return rank

    def _by_rule(self, world: int, saved_world: int) -> list[int | None]:
        """What the user's rule says of every rank: what is wrong for one is told to all."""
        assert self._rule is not None
        chosen = [self._rule(rank, world, saved_world) for rank in range(world)]
        for rank, found in enumerate(chosen):
            if found is not None and found not in range(saved_world):
                raise MismatchError(
                    f"the per_rank rule gave {found!r} for rank {rank}",
                    hint=f"It must give a saved rank, 0 to {saved_world - 1}, or None.",
                )
        return chosen

    def check(self, read: Read) -> None:
        """Load the Python values: what only a pickle could hold is refused before anything is placed."""
        target, sources = self._opened()
        for fqn in target.wanted_values:
            self._values[fqn] = self._loaded(fqn, sources.get(fqn), read)

    def _loaded(self, fqn: str, source: ItemSource, read: Read) -> object:
        allow = self._settings.allow_pickle
        if not _is_archive(source.item):
            return load_value(read_value(source, read), allow_pickle=allow, what=fqn)
        stream = PartStream(source, read)
        try:
            return load_stream(cast("IO[bytes]", stream), stream.length, allow_pickle=allow, what=fqn)
        except Exception:
            if stream.failure is not None:
                raise stream.failure from None  # torch makes of it that the stream has no `read`
            raise

    def place(self, read: Read) -> None:
        """Fill the tensors and take the values; nothing of the user's is called."""
        target, sources = self._opened()
        for request in self._plan.items:
            tensor = self._planner.resolve_tensor(request)
            read_tensor(source_of(sources, request), request, tensor.detach(), read)
        target.assign_values(self._values)

    def _opened(self) -> tuple[Target, Sources]:
        if self._target is None or self._sources is None:
            raise RestoreError("a checkpoint is read before it was planned")
        return self._target, self._sources

    def finish(self) -> None:
        """Put the values in place and call ``load_state_dict``."""
        if self._target is not None:
            self._target.finish()


def _is_archive(item: Item) -> bool:
    part = layout.parse_part_name(item.part)
    return part is not None and part.kind == "ckpt"


def _planner() -> Any:
    """DCP's own planner, over names that are flat already. Its methods are only partly typed."""
    return DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
