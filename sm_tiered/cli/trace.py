"""The run in the Trace Event Format, which Perfetto and Chrome's ``about:tracing`` read.

One track for training, one for the time that saves blocked it, one for each tier, and the work at risk as counters.
Uploads may overlap, so on tiers they are asynchronous slices. Times are microseconds since the run began.
"""

from __future__ import annotations

from collections.abc import Iterator

from sm_tiered.cli.told import Run
from sm_tiered.story import Leg, OnTier, Save

__all__ = ["trace_of"]

_PID = 1
_TRAINING, _BLOCKED, _FIRST_TIER = 1, 2, 3


def trace_of(run: Run) -> dict[str, object]:
    """Return the trace of *run* as a JSON object."""
    began = run.ledger.began_at
    events = [*_names(run), *_Trace(run).events()]
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"namespace": run.namespace, "utc_secs": f"{began:.6f}", "made_by": "sm-tiered"},
    }


def _names(run: Run) -> Iterator[dict[str, object]]:
    yield _meta("process_name", 0, {"name": run.namespace})
    tracks = {_TRAINING: "training", _BLOCKED: "blocked by saves"}
    tracks |= {_FIRST_TIER + place: name for place, name in enumerate(run.story.tiers)}
    for tid, name in tracks.items():
        yield _meta("thread_name", tid, {"name": name})
        yield _meta("thread_sort_index", tid, {"sort_index": tid})


def _meta(name: str, tid: int, args: dict[str, object]) -> dict[str, object]:
    return {"ph": "M", "name": name, "pid": _PID, "tid": tid, "ts": 0, "args": args}


class _Trace:
    def __init__(self, run: Run) -> None:
        self._run, self._t0 = run, run.ledger.began_at
        self._tids = {name: _FIRST_TIER + place for place, name in enumerate(run.story.tiers)}
        self._number = 0

    def events(self) -> list[dict[str, object]]:
        """Return all events, in the order of time."""
        found = [event for leg in self._run.story.legs for event in self._leg(leg)]
        found += [event for save in self._run.story.saves for event in self._save(save)]
        found += list(self._marks())
        found += list(self._risk())
        return sorted(found, key=lambda event: float(str(event["ts"])))

    def _us(self, at: float) -> float:
        return round(max(0.0, at - self._t0) * 1e6, 1)

    def _slice(self, name: str, tid: int, start: float, end: float, args: dict[str, object]) -> dict[str, object]:
        began, ended = self._us(start), self._us(end)
        whole = {"ph": "X", "cat": "sm_tiered", "name": name, "pid": _PID, "tid": tid}
        return {**whole, "ts": began, "dur": round(max(0.0, ended - began), 1), "args": args}

    def _leg(self, leg: Leg) -> Iterator[dict[str, object]]:
        args: dict[str, object] = {"launch": leg.launch, "attempt": leg.attempt, "ended_by": leg.end}
        if leg.ready_at > leg.began_at:
            from_what = {} if leg.restored is None else {"step": leg.restored.step, "tier": leg.restored.tier}
            yield self._slice("restoring", _TRAINING, leg.began_at, leg.ready_at, {**args, **from_what})
        lost = min((lost.from_at for lost in self._run.seen.lost if lost.leg == leg.index), default=leg.ended_at)
        if lost > leg.ready_at:
            yield self._slice("training", _TRAINING, leg.ready_at, lost, {**args, "reached_step": leg.reached_step})
        if leg.ended_at > lost:
            yield self._slice("training, lost", _TRAINING, max(lost, leg.ready_at), leg.ended_at, args)

    def _save(self, save: Save) -> Iterator[dict[str, object]]:
        args: dict[str, object] = {"step": save.step, "bytes": save.bytes, "requested": save.requested}
        if save.blocked_secs > 0:
            name = f"save step {save.step}"
            yield self._slice(name, _BLOCKED, save.at - save.blocked_secs, save.at, args)
        for on in save.tiers:
            yield from self._on(save, on)

    def _on(self, save: Save, on: OnTier) -> Iterator[dict[str, object]]:
        tid, args = self._tids[on.tier], {"step": save.step, "state": on.state, "bytes": on.bytes, "reason": on.reason}
        whole: dict[str, object] = {"cat": "save", "name": f"step {save.step}", "pid": _PID, "tid": tid}
        if on.state in ("skipped", "failed") or on.ended_at is None:
            name = f"step {save.step} {on.state}"
            yield {**whole, "ph": "i", "s": "t", "name": name, "ts": self._us(on.began_at), "args": args}
            return
        self._number += 1
        identity = {**whole, "id": self._number}
        yield {**identity, "ph": "b", "ts": self._us(on.began_at), "args": args}
        yield {**identity, "ph": "e", "ts": max(self._us(on.began_at), self._us(on.ended_at))}

    def _marks(self) -> Iterator[dict[str, object]]:
        for failure in self._run.ledger.failures:
            args: dict[str, object] = {
                "how": failure.how,
                "reached_step": failure.reached_step,
                "restored_step": failure.restored_step,
                "lost_steps": failure.lost_steps,
                "lost_secs": failure.lost_secs,
            }
            whole = {"ph": "i", "s": "g", "cat": "failure", "pid": _PID, "tid": _TRAINING}
            yield {**whole, "name": f"failure: {failure.kind}", "ts": self._us(failure.at), "args": args}

    def _risk(self) -> Iterator[dict[str, object]]:
        for window in self._run.seen.windows:
            grown = window.ended_at - window.began_at
            for at, more in ((window.began_at, 0.0), (window.ended_at, grown)):
                args = {"process": round(window.process_secs + more, 3), "node": round(window.node_secs + more, 3)}
                yield {"ph": "C", "name": "work at risk (s)", "pid": _PID, "tid": 0, "ts": self._us(at), "args": args}
