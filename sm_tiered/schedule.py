"""Which tiers are due: the policies asked on every rank alike, with one exchange where the step alone does not tell."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from sm_tiered.errors import PolicyError, RankFailedError
from sm_tiered.exchange import Offer, exchange
from sm_tiered.group import Group
from sm_tiered.policies.context import Need, SaveContext
from sm_tiered.policies.keep import wanted_metrics
from sm_tiered.policies import OnEnd, SavePolicy, ask, members_of, needs_of
from sm_tiered.preemption import Preemption
from sm_tiered.settings import Settings

__all__ = ["Due", "Schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """The same on every rank."""

    tiers: frozenset[str]
    preempted: bool = False
    """Whether a SIGTERM came to any rank since the last time that was asked."""


@dataclass(slots=True)
class Schedule:
    """The save policies of a recipe and what they have led to so far."""

    settings: Settings
    group: Group
    preemption: Preemption
    started_at: float = field(default_factory=time.time)
    _last: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    preempted: bool = False
    """Whether a SIGTERM came to any rank, as all of them learned in one exchange: the same on every rank."""

    @property
    def needs(self) -> frozenset[Need]:
        """What any policy looks at beyond the step."""
        return frozenset(need for policy in self._policies() for need in needs_of(policy))

    @property
    def saves_on_end(self) -> bool:
        """Whether any policy waits for the end of the training."""
        return any(_mentions_end(policy) for policy in self._policies())

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that keep policies rank checkpoints by."""
        return frozenset(name for tier in self.settings.tiers for name in wanted_metrics(tier.keep))

    def _policies(self) -> list[SavePolicy]:
        return [tier.save for tier in self.settings.tiers if tier.save is not None]

    def due(
        self, step: int, *, metrics: Mapping[str, float], epochs_ended: int | None = None, ending: bool = False
    ) -> Due:
        """Return the tiers that are due at *step*. Collective if any policy needs more than the step.

        Raises:
            PolicyError: a policy failed, or gave no bool.
        """
        context = SaveContext(
            step=step,
            now=time.time(),
            started_at=self.started_at,
            epochs_ended=epochs_ended,
            ending=ending,
            metrics=metrics,
        )
        if not self.needs:
            return Due(tiers=self._ask(context))
        fresh = self.preemption.noticed and not self.preempted
        offer, failure = Offer(step=step, preempted=fresh), None
        if self.group.rank == 0:
            try:
                calm = self._bits(self._ask(context))
                hurried = self._bits(self._ask(replace(context, preempted=True)))
                offer = replace(offer, decided=calm, tiers=hurried)
            except PolicyError as error:
                offer, failure = replace(offer, failed=True), error
        agreed = exchange(self.group, offer)
        if agreed.failed_rank is not None:
            raise failure or RankFailedError("rank 0's policy failed: it raised the reason", step=step, rank=0)
        if agreed.preempted:
            self.preempted = True
        return Due(tiers=self._names(agreed.tiers if agreed.preempted else agreed.decided), preempted=agreed.preempted)

    def note_saved(self, step: int, tiers: Iterable[str]) -> None:
        """Say that *step* was saved to *tiers*."""
        now = time.time()
        for tier in tiers:
            self._last[tier] = (step, now)

    def started_from(self, step: int) -> None:
        """Say that *step* was restored: time policies count from now."""
        self.note_saved(step, [tier.name for tier in self.settings.tiers])

    def _ask(self, context: SaveContext) -> frozenset[str]:
        due = set[str]()
        for tier in self.settings.tiers:
            step, at = self._last.get(tier.name, (None, None))
            if tier.save is not None and ask(tier.save, replace(context, last_saved_step=step, last_saved_at=at)):
                due.add(tier.name)
        return frozenset(due)

    def _bits(self, tiers: Iterable[str]) -> int:
        return sum(1 << bit for bit, tier in enumerate(self.settings.tiers) if tier.name in set(tiers))

    def _names(self, bits: int) -> frozenset[str]:
        return frozenset(tier.name for bit, tier in enumerate(self.settings.tiers) if bits >> bit & 1)


def _mentions_end(policy: SavePolicy) -> bool:
    if isinstance(policy, (AnyOf, AllOf)):
        return any(_mentions_end(member) for member in policy.policies)
    return isinstance(policy, OnEnd)
