"""A checkpoint of the predecessor's, brought to a durable tier as one of ours: whole and verified, or not at all.

It gets an attempt of its own, `ATTEMPT`, which is below every attempt of ours: what we save later continues it, and
where we had saved before, it is never taken for the latest. The step stays what it was. Importing the same again
finds it there already; what was cut short is gone on with.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

from sm_tiered import layout
from sm_tiered.commit import Outcome, publish_attempt, try_commit
from sm_tiered.errors import (
    CorruptPartError,
    FormatError,
    KeyExistsError,
    KeyNotFoundError,
    MismatchError,
    SaveError,
    UnsafeValueError,
)
from sm_tiered.finish import Finisher
from sm_tiered.inventory import list_checkpoints, read_manifest, read_records
from sm_tiered.manifest import attempt_record_to_json, record_from_json
from sm_tiered.parts import PartSource
from sm_tiered.policies.keep import Latest
from sm_tiered.records import AttemptRecord, CheckpointId, Item, Record
from sm_tiered.settings import LocalSettings
from sm_tiered.streaming import stream
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.shares import ShareTier
from sm_tiered.transfer import copy_checkpoint
from sm_tiered.verify import verify_checkpoint
from sm_tiered_dcp.finisher import compose_files
from sm_tiered_dcp.planning import VALUES_PART
from sm_tiered_dcp.predecessor.looking import ATTEMPT, Imported, read_whole
from sm_tiered_dcp.predecessor.metadata import Contents
from sm_tiered_dcp.predecessor.parts import TensorsFrom, lay_out, take_values
from sm_tiered_dcp.predecessor.shards import Shard
from sm_tiered_dcp.predecessor.sources import Listed, Source

__all__ = ["REFUSALS", "Progress", "import_step"]

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes of the predecessor's shards."""

REFUSALS = (MismatchError, UnsafeValueError, KeyExistsError)
"""What a step can be refused for that is whole."""

_USELESS = (CorruptPartError, FormatError, MismatchError, UnsafeValueError)
"""Another try would end so too: what was written of the checkpoint is taken back."""


