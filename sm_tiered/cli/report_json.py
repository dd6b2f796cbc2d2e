"""What ``sm-tiered report --json`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from sm_tiered.advice import Advice
from sm_tiered.cli.told import Run, remarks

__all__ = ["document"]

_SUMS = ("kept_secs", "lost_secs", "blocked_secs", "restoring_secs", "closing_secs", "down_secs")


def document(run: Run, advices: Sequence[Advice], lines: Sequence[str]) -> dict[str, object]:
    """Return the ledger as one JSON document; durations in seconds, times in UTC seconds since the epoch."""
    ledger, story = run.ledger, run.story
    return {
        "version": 1,
        "namespace": run.namespace,
        "began_at": round(ledger.began_at, 3),
        "ended_at": round(ledger.ended_at, 3),
        "launches": story.launches,
        "wall_secs": round(ledger.wall_secs, 3),
        "goodput": ledger.share,
        **{name: round(ledger.total(name), 3) for name in _SUMS},
        "lost_steps": ledger.lost_steps,
        "step_secs": ledger.step_secs,
        "mtbf_secs": ledger.mtbf_secs("process", "node"),
        "process_mtbf_secs": ledger.mtbf_secs("process"),
        "node_mtbf_secs": ledger.mtbf_secs("node"),
        "failures": [asdict(failure) for failure in ledger.failures],
        "legs": [
            {
                "launch": leg.launch,
                "attempt": leg.attempt,
                "began_at": leg.began_at,
                "ended_at": leg.ended_at,
                "end": leg.end,
                "restored_step": leg.restored.step if leg.restored else None,
                "restored_from": leg.restored.tier if leg.restored else None,
                "reached_step": leg.reached_step,
                "saves": len(leg.saves),
                **{name: round(getattr(times, name), 3) for name in _SUMS},
            }
            for leg, times in zip(story.legs, ledger.legs, strict=True)
        ],
        "tiers": [asdict(figures) for figures in ledger.tiers],
        "intervals": [{**asdict(advice), "worth_it": advice.worth_it} for advice in advices],
        "advice": "\n".join(lines) if lines else None,
        "events": len(run.reading.events),
        "bad_lines": run.reading.bad_lines,
        "remarks": remarks(run),
        "errors": {
            name: {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
            for name, error in run.errors.items()
        },
    }
