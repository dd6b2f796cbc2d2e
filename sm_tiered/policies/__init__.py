"""When to save and what to keep: pure functions of facts, composable with ``|`` and ``&``, testable without storage."""

from __future__ import annotations

from sm_tiered.policies.context import CommittedCheckpoint, Need, SaveContext, check_metrics
from sm_tiered.policies.keep import (
    AnyOfKeep,
    Best,
    KeepEveryNSteps,
    KeepPolicy,
    Latest,
    NewerThanSecs,
    ask_keep,
    wanted_metrics,
)
from sm_tiered.policies.save import (
    AllOf,
    AnyOf,
    AtSteps,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    OnEnd,
    OnPreemption,
    SavePolicy,
    ask,
    needs_of,
)

__all__ = [
    "AllOf",
    "AnyOf",
    "AnyOfKeep",
    "AtSteps",
    "Best",
    "CommittedCheckpoint",
    "EveryNEpochs",
    "EveryNSteps",
    "EverySecs",
    "KeepEveryNSteps",
    "KeepPolicy",
    "Latest",
    "Need",
    "NewerThanSecs",
    "OnEnd",
    "OnPreemption",
    "SaveContext",
    "SavePolicy",
    "ask",
    "ask_keep",
    "check_metrics",
    "needs_of",
    "wanted_metrics",
]
