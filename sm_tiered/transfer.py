"""A checkpoint brought from one tier to a durable one: every byte verified on its way, the manifest last.

The protocol is the drainer's: the attempt's record, then for each rank its file list, its parts and its record, then
the commit, each put-if-absent. What was cut short shows nothing and is gone on with: a part that stands there is taken
when its rank's record says so, or after it was read back. Into another namespace records and index are sealed anew, for
they name the one that they belong to; parts are the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from sm_tiered import layout
from sm_tiered.commit import Compose, Outcome, publish_attempt, put_once, try_commit
from sm_tiered.errors import (
    CheckpointNotFoundError,
    CorruptPartError,
    FormatError,
    KeyExistsError,
    KeyNotFoundError,
    SaveError,
)
from sm_tiered.inventory import read_holding, read_manifest
from sm_tiered.manifest import MAX_BYTES, compose_manifest, manifest_to_json, record_from_json
from sm_tiered.part_reading import open_verified
from sm_tiered.records import CheckpointId, Manifest, Part, Record
from sm_tiered.resealing import reseal_attempt, reseal_index, reseal_record
from sm_tiered.tiers.base import Chunks, Tier
from sm_tiered.tiers.conditions import check_conditions
from sm_tiered.tiers.shares import ShareTier, share_of

__all__ = ["Copied", "Progress", "clear_failed", "copy_checkpoint", "is_indexed"]

Progress = Callable[[int, int], None]
"""``progress(done, total)``, in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """What bringing one checkpoint to a tier came to."""

    bytes: int = 0
    """Of parts that were sent now."""
    found: int = 0
    """Of parts that stood there already, whole."""
    already: bool = False
    """Whether the same checkpoint was committed there, with all its parts."""


def copy_checkpoint(
    source: Tier,
    target: Tier,
    checkpoint: CheckpointId,
    *,
    durable: bool,
    namespace: str,
    compose: Compose | None = None,
    progress: Progress | None = None,
) -> Copied:
    """Bring *checkpoint* from *source* (*durable*: it needs a manifest there) to *target*, a durable tier.

    *namespace* is that of *target*. *compose* makes the files for other readers where *source* has none. It needs
    32 MiB of memory beside the records.

    Raises:
        CheckpointNotFoundError: it is not complete on *source*, or a job recycled it meanwhile.
        CorruptPartError: bytes on *source* differ from their digest; nothing is visible on *target*.
        KeyExistsError: something else stands on *target* under its name, or its tombstone does.
        TierError: a tier did not answer or refused.
    """
    records = _whole_records(source, checkpoint, durable=durable)
    records = {rank: reseal_record(data, namespace) for rank, data in records.items()}
    copy = _Copy(
        source=source,
        durable=durable,
        target=target,
        records=records,
        manifest=compose_manifest(records),
        namespace=namespace,
        compose=compose,
        progress=progress or (lambda done, total: None),
    )
    return copy.run()


def clear_failed(tier: Tier, checkpoint: CheckpointId, ranks: Iterable[int]) -> None:
    """Take away from *tier* what tells that *ranks* failed to bring *checkpoint* there: they are about to try again."""
    if isinstance(tier, ShareTier):
        return  # what they put takes its place
    for rank in ranks:
        key = layout.in_dir(checkpoint, layout.record_name(rank))
        with suppress(KeyNotFoundError):
            if record_from_json(tier.get(key, max_bytes=MAX_BYTES).data).failed is not None:
                tier.delete([key])


def is_indexed(records: Mapping[int, bytes]) -> bool:
    """Return whether the *records*, by rank, hold values: then other readers need the files that tell of them."""
    return any(record_from_json(data).items for data in records.values())


def _whole_records(source: Tier, checkpoint: CheckpointId, *, durable: bool) -> Mapping[int, bytes]:
    holding = read_holding(source, checkpoint, durable=durable)
    if holding.problem is None:
        return holding.records
    committed = holding.manifest is not None and not holding.manifest.tombstone
    kind = CorruptPartError if holding.damaged or committed else CheckpointNotFoundError
    raise kind(f"it is not complete there: {holding.problem}", step=checkpoint.step, tier=source.name)