def import_step(
    source: Source,
    step: Listed,
    tier: Tier,
    *,
    namespace: str,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Imported:
    """Bring *step* of *source* to *tier*, a durable one that is rooted at *namespace*, and read it back.

    Needs memory for the longest stored tensor twice, and 80 MiB.

    Raises:
        CheckpointNotFoundError, CorruptPartError, FormatError: as `read_whole`; or the bytes are damaged.
        MismatchError: a value can only be loaded by a pickle, and *allow_pickle* is False.
        UnsafeValueError: a value can't be stored by us.
        KeyExistsError: another checkpoint stands there under its name, or its tombstone does.
        TierError: a place did not answer or refused.
    """
    if isinstance(tier, ShareTier):
        return _by_way_of_a_directory(source, step, tier, namespace, allow_pickle, progress)
    contents = read_whole(source, step)
    work = _Import(
        source=source,
        step=step,
        contents=contents,
        tier=tier,
        namespace=namespace,
        allow_pickle=allow_pickle,
        progress=progress or (lambda done, total: None),
    )
    try:
        return work.run()
    except _USELESS:
        work.withdraw()
        raise


def _by_way_of_a_directory(
    source: Source, step: Listed, tier: Tier, namespace: str, allow_pickle: bool, progress: Progress | None
) -> Imported:
    """For a tier that takes what a rank wrote in one piece: it asks for every byte twice, and has a place for each step
    of an ordinal, whichever attempt's.
    """
    others = [c for c in list_checkpoints(tier) if c.attempt.ordinal == ATTEMPT.ordinal and c.attempt != ATTEMPT]
    if others:
        raise KeyExistsError(
            f"{tier.name} holds saves of {others[0].attempt}, whose places an import would take",
            hint="Import to a tier that lasts, e.g. kind: s3; a restore finds it there.",
            step=step.step,
            tier=tier.name,
        )
    with tempfile.TemporaryDirectory(prefix="sm_tiered-") as directory:
        there = LocalSettings(name=tier.name, save=None, keep=Latest(1), path=directory, fsync=False)
        with closing(open_tier(there, namespace)) as local:
            found = import_step(source, step, local, namespace=namespace, allow_pickle=allow_pickle, progress=progress)
            copied = copy_checkpoint(local, tier, found.checkpoint, durable=True, namespace=namespace)
            return replace(found, already=copied.already)


@dataclass(slots=True, kw_only=True)
class _Import:
    """One step on its way."""

    source: Source
    step: Listed
    contents: Contents
    tier: Tier
    namespace: str
    allow_pickle: bool
    progress: Progress
    saved_at: float = 0.0
    done: int = 0
    pickled: list[str] = field(default_factory=list[str])

    @property
    def checkpoint(self) -> CheckpointId:
        return CheckpointId(attempt=ATTEMPT, step=self.step.step)

    def run(self) -> Imported:
        standing = {rank: record_from_json(data) for rank, data in read_records(self.tier, self.checkpoint).items()}
        if self._stands(standing):
            return self._told(standing, already=True)
        self.saved_at = self.step.saved_at or min((r.saved_at for r in standing.values()), default=time.time())
        record = AttemptRecord(namespace=self.namespace, attempt=ATTEMPT, parent=None, chosen=False)
        publish_attempt(self.tier, ATTEMPT, attempt_record_to_json(record))
        for rank in range(self.contents.world):
            standing[rank] = self._bring(rank, standing.get(rank))
        compose = Finisher(make=compose_files).compose
        outcome = try_commit(self.tier, self.checkpoint, world=self.contents.world, compose=compose)
        if outcome is not Outcome.COMMITTED:
            hint = "Is something else deleting there? Try again."
            raise SaveError("it was deleted while it was imported", hint=hint, step=self.step.step, tier=self.tier.name)
        self._read_back()
        return self._told(standing, already=False)

    def withdraw(self) -> None:
        """Take back what was written, unless it is committed."""
        if read_manifest(self.tier, self.checkpoint) is None:
            prefix = f"{layout.checkpoint_dir(self.checkpoint)}/"
            self.tier.delete([entry.key for entry in self.tier.list(prefix)])

    def _stands(self, standing: Mapping[int, Record]) -> bool:
        """Whether this step was imported before."""
        manifest = read_manifest(self.tier, self.checkpoint)
        if manifest is None:
            return False
        if manifest.tombstone:
            hint = (
                "That goes a day after the deletion, with the next `sm-tiered prune --yes` or commit; then try again."
            )
            raise KeyExistsError(
                "it was deleted there, and what tells so still stands",
                hint=hint,
                step=self.step.step,
                tier=self.tier.name,
            )
        same = set(standing) == set(range(self.contents.world)) == set(range(manifest.world)) and all(
            self._is_same(rank, record) for rank, record in standing.items()
        )
        if not same:
            raise KeyExistsError(
                "another import of that step is committed there, with other values",
                hint="Nothing is written over. Import into another namespace: --set namespace=NAME.",
                step=self.step.step,
                tier=self.tier.name,
            )
        return True

    def _is_same(self, rank: int, record: Record) -> bool:
        """Whether *record* holds the names, shapes and places in which this import would store what *rank* has."""
        tensors, values = self.contents.of(rank)
        planned = {(t.fqn, t.offsets, t.sizes, t.shape, str(t.dtype).removeprefix("torch.")) for t in tensors}
        planned |= {(v.fqn, (), (), (), None) for v in values}
        return record.failed is None and planned == set(map(_facts, record.items))

    def _bring(self, rank: int, standing: Record | None) -> Record:
        """Write what *rank* stored, and its record, unless an earlier try did."""
        tensors, values = self.contents.of(rank)
        key = layout.in_dir(self.checkpoint, layout.record_name(rank))
        if standing is not None:
            if self._is_same(rank, standing):
                self._tell(sum(entry.span.length for entry in (*tensors, *values)))
                return standing
            self.tier.delete([key])
        record = Record(
            namespace=self.namespace,
            checkpoint=self.checkpoint,
            rank=rank,
            world=self.contents.world,
            saved_at=self.saved_at,
        )
        if not tensors and not values:
            return stream(self.tier, [], record, timeout_secs=math.inf)
        try:
            with ExitStack() as stack:
                shard = stack.enter_context(self.source.shard(self.step, rank))
                return stream(self.tier, self._parts(rank, shard, stack), record, timeout_secs=math.inf)
        except KeyNotFoundError as error:
            raise CorruptPartError(
                f"the shard of rank {rank} is missing: {error.message}", step=self.step.step, rank=rank
            ) from error

    def _parts(self, rank: int, shard: Shard, stack: ExitStack) -> list[PartSource]:
        tensors, values = self.contents.of(rank)
        parts: list[PartSource] = []
        if values:
            name = layout.part_name(rank, VALUES_PART)
            taken = take_values(name, shard, values, allow_pickle=self.allow_pickle, told=self._tell)
            part = stack.enter_context(taken)
            self.pickled += part.pickled
            parts.append(part)
        if tensors:
            planned = lay_out(layout.part_name(rank, 0), tensors)
            parts.insert(0, TensorsFrom(layout=planned, shard=shard, entries=tensors, told=self._tell))
        return parts

    def _tell(self, count: int) -> None:
        # A part that is sent again after a failure is counted again.
        self.done = min(self.done + count, self.contents.size)
        self.progress(self.done, self.contents.size)

    def _read_back(self) -> None:
        report = verify_checkpoint(self.tier, self.checkpoint, durable=True)
        if report.problems:
            first = report.problems[0]
            raise CorruptPartError(
                f"read back, it is not what was written: {first.part} {first.what}",
                hint="`sm-tiered verify` tells all of it.",
                step=self.step.step,
                tier=self.tier.name,
            )

    def _told(self, records: Mapping[int, Record], *, already: bool) -> Imported:
        return Imported(
            checkpoint=self.checkpoint,
            world=self.contents.world,
            tensors=len(self.contents.tensors),
            values=len(self.contents.values),
            bytes=sum(part.size for record in records.values() for part in record.parts),
            already=already,
            pickled=tuple(self.pickled),
        )


def _facts(item: Item) -> tuple[object, ...]:
    return item.fqn, item.offsets, item.sizes, item.shape, item.dtype
