"""The engine without torch: a rank's state is one bytes object, stored as one item."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sm_tiered import layout
from sm_tiered.agreement import Request
from sm_tiered.group import Group
from sm_tiered.handle import SaveHandle
from sm_tiered.records import Item, ItemTable
from sm_tiered.resolve import Candidate
from sm_tiered.saving import Saver
from sm_tiered.settings import Settings
from sm_tiered.sources import Span
from sm_tiered.store import Store
from sm_tiered.voted_load import Read

__all__ = ["PlainEngine", "PlainLoader", "PlainPart"]


@dataclass(frozen=True)
class PlainPart:
    """One part that holds *data*. A `sm_tiered.parts.PartSource`."""

    name: str
    data: bytes
    replica: bool = False
    recycled: bool = True

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.data)

    @property
    def table(self) -> ItemTable:
        """One item: everything."""
        item = Item(fqn=self.name, path=(self.name,), part=self.name, offset=0, length=len(self.data))
        return ItemTable(items=(item,))

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*."""
        buffer[:] = self.data

    def chunks(self) -> Iterator[memoryview]:
        """Yield everything at once."""
        if self.data:
            yield memoryview(self.data)


@dataclass
class PlainLoader:
    """Loads this rank's part; with another world size, all parts of which the rank's share is made up."""

    group: Group
    parts: dict[str, bytes] = field(default_factory=dict[str, bytes])
    _spans: dict[tuple[int, str], list[Span]] = field(default_factory=dict[tuple[int, str], list[Span]])

    def plan(self, candidate: Candidate) -> Mapping[tuple[int, str], Sequence[Span]]:
        """Read the parts of every saved rank that is this rank's modulo the world."""
        self._spans = {
            (record.rank, part.name): [(0, part.size)]
            for record in candidate.records
            if record.rank % self.group.world == self.group.rank % max(1, len(candidate.records))
            for part in record.parts
        }
        return self._spans

    def check(self, read: Read) -> None:
        """Bytes are never refused for what they hold."""

    def place(self, read: Read) -> None:
        """Read them."""
        for (rank, name), spans in self._spans.items():
            buffer = bytearray(spans[0][1])
            read(rank, name, 0, memoryview(buffer))
            self.parts[name] = bytes(buffer)

    def finish(self) -> None:
        """Nothing is left."""


class PlainEngine:
    """Store and saver of one rank, over states of bytes."""

    def __init__(self, settings: Settings, group: Group) -> None:
        self.settings, self.group = settings, group
        self.store = Store(settings, group)
        self.saver = Saver(self.store)
        self._size: int | None = None

    def save(self, step: int, data: bytes, tiers: Sequence[str] | None = None, **facts: Any) -> SaveHandle:
        """Save *data* as this rank's share of *step*. Collective."""
        begun = time.monotonic()
        named = frozenset(tier.name for tier in self.settings.tiers) if tiers is None else frozenset(tiers)
        request = Request(step=step, tiers=named, size=self._size, urgent=bool(facts.get("urgent")))
        agreement = self.saver.agree(request)
        part = PlainPart(layout.part_name(self.group.rank, 0), data)
        self._size = len(data)
        return self.saver.save(agreement, [part], metrics=facts.get("metrics", {}), begun=begun)

    def restore(self, step: int | None = None) -> tuple[int, bytes] | None:
        """Restore this rank's share of the newest checkpoint, or of *step*. Collective."""
        loader = PlainLoader(self.group)
        restored = self.store.restore(loader, step=step)
        if restored is None:
            return None
        return restored.step, b"".join(data for _, data in sorted(loader.parts.items()))

    def close(self) -> None:
        """Let go of everything, without waiting for the drain."""
        self.saver.close()
        self.store.close()
