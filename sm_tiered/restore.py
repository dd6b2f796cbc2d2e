"""The collective decision which checkpoint is restored.

Candidates are walked best first; `sm_tiered.voted_load` loads one. Three answers are never confused: nothing was ever
saved (None), a tier did not answer (`TierUnavailableError`), and what is there is damaged or gone
(`NothingRestorableError`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from sm_tiered.errors import CheckpointNotFoundError, NothingRestorableError, RestoreIncompleteError
from sm_tiered.event_log import Events
from sm_tiered.events import CandidateRefused, CopyRefused, TierUnreachable
from sm_tiered.group import Group
from sm_tiered.records import CheckpointId
from sm_tiered.resolve import Candidate, Survey, Tiers, assemble, unknown, unreachable
from sm_tiered.sources import Room
from sm_tiered.voted_load import Loaded, Loader, Walk, load

__all__ = ["Restored", "walk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a restore took, and from where."""

    checkpoint: CheckpointId
    tier: str
    """The tiers that any rank read from, joined with ``+``, in recipe order."""
    secs: float
    bytes: int
    """That this rank read."""
    reasons: tuple[str, ...]
    """Why each better candidate was refused, and, of the one that was taken, why this rank took no nearer copy."""

    @property
    def step(self) -> int:
        """The step that was restored."""
        return self.checkpoint.step


def walk(
    group: Group,
    tiers: Tiers,
    seen: Survey,
    loader: Loader,
    *,
    step: int | None,
    events: Events,
    room: Room,
    use_memory: bool,
) -> Restored | None:
    """Restore the best candidate, or the given *step*; None when nothing was ever saved. Collective.

    Raises:
        CheckpointNotFoundError: no tier has *step*.
        TierUnavailableError: a tier did not answer, so what is newest can't be known.
        MismatchError: the state and the checkpoint do not fit.
        NothingRestorableError: checkpoints exist and none can be restored; the state is as it was.
        RestoreIncompleteError: a load failed after bytes were placed, and no other candidate is left.
    """
    begun, reasons = time.monotonic(), list[str]()
    _check_reachable(tiers, seen, events, use_memory=use_memory)
    chosen = seen.candidates if step is None else _with_step(seen, step)
    state = Walk(group=group, tiers=tiers.without(seen.skipped), loader=loader, room=room, use_memory=use_memory)
    if seen.unreachable:
        state.without_durable(unreachable(*next(iter(seen.unreachable.items()))))
    # An attempt that began from a checkpoint tells of it even where nothing else is left.
    watermarked = any(record.parent is not None for record in seen.attempts.values())
    for checkpoint in chosen:
        if state.silent is not None and checkpoint.attempt != chosen[0].attempt:
            state.give_up(state.silent)
        candidate, loaded = _take(state, seen, checkpoint, events)
        watermarked |= candidate.watermarked or candidate.problem is None
        if not isinstance(loaded, str):
            _tell_copies(events, candidate, state.passed_over)
            return Restored(
                checkpoint=checkpoint,
                tier=loaded.tiers,
                secs=time.monotonic() - begun,
                bytes=loaded.bytes,
                reasons=(*reasons, *state.passed_over),
            )
        if candidate.unreachable:
            state.without_durable(unreachable(candidate.unreachable[0], loaded))
        reasons.append(f"{checkpoint}: {loaded}")
        events.emit(CandidateRefused(step=checkpoint.step, attempt=str(checkpoint.attempt), reason=loaded))
    if step is None and seen.damaged:
        reasons.append(f"the record of {max(seen.damaged)} is damaged: what it continues can't be told")
        watermarked = True
    skipped = {**seen.skipped, **state.skipped}
    if skipped and not state.placed:
        raise unknown(*next(iter(skipped.items())))
    return _nothing(state, reasons, watermarked=watermarked, step=step)


def _take(state: Walk, seen: Survey, checkpoint: CheckpointId, events: Events) -> tuple[Candidate, Loaded | str]:
    """Load *checkpoint*, and again without an optional tier that fell silent over it: others may have it too."""
    while True:
        before = set(state.skipped)
        candidate = assemble(state.group, state.tiers, seen, checkpoint)
        state.skip(candidate.skipped)
        loaded = candidate.problem or load(state, candidate)
        for name in sorted(set(state.skipped) - before):
            events.emit(TierUnreachable(tier=name, error=state.skipped[name]))
        if not isinstance(loaded, str) or set(state.skipped) == before:
            return candidate, loaded


def _check_reachable(tiers: Tiers, seen: Survey, events: Events, *, use_memory: bool) -> None:
    """Refuse to guess what a tier holds that does not answer, unless memory may do."""
    for name, reason in {**seen.unreachable, **seen.skipped}.items():
        events.emit(TierUnreachable(tier=name, error=reason))
    near = tiers.memory.name if tiers.memory is not None else None
    if seen.unreachable and (not use_memory or near in seen.unreachable):
        raise unreachable(*next(iter(seen.unreachable.items())))


def _tell_copies(events: Events, candidate: Candidate, passed_over: Sequence[str]) -> None:
    if passed_over:
        more = f" (and {len(passed_over) - 1} more)" if len(passed_over) > 1 else ""
        events.emit(CopyRefused(step=candidate.checkpoint.step, reason=passed_over[0] + more))


def _nothing(state: Walk, reasons: list[str], *, watermarked: bool, step: int | None) -> None:
    if state.silent is not None and not state.placed:
        raise state.silent
    if state.placed:
        raise RestoreIncompleteError(
            "the load failed after bytes were placed, and no other checkpoint is left: " + "; ".join(reasons),
            hint="The state must not be used: build it anew.",
            step=step,
        )
    if watermarked or step is not None:
        raise NothingRestorableError(
            "checkpoints exist and none can be restored: " + "; ".join(reasons),
            hint="Look with `sm-tiered ls` and `sm-tiered verify`; restore(state, step=…) takes an older step; "
            "a fresh start needs a new namespace.",
            step=step,
        )


def _with_step(seen: Survey, step: int) -> list[CheckpointId]:
    line = [checkpoint for checkpoint in seen.candidates if checkpoint.step == step]
    others = {checkpoint for checkpoint in seen.found if checkpoint.step == step} - set(line)
    found = [*line, *sorted(others, reverse=True)]
    if found or seen.unreachable or seen.skipped:
        return found
    steps: dict[str, list[int]] = {}
    for checkpoint, names in sorted(seen.found.items(), reverse=True):
        for name in names:
            steps.setdefault(name, []).append(checkpoint.step)
    have = "; ".join(f"{name}: {found[:10]}" for name, found in steps.items()) or "nothing"
    raise CheckpointNotFoundError(
        f"step {step} is on no tier", hint=f"There is {have}. Leave step out for the newest.", step=step
    )
