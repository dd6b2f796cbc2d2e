"""The one copy: parts into memory-tier files, and, after `save` has returned, their digests and the record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sm_tiered import checksum, layout
from sm_tiered.crashpoints import crashpoint
from sm_tiered.errors import FormatError, KeyNotFoundError, TierFullError
from sm_tiered.inventory import list_checkpoints
from sm_tiered.manifest import MAX_BYTES, record_from_json, record_to_json
from sm_tiered.parts import PartSource
from sm_tiered.records import CheckpointId, ItemTable, Part, Record
from sm_tiered.store import Store
from sm_tiered.tiers.arena import Slot
from sm_tiered.tiers.file_list import put_file_list, read_file_lists

__all__ = ["Staged", "Stager"]


@dataclass(slots=True, kw_only=True)
class Staged:
    """What was copied and is not yet recorded."""

    record: Record
    """Without digests."""
    buffers: list[tuple[PartSource, memoryview]] = field(default_factory=list[tuple[PartSource, memoryview]])

    @property
    def bytes(self) -> int:
        """How many were copied."""
        return sum(len(buffer) for _, buffer in self.buffers)

    def sources(self) -> list[PartSource]:
        """The parts again, now with the bytes that were copied, whatever has become of the state."""
        return [_Copied(part, buffer) for part, buffer in self.buffers]


@dataclass(frozen=True, slots=True)
class _Copied:
    """A part whose bytes stand in memory. A `PartSource`."""

    part: PartSource
    buffer: memoryview

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def size(self) -> int:
        return self.part.size

    @property
    def table(self) -> ItemTable:
        return self.part.table

    @property
    def replica(self) -> bool:
        return self.part.replica

    @property
    def recycled(self) -> bool:
        return self.part.recycled

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        buffer[:] = self.buffer

    def chunks(self) -> Iterator[memoryview]:
        yield from checksum.chunks_of(self.buffer)


class Stager:
    """Writes one rank's share of checkpoints into its node's memory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._small: set[CheckpointId] | None = None

    def stage(self, parts: Sequence[PartSource], record: Record) -> Staged:
        """Copy *parts*; when this returns the state may change.

        Raises:
            TierError: there is no room, or the directory is gone; nothing is visible then.
        """
        staged, memory = Staged(record=record), self._store.tiers.memory
        assert memory is not None
        small = self._take_back_small()
        if not any(part.recycled for part in parts):
            small.add(record.checkpoint)
        put_file_list(memory, record, parts)
        crashpoint("stage.before_copy")
        for part in parts:
            buffer = self._recycled(part, record) if part.recycled else self._fresh(part, record)
            staged.buffers.append((part, buffer))
        crashpoint("stage.after_copy")
        return staged

    def holds(self, checkpoint: CheckpointId) -> bool:
        """Return whether this rank's share of *checkpoint* is in memory."""
        arena = self._store.arena
        return arena is not None and (checkpoint in arena.published() or checkpoint in (self._small or ()))

    def _take_back_small(self) -> set[CheckpointId]:
        """Delete what nobody needs of the checkpoints of which this rank holds small files only; return the others.

        The arena takes back the rest when it recycles their large file; to these no large file leads.
        """
        store = self._store
        if self._small is None:
            self._small = self._find_small()
        for checkpoint in store.generations.releasable(self._small, store.held()) if self._small else ():
            self._delete_small(checkpoint)
            self._small.discard(checkpoint)
        return self._small

    def _find_small(self) -> set[CheckpointId]:
        """Return those that earlier processes left, and delete what lacks its record: who wrote that died over it."""
        memory, arena = self._store.tiers.memory, self._store.arena
        assert memory is not None
        assert arena is not None
        small: set[CheckpointId] = set()
        for checkpoint in set(list_checkpoints(memory)) - set(arena.published()):
            records = [layout.in_dir(checkpoint, layout.record_name(rank)) for rank in self._ranks()]
            if any(map(memory.list, records)):
                small.add(checkpoint)
            elif read_file_lists(memory, checkpoint, self._ranks()):
                self._delete_small(checkpoint)
        return small

    def _ranks(self) -> set[int]:
        return {self._store.group.rank, *self._store.taken_over}

    def _delete_small(self, checkpoint: CheckpointId) -> None:
        memory, ranks = self._store.tiers.memory, self._ranks()
        assert memory is not None
        directory = f"{layout.checkpoint_dir(checkpoint)}/"
        ours = [entry.key for entry in memory.list(directory) if layout.rank_of_key(entry.key) in ranks]
        lists = read_file_lists(memory, checkpoint, ranks).values()
        named = [directory + name for listed in lists for name in listed.names]
        memory.delete(layout.in_dir(checkpoint, layout.record_name(rank)) for rank in ranks)
        memory.delete([*named, directory + layout.METADATA, directory + layout.INDEX])
        memory.delete(ours)  # the lists of the named ones among them, so last

    def _recycled(self, part: PartSource, record: Record) -> memoryview:
        arena, memory = self._store.arena, self._store.settings.memory
        assert arena is not None
        assert memory is not None
        slot = arena.take(part.size, self._releasable(), self._store.settings.arena_slots)
        if slot is None:
            raise TierFullError(
                "every generation of the arena is in use", tier=memory.name, step=record.checkpoint.step
            )
        self._fill(slot, part)
        arena.publish(slot, record.checkpoint, part.name)
        return slot.buffer[: part.size]

    def _fill(self, slot: Slot, part: PartSource) -> None:
        try:
            part.write(slot.buffer[: part.size], slot.cache)
        except BaseException:
            slot.cache.clear()
            assert self._store.arena is not None
            self._store.arena.release(slot)
            raise

    def _fresh(self, part: PartSource, record: Record) -> memoryview:
        memory = self._store.tiers.memory
        assert memory is not None
        buffer = memoryview(bytearray(part.size))
        part.write(buffer, {})
        memory.put(layout.in_dir(record.checkpoint, part.name), bytes(buffer))
        return buffer

    def _releasable(self) -> set[CheckpointId]:
        store = self._store
        assert store.arena is not None
        return store.generations.releasable(store.arena.published(), store.held())

    def finish(self, staged: Staged) -> None:
        """Digest what was copied and write the record: from here on the rank's share counts."""
        parts = tuple(
            Part(name=part.name, size=part.size, chunks=checksum.digest_chunks(buffer), replica=part.replica)
            for part, buffer in staged.buffers
        )
        tables = tuple(part.table for part, _ in staged.buffers)
        record = replace(staged.record, parts=parts, tables=tables)
        crashpoint("record.before_write")
        self.put_record(record)
        crashpoint("record.after_write")

    def put_record(self, record: Record) -> None:
        """Write *record*, in the place of one that may stand there."""
        memory = self._store.tiers.memory
        assert memory is not None
        memory.put(layout.in_dir(record.checkpoint, layout.record_name(record.rank)), record_to_json(record))

    def add_metrics(self, checkpoint: CheckpointId, metrics: Mapping[str, float]) -> None:
        """Add *metrics* that came after the save, while the record is still this node's own affair."""
        memory = self._store.tiers.memory
        assert memory is not None
        key = layout.in_dir(checkpoint, layout.record_name(self._store.group.rank))
        with suppress(KeyNotFoundError, FormatError):
            record = record_from_json(memory.get(key, max_bytes=MAX_BYTES).data)
            if set(metrics) - set(record.metrics):
                self.put_record(replace(record, metrics={**metrics, **record.metrics}))

    def put_failed(self, record: Record, reason: str) -> None:
        """Write a record that says why there are no parts, and hand nothing on."""
        self.put_record(replace(record, parts=(), tables=(), failed=reason))

    def put_derived(self, checkpoint: CheckpointId, made: Mapping[str, bytes]) -> None:
        """Leave the files for other readers beside the parts."""
        memory = self._store.tiers.memory
        assert memory is not None
        for name, data in made.items():
            memory.put(layout.in_dir(checkpoint, name), data)
