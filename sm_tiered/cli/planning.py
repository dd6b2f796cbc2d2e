"""A training that does not happen: its save policies asked at every step, on a clock that is only counted.

It follows `sm_tiered.schedule` (when a tier is due), `sm_tiered.promotions` (one step in flight; the newest that had to
wait wins) and `sm_tiered.retention` (what is kept), with the times that the `Assumptions` give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sm_tiered.history import TypicalCost
from sm_tiered.policies import CommittedCheckpoint, SaveContext, ask, ask_keep
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import Settings, TierSettings

__all__ = ["Assumptions", "Planned", "Run", "Stored", "simulate"]

_ATTEMPT = Attempt(ordinal=1, utc_secs=0, nonce="0" * 8)
_TELL_EVERY = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan is made from. Times are in seconds."""

    steps: int
    step_secs: float
    """One training step, without saves."""
    state_bytes: int
    """Of the whole job."""
    ranks: int = 1
    nodes: int = 1
    blocked_secs: float
    """How long a save blocks the training."""
    drain_bytes_per_sec: float
    """Of one node to one durable tier."""
    commit_secs: float
    """From the last byte on a durable tier to the manifest."""
    steps_per_epoch: int | None = None

    @property
    def node_bytes(self) -> int:
        """What one node holds of the state."""
        return -(-self.state_bytes // self.nodes)

    @property
    def drain_secs(self) -> float:
        """From the copy to the commit on one durable tier."""
        return self.node_bytes / self.drain_bytes_per_sec + self.commit_secs


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One checkpoint on one tier."""

    step: int
    at: float
    """When the state was copied, in seconds since the start."""
    usable_at: float
    """When it was acknowledged in memory, or committed."""


@dataclass(slots=True, kw_only=True)
class Stored:
    """The checkpoints of a durable tier, without what its keep policy gives up."""

    kept: list[Planned] = field(default_factory=list[Planned])
    most: int = 0
    """The highest number, before what is given up was deleted."""

    def commit(self, settings: TierSettings, planned: Planned) -> None:
        """Take in a checkpoint, and give up what the policy does not keep."""
        self.kept.append(planned)
        self.most = max(self.most, len(self.kept))
        facts = [
            CommittedCheckpoint(checkpoint=CheckpointId(attempt=_ATTEMPT, step=each.step), saved_at=each.at)
            for each in self.kept
        ]
        wanted = ask_keep(settings.keep, facts)
        self.kept = [each for each, stays in zip(self.kept, wanted, strict=True) if stays]


@dataclass(slots=True, kw_only=True)
class Run:
    """How the training went. Seconds count from its start."""

    secs: float = 0.0
    """How long it took, saves included."""
    blocked_secs: float = 0.0
    saves: int = 0
    """Times that the training was blocked."""
    planned: dict[str, list[Planned]] = field(default_factory=dict[str, list[Planned]])
    """By tier, in the order of steps."""
    skipped: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """By durable tier: steps that were due and gave way to a newer one, because the drain was busy."""
    stored: dict[str, Stored] = field(default_factory=dict[str, Stored])
    """By durable tier."""


def simulate(settings: Settings, given: Assumptions, *, tell: Callable[[int], None] = lambda step: None) -> Run:
    """Train *given*.steps steps under the policies of *settings*; *tell* hears now and then which step it is at.

    Raises:
        PolicyError: a policy failed, or gave no bool.
    """
    training = _Training(settings, given)
    for step in range(1, given.steps + 1):
        training.now += given.step_secs
        per_epoch = given.steps_per_epoch
        ended = step // per_epoch if per_epoch is not None and step % per_epoch == 0 else None
        due = training.due(step, epochs_ended=ended)
        if due:
            training.save(step, due, urgent=False)
        if step % _TELL_EVERY == 0:
            tell(step)
    due = training.due(given.steps, ending=True)
    if due:
        training.save(given.steps, due, urgent=True)
    return training.end()


class _Training:
    def __init__(self, settings: Settings, given: Assumptions) -> None:
        self._settings, self._given = settings, given
        self._policies = [tier for tier in settings.tiers if tier.save is not None]
        self._durable = {tier.name: tier for tier in settings.durable}
        self._last: dict[str, tuple[int, float]] = {}
        self._cost = TypicalCost()
        self._marked: dict[str, int] = {}
        self._busy_until: dict[int, float] = {}
        """By lane: tiers of one lane wait for each other."""
        self.now = 0.0
        self._run = Run(
            planned={tier.name: [] for tier in settings.tiers},
            skipped={name: [] for name in self._durable},
            stored={name: Stored() for name in self._durable},
        )

    def due(self, step: int, *, epochs_ended: int | None = None, ending: bool = False) -> frozenset[str]:
        found: list[str] = []
        for tier in self._policies:
            last_step, last_at = self._last.get(tier.name, (None, None))
            context = SaveContext(
                step=step,
                now=self.now,
                started_at=0.0,
                last_saved_step=last_step,
                last_saved_at=last_at,
                epochs_ended=epochs_ended,
                ending=ending,
                cost_secs=self._cost.secs,
                observed_secs=self.now,
            )
            if tier.save is not None and ask(tier.save, context):
                found.append(tier.name)
        return frozenset(found)

    def save(self, step: int, due: frozenset[str], *, urgent: bool) -> None:
        if self._settings.memory is None:
            self._stream(step, due)
        else:
            self._stage(step, due, urgent=urgent)
        for tier in due:
            self._last[tier] = (step, self.now)

    def _stage(self, step: int, due: frozenset[str], *, urgent: bool) -> None:
        """Copy into memory, unless the step is there, and hand to the drainer what may go now."""
        memory = self._settings.memory
        assert memory is not None
        promote = self._choose(step, due & self._durable.keys(), urgent=urgent)
        copies = self._run.planned[memory.name]
        if not copies or copies[-1].step != step:
            begun = self.now
            self._block(self._given.blocked_secs)
            copies.append(Planned(step=step, at=begun, usable_at=self.now))
        at = copies[-1].at
        for tier in sorted(promote, key=self._settings.place_of):
            if any(planned.step == step for planned in self._run.planned[tier][-1:]):
                continue
            lane = self._durable[tier].lane
            usable_at = self._busy_until[lane] = max(self.now, self._free_at(tier)) + self._given.drain_secs
            self._commit(tier, Planned(step=step, at=at, usable_at=usable_at))

    def _free_at(self, tier: str) -> float:
        return self._busy_until.get(self._durable[tier].lane, 0.0)

    def _choose(self, step: int, due: Iterable[str], *, urgent: bool) -> frozenset[str]:
        """As `Promotions.choose`."""
        due = frozenset(due)
        free = frozenset(tier for tier in due.union(self._marked) if self.now >= self._free_at(tier))
        chosen = free | due if urgent else free
        for tier in chosen.union(due):
            older = self._marked.pop(tier, step)
            if older != step:
                self._run.skipped[tier].append(older)
            if tier not in chosen:
                self._marked[tier] = step
        return chosen

    def _stream(self, step: int, due: Iterable[str]) -> None:
        """Without a memory tier the training waits for the durable ones."""
        begun = self.now
        for tier in sorted(due):
            if any(planned.step == step for planned in self._run.planned[tier][-1:]):
                continue
            self._block(self._given.drain_secs)
            self._commit(tier, Planned(step=step, at=begun, usable_at=self.now))

    def _block(self, secs: float) -> None:
        self.now += secs
        self._run.blocked_secs += secs
        self._run.saves += 1
        self._cost.take(secs)

    def _commit(self, tier: str, planned: Planned) -> None:
        self._run.planned[tier].append(planned)
        self._run.stored[tier].commit(self._durable[tier], planned)

    def end(self) -> Run:
        for tier, step in self._marked.items():
            self._run.skipped[tier].append(step)
        self._run.secs = self.now
        return self._run
