"""`TieredStorageReader`: the tiers behind ``dcp.load``."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from sm_tiered import layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CheckpointNotFoundError, RestoreError
from sm_tiered.nearest import ItemSource, Sources
from sm_tiered.resolve import Candidate
from sm_tiered.sources import Span, open_part, touched_chunks
from sm_tiered.voted_load import Opened, Read
from sm_tiered_dcp.engine import Engine, Lease, RecipeLike, open_engine
from sm_tiered_dcp.finisher import metadata_from_records
from sm_tiered_dcp.loading import read_plan_spans, read_tensor, read_value, source_of
from sm_tiered_dcp.values import load_value
from sm_tiered_dcp.writer import step_of

__all__ = ["TieredStorageReader"]


class _ShareOut:
    """A `sm_tiered.voted_load.Loader` that verifies: every part is checked by one rank, as near as that has it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.candidate: Candidate | None = None

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        self.candidate = candidate
        rank, world = self._engine.group.rank, self._engine.group.world
        return {
            (record.rank, part.name): [(0, part.size)]
            for record in candidate.records
            if record.rank % world == rank and (record.rank in candidate.near or candidate.durable)
            for part in record.parts
            if not part.replica
        }

    def check(self, read: Read) -> None:
        """Touch every chunk: one that is read in place is verified only then. DCP's planner takes the values, later."""
        candidate = self.candidate
        assert candidate is not None
        byte = memoryview(bytearray(1))
        for (rank, name), spans in self.plan(candidate).items():
            for offset in range(0, spans[0][1], CHUNK_BYTES):
                read(rank, name, offset, byte)

    def place(self, read: Read) -> None:
        """DCP places the bytes, later."""

    def finish(self) -> None:
        """DCP's caller finishes."""


class TieredStorageReader(StorageReader):
    """Loads the newest complete, verified checkpoint of a recipe's namespace, or one step; drop-in for ``dcp.load``.

    All ranks read the same checkpoint, each byte is verified before it is used, and nothing is unpickled that
    ``torch.load(weights_only=True)`` would refuse, unless the recipe says ``allow_pickle: true``.
    """

    def __init__(self, recipe: RecipeLike, *, step: int | None = None) -> None:
        """Open the engine of *recipe*, the first time in a process. Collective."""
        self._asked = self._step = layout.check_step(step) if step is not None else None
        self._lease = Lease(open_engine(recipe), "TieredStorageReader")
        self._candidate: Candidate | None = None
        self._sources: Sources | None = None
        self.step: int | None = None
        """The step that was loaded."""

    @property
    def _engine(self) -> Engine:
        return self._lease.engine

    def close(self) -> None:
        """Let the engine go. Not collective; can be called many times."""
        self._lease.end()

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a load; the checkpoint is chosen anew."""
        self._step = step_of(checkpoint_id, self._asked)
        self._candidate = None

    # Not `**kwargs`: by that name DCP would ask again after a failure, and go on without collectives.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Choose the checkpoint with all ranks and return its metadata, made from the records. Collective.

        Raises:
            CheckpointNotFoundError: nothing was ever saved.
            RestoreError: see `sm_tiered.restore.walk`.
        """
        loader = _ShareOut(self._engine)
        self._engine.saver.quiesce()
        restored = self._engine.store.restore(loader, step=self._step, opens=False)
        if restored is None or loader.candidate is None:
            raise CheckpointNotFoundError(
                f"nothing was ever saved in namespace {self._engine.settings.namespace!r}",
                hint="TieredCheckpointer.restore() returns None here instead.",
            )
        self._candidate, self.step = loader.candidate, restored.step
        self._sources = Sources(self._candidate.records, self._candidate.near)
        return metadata_from_records(self._candidate.records)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and place what *plan* names, verified, from the nearest tier that has it."""
        candidate, sources = self._candidate, self._sources
        if candidate is None or sources is None:
            raise RestoreError("read_data was called before read_metadata")
        with ExitStack() as stack:
            opened = Opened()
            for (rank, name), spans in read_plan_spans(plan, sources).items():
                part = next(part for part in candidate.records[rank].parts if part.name == name)
                source = open_part(
                    self._engine.store.tiers, candidate, rank, part, touched_chunks(spans), self._engine.store.room
                )
                stack.callback(source.close)
                opened.parts[rank, name] = source
            self._place(plan, planner, sources, opened)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, plan: LoadPlan, planner: LoadPlanner, sources: Sources, read: Read) -> None:
        for request in plan.items:
            source = source_of(sources, request)
            if request.type == LoadItemType.BYTE_IO:
                planner.load_bytes(request, io.BytesIO(self._stream(source, read)))
                continue
            target = planner.resolve_tensor(request)
            read_tensor(source, request, target.detach(), read)
            planner.commit_tensor(request, target)

    def _stream(self, source: ItemSource, read: Read) -> bytes:
        """The value as a stream that the planner may unpickle: DCP's own does so without weights_only."""
        value = load_value(
            read_value(source, read), allow_pickle=self._engine.settings.allow_pickle, what=source.item.fqn
        )
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Return whether *checkpoint_id* names a step."""
        try:
            return step_of(checkpoint_id, None) is not None
        except ValueError:
            return False
