"""A checkpoint of the predecessor's, brought to a durable tier as one of ours: whole and verified, or not at all.

It gets an attempt of its own, named after the save that it was (`sm_tiered.lineage.imported_attempt`), which is below
every attempt of ours: what we save later continues it, and where we had saved before, it is never taken for the latest.
The step stays what it was. Importing the same save again finds it there already, what was cut short is gone on with,
and two saves of one step are never mixed.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

from sm_tiered import layout
from sm_tiered.commit import Outcome, publish_attempt, try_commit
from sm_tiered.errors import (
    CheckpointNotFoundError,
    CorruptPartError,
    FormatError,
    KeyExistsError,
    KeyNotFoundError,
    MismatchError,
    SaveError,
    TieredError,
    TierFullError,
    TierUnavailableError,
    UnsafeValueError,
)
from sm_tiered.finish import Finisher
from sm_tiered.log_lines import printable
from sm_tiered.manifest import attempt_record_to_json
from sm_tiered.parts import PartSource
from sm_tiered.policies.keep import Latest
from sm_tiered.records import AttemptRecord, CheckpointId, Record
from sm_tiered.settings import LocalSettings
from sm_tiered.streaming import stream
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.shares import ShareTier
from sm_tiered.transfer import copy_checkpoint
from sm_tiered_dcp.finisher import compose_files
from sm_tiered_dcp.planning import VALUES_PART
from sm_tiered_dcp.predecessor.contents import Contents
from sm_tiered_dcp.predecessor.looking import MISSING, Imported, named, read_whole
from sm_tiered_dcp.predecessor.parts import TensorsFrom, lay_out, take_values
from sm_tiered_dcp.predecessor.receiving import Receiving
from sm_tiered_dcp.predecessor.shards import Checks, Shard
from sm_tiered_dcp.predecessor.sources import Listed, Source
from sm_tiered_dcp.predecessor.temporary import no_room, using_temporary

__all__ = ["OLDER", "REFUSALS", "Progress", "import_step"]

_logger = logging.getLogger("sm_tiered")

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes of the predecessor's shards."""

OLDER = (CheckpointNotFoundError, CorruptPartError, FormatError)
"""Why a step is passed over for the one before it: what the predecessor left of it can't be used."""

REFUSALS = (MismatchError, UnsafeValueError, KeyExistsError)
"""What a step can be refused for that is whole."""


def import_step(
    source: Source,
    step: Listed,
    tier: Tier,
    *,
    namespace: str,
    allow_pickle: bool = False,
    asked: bool = True,
    progress: Progress | None = None,
) -> Imported:
    """Bring *step* of *source* to *tier*, a durable one that is rooted at *namespace*, and read it back.

    Needs memory for the longest stored tensor twice, and 80 MiB. *asked*: for this very step, though it may be of two
    saves.

    Raises:
        CheckpointNotFoundError, CorruptPartError, FormatError: as `read_whole`; or the bytes are damaged.
        MismatchError: a value can only be loaded by a pickle, and *allow_pickle* is False.
        UnsafeValueError: a value can't be stored by us.
        KeyExistsError: another import of that step stands there, or a tombstone of this one does.
        SaveError: what stands or was written there is damaged, or memory ran out.
        TierFullError: there is no room there, or in TMPDIR.
        TierUnavailableError: a place did not answer, or *step* is still being written.
        TierError: a place refused.
    """
    whole = read_whole(source, step, asked=asked)
    contents = whole.contents
    identity = source.identity(step, contents.ends)
    work = _Import(
        source=source,
        step=step,
        identity=identity,
        there=Receiving(tier=tier, namespace=namespace, checkpoint=named(step.step, identity), contents=contents),
        allow_pickle=allow_pickle,
        doubts=whole.doubts,
        progress=progress or (lambda done, total: None),
    )
    return work.by_way_of_a_directory(tier) if isinstance(tier, ShareTier) else work.run()