@dataclass(slots=True, kw_only=True)
class _Copy:
    """One checkpoint on its way."""

    source: Tier
    durable: bool
    target: Tier
    records: Mapping[int, bytes]
    """As they shall stand on the target."""
    manifest: Manifest
    namespace: str
    compose: Compose | None
    progress: Progress
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    """Of the files that stood on the target at the beginning."""
    sent: int = 0
    found: int = 0

    @property
    def checkpoint(self) -> CheckpointId:
        return self.manifest.checkpoint

    @property
    def total(self) -> int:
        return sum(self.manifest.parts.values())

    def run(self) -> Copied:
        prefix = f"{layout.checkpoint_dir(self.checkpoint)}/"
        self.sizes = {entry.key.removeprefix(prefix): entry.size for entry in self.target.list(prefix)}
        if self._stands() and self._all_there():
            return Copied(found=self.total, already=True)
        self._bring_attempt()
        for rank, data in sorted(self.records.items()):
            self._bring_rank(rank, data)
        derived = self._derived()
        outcome = try_commit(
            self.target, self.checkpoint, world=self.manifest.world, compose=lambda _: derived, lead=True
        )
        if outcome is Outcome.DELETED:
            raise self._deleted()
        if outcome is Outcome.WAITING:
            raise SaveError(
                "its records are gone from there again",
                hint="Is something else deleting there? Try again.",
                step=self.checkpoint.step,
                tier=self.target.name,
            )
        return Copied(bytes=self.sent, found=self.found)

    def _stands(self) -> bool:
        """Whether this very checkpoint is committed on the target."""
        standing = read_manifest(self.target, self.checkpoint)
        if standing is None:
            return False
        if standing.tombstone:
            raise self._deleted()
        if manifest_to_json(standing) != manifest_to_json(self.manifest):
            raise KeyExistsError(
                "another checkpoint is committed there under the same name",
                hint="`sm-tiered verify` tells whether it is whole. Nothing is written over.",
                step=self.checkpoint.step,
                tier=self.target.name,
            )
        return True

    def _deleted(self) -> KeyExistsError:
        return KeyExistsError(
            "it was deleted there, and what tells so still stands",
            hint="That goes a day after the deletion, with the next `sm-tiered prune --yes` or commit; then try again.",
            step=self.checkpoint.step,
            tier=self.target.name,
        )

    def _all_there(self) -> bool:
        records = all(self.sizes.get(layout.record_name(rank)) == len(data) for rank, data in self.records.items())
        return records and all(self.sizes.get(name) == size for name, size in self.manifest.parts.items())

    def _bring_attempt(self) -> None:
        """Before anything is committed: it tells what the attempt continues. One that can't be read stays behind."""
        attempt = self.checkpoint.attempt
        try:
            data = self.source.get(layout.attempt_key(attempt), max_bytes=MAX_BYTES).data
            sealed = reseal_attempt(data, self.namespace)
        except (KeyNotFoundError, FormatError, CorruptPartError):
            if not isinstance(self.target, ShareTier):
                check_conditions(self.target, layout.CONDITIONS)
            return
        publish_attempt(self.target, attempt, sealed)

    def _bring_rank(self, rank: int, data: bytes) -> None:
        key = layout.in_dir(self.checkpoint, layout.record_name(rank))
        record = record_from_json(data)
        trusted = self._holds(key, data)
        if isinstance(self.target, ShareTier):
            self._bring_share(self.target, record, data, trusted=trusted)
            return
        self._bring_file_list(rank)
        for part in record.parts:
            if not part.replica:
                self._bring_part(part, trusted=trusted)
        if not trusted:
            self._bring_record(key, record, data)

    def _bring_share(self, target: ShareTier, record: Record, data: bytes, *, trusted: bool) -> None:
        parts = [part for part in record.parts if not part.replica]
        if trusted:
            self.found += sum(part.size for part in parts)
            return
        with ExitStack() as stack:
            opened: list[tuple[Part, Chunks]] = []
            for part in parts:
                opened.append((part, stack.enter_context(self._opened(part, sum(p.size for p, _ in opened)))))
            target.put_share(share_of(record, data, opened))
        self.sent += sum(part.size for part in parts)

    def _holds(self, key: str, data: bytes) -> bool:
        """Whether this very record stands there: it is written after the parts, so then they came whole."""
        try:
            return self.target.get(key, max_bytes=MAX_BYTES).data == data
        except KeyNotFoundError:
            return False

    def _bring_file_list(self, rank: int) -> None:
        """Before the files that it tells of: should this never be committed, retention knows them by it."""
        key = layout.in_dir(self.checkpoint, layout.file_list_name(rank))
        with suppress(KeyNotFoundError):
            self.target.put(key, self.source.get(key, max_bytes=MAX_BYTES).data)

    def _bring_part(self, part: Part, *, trusted: bool) -> None:
        key, before = layout.in_dir(self.checkpoint, part.name), self.sent + self.found
        self.progress(before, self.total)
        if self.sizes.get(part.name) == part.size and (trusted or self._reads_back(part)):
            self.found += part.size
            self.progress(before + part.size, self.total)
            return
        with self._opened(part, 0) as chunks:
            self.target.put_part(key, chunks, part.size)
        self.sent += part.size

    @contextmanager
    def _opened(self, part: Part, ahead: int) -> Generator[Chunks, None, None]:
        """Give what reads *part*, verified; *ahead*: bytes of what goes before it and does not count as sent yet."""
        key, before = layout.in_dir(self.checkpoint, part.name), self.sent + self.found + ahead
        with open_verified(self.source, self.checkpoint, part) as read:

            def chunks() -> Iterator[memoryview]:
                done = 0
                for chunk in self._still_there(read(), key):
                    yield chunk
                    done += len(chunk)
                    self.progress(before + done, self.total)

            yield chunks

    def _still_there(self, chunks: Iterator[memoryview], key: str) -> Iterator[memoryview]:
        """*chunks* of the source; that a part is missing is damage only while the checkpoint counts as one."""
        try:
            yield from chunks
        except KeyNotFoundError as error:
            if read_holding(self.source, self.checkpoint, durable=self.durable).problem is None:
                raise CorruptPartError(f"{key} is missing", tier=self.source.name, key=key) from error
            raise CheckpointNotFoundError(
                "it was given up while it was copied", step=self.checkpoint.step, tier=self.source.name
            ) from error

    def _reads_back(self, part: Part) -> bool:
        """Whether what an earlier try left is the part, byte for byte."""
        try:
            with open_verified(self.target, self.checkpoint, part) as read:
                for _ in read():
                    pass
        except (CorruptPartError, KeyNotFoundError):
            return False
        return True

    def _bring_record(self, key: str, record: Record, data: bytes) -> None:
        if put_once(self.target, key, data):
            return
        standing = self.target.get(key, max_bytes=MAX_BYTES)
        if record_from_json(standing.data).failed is None:
            raise KeyExistsError(
                f"another record of rank {record.rank} stands there",
                hint="Nothing is written over; once it is long out of use, `sm-tiered prune --yes` takes it away.",
                step=self.checkpoint.step,
                tier=self.target.name,
                key=key,
            )
        # An earlier try left word that it failed.
        self.target.replace(key, data, version=standing.version)

    def _derived(self) -> Mapping[str, bytes]:
        """The files for other readers: as the source has them, else made anew."""
        if isinstance(self.target, ShareTier):
            return {}
        found: dict[str, bytes] = {}
        for name in (layout.METADATA, layout.INDEX):
            with suppress(KeyNotFoundError):
                found[name] = self.source.get(layout.in_dir(self.checkpoint, name), max_bytes=MAX_BYTES).data
        if len(found) < 2 and self.compose is not None and is_indexed(self.records):
            return self.compose(self.records)
        if layout.INDEX in found:
            found[layout.INDEX] = reseal_index(found[layout.INDEX], self.namespace)
        return found
