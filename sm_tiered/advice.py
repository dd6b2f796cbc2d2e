"""How often to save, judged by what a run has cost and lost: present intervals against the optimal ones.

The optimum is that of `sm_tiered.policies.optimum`. What memory is for, the death of processes, counts every failure;
what a durable tier is for, the loss of a node, counts only those. A save costs what it blocks training for, with a
durable tier too, though the same copy may serve memory: so its advice errs towards rarer saves. An interval that is
shorter than an upload only leaves saves out, and shorter than a step there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from sm_tiered.goodput import Goodput, TierFigures
from sm_tiered.policies.optimum import lost_share, optimal_interval_secs

__all__ = ["WORTH_IT", "Advice", "advise", "changed_policy"]

WORTH_IT = 0.001
"""A change that saves less than this share of all time is not advised."""
_KINDS = {False: ("process", "node"), True: ("node",)}
_ADAPTS = ("optimal", "max_overhead")
"""Policies that look after the interval themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One tier's interval. Times are in seconds; None where they can't be told."""

    tier: str
    durable: bool
    cost_secs: float | None
    """What a save blocks training for."""
    mtbf_secs: float | None
    """Between the failures that the tier is for."""
    given: bool
    """Whether that was said, and not seen."""
    interval_secs: float | None
    """At present."""
    optimal_secs: float | None
    advised_secs: float | None
    """The optimum, or what is possible."""
    lost_now: float | None
    """The share of time that goes to saves and failures at the present interval, as the model expects."""
    lost_then: float | None
    """The same at the advised one."""
    steps: int | None
    """The advised interval in steps."""

    @property
    def worth_it(self) -> bool:
        """Whether to change anything."""
        known = self.lost_now is not None and self.lost_then is not None
        return known and cast(float, self.lost_now) - cast(float, self.lost_then) >= WORTH_IT


def advise(
    ledger: Goodput, *, memory: str | None, mtbf_secs: float | None = None, node_mtbf_secs: float | None = None
) -> list[Advice]:
    """Return the advice for each tier that has saves; times between failures that are given count, not those seen."""
    found: list[Advice] = []
    for figures in ledger.tiers:
        durable = figures.tier != memory
        given = node_mtbf_secs if durable else mtbf_secs
        mtbf = given if given is not None else ledger.mtbf_secs(*_KINDS[durable])
        found.append(_advice(figures, ledger.step_secs, durable=durable, mtbf=mtbf, given=given is not None))
    return found


def _advice(figures: TierFigures, step: float | None, *, durable: bool, mtbf: float | None, given: bool) -> Advice:
    cost, now = figures.blocked_secs, figures.interval_secs
    lag = figures.safe_secs or 0.0
    optimal = advised = lost_now = lost_then = None
    if cost is not None and mtbf is not None:
        optimal = optimal_interval_secs(cost, mtbf)
        advised = max(optimal, lag if durable else 0.0, step or 0.0)
        if now is not None and now > 0 and advised > 0:
            lost_now = lost_share(now, cost_secs=cost, mtbf_secs=mtbf, lag_secs=lag)
            lost_then = lost_share(advised, cost_secs=cost, mtbf_secs=mtbf, lag_secs=lag)
    steps = None if advised is None or not step else max(1, _rounded(advised / step))
    return Advice(
        tier=figures.tier,
        durable=durable,
        cost_secs=cost,
        mtbf_secs=mtbf,
        given=given,
        interval_secs=now,
        optimal_secs=optimal,
        advised_secs=advised,
        lost_now=lost_now,
        lost_then=lost_then,
        steps=steps,
    )


def _rounded(value: float) -> int:
    """To two digits, for nothing here is known better."""
    if value < 10:
        return round(value)
    unit = 10 ** (math.floor(math.log10(value)) - 1)
    return round(value / unit) * unit


def changed_policy(policy: object, advice: Advice) -> object | None:
    """Return *policy*, a tier's `save` in a recipe's JSON, with the advised interval; None: it can't be told how.

    Where the policy counts steps it goes on to, as long as a step's time is known; what else it says stays.
    """
    if advice.advised_secs is None:
        return None
    secs: object = {"every_secs": _rounded(advice.advised_secs) or round(advice.advised_secs, 2)}
    if policy is None:
        return secs
    if _names(policy) & set(_ADAPTS):
        return None
    found = _replaced(policy, advice, secs)
    return found if found != policy else None


def _names(policy: object) -> set[str]:
    if isinstance(policy, Mapping):
        entries = cast("Mapping[str, object]", policy)
        return set(entries) | {name for value in entries.values() for name in _names(value)}
    if isinstance(policy, list):
        return {name for entry in cast("list[object]", policy) for name in _names(entry)}
    return {policy} if isinstance(policy, str) else set()


def _replaced(policy: object, advice: Advice, secs: object) -> object:
    if not isinstance(policy, Mapping):
        return policy
    entries = cast("Mapping[str, object]", policy)
    for name in ("any", "all"):
        if isinstance(entries.get(name), list):
            return {name: [_replaced(entry, advice, secs) for entry in cast("list[object]", entries[name])]}
    if "every_secs" in entries:
        return secs
    if "every_n_steps" in entries and advice.steps is not None:
        given = entries["every_n_steps"]
        if not isinstance(given, Mapping):
            return {"every_n_steps": advice.steps}
        more = {**cast("Mapping[str, object]", given), "n": advice.steps}
        if isinstance(offset := more.get("offset"), int):
            more["offset"] = offset % advice.steps
        return {"every_n_steps": more}
    return entries
