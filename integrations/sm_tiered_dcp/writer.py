"""`TieredStorageWriter`: the tiers behind ``dcp.save`` and ``dcp.async_save``."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo  # pyright: ignore
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from sm_tiered import layout
from sm_tiered.agreement import Agreement, Request
from sm_tiered.errors import ConfigError, SaveError
from sm_tiered.handle import SaveHandle
from sm_tiered.parts import PartSource
from sm_tiered.policies.context import check_metrics
from sm_tiered_dcp.dcp_parts import BytesPart, ValueEntry
from sm_tiered_dcp.engine import Engine, Lease, RecipeLike, open_engine
from sm_tiered_dcp.group import GlooGroup
from sm_tiered_dcp.leaves import lacks_storage, no_storage
from sm_tiered_dcp.planning import VALUES_PART, lay_out_plan
from sm_tiered_dcp.state_saver import StateSaver
from sm_tiered_dcp.values import dump_value, load_value

__all__ = ["TieredStorageWriter", "step_of"]


def step_of(checkpoint_id: object, step: int | None) -> int | None:
    """Return the step that *step* and DCP's *checkpoint_id* (an int, ``"500"`` or ``".../step_500"``) name together.

    Raises:
        ConfigError: they name different ones, or the id names none.
    """
    if checkpoint_id is None:
        return step
    found = re.search(r"(?:^|[/_-])(\d{1,10})/?$", str(checkpoint_id))
    if found is None:
        raise ConfigError(
            f"checkpoint_id {checkpoint_id!r} names no step", hint="Pass step=, or an id like 'step_500'."
        )
    if step is not None and int(found[1]) != step:
        raise ConfigError(f"checkpoint_id {checkpoint_id!r} and step={step} differ", hint="Pass one of them.")
    return layout.check_step(int(found[1]))


class TieredStorageWriter(StorageWriter, AsyncStager):
    """Saves through the tiers of a recipe; drop-in for ``dcp.save`` and, as its own stager, ``dcp.async_save``.

    A writer is thin: make one for each save. All writers of one recipe share one engine. ``dcp.save`` returns when
    every rank's share is in memory; ``handle`` tells of the durable tiers.

    With ``dcp.async_save`` pass ``process_group=writer.process_group``: DCP's collectives then run in a background
    thread on a group of their own. The process executor is refused: a mapping can't be sent to another process.
    """

    def __init__(
        self,
        recipe: RecipeLike,
        *,
        step: int | None = None,
        tiers: tuple[str, ...] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Open the engine of *recipe*, the first time in a process. Collective.

        Args:
            recipe: a path, a mapping or a `sm_tiered.recipe.Recipe`.
            step: the step to save; may come as DCP's ``checkpoint_id`` instead.
            tiers: names of the tiers to save to, queued even behind a step that is still draining; None: all of the
                recipe, where a busy drain makes the newest step win.
            metrics: what keep policies rank checkpoints by.
        """
        self._asked = self._step = layout.check_step(step) if step is not None else None
        self._metrics = check_metrics(metrics or {})
        self._lease = Lease(open_engine(recipe), "TieredStorageWriter")
        self._saver = StateSaver.of(self._engine)
        self._tiers = tiers
        self._agreement: Agreement | None = None
        self._begun = 0.0
        self._staged = self._copied = self._group_taken = False
        self.handle: SaveHandle | None = None
        """How the save stands on each tier, once it has begun."""

    @property
    def _engine(self) -> Engine:
        return self._lease.engine

    @property
    def process_group(self) -> Any:
        """The group to pass to ``dcp.async_save``; None without torch.distributed."""
        self._group_taken = True
        group = self._engine.group
        return group.async_group if isinstance(group, GlooGroup) else None

    def close(self) -> None:
        """Let the engine go. Not collective; can be called many times."""
        self._lease.end()

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a TieredStorageWriter can't be sent to another process: it copies into memory mapped here",
            hint="Use async_checkpointer_type=AsyncCheckpointerType.THREAD.",
        )

    # ---- AsyncStager

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy *state_dict* into memory, whole; what DCP does afterwards in its thread copies nothing. Collective."""
        self._check_group()
        if self._asked is None:
            # A step that is left from an earlier save would be taken for this one's.
            raise ConfigError(
                "dcp.async_save copies the state before it tells its checkpoint_id", hint="Pass step= to the writer."
            )
        self._check_metrics()
        self._staged, self.handle = False, None
        urgent = self._tiers is not None
        self.handle = self._saver.save(self._asked, state_dict, tiers=self._tiers, metrics=self._metrics, urgent=urgent)
        self._staged = True
        return state_dict

    def _check_group(self) -> None:
        """Refuse DCP's collectives in the background on the group of the training."""
        if isinstance(self._engine.group, GlooGroup) and not self._group_taken:
            raise ConfigError(
                "dcp.async_save was called without our process group",
                hint="Pass process_group=writer.process_group: collectives of two threads on one group can deadlock.",
            )

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: `stage` has copied everything when it returns."""
        return False

    def synchronize_staging(self) -> None:
        """Nothing is left to wait for."""

    # ---- StorageWriter

    def reset(self, checkpoint_id: Any = None) -> None:
        """Take the step from DCP's ``checkpoint_id``, where one is given."""
        staged, self._staged = self._staged, False
        self._step = step_of(checkpoint_id, self._asked)
        self._staged = staged

    def storage_meta(self) -> StorageMeta | None:
        """Agree with all ranks on the save: DCP calls this first of all, on every rank. Returns None. Collective."""
        # What was staged is this save's, or nobody's: one that failed half-way must not lend it to the next.
        self._copied, self._staged = self._staged, False
        if not self._copied:
            self._begun = time.monotonic()
            self._check_metrics()
            self._agreement = self._engine.saver.agree(
                Request(
                    step=self._the_step(),
                    tiers=self._engine.tiers(self._tiers),
                    urgent=self._tiers is not None,
                    size=self._saver.last_size,
                    failure=self._engine.saver.deliver(),
                )
            )

    def _check_metrics(self) -> None:
        check_metrics(self._metrics, wanted=self._engine.schedule.ranked_by)

    def _the_step(self) -> int:
        if self._step is None:
            raise ConfigError("no step was given", hint="TieredStorageWriter(recipe, step=step).")
        return self._step

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Leave the plans as they are."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy what *plan* names into memory; the future is complete when this rank's record is written."""
        if not self._copied:
            if self._agreement is None:
                raise SaveError("write_data was called before storage_meta")
            parts = self._parts(plan, planner)
            self.handle = self._engine.saver.save(self._agreement, parts, metrics=self._metrics, begun=self._begun)
        if self.handle is not None:
            self._settle(self.handle)
        done: Future[list[WriteResult]] = Future()
        done.set_result([_result(item) for item in plan.items])
        return done

    def _settle(self, handle: SaveHandle) -> None:
        """Raise what kept this rank's share from memory, unless a durable tier has it."""
        self._engine.saver.settle()
        errors = {tier: handle.exception(tier) for tier in handle.tiers if not handle.skipped(tier)}
        if errors and all(errors.values()):
            raise next(error for error in errors.values() if error is not None)

    def _parts(self, plan: SavePlan, planner: SavePlanner) -> list[PartSource]:
        paths: Mapping[str, Any] = plan.planner_data or {}
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        found = {item.index: cast("torch.Tensor", planner.resolve_data(item)) for item in tensors}
        for index, tensor in found.items():
            if lacks_storage(tensor):
                raise no_storage(index.fqn, tensor)
        rank = self._engine.group.rank
        named = {item.index.fqn: tuple(paths.get(item.index.fqn, (item.index.fqn,))) for item in plan.items}
        parts: list[PartSource] = []
        for part in lay_out_plan(tensors, (), named, {}, rank).parts:
            parts.append(part.layout.source([found[item.index] for item in tensors]))
        if self._saver.last_size is None:
            self._engine.store.check_room([part.size for part in parts])
        self._saver.last_size = max((part.size for part in parts), default=0)
        values = [item for item in plan.items if item.type == WriteItemType.BYTE_IO]
        entries = tuple(
            ValueEntry(fqn=item.index.fqn, path=named[item.index.fqn], data=self._bytes(item, planner))
            for item in values
        )
        if entries:
            parts.append(BytesPart(name=layout.part_name(rank, VALUES_PART), entries=entries))
        return parts

    def _bytes(self, item: WriteItem, planner: SavePlanner) -> bytes:
        allow = self._engine.settings.allow_pickle
        if isinstance(planner, DefaultSavePlanner):
            value: object = cast("Any", planner).lookup_object(item.index)
            return dump_value(item.index.fqn, value, allow_pickle=allow)
        data = cast(io.BytesIO, planner.resolve_data(item)).getvalue()
        if not allow:
            load_value(data, allow_pickle=False, what=item.index.fqn)
        return data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Nothing is left: the record of each rank is the commit in memory, and drainers do the rest."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return whether *checkpoint_id* names a step."""
        try:
            return step_of(checkpoint_id, None) is not None
        except (ConfigError, SaveError):
            return False


def _result(item: WriteItem) -> WriteResult:
    """What DCP wants to know of an item; the real offsets stand in the records."""
    size = 0
    if item.tensor_data is not None:
        size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=StorageInfo("", 0, size))
