"""What an integration hands to the engine: parts that it can write into a mapping, or give in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from sm_tiered.records import ItemTable

__all__ = ["PartSource"]


class PartSource(Protocol):
    """One part, about to be saved. Reading it reads the live values: the engine does so inside `save`, never later."""

    @property
    def name(self) -> str:
        """Its file name."""
        ...

    @property
    def size(self) -> int:
        """In bytes, known before anything is written."""
        ...

    @property
    def table(self) -> ItemTable:
        """The items that it holds."""
        ...

    @property
    def replica(self) -> bool:
        """Whether it only repeats, for this node, what other parts hold: never promoted."""
        ...

    @property
    def recycled(self) -> bool:
        """Whether it goes into a recycled file of the arena (large, the same layout each time) or a fresh one."""
        ...

    def write(self, buffer: memoryview, cache: dict[object, object]) -> None:
        """Fill *buffer*, which is exactly *size* bytes long.

        *cache* lives as long as the mapping behind *buffer*: what was put there at an earlier save into the same
        bytes (views, the knowledge that headers already stand there) is found again. It is empty for a new mapping.
        """
        ...

    def chunks(self) -> Iterator[memoryview]:
        """Yield the same *size* bytes in order, each view valid until the next, for a tier written without memory."""
        ...
