"""A tier that goes wrong on purpose: which call, and how, is a plan made beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from sm_tiered.errors import CorruptPartError, TierError, TierUnavailableError
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.tiers.base import Blob, Chunks, Entry, Tier

__all__ = ["Fault", "FaultPlan", "FaultyTier", "Kind"]

Kind = Literal["fail", "ack_lost", "silent", "midway", "flip", "truncate"]
"""What goes wrong:

- ``fail``: it raises, nothing is done.
- ``ack_lost``: it is done, then it raises.
- ``silent``: it returns, nothing is done.
- ``midway``: ``put_part`` raises after the first half of the bytes.
- ``flip``: a read gives its last byte with one bit changed.
- ``truncate``: ``get`` gives one byte less; ``read_into`` meets the end one byte early.
"""

_READS = frozenset({"get", "read_into"})
_T = TypeVar("_T")


def _unavailable() -> TierError:
    return TierUnavailableError("injected fault", tier="faulty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong, at calls *first* to *first* + *times* - 1 of those that match."""

    kind: Kind = "fail"
    operations: frozenset[str] = frozenset()
    """Names of `Tier` methods; none: every method."""
    key: str = ""
    """Only calls whose key (or prefix, or first key) contains this."""
    first: int = 1
    times: int = 1
    error: Callable[[], BaseException] = _unavailable
    """Makes what ``fail``, ``ack_lost`` and ``midway`` raise."""

    def matches(self, operation: str, key: str) -> bool:
        """Whether the call counts for this fault."""
        if self.kind in ("flip", "truncate") and operation not in _READS:
            return False
        if self.kind == "midway" and operation != "put_part":
            return False
        return (not self.operations or operation in self.operations) and self.key in key


@dataclass(kw_only=True)
class FaultPlan:
    """What goes wrong when. Threads may share it; after a run, *fired* tells whether anything did."""

    faults: Sequence[Fault] = ()
    calls: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Every call so far, as method and key."""
    fired: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """The calls that went wrong."""
    _seen: dict[int, int] = field(default_factory=dict[int, int])
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def at_call(cls, number: int, kind: Kind = "fail", *operations: str) -> FaultPlan:
        """Let the call *number* (from 1) of *operations* (none: of all) go wrong; raise it until nothing fires."""
        return cls(faults=(Fault(kind=kind, operations=frozenset(operations), first=number),))

    def take(self, operation: str, key: str) -> Fault | None:
        """Count a call, and return the fault that strikes it."""
        struck: Fault | None = None
        with self._lock:
            self.calls.append((operation, key))
            for index, fault in enumerate(self.faults):
                if not fault.matches(operation, key):
                    continue
                self._seen[index] = count = self._seen.get(index, 0) + 1
                if struck is None and fault.first <= count < fault.first + fault.times:
                    struck = fault
            if struck is not None:
                self.fired.append((operation, key))
        return struck


class FaultyTier:
    """*tier*, with the faults of *plan*. Without any it passes the contract."""

    def __init__(self, tier: Tier, plan: FaultPlan | None = None) -> None:
        self.inner = tier
        self.plan = plan or FaultPlan()

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self.inner.name

    def _struck(self, operation: str, key: str, call: Callable[[], _T], nothing: _T) -> _T:
        fault = self.plan.take(operation, key)
        if fault is None:
            return call()
        if fault.kind == "fail":
            raise fault.error()
        if fault.kind == "silent":
            return nothing
        value = call()
        if fault.kind == "ack_lost":
            raise fault.error()
        return value

    def list(self, prefix: str) -> list[Entry]:
        """See `Tier.list`; ``silent`` finds nothing."""
        return self._struck("list", prefix, lambda: self.inner.list(prefix), [])

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """See `Tier.list_dirs`; ``silent`` finds nothing."""
        return self._struck("list_dirs", prefix, lambda: self.inner.list_dirs(prefix), ())

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """See `Tier.get`; ``silent`` gives no bytes."""
        fault = self.plan.take("get", key)
        if fault is not None and fault.kind == "fail":
            raise fault.error()
        blob = self.inner.get(key, max_bytes=max_bytes)
        if fault is None:
            return blob
        if fault.kind == "ack_lost":
            raise fault.error()
        data = {"silent": b"", "truncate": blob.data[:-1], "flip": _flipped(blob.data)}.get(fault.kind, blob.data)
        return Blob(data=data, version=blob.version)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Tier.read_into`; ``silent`` leaves the buffer as it is."""
        fault = self.plan.take("read_into", key)
        kind = fault.kind if fault else None
        if fault is not None and kind == "fail":
            raise fault.error()
        if kind == "silent":
            return
        if kind == "truncate":
            self.inner.read_into(key, offset, buffer[:-1])
            raise CorruptPartError("the object ends before the buffer is full", tier=self.name, key=key)
        self.inner.read_into(key, offset, buffer)
        if fault is not None and kind == "ack_lost":
            raise fault.error()
        if kind == "flip" and buffer.nbytes:
            data = buffer.cast("B")
            data[-1] ^= 1

    def put(self, key: str, data: bytes) -> None:
        """See `Tier.put`."""
        self._struck("put", key, lambda: self.inner.put(key, data), None)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """See `Tier.put_if_absent`."""
        self._struck("put_if_absent", key, lambda: self.inner.put_if_absent(key, data), None)

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """See `Tier.replace`."""
        self._struck("replace", key, lambda: self.inner.replace(key, data, version=version), None)

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """See `Tier.put_part`."""
        fault = self.plan.take("put_part", key)
        if fault is not None and fault.kind == "fail":
            raise fault.error()
        if fault is not None and fault.kind == "silent":
            return
        source = chunks if fault is None or fault.kind != "midway" else _cut(chunks, size // 2, fault.error)
        self.inner.put_part(key, source, size)
        if fault is not None and fault.kind == "ack_lost":
            raise fault.error()

    def delete(self, keys: Iterable[str]) -> None:
        """See `Tier.delete`."""
        doomed = tuple(keys)
        self._struck("delete", doomed[0] if doomed else "", lambda: self.inner.delete(doomed), None)

    def probe(self) -> None:
        """See `Tier.probe`."""
        self._struck("probe", "", self.inner.probe, None)

    def close(self) -> None:
        """See `Tier.close`; nothing goes wrong here."""
        self.inner.close()


def _flipped(data: bytes) -> bytes:
    return data[:-1] + bytes((data[-1] ^ 1,)) if data else data


def _cut(chunks: Chunks, size: int, error: Callable[[], BaseException]) -> Chunks:
    def some() -> Iterator[memoryview]:
        left = size
        for chunk in chunks():
            if len(chunk) >= left:
                yield chunk[:left]
                break
            left -= len(chunk)
            yield chunk
        raise error()

    return some
