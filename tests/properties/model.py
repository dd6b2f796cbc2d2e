"""The model that the state machine compares the engine with: what was saved, and, byte by byte, what is left of it.

It shares no rule with the engine: it knows what every file held when it was written, looks at what the files hold now,
and keeps a timeline of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sm_tiered import layout
from sm_tiered.records import CheckpointId
from tests.properties.thread_ranks import Cluster

__all__ = ["DURABLE", "Model", "Saved"]

DURABLE = -1
"""Stands for the durable tier where a node's number is expected."""


@dataclass(eq=False)
class Saved:
    """One checkpoint that was begun."""

    id: CheckpointId
    placement: tuple[int, ...]
    """For each rank, the node that it ran on."""
    data: Mapping[int, bytes]
    past: tuple[Saved, ...] = ()
    """What the timeline was when this was saved, itself included at the end."""
    acked: bool = False
    records: dict[int, bytes] = field(default_factory=dict[int, bytes])
    """As they were first seen."""
    manifest: bytes | None = None
    """The same."""

    @property
    def world(self) -> int:
        """How many ranks saved it."""
        return len(self.placement)

    @property
    def dir(self) -> str:
        """The name of its directory."""
        return layout.checkpoint_dir(self.id)


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _failed(path: Path) -> bool:
    """Whether a record tells that its rank failed."""
    try:
        return json.loads(path.read_bytes())["failed"] is not None
    except (ValueError, KeyError):
        return False


