"""Saving a state: flattened, planned once, then only copied. Checkpointers and the async writer share it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from sm_tiered import layout
from sm_tiered.agreement import Agreement, Request
from sm_tiered.errors import StructureError, TieredError
from sm_tiered.events import StructureReplanned
from sm_tiered.handle import SaveHandle
from sm_tiered.parts import PartSource
from sm_tiered_dcp.archive import Packed, Packer
from sm_tiered_dcp.collector import collector_paused
from sm_tiered_dcp.dcp_parts import BytesPart, ValueEntry
from sm_tiered_dcp.engine import Engine, fits
from sm_tiered_dcp.fingerprints import fingerprint
from sm_tiered_dcp.leaves import Stateful
from sm_tiered_dcp.packed_part import PackedPart
from sm_tiered_dcp.planning import KEPT_VALUES_PART, VALUES_PART, TensorPlan, plan_tensors
from sm_tiered_dcp.tree import Flat, flatten, signature, values_signature
from sm_tiered_dcp.values import dump_value

__all__ = ["State", "StateSaver"]

State = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
"""A state, or what returns it."""


@dataclass(slots=True)
class StateSaver:
    """Flattens and plans for one engine; keeps the plan while the structure stays the same."""

    engine: Engine
    plan: TensorPlan | None = None
    last_size: int | None = None
    """Bytes of the largest recycled part, as it was planned last."""
    state_dict_secs: float = 0.0
    """Time that the last save spent inside the user's ``state_dict``."""
    _signature: int | None = None
    _packers: dict[str, Packer] = field(default_factory=dict[str, Packer])
    """By the name of the archive; so are the next."""
    _planned_archives: dict[str, int] = field(default_factory=dict[str, int])
    """How many bytes room was made for."""
    _keeps_values: bool = False
    """Whether this rank keeps, for its node, the Python values and archives that rank 0 stores for the job."""

    @classmethod
    def of(cls, engine: Engine) -> StateSaver:
        """Return the saver that all users of *engine* share."""
        if engine.state_saver is None:
            engine.state_saver = cls(engine)
        return engine.state_saver

    def save(
        self,
        step: int,
        state: State,
        *,
        tiers: Sequence[str] | None = None,
        metrics: Mapping[str, float] | None = None,
        urgent: bool = False,
    ) -> SaveHandle:
        """Save *state* as *step* and return a handle; when this returns the state may change. Collective.

        Raises:
            ConfigError: the step or a tier's name can't be used.
            StructureError: ranks disagree, or the state can't be one checkpoint.
            UnsafeValueError: a value that only a pickle could store.
        """
        with torch.no_grad(), collector_paused():
            return self._save(step, state, tiers=tiers, metrics=metrics or {}, urgent=urgent)

    def _save(
        self,
        step: int,
        state: State,
        *,
        tiers: Sequence[str] | None,
        metrics: Mapping[str, float],
        urgent: bool,
    ) -> SaveHandle:
        begun = time.monotonic()
        step, named = layout.check_step(step), self.engine.tiers(tiers)
        taken, failure = self._flatten(state)
        failure = failure or self.engine.saver.deliver()
        agreement = self.engine.saver.agree(self._request(step, named, urgent, taken, failure))
        assert taken is not None
        self._compare_values(agreement, taken)
        if agreement.structure_changed:
            self._plan(taken, step)
            agreement = replace(agreement, in_memory=agreement.in_memory and not self.engine.store.over_budget)
        return self.engine.saver.save(agreement, self._parts(taken), metrics=metrics, begun=begun)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Plan *state* and fill the arena's pages in the background, so that the first save is as fast as the next.

        Collective; calls ``state_dict()``.
        """
        with collector_paused():
            flat, failure = self._flatten(state)
            self.engine.store.all_or_none(lambda: _raise(failure))
            assert flat is not None
            self._plan(flat, step=None)
        self.engine.store.line.attempt()

    def _flatten(self, state: State) -> tuple[_Taken | None, Exception | None]:
        """What is wrong with this rank's state is told to all ranks before anybody raises."""
        begun = time.monotonic()
        try:
            flat = flatten(_made(state), rank=self.engine.group.rank)
            self.state_dict_secs = time.monotonic() - begun
            return self._take(flat), None
        except Exception as error:
            return None, error

    def _take(self, flat: Flat) -> _Taken:
        """Serialise the Python values now: they are as they are at the moment of the call."""
        allow = self.engine.settings.allow_pickle
        return _Taken(
            flat=flat,
            signature=signature(flat, world=self.engine.group.world),
            tensors={
                fqn: leaf.value for leaves in (flat.tensors, flat.per_rank_tensors) for fqn, leaf in leaves.items()
            },
            common=tuple(
                ValueEntry(fqn=fqn, path=leaf.path, data=dump_value(fqn, leaf.value, allow_pickle=allow))
                for fqn, leaf in flat.values.items()
            ),
            own=tuple(
                ValueEntry(fqn=fqn, path=leaf.path, data=dump_value(fqn, leaf.value, allow_pickle=allow))
                for fqn, leaf in flat.per_rank_values.items()
            ),
            archives=self._packed(flat),
        )

    def _packed(self, flat: Flat) -> dict[str, Packed]:
        """Pack what this rank stores or keeps; before the first plan, when that is not known, all that there is."""
        if self.plan is not None and self.engine.group.rank != 0 and not self._keeps_values:
            return {}
        allow = self.engine.settings.allow_pickle
        self._packers = {fqn: self._packers.get(fqn) or Packer(fqn, allow_pickle=allow) for fqn in flat.archives}
        return {fqn: self._packers[fqn].pack(leaf.value) for fqn, leaf in flat.archives.items()}

    def _request(
        self, step: int, tiers: frozenset[str], urgent: bool, taken: _Taken | None, failure: Exception | None
    ) -> Request:
        if taken is None or failure is not None:
            return Request(step=step, tiers=tiers, failure=failure)
        sizes = taken.archive_sizes
        changed = self.plan is None or taken.signature != self._signature or not fits(sizes, self._planned_archives)
        return Request(
            step=step,
            tiers=tiers,
            urgent=urgent,
            structure_changed=changed,
            values_signature=values_signature(taken.flat),
            values_fingerprint=fingerprint({fqn: leaf.value for fqn, leaf in taken.flat.values.items()}),
            size=None if changed else max([self.last_size or 0, *sizes.values()]),
        )

    def _plan(self, taken: _Taken, step: int | None) -> None:
        """Plan with all ranks, and see to it that the generations fit. Collective."""
        engine, flat = self.engine, taken.flat
        first = self.plan is None
        nodes = engine.group.gather(engine.store.tiers.memory.node_key() if engine.store.tiers.memory else None)
        paths = {fqn: leaf.path for leaves in (flat.tensors, flat.per_rank_tensors) for fqn, leaf in leaves.items()}
        self.plan = plan_tensors(taken.tensors, paths, flat.tied, engine.group, nodes)
        here = nodes[engine.group.rank]
        self._keeps_values = here != nodes[0] and nodes.index(here) == engine.group.rank
        if engine.group.rank != 0 and not self._keeps_values:
            taken.archives.clear()
            self._packers.clear()
        grown = not first and taken.signature == self._signature
        self._planned_archives = taken.archive_sizes
        sizes = [part.layout.size for part in self.plan.parts]
        sizes += self._planned_archives.values()
        self._signature, self.last_size = taken.signature, max(sizes, default=0)
        engine.make_room(sizes, first=first)
        if step is not None and not first:
            reason = "an archive outgrew its room" if grown else "names, shapes, dtypes or placements changed"
            engine.store.events.emit(StructureReplanned(step=step, reason=reason))

    def _compare_values(self, agreement: Agreement, taken: _Taken) -> None:
        """Python values outside per_rank are stored once: ranks that differ would silently lose all but one.

        Raises:
            StructureError: two ranks have different values under one name.
        """
        if agreement.same_value_names and agreement.same_values:
            return
        mine = {fqn: fingerprint(leaf.value) for fqn, leaf in taken.flat.values.items()}
        self._compare_archives(taken.flat)
        found: dict[str, tuple[int, int]] = {}
        for rank, prints in enumerate(self.engine.group.gather(mine)):
            for fqn, value in prints.items():
                first, known = found.setdefault(fqn, (rank, value))
                if known != value:
                    raise StructureError(
                        f"{fqn}: ranks {first} and {rank} have different values",
                        hint="A value outside per_rank is stored once: put what differs by rank under 'per_rank'.",
                        rank=rank,
                    )
        me = self.engine.group.rank
        taken.writers = {fqn for fqn, (rank, _) in found.items() if rank == me}

    def _compare_archives(self, flat: Flat) -> None:
        """Rank 0's are stored: what another rank alone holds as an archive would be lost."""
        names = self.engine.group.gather(sorted(flat.archives))
        for rank, others in enumerate(names):
            if others != names[0]:
                one = min(set(others) ^ set(names[0]))
                has, lacks = (0, rank) if one in names[0] else (rank, 0)
                message = f"{one} is an Archive on rank {has} and not on rank {lacks}"
                raise StructureError(message, hint="Hold the same archives on every rank.", rank=rank)

    def _parts(self, taken: _Taken) -> list[PartSource]:
        assert self.plan is not None
        rank = self.engine.group.rank
        parts: list[PartSource] = [part.bind(taken.tensors) for part in self.plan.parts]
        parts += self._archive_parts(taken)
        common = [e for e in taken.common if (rank == 0 if taken.writers is None else e.fqn in taken.writers)]
        entries = (*common, *taken.own)
        if entries:
            parts.append(BytesPart(name=layout.part_name(rank, VALUES_PART), entries=entries))
        if self._keeps_values and (kept := tuple(entry for entry in taken.common if entry not in common)):
            parts.append(BytesPart(name=layout.part_name(rank, KEPT_VALUES_PART), entries=kept, replica=True))
        return parts

    def _archive_parts(self, taken: _Taken) -> Iterator[PartSource]:
        rank = self.engine.group.rank
        for index, (fqn, packed) in enumerate(taken.archives.items()):
            name, path = layout.part_name(rank, index, "ckpt"), taken.flat.archives[fqn].path
            yield PackedPart(name=name, fqn=fqn, path=path, packed=packed, replica=rank != 0)


def _made(state: Any) -> Any:
    # A module is callable too, and is no state: `flatten` says so.
    if not callable(state) or isinstance(cast("object", state), (Mapping, Stateful)):
        return state
    return state()


@dataclass(slots=True, kw_only=True)
class _Taken:
    """A state as it was at the moment of a save."""

    flat: Flat
    signature: int
    tensors: dict[str, Any]
    common: tuple[ValueEntry, ...]
    own: tuple[ValueEntry, ...]
    archives: dict[str, Packed]
    """Those that this rank may write."""
    writers: set[str] | None = None
    """The common values that this rank stores; None: rank 0 stores them all."""

    @property
    def archive_sizes(self) -> dict[str, int]:
        """In bytes, by name."""
        return {fqn: packed.frame.size for fqn, packed in self.archives.items()}


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure if isinstance(failure, TieredError) else StructureError(f"{type(failure).__name__}: {failure}")
