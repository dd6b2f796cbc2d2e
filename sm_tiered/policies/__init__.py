"""When to save and what to keep: pure functions of facts, composable with ``|``, ``&`` and ``~``, without storage."""

from __future__ import annotations

from sm_tiered.policies.context import CommittedCheckpoint, Need, SaveContext, check_metrics
from sm_tiered.policies.costs import MaxOverhead, Optimal
from sm_tiered.policies.keep import (
    AllOfKeep,
    AnyOfKeep,
    Best,
    KeepAtSteps,
    KeepEveryNSteps,
    KeepPolicy,
    Latest,
    NewerThanSecs,
    NotKeep,
    ask_keep,
    most_kept,
    wanted_metrics,
)
from sm_tiered.policies.save import AllOf, AnyOf, Not, SavePolicy, ask, members_of, needs_of
from sm_tiered.policies.when import (
    AtSteps,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    OnEnd,
    OnException,
    OnPreemption,
    OnRequest,
    WhenImproved,
)

__all__ = [
    "AllOf",
    "AllOfKeep",
    "AnyOf",
    "AnyOfKeep",
    "AtSteps",
    "Best",
    "CommittedCheckpoint",
    "EveryNEpochs",
    "EveryNSteps",
    "EverySecs",
    "KeepAtSteps",
    "KeepEveryNSteps",
    "KeepPolicy",
    "Latest",
    "MaxOverhead",
    "Need",
    "NewerThanSecs",
    "Not",
    "NotKeep",
    "OnEnd",
    "OnException",
    "OnPreemption",
    "OnRequest",
    "Optimal",
    "SaveContext",
    "SavePolicy",
    "WhenImproved",
    "ask",
    "ask_keep",
    "check_metrics",
    "members_of",
    "most_kept",
    "needs_of",
    "wanted_metrics",
]