@dataclass(slots=True, kw_only=True)
class _Import:
    """One step on its way."""

    source: Source
    step: Listed
    identity: str
    there: Receiving
    allow_pickle: bool
    doubts: tuple[str, ...]
    progress: Progress
    saved_at: float = 0.0
    done: int = 0
    pickled: list[str] = field(default_factory=list[str])
    checks: Checks = field(default_factory=Checks)
    wrote: bool = False

    @property
    def contents(self) -> Contents:
        return self.there.contents

    @property
    def checkpoint(self) -> CheckpointId:
        return self.there.checkpoint

    def run(self) -> Imported:
        found = self._already()
        if found is not None:
            return found
        left = self.there.left()
        self.saved_at = self.step.saved_at or min((r.saved_at for r in left.values()), default=time.time())
        record = AttemptRecord(
            namespace=self.there.namespace, attempt=self.checkpoint.attempt, parent=None, chosen=False
        )
        publish_attempt(self.there.tier, self.checkpoint.attempt, attempt_record_to_json(record))
        try:
            written = {rank: self._bring(rank, left.get(rank)) for rank in range(self.contents.world)}
            problem = self._changed() or self.there.unlike_written()
            if problem is None:
                self._commit()
        except (CorruptPartError, FormatError):
            if self.wrote:
                self._take_back()  # another try would end so too
            raise
        if problem is not None:
            self._take_back()
            raise problem
        self._check_committed()
        return self._told(written, already=False)

    def by_way_of_a_directory(self, tier: ShareTier) -> Imported:
        """For a tier that takes what a rank wrote in one piece: it asks for every byte twice, and has a place for each
        step of an ordinal, whichever attempt's.
        """
        self.there.check_places()
        found = self._already()
        if found is not None:
            return found
        what, size = f"step {self.step.step} on its way to {tier.name}", self.contents.size
        with using_temporary(what, size), tempfile.TemporaryDirectory(prefix="sm_tiered-") as directory:
            if shutil.disk_usage(directory).free < size:
                raise no_room(what, size)
            there = LocalSettings(name="TMPDIR", save=None, keep=Latest(1), path=directory, fsync=False)
            with closing(open_tier(there, self.there.namespace)) as local:
                try:
                    made = replace(self, there=replace(self.there, tier=local)).run()
                except TierFullError as error:
                    raise no_room(what, size) from error
                copy_checkpoint(local, tier, self.checkpoint, durable=True, namespace=self.there.namespace)
        self._check_committed(thoroughly=True)
        return made

    def _already(self) -> Imported | None:
        """What is told of this very save where it is committed there, whole."""
        standing = self.there.committed()
        if standing is None:
            return None
        self.there.check_committed(thoroughly=True)
        for _, record in sorted(standing.items()):
            self.pickled += self.there.pickled_in(record)
        return self._told(standing, already=True)

    def _bring(self, rank: int, left: Record | None) -> Record:
        """Write what *rank* stored, and its record, unless an earlier try did."""
        tensors, values = self.contents.of(rank)
        if left is not None:
            self.pickled += self.there.pickled_in(left)
            self._tell(sum(entry.span.length for entry in (*tensors, *values)))
            return left
        record = Record(
            namespace=self.there.namespace,
            checkpoint=self.checkpoint,
            rank=rank,
            world=self.contents.world,
            saved_at=self.saved_at,
        )
        self.wrote = True
        if not tensors and not values:
            return stream(self.there.tier, [], record, timeout_secs=math.inf)
        try:
            with ExitStack() as stack:
                shard = stack.enter_context(self.source.shard(self.step, rank, end=self.contents.ends[rank]))
                return stream(self.there.tier, self._parts(rank, shard, stack), record, timeout_secs=math.inf)
        except KeyNotFoundError as error:
            raise CorruptPartError(
                f"the shard of rank {rank} is missing: {error.message}",
                hint=MISSING,
                step=self.step.step,
                rank=rank,
            ) from error

    def _parts(self, rank: int, shard: Shard, stack: ExitStack) -> list[PartSource]:
        tensors, values = self.contents.of(rank)
        parts: list[PartSource] = []
        if values:
            name = layout.part_name(rank, VALUES_PART)
            taken = take_values(name, shard, values, self.checks, allow_pickle=self.allow_pickle, told=self._tell)
            part = stack.enter_context(taken)
            self.pickled += part.pickled
            parts.append(part)
        if tensors:
            planned = lay_out(layout.part_name(rank, 0), tensors)
            tensors_part = TensorsFrom(
                layout=planned, shard=shard, entries=tensors, told=self._tell, checks=self.checks
            )
            parts.insert(0, tensors_part)
        return parts

    def _tell(self, count: int) -> None:
        # A part that is sent again after a failure is counted again.
        self.done = min(self.done + count, self.contents.size)
        self.progress(self.done, self.contents.size)

    def _changed(self) -> TierUnavailableError | None:
        """What was read over a while may be of two saves, unless it is now as it was before."""
        if self.source.identity(self.step, self.contents.ends, again=True) == self.identity:
            return None
        return TierUnavailableError(
            f"{self.source.title}, {self.step.name}: it was written to while it was read",
            hint="Try again when nothing saves there any more.",
            step=self.step.step,
        )

    def _commit(self) -> None:
        compose = Finisher(make=compose_files).compose
        outcome = try_commit(self.there.tier, self.checkpoint, world=self.contents.world, compose=compose)
        if outcome is Outcome.DELETED:
            raise self.there.deleted()
        if outcome is Outcome.WAITING:
            raise SaveError(
                "its records are gone from there again",
                hint="Is something else deleting there? Try again.",
                step=self.step.step,
                tier=self.there.tier.name,
            )

    def _check_committed(self, *, thoroughly: bool = False) -> None:
        """Something else may have deleted there between the two."""
        try:
            self.there.check_committed(thoroughly=thoroughly)
        except SaveError:
            self.there.bury()
            raise

    def _take_back(self) -> None:
        """What ended the import is what is raised, whatever becomes of this."""
        try:
            self.there.take_back()
        except TieredError as second:
            said = printable(second.message)
            _logger.warning("what was written of %s stays on %s: %s", self.checkpoint, self.there.tier.name, said)

    def _told(self, records: Mapping[int, Record], *, already: bool) -> Imported:
        return Imported(
            checkpoint=self.checkpoint,
            world=self.contents.world,
            tensors=len(self.contents.tensors),
            values=len(self.contents.values),
            bytes=sum(part.size for record in records.values() for part in record.parts),
            already=already,
            pickled=tuple(self.pickled),
            doubts=self.doubts,
            compared=len(self.checks.compared),
            unchecked=tuple(sorted(set(self.checks.bare.values()))),
            bare=len(self.checks.bare),
        )
