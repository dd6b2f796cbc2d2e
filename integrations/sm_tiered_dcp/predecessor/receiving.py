"""What stands on the receiving tier under the name of an import, and what may be done about it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sm_tiered import layout
from sm_tiered.commit import put_once
from sm_tiered.errors import (
    CorruptPartError,
    FormatError,
    KeyExistsError,
    KeyNotFoundError,
    MismatchError,
    SaveError,
)
from sm_tiered.graves import delete_files, entomb
from sm_tiered.inventory import list_checkpoints, read_manifest, read_records
from sm_tiered.manifest import manifest_to_json, record_from_json
from sm_tiered.records import CheckpointId, Item, Manifest, Record
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.shares import ShareTier
from sm_tiered.verify import Report, State, verify_checkpoint
from sm_tiered_dcp.predecessor.contents import Contents
from sm_tiered_dcp.values import load_value

__all__ = ["Receiving"]

_ALMOST_NOTHING = 1e-12
"""A share of the chunks that is none of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receiving:
    """The place of one import. What is damaged here is no damage of the predecessor's: no older step would help."""

    tier: Tier
    namespace: str
    checkpoint: CheckpointId
    contents: Contents

    def committed(self) -> dict[int, Record] | None:
        """Return the records, by rank, where this very save is committed; None where it is not. Nothing is written.

        Raises:
            KeyExistsError: another import of that step is committed there, or a tombstone of this one stands.
            SaveError: what stands there can't be read.
        """
        with self._readable():
            self._check_others()
            manifest = read_manifest(self.tier, self.checkpoint)
            if manifest is None:
                return None
            if manifest.tombstone:
                raise self.deleted()
            return self._records()

    def check_places(self) -> None:
        """Refuse a tier with one place for each step of an ordinal where saves of our own are in those places.

        Raises:
            KeyExistsError: they are.
        """
        ordinal = self.checkpoint.attempt.ordinal
        own = [c for c in list_checkpoints(self.tier) if c.attempt.ordinal == ordinal and not c.attempt.is_imported]
        if own:
            raise KeyExistsError(
                f"{self.tier.name} holds saves of {own[0].attempt}, whose places an import would take",
                hint="Import to a tier that lasts, e.g. kind: s3; a restore finds it there.",
                step=self.checkpoint.step,
                tier=self.tier.name,
            )

    def left(self) -> dict[int, Record]:
        """Return the records, by rank, that an earlier try left there.

        Raises:
            KeyExistsError: they are not of this import.
            SaveError: they can't be read.
        """
        with self._readable():
            return self._records()

    def deleted(self) -> KeyExistsError:
        """Return the error that tells that a tombstone stands there."""
        return KeyExistsError(
            "it was deleted there, and what tells so still stands",
            hint="That goes a day after the deletion, with the next `sm-tiered prune --yes` or commit; then try again.",
            step=self.checkpoint.step,
            tier=self.tier.name,
        )

    def unlike_written(self) -> SaveError | None:
        """Compare every byte that was written with its digest, while nothing of it is visible; return what is wrong."""
        report = verify_checkpoint(self.tier, self.checkpoint, durable=False)
        return None if report.state is State.WHOLE else self._damaged(report, hint="It is taken back: try again.")

    def check_committed(self, *, thoroughly: bool) -> None:
        """Compare what is committed with its records: every byte if *thoroughly*, else names and sizes.

        Raises:
            SaveError: it is damaged.
        """
        share = 1.0 if thoroughly else _ALMOST_NOTHING
        report = verify_checkpoint(self.tier, self.checkpoint, durable=True, share=share)
        if report.problems:
            name = layout.checkpoint_dir(self.checkpoint)
            raise self._damaged(
                report, hint=f"`sm-tiered verify` tells all of it. Delete {name} there, then import it again."
            )

    def take_back(self) -> None:
        """Delete what was written, unless it was committed or deleted meanwhile; files of others stay.

        For as long as that takes a tombstone stands, so that nobody commits what is being deleted.
        """
        if isinstance(self.tier, ShareTier):
            self.tier.drop(self.checkpoint)
            return
        key = layout.in_dir(self.checkpoint, layout.MANIFEST)
        grave = Manifest(namespace=self.namespace, checkpoint=self.checkpoint, world=1, saved_at=0.0, tombstone=True)
        with suppress(KeyNotFoundError):  # another import of the same save took it back
            if put_once(self.tier, key, manifest_to_json(grave)):
                delete_files(self.tier, grave)
                self.tier.delete([key])

    def bury(self) -> None:
        """Take back what was committed and is damaged: nothing may restore it."""
        if isinstance(self.tier, ShareTier):
            self.tier.drop(self.checkpoint)
            return
        grave = entomb(self.tier, self.namespace, self.checkpoint)
        if grave is not None:
            delete_files(self.tier, grave.tombstone)

    def pickled_in(self, record: Record) -> list[str]:
        """Return the names of the values of *record*, which stands there, that only a pickle can load."""
        with self._readable():
            return [item.fqn for item in record.items if item.dtype is None and self._is_pickled(item)]

    def _is_pickled(self, item: Item) -> bool:
        data = bytearray(item.length)
        self.tier.read_into(layout.in_dir(self.checkpoint, item.part), item.offset, memoryview(data))
        try:
            load_value(data, allow_pickle=False, what=item.fqn)
        except MismatchError:
            return True
        return False

    def _check_others(self) -> None:
        """Two saves of one step are never both there: which of them a restore takes, nobody could tell."""
        for other in list_checkpoints(self.tier):
            if other.step != self.checkpoint.step or other == self.checkpoint or not other.attempt.is_imported:
                continue
            manifest = read_manifest(self.tier, other)
            if manifest is not None and not manifest.tombstone:
                raise self._other("another save of that step, imported before, is committed there")

    def _records(self) -> dict[int, Record]:
        found = {rank: record_from_json(data) for rank, data in read_records(self.tier, self.checkpoint).items()}
        if not all(self._is_same(rank, record) for rank, record in found.items()):
            raise self._other("something else stands there under its name")
        return found

    def _is_same(self, rank: int, record: Record) -> bool:
        """Whether *record* holds the names, shapes and places in which this import would store what *rank* has."""
        world = self.contents.world
        if rank >= world or (record.rank, record.world, record.failed) != (rank, world, None):
            return False
        tensors, values = self.contents.of(rank)
        planned = {(t.fqn, t.offsets, t.sizes, t.shape, str(t.dtype).removeprefix("torch.")) for t in tensors}
        planned |= {(v.fqn, (), (), (), None) for v in values}
        return planned == set(map(_facts, record.items))

    def _other(self, what: str) -> KeyExistsError:
        return KeyExistsError(
            what,
            hint="Nothing is written over. Import into another namespace: --set namespace=NAME.",
            step=self.checkpoint.step,
            tier=self.tier.name,
        )

    def _damaged(self, report: Report, *, hint: str) -> SaveError:
        first = next(iter(report.problems), None)
        told = report.note if first is None else f"{first.part or ''} {first.what}".strip()
        return SaveError(
            f"read back, it is not what was written: {told}",
            hint=hint,
            step=self.checkpoint.step,
            tier=self.tier.name,
        )

    @contextmanager
    def _readable(self) -> Generator[None, None, None]:
        try:
            yield
        except (FormatError, CorruptPartError) as error:
            raise SaveError(
                f"what stands there can't be read: {error.message}",
                hint=f"`sm-tiered verify` tells more. Or delete {layout.checkpoint_dir(self.checkpoint)} there.",
                step=self.checkpoint.step,
                tier=self.tier.name,
            ) from error


def _facts(item: Item) -> tuple[object, ...]:
    return item.fqn, item.offsets, item.sizes, item.shape, item.dtype