@dataclass
class Model:
    """Everything that was saved, in the order of the timeline that counts."""

    cluster: Cluster
    all: list[Saved] = field(default_factory=list[Saved])
    timeline: list[Saved] = field(default_factory=list[Saved])
    """Candidates for latest, the best last."""
    owed_memory: list[Saved] = field(default_factory=list[Saved])
    """Acknowledged, not yet to be recycled, and harmed by no rule."""
    owed_durable: Saved | None = None
    """Committed, not yet to be deleted, and harmed by no rule."""
    harmed: set[tuple[int, str, str]] = field(default_factory=set[tuple[int, str, str]])
    """Files that rules have changed: node, directory, name."""

    # ---- files

    def place(self, node: int) -> Path:
        """Where the checkpoints of *node*, or of the durable tier, are."""
        return self.cluster.durable if node == DURABLE else self.cluster.memory(node)

    def part(self, saved: Saved, rank: int, node: int) -> bool:
        """Whether *node* has the part of *rank* as it was saved."""
        return _read(self.place(node) / saved.dir / layout.part_name(rank, 0)) == saved.data[rank]

    def record(self, saved: Saved, rank: int, node: int) -> bool:
        """Whether *node* has the record of *rank* as it was written."""
        found = _read(self.place(node) / saved.dir / layout.record_name(rank))
        return found is not None and found == saved.records.get(rank)

    def files(self) -> Iterator[tuple[int, str, str]]:
        """Yield all files of all checkpoints that rules may harm, in an order that is the same in every run."""
        for node in (DURABLE, *range(self.cluster.nodes)):
            for path in sorted(self.place(node).glob("step_*/*")):
                if not path.name.startswith("."):
                    yield node, path.parent.name, path.name

    def look(self) -> None:
        """Take in records and manifests that are new; a manifest must find everything that it promises."""
        for saved in self.all:
            for rank in set(range(saved.world)) - set(saved.records):
                self._look_for_record(saved, rank)
            if saved.manifest is None and not self._is_harmed(DURABLE, saved, layout.MANIFEST):
                self._look_at_manifest(saved)

    def _look_for_record(self, saved: Saved, rank: int) -> None:
        """In memory, or, where the trainer brought it there itself, on the durable tier."""
        for node in (saved.placement[rank], DURABLE):
            name = layout.record_name(rank)
            found = _read(self.place(node) / saved.dir / name)
            if found is not None and not self._is_harmed(node, saved, name) and json.loads(found)["failed"] is None:
                saved.records[rank] = found
                return

    def _look_at_manifest(self, saved: Saved) -> None:
        found = _read(self.cluster.durable / saved.dir / layout.MANIFEST)
        if found is None or json.loads(found)["kind"] != "manifest":
            return
        saved.manifest = found
        for rank in range(saved.world):
            for name, whole in (
                (layout.part_name(rank, 0), self.part(saved, rank, DURABLE)),
                (layout.record_name(rank), self.record(saved, rank, DURABLE)),
            ):
                harmed = self._is_harmed(DURABLE, saved, name)
                assert whole or harmed, f"{saved.id} was committed, and {name} is not there as it was saved"
        harmed = any(self._is_harmed(DURABLE, saved, name) for name in self._names(saved))
        if saved in self.timeline and not harmed and self._is_newer(saved, self.owed_durable):
            self.owed_durable = saved

    def _is_newer(self, saved: Saved, other: Saved | None) -> bool:
        return other not in self.timeline or self.timeline.index(saved) > self.timeline.index(other)

    def _names(self, saved: Saved) -> list[str]:
        ranks = range(saved.world)
        return [*(layout.part_name(r, 0) for r in ranks), *(layout.record_name(r) for r in ranks), layout.MANIFEST]

    def _is_harmed(self, node: int, saved: Saved, name: str) -> bool:
        return (node, saved.dir, name) in self.harmed

    def was_harmed(self, saved: Saved) -> bool:
        """Whether a rule has changed the manifest of *saved*."""
        return self._is_harmed(DURABLE, saved, layout.MANIFEST)

    def harm(self, node: int, directory: str, name: str) -> None:
        """Note that a rule has changed a file: its checkpoint is no longer owed by that tier."""
        self.harmed.add((node, directory, name))
        if node == DURABLE:
            if self.owed_durable is not None and self.owed_durable.dir == directory:
                self.owed_durable = None
        else:
            self.owed_memory = [saved for saved in self.owed_memory if saved.dir != directory]

    def lose(self, node: int) -> None:
        """Note that *node* lost its memory."""
        self.owed_memory = [saved for saved in self.owed_memory if node not in saved.placement]
        self.harmed = {file for file in self.harmed if file[0] != node}

    # ---- the timeline

    def begin(self, saved: Saved) -> None:
        """Note that a save of *saved* began."""
        self.timeline.append(saved)
        saved.past = tuple(self.timeline)
        self.all.append(saved)

    def acknowledge(self, saved: Saved) -> None:
        """Note that *saved* is safe in memory: it must be there, and so must it stay."""
        saved.acked = True
        for rank, node in enumerate(saved.placement):
            assert self.record(saved, rank, node), f"{saved.id} was acknowledged without the record of rank {rank}"
            assert self.part(saved, rank, node), f"{saved.id} was acknowledged without the part of rank {rank}"
        self.owed_memory = [*self.owed_memory, saved][-self.cluster.keep :]

    def restored(self, saved: Saved, *, chosen: bool) -> None:
        """Note that the job goes on from *saved*."""
        if chosen:
            self.timeline = list(saved.past)
        near = all(
            self.part(saved, rank, node) and self.record(saved, rank, node) for rank, node in enumerate(saved.placement)
        )
        harmed = any((node, saved.dir, name) in self.harmed for node in saved.placement for name in self._names(saved))
        self.owed_memory = [saved] if near and not harmed else []
        if self.owed_durable not in self.timeline:
            self.owed_durable = saved if self.committed(saved) and self._undamaged(saved) else None

    def _undamaged(self, saved: Saved) -> bool:
        return all(self.part(saved, rank, DURABLE) for rank in range(saved.world))

    # ---- what can be restored

    def committed(self, saved: Saved) -> bool:
        """Whether the durable tier promises *saved*, or would as soon as anybody asks: all records are there."""
        found = _read(self.cluster.durable / saved.dir / layout.MANIFEST)
        promised = found is None or (saved.manifest is not None and found == saved.manifest)
        return promised and all(self.record(saved, rank, DURABLE) for rank in range(saved.world))

    def share(self, saved: Saved, rank: int, world: int) -> list[int]:
        """Return the ranks of *saved* whose parts *rank* of *world* reads."""
        return [other for other in range(saved.world) if other % world == rank % saved.world]

    def bytes_of(self, saved: Saved, rank: int, world: int) -> bytes:
        """Return what *rank* of *world* must be given."""
        return b"".join(saved.data[other] for other in self.share(saved, rank, world))

    def is_known(self, saved: Saved, placement: Sequence[int]) -> bool:
        """Whether all records of *saved* can be seen by ranks on the nodes *placement*."""
        seen = {rank for rank in range(saved.world) for node in set(placement) if self.record(saved, rank, node)}
        return self.committed(saved) or len(seen) == saved.world

    def is_restorable(self, saved: Saved, placement: Sequence[int]) -> bool:
        """Whether each of the ranks on the nodes *placement* can be given what it needs of *saved*."""
        if not self.is_known(saved, placement):
            return False
        committed = self.committed(saved)
        for rank, node in enumerate(placement):
            for other in self.share(saved, rank, len(placement)):
                near = self.record(saved, other, node) and self.part(saved, other, node)
                if not near and not (committed and self.part(saved, other, DURABLE)):
                    return False
        return True

    def newest(self, candidates: Iterable[Saved], placement: Sequence[int]) -> Saved | None:
        """Return the last of *candidates* that is restorable."""
        return next((saved for saved in reversed(list(candidates)) if self.is_restorable(saved, placement)), None)

    def with_step(self, step: int) -> list[Saved]:
        """Return all that was saved as *step*, the best last; what is on the timeline is better than the rest."""
        found = [saved for saved in self.all if saved.id.step == step]
        return sorted(found, key=lambda saved: (saved in self.timeline, saved.id))

    def check_owed(self, placement: Sequence[int]) -> None:
        """Fail if anything was lost that no rule has harmed."""
        for saved in self.owed_memory:
            if saved.placement == tuple(placement):
                assert self.is_restorable(saved, placement), f"{saved.id} was acknowledged in memory, and is lost"
        if self.owed_durable is not None:
            lost = not (self.committed(self.owed_durable) and self._undamaged(self.owed_durable))
            assert not lost, f"{self.owed_durable.id} was committed, and is lost"

    # ---- what tells that something was saved

    def evidence(self, placement: Sequence[int]) -> bool | None:
        """Whether something tells that a checkpoint was once whole; None: it can be seen either way."""
        told: bool | None = False
        for node in {DURABLE, *placement}:
            for path in self.place(node).glob("attempts/*.json"):
                if json.loads(path.read_bytes())["parent"] is not None:
                    return True
        for saved in self.all:
            if saved in self.timeline and self._tells(saved, placement):
                return True
            if any((self.place(node) / saved.dir).is_dir() for node in {DURABLE, *placement}):
                told = None if self._traces(saved, placement) else told
        return told

    def _tells(self, saved: Saved, placement: Sequence[int]) -> bool:
        if self.is_known(saved, placement):
            return True
        for node in {DURABLE, *placement}:
            for rank in range(saved.world):
                path = self.place(node) / saved.dir / layout.record_name(rank)
                if self.record(saved, rank, node) or (path.is_file() and _failed(path)):
                    if json.loads(path.read_bytes())["watermark"] is not None:
                        return True
                elif path.is_file() and node != DURABLE:
                    return True
        found = _read(self.cluster.durable / saved.dir / layout.MANIFEST)
        return found is not None and (found == saved.manifest or b"tombstone" not in found)

    def _traces(self, saved: Saved, placement: Sequence[int]) -> bool:
        """Whether there is anything else of it that may be taken for a sign."""
        return saved not in self.timeline or any((self.cluster.durable / saved.dir).glob("*"))
