"""Rows on the cluster's checkpoint service: ours, the predecessor, and a bare socket at the same servers."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_bench
import pytest
import room
from rows import FEW, Scale, goal, in_memory, joined, mib, ratio, timed
from table import Row

sys.path.append(str(Path(__file__).parents[1]))

from predecessor import predecessor, running_server  # noqa: E402 - it is beside the tests

__all__ = ["cluster"]

_TIMES = 3
_TRAINER_MIB, _DRAINER_MIB = 64, 96
_MEMORY_RUNS = 3


def cluster(scale: Scale) -> list[Row]:
    """What saves to the cluster's service and restores from it cost, ours beside the predecessor's."""
    rows: list[Row] = []
    try:
        package: str | None = _package()
    except _AbsentError as error:
        package = None
        rows.append(_left_out("the predecessor", error))
    with cluster_bench.service(discard=True) as url:
        case = _Case(url=url, server="discarding server", keeps=False, package=package, scale=scale)
        rows += [*case.rows(), *case.memory()]
    with cluster_bench.service(discard=False) as url:
        rows += _Case(url=url, server="server that keeps", keeps=True, package=package, scale=scale).rows()
    service: AbstractContextManager[str] = _rival_service()
    try:
        with service as url:
            rows += _Case(url=url, server="the predecessor's server", keeps=True, package=package, scale=scale).rows()
    except _AbsentError as error:
        rows.append(_left_out("the predecessor's server", error))
    return rows


def _left_out(what: str, error: _AbsentError) -> Row:
    return Row(figure=f"{what} is left out: {error}", value="", measured=0)


class _AbsentError(RuntimeError):
    """The predecessor can't be had here; the message says why."""


@contextmanager
def _rival_service() -> Generator[str, None, None]:
    """Run the predecessor's own test server; give its address.

    Raises:
        _AbsentError: it can't be had here.
    """
    with ExitStack() as stack:
        try:
            server = stack.enter_context(running_server(cluster_bench.KEEPS_PAGES))
        except pytest.skip.Exception as reason:
            raise _AbsentError(str(reason)) from reason
        yield server.url


def _package() -> str:
    """Return where the predecessor can be imported from.

    Raises:
        _AbsentError: it can't be had here.
    """
    try:
        return str(predecessor())
    except pytest.skip.Exception as reason:
        raise _AbsentError(str(reason)) from reason


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """One server, and who talks to it."""

    url: str
    server: str
    keeps: bool
    """Whether it gives back what was put there."""
    package: str | None
    """Where the predecessor is; None: nowhere."""
    scale: Scale

    def rows(self) -> list[Row]:
        """Durations, each beside copies in the same process: the machine is not the same later on."""
        scale = self.scale
        bare = room.call("cluster_rivals.bare", url=self.url, size=scale.size, runs=scale.rival_runs)
        with room.directory() as path:
            saves = room.call("cluster_bench.saves", path=path, runs=scale.runs, **self._given())
        loads = self._runs(lambda: in_memory("cluster_bench.load", **self._given()))
        more = statistics.median(both / alone for both, alone in zip(saves["blocked"], saves["alone"], strict=True))
        figure = f"{self.server}, ours: blocked, against a save into memory alone"
        rows = [
            *self._timed("a bare socket", bare, bare),
            timed(f"{self.server}, ours: blocked", saves, "blocked"),
            Row(figure=figure, value=f"{more:.2f}", measured=more, must=goal(1.15, "≤ 1.15")),
            *self._timed("ours", saves, loads),
        ]
        if loads:
            figure = f"{self.server}, ours: load: private memory added, peak"
            rows.append(mib(figure, max(loads["peak_bytes"]), _TRAINER_MIB))
        return rows if self.package is None else [*rows, *self._beside(saves, loads)]

    def _beside(self, saves: dict[str, Any], loads: dict[str, Any]) -> list[Row]:
        """The predecessor, and how much less ours takes."""
        given = {**self._given(), "package": self.package}
        theirs = room.call("cluster_rivals.saves", runs=self.scale.rival_runs, **given)
        their_loads = self._runs(lambda: room.call("cluster_rivals.load", **given))
        rows = [
            timed(f"{self.server}, the predecessor: blocked", theirs, "blocked"),
            *self._timed("the predecessor", theirs, their_loads),
            self._ratio("total", theirs, saves),
        ]
        if loads:
            figure = f"{self.server}, the predecessor: load: private memory added, peak"
            rows += [mib(figure, max(their_loads["peak_bytes"])), self._ratio("load", their_loads, loads)]
        return rows

    def memory(self) -> list[Row]:
        """Private memory of trainer and drainer while they save."""
        given = {**self._given(), "runs": _MEMORY_RUNS}
        found = in_memory("cluster_bench.memory", **given)
        beyond = found["drainer_bytes"] - found["idle_bytes"]
        rows = [
            mib("saves to the cluster: private memory added to the trainer, peak", found["peak_bytes"], _TRAINER_MIB),
            mib("saves to the cluster: private memory of the drainer, peak beyond idle", beyond, _DRAINER_MIB),
            mib("saves to the cluster: private memory of the drainer, idle", found["idle_bytes"]),
        ]
        if self.package is not None:
            theirs = room.call("cluster_rivals.memory", package=self.package, **given)
            rows.append(mib("the predecessor: private memory added to the trainer, peak", theirs["peak_bytes"]))
        return rows

    def _given(self) -> dict[str, Any]:
        return {"url": self.url, "tensors": FEW, "size": self.scale.size}

    def _runs(self, load: Any) -> dict[str, Any]:
        return joined([load() for _ in range(self.scale.rival_runs)]) if self.keeps else {}

    def _timed(self, who: str, saves: dict[str, Any], loads: dict[str, Any]) -> list[Row]:
        total = timed(f"{self.server}, {who}: total, until it is there", saves, "total")
        return [total, timed(f"{self.server}, {who}: load", loads, "load")] if loads and self.keeps else [total]

    def _ratio(self, name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> Row:
        slow, fast = (statistics.median(found[name]) / statistics.median(found["copy"]) for found in (theirs, ours))
        return ratio(f"{self.server}: {name}, the predecessor against ours", slow, fast, _TIMES)
