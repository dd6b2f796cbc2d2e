"""What the stand-in for the HyperPod service keeps, and how it behaves without the HTTP around it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import xxhash

__all__ = ["HEAD_BYTES", "DaemonError", "DaemonMemory", "StoredBlob", "StoredNamespace", "shard_meta"]

HEAD_BYTES = 1024 * 1024
"""How much of a blob is kept where bodies are thrown away."""


def shard_meta(data: bytes | bytearray | memoryview) -> str:
    """Return the ``Shard-Meta`` header that belongs to *data*."""
    checksum = base64.b64encode(xxhash.xxh3_128_digest(data)).decode()
    return json.dumps({"checksum": checksum, "algorithm": "xxh3_128"})


class DaemonError(Exception):
    """A request is answered with *status* and a detail."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(slots=True)
class StoredBlob:
    """What one rank put at one step."""

    data: bytearray
    size: int
    """Its length as it was put; more than there is in *data* where bodies are thrown away."""
    meta: str
    """Its ``Shard-Meta`` header; empty: it had none."""


@dataclass(slots=True)
class StoredNamespace:
    """One namespace: its bounds, and its blobs as rank → step → blob."""

    num_ranks: int
    steps_retained: int
    blobs: dict[int, dict[int, StoredBlob]] = field(default_factory=dict[int, dict[int, StoredBlob]])

    @property
    def steps(self) -> dict[int, list[int]]:
        """Which steps each rank holds, ascending."""
        return {rank: sorted(held) for rank, held in sorted(self.blobs.items()) if held}


@dataclass
class DaemonMemory:
    """All namespaces. Every method raises `DaemonError` where the service would answer with an error."""

    max_step: int = 2**63 - 1
    """Steps above are refused."""
    namespaces: dict[str, StoredNamespace] = field(default_factory=dict[str, StoredNamespace])
    dropped: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    """What the service's own retention dropped so far: namespace, rank, step."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def describe(self, name: str) -> dict[str, int]:
        """Return the bounds of a namespace."""
        with self._lock:
            found = self._namespace(name)
            return {"num_ranks": found.num_ranks, "steps_to_retain_per_rank": found.steps_retained}

    def create(self, name: str, query: Mapping[str, str]) -> None:
        """Make a namespace with the bounds that *query* gives."""
        ranks, retained = query.get("num_ranks", ""), query.get("steps_retained", "3")
        with self._lock:
            if not all(_is_number(text) and int(text) > 0 for text in (ranks, retained)):
                raise DaemonError(422, "num_ranks and steps_retained must be positive integers")
            if name in self.namespaces:
                raise DaemonError(409, f"Namespace {name!r} already exists")
            self.namespaces[name] = StoredNamespace(int(ranks), int(retained))

    def drop(self, name: str) -> None:
        """Forget a namespace and all its blobs."""
        with self._lock:
            self._namespace(name)
            del self.namespaces[name]

    def reset(self) -> None:
        """Forget everything: the most dangerous call of the protocol."""
        with self._lock:
            self.namespaces.clear()

    def check(self, name: str, rank: str, step: str) -> tuple[int, int]:
        """Return rank and step of a blob that may be put there."""
        with self._lock:
            found = self._namespace(name)
            if not (_is_number(rank) and _is_number(step)):
                raise DaemonError(422, "rank and step must be integers, at least 0")
            if int(rank) >= found.num_ranks:
                raise DaemonError(400, f"Rank {rank} is not below num_ranks={found.num_ranks} of {name!r}")
            if int(step) > self.max_step:
                raise DaemonError(400, f"Step {step} is above {self.max_step}")
            return int(rank), int(step)

    def put(self, name: str, rank: int, step: int, blob: StoredBlob) -> None:
        """Keep *blob* in the place of what stood there, and drop the lowest step of a rank that has too many."""
        with self._lock:
            found = self._namespace(name)
            held = found.blobs.setdefault(rank, {})
            held[step] = blob
            if len(held) > found.steps_retained:
                lowest = min(held)
                del held[lowest]
                self.dropped.append((name, rank, lowest))

    def get(self, name: str, rank: str, step: str) -> StoredBlob:
        """Return what stands there."""
        with self._lock:
            return self._held(name, rank)[self._step(name, rank, step)]

    def delete(self, name: str, rank: str, step: str) -> None:
        """Forget what stands there."""
        with self._lock:
            del self._held(name, rank)[self._step(name, rank, step)]

    def latest(self, name: str, limit: str) -> list[int]:
        """Return the steps of which any rank holds anything, newest first, *limit* of them."""
        with self._lock:
            if not _is_number(limit):
                raise DaemonError(422, "limit must be an integer, at least 0")
            steps = {step for held in self._namespace(name).blobs.values() for step in held}
            return sorted(steps, reverse=True)[: int(limit)]

    def _namespace(self, name: str) -> StoredNamespace:
        if name not in self.namespaces:
            raise DaemonError(404, f"Namespace {name!r} not found")
        return self.namespaces[name]

    def _held(self, name: str, rank: str) -> dict[int, StoredBlob]:
        if not _is_number(rank):
            raise DaemonError(422, "rank must be an integer, at least 0")
        return self._namespace(name).blobs.get(int(rank), {})

    def _step(self, name: str, rank: str, step: str) -> int:
        if not _is_number(step):
            raise DaemonError(422, "step must be an integer, at least 0")
        if int(step) not in self._held(name, rank):
            raise DaemonError(404, "Not found")
        return int(step)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 40
