"""Which checkpoints are candidates, and in which order: a pure function of names and attempt records.

Candidates are ordered by (attempt, step) over all tiers together. Where the user chose the step that an attempt began
from, the timeline that was left behind is no candidate for latest: the walk goes from that attempt straight to the
chosen checkpoint and on through its ancestors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from sm_tiered.records import Attempt, AttemptRecord, CheckpointId

__all__ = ["candidates", "imported_attempt", "next_attempt"]


def next_attempt(seen: Iterable[Attempt], *, utc_secs: int, nonce: str) -> Attempt:
    """Return an attempt above all that were *seen*."""
    return Attempt(ordinal=1 + max((attempt.ordinal for attempt in seen), default=0), utc_secs=utc_secs, nonce=nonce)


def imported_attempt(step: int, identity: str) -> Attempt:
    """Return the attempt of *step* of another program, of the save that *identity* (hex digits) tells from others.

    It is below every attempt of ours, in the order of the steps, and no two saves share it: what was cut short is only
    gone on with out of the very same save.
    """
    return Attempt(ordinal=1, utc_secs=1 + step // 10, nonce=f"{step % 10}{identity[:7]}")


def candidates(
    checkpoints: Iterable[CheckpointId],
    attempts: Mapping[Attempt, AttemptRecord],
    damaged: Collection[Attempt] = (),
) -> list[CheckpointId]:
    """Return the candidates for latest among *checkpoints*, best first.

    *attempts* may lack records: an attempt without one is taken as a continuation of what came before it. Where the
    record is there and *damaged*, nobody knows what the attempt continues, and the list ends.
    """
    by_attempt: dict[Attempt, list[CheckpointId]] = {attempt: [] for attempt in (*attempts, *damaged)}
    for checkpoint in set(checkpoints):
        by_attempt.setdefault(checkpoint.attempt, []).append(checkpoint)
    found: list[CheckpointId] = []
    fork: CheckpointId | None = None
    for attempt in sorted(by_attempt, reverse=True):
        if fork is not None and attempt > fork.attempt:
            continue
        highest = fork.step if fork is not None and attempt == fork.attempt else None
        found += sorted((c for c in by_attempt[attempt] if highest is None or c.step <= highest), reverse=True)
        if attempt in damaged:
            break
        record = attempts.get(attempt)
        fork = record.parent if record is not None and record.chosen else None
    return found
