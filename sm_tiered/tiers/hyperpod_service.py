"""The calls of the HyperPod checkpoint service, and nothing believed of what it answers.

Every path is built of a namespace that was checked and of bounded integers, so that no name can spell another call:
the service has one that wipes every namespace of the cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

from sm_tiered.errors import ConfigError, KeyNotFoundError
from sm_tiered.layout import MAX_WORLD
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_client import Body, HttpClient
from sm_tiered.tiers.hyperpod_shares import shard_meta

__all__ = ["MAX_WIRE", "HyperPodService", "Namespace", "Slot"]

MAX_WIRE = 2**53
"""Steps are below it on the wire: JSON numbers are exact up to there, whoever reads them."""

_NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,135}", re.ASCII)
"""That of a run, and what `sm_tiered.tiers.hyperpod_chain` puts behind it."""

_MAX_STEPS = 10_000
_MAX_RANKS = MAX_WORLD + 3
_MAX_KEPT = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A namespace as the service describes it."""

    name: str
    ranks: int
    """How many slots it has: those of ranks, one for manifests where there is one to spare, and one for attempts."""
    kept: int
    """How many steps of each rank it keeps; it drops the lowest."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Slot:
    """Where one blob stands."""

    namespace: str
    rank: int
    wire: int
    """The step, as the service counts them."""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.rank}/{self.wire}"


class HyperPodService:
    """Calls of one service. Threads may share it."""

    def __init__(self, settings: HyperPodSettings) -> None:
        self._http = HttpClient(settings)
        self.call_secs = settings.retry_deadline_secs
        """The longest that a call may take which moves little."""

    @property
    def tier(self) -> str:
        """What the recipe calls the tier."""
        return self._http.tier

    def describe(self, namespace: str) -> Namespace | None:
        """Return what the service says of *namespace*, or None when it has none of that name."""
        path = self._namespace_path(namespace)
        try:
            found = self._json("GET", path)
        except KeyNotFoundError:
            return None
        facts = cast("dict[str, object]", found) if isinstance(found, dict) else {}
        ranks, kept = facts.get("num_ranks"), facts.get("steps_to_retain_per_rank")
        if not _is_count(ranks, _MAX_RANKS) or not _is_count(kept, _MAX_KEPT):
            raise self._http.strange(f"GET {path}", f"num_ranks {ranks!r:.40}, steps_to_retain_per_rank {kept!r:.40}")
        return Namespace(name=namespace, ranks=cast(int, ranks), kept=cast(int, kept))

    def create(self, namespace: str, *, ranks: int, kept: int) -> bool:
        """Create *namespace*; return False where somebody was faster."""
        path = f"{self._namespace_path(namespace)}?num_ranks={ranks:d}&steps_retained={kept:d}"
        return self._http.call("POST", path, accept=(409,))[0] != 409

    def remove(self, namespace: str) -> None:
        """Delete *namespace* with all that it holds; none of that name is no error."""
        self._http.call("DELETE", self._namespace_path(namespace), accept=(404,))

    def put(self, slot: Slot, chunks: Callable[[], Iterator[memoryview]], size: int, meta: str) -> bool:
        """Write *size* bytes in the place of what stood in *slot*; *meta* goes into the ``Shard-Meta`` header.

        Return False where the namespace is gone. An exception out of *chunks* ends the request before its last byte,
        and is raised.
        """
        headers = {
            "Content-Length": str(size),
            "Content-Type": "application/octet-stream",
            "Shard-Meta": meta,
        }
        path = self._slot_path(slot)
        return self._http.call("POST", path, body=chunks, size=size, headers=headers, accept=(404,))[0] != 404

    def put_small(self, slot: Slot, data: bytes) -> bool:
        """Write *data*; see `put`."""
        return self.put(slot, lambda: iter((memoryview(data),)), len(data), shard_meta(data))

    def open(self, slot: Slot) -> Body:
        """Begin to receive what stands in *slot*.

        Raises:
            KeyNotFoundError: nothing does.
        """
        path = self._slot_path(slot)
        return self._http.open(path)

    def delete(self, slot: Slot) -> None:
        """Delete what stands in *slot*; nothing there is no error."""
        self._http.call("DELETE", self._slot_path(slot), accept=(404,))

    def latest(self, namespace: Namespace) -> list[int]:
        """Return every step of which any rank of *namespace* has something, highest first."""
        most = min(namespace.ranks * namespace.kept, _MAX_STEPS)
        path = f"{self._prefix('checkpoints', namespace.name)}/latest?limit={most}"
        try:
            found = self._json("GET", path)
        except KeyNotFoundError:
            return []
        steps = cast("list[object]", found) if isinstance(found, list) else None
        if steps is None or not all(_is_count(step, MAX_WIRE, low=0) for step in steps):
            raise self._http.strange(f"GET {path}", f"{found!r:.200}")
        return sorted(set(cast("list[int]", steps)), reverse=True)

    def close(self) -> None:
        """Close all connections; the next call makes new ones."""
        self._http.close()

    def _json(self, method: str, path: str) -> object:
        _, data = self._http.call(method, path)
        try:
            return cast(object, json.loads(data))
        except (ValueError, RecursionError) as error:
            raise self._http.strange(f"{method} {path}", f"{data[:100]!r} is no JSON") from error

    def _prefix(self, kind: str, namespace: str) -> str:
        if not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(f"namespace {namespace[:140]!r} can't be one of the checkpoint service")
        return f"/v1/cp/{kind}/{namespace}"

    def _namespace_path(self, namespace: str) -> str:
        return self._prefix("namespaces", namespace)

    def _slot_path(self, slot: Slot) -> str:
        if not _is_count(slot.rank, _MAX_RANKS, low=0) or not _is_count(slot.wire, MAX_WIRE, low=0):
            raise ConfigError(f"rank {slot.rank!r:.40} and step {slot.wire!r:.40} can't be a slot of the service")
        return f"{self._prefix('checkpoints', slot.namespace)}/{slot.rank:d}/{slot.wire:d}"


def _is_count(value: object, below: int, *, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < below
