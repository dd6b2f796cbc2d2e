"""Which tiers are due: the policies asked on every rank alike, with an exchange where the step alone does not tell."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from sm_tiered.errors import PolicyError, RankFailedError
from sm_tiered.exchange import Agreed, Offer, exchange
from sm_tiered.group import Group
from sm_tiered.history import Extremes, History, TypicalCost
from sm_tiered.policies import (
    Need,
    OnEnd,
    OnException,
    SaveContext,
    SavePolicy,
    WhenImproved,
    ask,
    members_of,
    needs_of,
    wanted_metrics,
)
from sm_tiered.preemption import Preemption
from sm_tiered.requests import Requests
from sm_tiered.settings import Settings

__all__ = ["Due", "Schedule"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """The same on every rank."""

    tiers: frozenset[str]
    preempted: bool = False
    """Whether a SIGTERM came to any rank since the last time that was asked."""
    requested: bool = False
    """Whether this is the save that somebody has asked for, as any rank saw."""


@dataclass(slots=True)
class Schedule:
    """The save policies of a recipe and what they have led to so far."""

    settings: Settings
    group: Group
    preemption: Preemption
    requests: Requests = field(default_factory=Requests)
    started_at: float = field(default_factory=time.time)
    preempted: bool = False
    """Whether a SIGTERM came to any rank, as all of them learned in one exchange: the same on every rank."""
    _last: dict[str, tuple[int, float]] = field(default_factory=dict[str, tuple[int, float]])
    _cost: TypicalCost = field(default_factory=TypicalCost)
    _slowest_secs: float = 0.0
    """What a save costs the slowest rank, as of the last exchange."""
    _extremes: dict[str, Extremes] = field(default_factory=dict[str, Extremes])
    _history: History = field(default_factory=History)

    @property
    def needs(self) -> frozenset[Need]:
        """What any policy looks at beyond the step."""
        return frozenset(need for policy in self._policies() for need in needs_of(policy))

    @property
    def saves_on_end(self) -> bool:
        """Whether any policy waits for the end of the training."""
        return any(isinstance(policy, OnEnd) for policy in self._members())

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that policies look at."""
        return self.ranked_by | {policy.metric for policy in self._members() if isinstance(policy, WhenImproved)}

    @property
    def ranked_by(self) -> frozenset[str]:
        """The names of the metrics that keep policies rank checkpoints by: whoever gives metrics gives these."""
        return frozenset(chain.from_iterable(wanted_metrics(tier.keep) for tier in self.settings.tiers))

    def _policies(self) -> list[SavePolicy]:
        return [tier.save for tier in self.settings.tiers if tier.save is not None]

    def _members(self) -> Iterable[SavePolicy]:
        return chain.from_iterable(map(members_of, self._policies()))

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
        mine = Offer(
            step=step,
            preempted=fresh,
            requested=self.requests.noticed(),
            cost_micros=round((self._cost.secs or 0.0) * 1e6),
        )
        agreed, tiers = self._decide(context, mine)
        if agreed.preempted or agreed.requested:
            # Rare, so a second exchange: rank 0 decides again, with what the others saw.
            seen = replace(context, preempted=agreed.preempted, requested=agreed.requested)
            _, tiers = self._decide(seen, mine)
            self.preempted |= agreed.preempted
        answered = agreed.requested and bool(tiers)  # until then it waits, where another policy has a say too
        if answered:
            self.requests.take()
        return Due(tiers=tiers, preempted=agreed.preempted, requested=answered)

    def _decide(self, context: SaveContext, offer: Offer) -> tuple[Agreed, frozenset[str]]:
        """Let rank 0 decide and all ranks hear of it. Collective."""
        failure: PolicyError | None = None
        if self.group.rank == 0:
            try:
                offer = replace(offer, decided=self._bits(self._ask(context)))
            except PolicyError as error:
                offer, failure = replace(offer, failed=True), error
        agreed = exchange(self.group, offer)
        if agreed.failed_rank is not None:
            text = "rank 0's policy failed: it raised the reason"
            raise failure or RankFailedError(text, step=context.step, rank=0)
        self._slowest_secs = agreed.cost_micros / 1e6
        return agreed, self._names(agreed.decided)

    def after_exception(self, step: int) -> frozenset[str]:
        """Return the tiers that want what is whole in memory now that the training has failed. Not collective.

        Raises:
            PolicyError: a policy failed, or gave no bool.
        """
        waiting = frozenset(
            tier.name
            for tier in self.settings.tiers
            if tier.save is not None and any(isinstance(policy, OnException) for policy in members_of(tier.save))
        )
        context = SaveContext(step=step, now=time.time(), started_at=self.started_at, failed=True)
        return self._ask(context) & waiting if waiting else waiting

    def note_saved(
        self,
        step: int,
        tiers: Iterable[str],
        *,
        metrics: Mapping[str, float] | None = None,
        blocked_secs: float | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        """Say that *step* was saved to *tiers*, with which metrics, and how long that blocked the training.

        Those that it was *left_out* on are not asked for it again, and have nothing of it to beat.
        """
        now = time.time()
        for tier in tiers:
            self._last[tier] = (step, now)
            if tier not in left_out:
                self._extremes.setdefault(tier, Extremes()).take(metrics or {})
        if blocked_secs is not None:
            self._cost.take(blocked_secs)

    def started_from(self, step: int, history: History) -> None:
        """Say that *step* was restored, and what had been before: time policies count from now."""
        self.note_saved(step, [tier.name for tier in self.settings.tiers])
        self._history = history
        for tier, extremes in history.extremes.items():
            self._extremes[tier] = extremes

    def _ask(self, context: SaveContext) -> frozenset[str]:
        due = set[str]()
        measured = max(self._cost.secs or 0.0, self._slowest_secs)
        for tier in self.settings.tiers:
            step, at = self._last.get(tier.name, (None, None))
            if tier.save is None:
                continue
            facts = replace(
                context,
                last_saved_step=step,
                last_saved_at=at,
                cost_secs=measured or None,
                saved_metrics=dict(self._extremes.get(tier.name, Extremes()).found),
                failures=self._history.failures.get(tier.name, 0),
                observed_secs=self._history.observed_secs(context.now),
            )
            if ask(tier.save, facts):
                due.add(tier.name)
        return frozenset(due)

    def _bits(self, tiers: Iterable[str]) -> int:
        return sum(1 << bit for bit, tier in enumerate(self.settings.tiers) if tier.name in set(tiers))

    def _names(self, bits: int) -> frozenset[str]:
        return frozenset(tier.name for bit, tier in enumerate(self.settings.tiers) if bits >> bit & 1)
