"""The ledger of a run: where its time went, over all launches, and what failed. A pure function of its story.

Every second from the first event to the last is counted once: restoring, blocked by saves, trained and kept, trained
and lost, closing (waiting for the last drain, mostly), or down between launches. What a job does before it opens its
checkpoints, and after the last that was heard of it, is down time: nothing tells what happened then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from sm_tiered.exposure import Exposure
from sm_tiered.story import SAFE, Leg, Save, Story

__all__ = ["Failure", "Goodput", "LegTimes", "TierFigures", "goodput"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LegTimes:
    """Where one leg's time went, in seconds; together they are all of it."""

    leg: int
    restoring_secs: float
    blocked_secs: float
    kept_secs: float
    """Trained, and still there."""
    lost_secs: float
    """Trained, and done again or given up later."""
    closing_secs: float
    """From the last step to the good end of the launch."""
    down_secs: float
    """Between the launch before and this one; no part of the leg."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A launch that ended without a word, or with an exception, and was followed by another."""

    at: float
    """The last that was heard of it."""
    leg: int
    kind: str
    """``process``: what was in memory was there afterwards; ``node``: it was not; ``preempted``: it had been told."""
    how: str
    """``killed`` or ``raised``."""
    reached_step: int | None
    restored_step: int | None
    """None: it began afresh."""
    lost_steps: int | None
    """None: not known."""
    lost_secs: float
    at_least: bool
    """Whether more may be lost than was heard of: with a node, its newest events go too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierFigures:
    """What saves to one tier were like. Medians, in seconds; None where there is nothing to tell."""

    tier: str
    safe: int
    """Saves that it has, or had."""
    skipped: int
    failed: int
    open: int
    blocked_secs: float | None
    """How long training waited for a save that went there."""
    safe_secs: float | None
    """From there until it was safe."""
    upload_secs: float | None
    """Of that, while its bytes were on their way; for memory the same."""
    interval_secs: float | None
    """Between two saves that became safe."""
    interval_steps: float | None
    bytes: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """The whole ledger."""

    began_at: float
    ended_at: float
    legs: tuple[LegTimes, ...]
    failures: tuple[Failure, ...]
    tiers: tuple[TierFigures, ...]
    step_secs: float | None
    """Median of a step, saves included."""
    lost_steps: int

    def total(self, name: str) -> float:
        """Return the sum of a field of `LegTimes` over all legs."""
        return sum(getattr(leg, name) for leg in self.legs)

    @property
    def up_secs(self) -> float:
        """How long launches were heard of, in all."""
        names = ("restoring_secs", "blocked_secs", "kept_secs", "lost_secs", "closing_secs")
        return sum(self.total(name) for name in names)

    @property
    def wall_secs(self) -> float:
        """All of it, down times too."""
        return self.up_secs + self.total("down_secs")

    @property
    def share(self) -> float | None:
        """Kept training, of all the time; None when there was none."""
        return self.total("kept_secs") / self.wall_secs if self.wall_secs > 0 else None

    def mtbf_secs(self, *kinds: str) -> float | None:
        """Return the mean time between failures of these kinds, while launches were heard of; None: there was none."""
        number = sum(failure.kind in kinds for failure in self.failures)
        return self.up_secs / number if number else None


def goodput(story: Story, seen: Exposure) -> Goodput:
    """Return the ledger of *story*, given its exposure."""
    times = tuple(_times(story, seen, leg) for leg in story.legs)
    return Goodput(
        began_at=min((leg.began_at for leg in story.legs), default=0.0),
        ended_at=max((leg.ended_at for leg in story.legs), default=0.0),
        legs=times,
        failures=tuple(_failures(story, seen)),
        tiers=tuple(_figures(story, tier) for tier in story.tiers),
        step_secs=_step_secs(story),
        lost_steps=sum(_lost_steps(story, leg) or 0 for leg in story.legs),
    )


def _times(story: Story, seen: Exposure, leg: Leg) -> LegTimes:
    blocked, end = _merged(leg), _last_step_at(leg)
    # Lost more than once: the first time counts.
    from_at = min(min((lost.from_at for lost in seen.lost if lost.leg == leg.index), default=end), end)
    waited = _overlap(blocked, leg.ready_at, end)
    lost = max(0.0, end - from_at - _overlap(blocked, from_at, end))
    before = story.legs[leg.index - 1] if leg.index else None
    return LegTimes(
        leg=leg.index,
        restoring_secs=leg.ready_at - leg.began_at,
        blocked_secs=waited,
        kept_secs=max(0.0, end - leg.ready_at - waited - lost),
        lost_secs=lost,
        closing_secs=leg.ended_at - end,
        down_secs=max(0.0, leg.began_at - before.ended_at) if before and before.launch != leg.launch else 0.0,
    )


def _last_step_at(leg: Leg) -> float:
    """When the last step was over: what comes after it in a launch that ended well is closing."""
    if leg.end not in ("finished", "closed") or not leg.marks:
        return leg.ended_at
    last = max([leg.marks[-1][0], *(save.at for save in leg.saves)])
    return min(max(last, leg.ready_at), leg.ended_at)


def _merged(leg: Leg) -> list[tuple[float, float]]:
    """When training waited for saves, each moment once."""
    merged: list[tuple[float, float]] = []
    for save in leg.saves:
        start, end = max(save.at - save.blocked_secs, leg.ready_at), min(save.at, leg.ended_at)
        start = max(start, merged[-1][1]) if merged else start
        if end > start:
            merged.append((start, end))
    return merged


def _overlap(merged: Iterable[tuple[float, float]], start: float, end: float) -> float:
    return sum(max(0.0, min(e, end) - max(s, start)) for s, e in merged)


# ---- failures


def _failures(story: Story, seen: Exposure) -> Iterable[Failure]:
    for leg in story.legs:
        following = story.follows(leg)
        if following is None or following.launch == leg.launch or leg.end not in ("silent", "failed"):
            continue
        kind = "preempted" if leg.preempted else _kind(story, leg, following)
        yield Failure(
            at=leg.ended_at,
            leg=leg.index,
            kind=kind,
            how="raised" if leg.end == "failed" else "killed",
            reached_step=leg.reached_step,
            restored_step=following.restored.step if following.restored else None,
            lost_steps=_lost_steps(story, following),
            lost_secs=seen.lost_by(following.index),
            at_least=kind == "node" and leg.end == "silent",
        )


def _kind(story: Story, leg: Leg, following: Leg) -> str:
    """Whether memory was there afterwards: a restore takes it where it has a step that is as new as any."""
    if following.restored is not None and story.memory in following.restored.tier.split("+"):
        return "process"
    floor = following.restored.step if following.restored is not None else -1
    acknowledged = any(
        save.step >= floor and (on := save.on(story.memory)) is not None and on.state in SAFE
        for other in story.legs[: leg.index + 1]
        for save in other.saves
    )
    return "node" if acknowledged else "process"


def _lost_steps(story: Story, leg: Leg) -> int | None:
    """How many steps *leg* went back by; None: it is the first, or began afresh after a training that was over."""
    if leg.index == 0:
        return None
    before = story.legs[leg.index - 1]
    if before.reached_step is None or (leg.restored is None and before.end == "finished"):
        return None
    return max(0, before.reached_step - (leg.restored.step if leg.restored is not None else 0))


# ---- saves


def _figures(story: Story, tier: str) -> TierFigures:
    pairs = [(save, on) for save in story.saves if (on := save.on(tier)) is not None]
    safe = [(save, on) for save, on in pairs if on.state in SAFE]
    states = [on.state for _, on in pairs]
    spaces = list(_spaces([save for save, _ in safe]))
    return TierFigures(
        tier=tier,
        safe=len(safe),
        skipped=states.count("skipped"),
        failed=states.count("failed"),
        open=states.count("open"),
        blocked_secs=_median(save.blocked_secs for save, _ in safe),
        safe_secs=_median(max(0.0, on.ended_at - save.at) for save, on in safe if on.ended_at is not None),
        upload_secs=_median(on.ended_at - on.began_at for _, on in safe if on.ended_at is not None),
        interval_secs=_median(secs for secs, _ in spaces),
        interval_steps=_median(float(steps) for _, steps in spaces),
        bytes=_median(float(found) for save, on in safe if (found := on.bytes or save.bytes) is not None),
    )


def _spaces(saves: Sequence[Save]) -> Iterable[tuple[float, int]]:
    """Seconds and steps between neighbours of one leg."""
    for one, other in zip(saves, saves[1:], strict=False):
        if one.leg == other.leg and other.step > one.step:
            yield other.at - one.at, other.step - one.step


def _step_secs(story: Story) -> float | None:
    return _median(
        (there - here) / (step - start)
        for leg in story.legs
        for (here, start), (there, step) in zip(leg.marks, leg.marks[1:], strict=False)
    )


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None
