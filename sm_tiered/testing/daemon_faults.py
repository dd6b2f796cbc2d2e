"""What goes wrong at the stand-in for the HyperPod service: which requests, and how, is a plan made beforehand."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["DaemonFault", "DaemonRequest", "FaultList"]

Kind = Literal["status", "reset", "cut", "flip", "meta", "hang", "late", "ack_lost"]
"""What goes wrong:

- ``status``: an answer made up here (*status*, *headers*, *text*); nothing is done. A redirect is one, and so is a
  listing of garbage under a 200.
- ``reset``: the connection is reset after *at* bytes of the body, of the request where it has one, else of the answer.
- ``cut``: a whole answer with only the first *at* bytes of the blob.
- ``flip``: an answer in which bit *at* of the blob is another one; what is stored stays as it is.
- ``meta``: an answer whose ``Shard-Meta`` is *text*; an empty text: it has none.
- ``hang``: the request is read and never answered.
- ``late``: the answer comes *secs* later.
- ``ack_lost``: it is done, and the connection is closed without an answer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonFault:
    """What goes wrong at the requests *first* to *first* + *times* - 1 (from 1) of those that match."""

    kind: Kind
    method: str = ""
    """``GET``, ``POST`` or ``DELETE``; empty: any."""
    path: str = ""
    """A regular expression, searched in the path with its query."""
    first: int = 1
    times: int = 1_000_000
    status: int = 503
    headers: tuple[tuple[str, str], ...] = ()
    text: str = "injected"
    at: int = 0
    sealed: bool = False
    """With ``cut`` and ``flip``: whether ``Shard-Meta`` fits what is sent, as when it was damaged before it was put."""
    secs: float = 0.0

    def matches(self, method: str, path: str) -> bool:
        """Return whether the request is one of those that it is about."""
        return self.method in ("", method) and re.search(self.path, path) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonRequest:
    """One request as it came."""

    method: str
    path: str
    """With its query, as it was sent."""
    headers: dict[str, str]
    """Names in lower case."""
    size: int
    """How long its body is said to be, in bytes."""
    struck: Kind | None


@dataclass
class FaultList:
    """The faults that are set, and how many requests each has seen."""

    _faults: tuple[DaemonFault, ...] = ()
    _counts: list[int] = field(default_factory=list[int])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def set(self, faults: tuple[DaemonFault, ...]) -> None:
        """Follow *faults* from the next request on, counted from 1."""
        with self._lock:
            self._faults, self._counts = faults, [0] * len(faults)

    def strike(self, method: str, path: str) -> DaemonFault | None:
        """Count a request, and return the first fault that strikes it."""
        struck = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.matches(method, path):
                    self._counts[index] += 1
                    if struck is None and fault.first <= self._counts[index] < fault.first + fault.times:
                        struck = fault
        return struck
