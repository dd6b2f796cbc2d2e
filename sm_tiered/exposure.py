"""What a failure would have lost at any time of a run, and what failures did lose: a pure function of its story.

Work is counted in seconds of the line of training that led to where it is: a restore goes back to the work at that
step, so what is done again counts once. What would be lost is the work since the newest save that would survive: of
any tier where the processes die, of a durable one where the node is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sm_tiered.story import SAFE, Leg, OnTier, Save, Story

__all__ = ["Exposure", "Lost", "Window", "exposure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A time in which nothing became safe: what would be lost grows by a second a second."""

    leg: int
    began_at: float
    ended_at: float
    process_secs: float
    """What would be lost at its beginning if the processes died."""
    node_secs: float
    """The same if the node were lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Training of one leg that a later one did again, or gave up."""

    leg: int
    by: int
    """The leg that went back."""
    from_at: float
    """All that the leg trained from then on."""
    secs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposure:
    """What would have been lost, and what was."""

    windows: tuple[Window, ...]
    """In the order of time, leg by leg; nothing stands for the times between."""
    lost: tuple[Lost, ...]

    def lost_by(self, leg: int) -> float:
        """Return how many seconds of training *leg* threw away by going back."""
        return sum(lost.secs for lost in self.lost if lost.by == leg)


@dataclass(slots=True, kw_only=True)
class _Reach:
    """A leg of the present line, and how much of it counts."""

    leg: Leg
    base: float
    """Work that was done before it."""
    top: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Became:
    """A save became safe."""

    at: float
    save: Save
    durable: bool


@dataclass(slots=True)
class _Safe:
    """What is safe of the present line, and the work of the newest."""

    found: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Step and work."""
    top: float = 0.0

    def add(self, step: int, work: float) -> None:
        """*step* is safe."""
        self.found.append((step, work))
        self.top = max(self.top, work)

    def cut(self, step: int | None) -> None:
        """What is above *step* is of another line; None: everything is."""
        self.found = [known for known in self.found if step is not None and known[0] <= step]
        self.top = max((work for _, work in self.found), default=0.0)


@dataclass(slots=True, kw_only=True)
class _Line:
    """The line of training, walked leg by leg."""

    memory: str | None
    reaches: list[_Reach] = field(default_factory=list[_Reach])
    anchors: list[tuple[int, float]] = field(default_factory=list[tuple[int, float]])
    """Step and work, both ascending."""
    near: _Safe = field(default_factory=lambda: _Safe())
    """On any tier."""
    durable: _Safe = field(default_factory=lambda: _Safe())

    def work_at(self, step: int) -> float:
        """Return the work that led to *step*, between its neighbours where it is not known."""
        below = max((anchor for anchor in self.anchors if anchor[0] <= step), default=None)
        above = min((anchor for anchor in self.anchors if anchor[0] > step), default=None)
        if below is None:
            return 0.0
        if above is None or below[0] == step:
            return below[1]
        share = (step - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def go_back(self, leg: Leg) -> Iterator[Lost]:
        """Begin *leg*; yield what it throws away."""
        step = leg.restored.step if leg.restored is not None else None
        cut = self.work_at(step) if step is not None else 0.0
        ended_well = bool(self.reaches) and self.reaches[-1].leg.end == "finished"
        for reach in self.reaches:
            # Who begins afresh after a training that is over gives nothing up.
            start = max(reach.base, cut)
            if reach.top > start and not (step is None and ended_well):
                from_at = reach.leg.ready_at + (start - reach.base)
                yield Lost(leg=reach.leg.index, by=leg.index, from_at=from_at, secs=reach.top - start)
            reach.top = min(reach.top, max(cut, reach.base))
        kept = [anchor for anchor in self.anchors if step is not None and anchor[0] < step]
        self.anchors = [*kept, (step, cut)] if step is not None else []
        self.near.cut(step)
        self.durable.cut(step)
        if leg.restored is not None and step is not None:
            self.near.add(step, cut)
            if set(leg.restored.tier.split("+")) - {self.memory}:
                self.durable.add(step, cut)
        if step is None:
            self.reaches.clear()
        end = cut + max(0.0, leg.ended_at - leg.ready_at)
        self.reaches.append(_Reach(leg=leg, base=cut, top=end))
        self.anchors += [
            (mark, cut + max(0.0, at - leg.ready_at)) for at, mark in leg.marks if step is None or mark > step
        ]

    def note(self, became: _Became) -> None:
        """Something is safe from now on, if it is of this line."""
        for reach in self.reaches:
            if reach.leg.index == became.save.leg:
                work = reach.base + max(0.0, became.save.at - reach.leg.ready_at)
                if work <= reach.top:
                    self.near.add(became.save.step, work)
                    if became.durable:
                        self.durable.add(became.save.step, work)

    def windows(self, leg: Leg, becomes: list[_Became]) -> Iterator[Window]:
        """Yield the windows of *leg*, in which these became safe."""
        base, at = self.reaches[-1].base, leg.ready_at
        for became in [*becomes, None]:
            until = leg.ended_at if became is None else min(max(became.at, at), leg.ended_at)
            if until > at:
                work = base + at - leg.ready_at
                yield Window(
                    leg=leg.index,
                    began_at=at,
                    ended_at=until,
                    process_secs=max(0.0, work - self.near.top),
                    node_secs=max(0.0, work - self.durable.top),
                )
                at = until
            if became is not None:
                self.note(became)


def exposure(story: Story) -> Exposure:
    """Return what *story* tells of work at risk and of work lost."""
    line, windows, lost = _Line(memory=story.memory), list[Window](), list[Lost]()
    becomes = sorted(_becomes(story), key=lambda became: became.at)
    for leg in story.legs:
        lost += line.go_back(leg)
        following = story.follows(leg)
        until = following.ready_at if following is not None else float("inf")
        now, later = list[_Became](), list[_Became]()
        for became in becomes:
            (now if became.save.leg <= leg.index and became.at <= until else later).append(became)
        becomes = later
        windows += line.windows(leg, now)
    return Exposure(windows=tuple(windows), lost=tuple(lost))


def _becomes(story: Story) -> Iterator[_Became]:
    for save in story.saves:
        for on in save.tiers:
            if _safe(on):
                at = on.ended_at if on.ended_at is not None else on.began_at
                yield _Became(at=at, save=save, durable=on.tier != story.memory)


def _safe(on: OnTier) -> bool:
    return on.state in SAFE
