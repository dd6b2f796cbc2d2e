"""The contract of a tier: somewhere bytes live. It knows nothing of steps, ranks or tensors.

A tier is rooted at one namespace: keys are relative to it and use ``/``. Every tier, and every wrapper around one,
passes `sm_tiered.testing.contract.TierContract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

__all__ = ["Blob", "Chunks", "Entry", "Tier"]

Chunks = Callable[[], Iterator[memoryview]]
"""Makes a fresh iterator over the bytes of a part; called again for each try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One stored object, as a listing tells it."""

    key: str
    size: int
    modified_at: float
    """UTC seconds since the epoch, by the tier's clock."""
    version: str = field(default="", compare=False)
    """What the tier calls this version of it, another for other bytes; empty where it tells none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A small object and the version that a conditional `Tier.replace` compares."""

    data: bytes
    version: str


@runtime_checkable
class Tier(Protocol):
    """Somewhere bytes live.

    Every method may raise `TierUnavailableError` (worth a retry) or `TierRefusedError` (not worth one).
    Small objects appear whole or not at all. Parts are written once and never changed.
    """

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        ...

    def list(self, prefix: str) -> list[Entry]:
        """Return every object whose key begins with *prefix*, in key order; nothing there is no error."""
        ...

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """Return the names directly below *prefix* (empty, or ending in ``/``) that have keys below them."""
        ...

    def get(self, key: str, *, max_bytes: int = ...) -> Blob:
        """Return a small object.

        Raises:
            KeyNotFoundError: nothing stands there.
            CorruptPartError: it is longer than *max_bytes*.
        """
        ...

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *offset* on.

        Raises:
            KeyNotFoundError: nothing stands there.
            CorruptPartError: the object ends before the buffer is full.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, in the place of what stood there.

        Raises:
            TierFullError: no room; what stood there is as it was.
        """
        ...

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write a small object unless something stands there.

        Raises:
            KeyExistsError: something does. When it holds the same bytes, the write may have been this one's own.
        """
        ...

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """Write a small object in the place of that version of it.

        Raises:
            KeyExistsError: another version stands there.
            KeyNotFoundError: nothing does.
        """
        ...

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """Write a large object of *size* bytes.

        An exception out of the iterator, or another total than *size*, aborts: nothing appears under *key*
        then, not even later. Chunks may be of any length and are valid only until the next one is asked for.

        Raises:
            CorruptPartError: the iterator gave another number of bytes than *size*.
            TierFullError: no room.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; one that is not there is no error. Directories left empty disappear."""
        ...

    def probe(self) -> None:
        """Find out whether the tier can be used, by using it (a small object written, read, deleted)."""
        ...

    def close(self) -> None:
        """Free connections. Can be called many times."""
        ...
