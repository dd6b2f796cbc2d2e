"""What users ask a checkpoint callback for: where the last and the best checkpoint are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sm_tiered.policies.keep import AnyOfKeep, Best, KeepPolicy
from sm_tiered.settings import Settings

__all__ = ["BestModel", "Paths"]


@dataclass(slots=True)
class BestModel:
    """The best that was offered, by the metric of the recipe's ``keep: best``; of equals the newer."""

    tier: str = ""
    """The tier that keeps the best ones; empty: none does, and nothing is ever best."""
    metric: str = ""
    sign: float = 1.0
    """-1 where less is better."""
    path: str = ""
    score: float = math.nan

    @classmethod
    def of(cls, settings: Settings) -> BestModel:
        """Return what the recipe ranks by: on the first durable tier that keeps the best, else on the memory tier."""
        tiers = (*settings.durable, *((settings.memory,) if settings.memory else ()))
        for tier in tiers:
            policy = _best(tier.keep)
            if policy is not None:
                return cls(tier.name, policy.metric, 1.0 if policy.mode == "max" else -1.0)
        return cls()

    def offer(self, path: str, score: float | None) -> None:
        """Take *path* if nothing better was offered."""
        if score is None or not math.isfinite(score):
            return
        if math.isnan(self.score) or self.sign * score >= self.sign * self.score:
            self.path, self.score = path, score


@dataclass(slots=True)
class Paths:
    """URIs of the last and the best step, kept in each checkpoint."""

    best: BestModel = field(default_factory=BestModel)
    last: str = ""
    score: float | None = None
    """Of the last step, by the metric of the best."""

    def begin(self, path: str, metrics: Mapping[str, float]) -> None:
        """Say that *path* is being saved: first, for that is part of what is saved."""
        self.last, self.score = path, metrics.get(self.best.metric)

    def saved(self, tiers: Collection[str]) -> None:
        """Say that the last one goes to *tiers*: where these keep the best, it may be it."""
        if self.best.tier in tiers:
            self.best.offer(self.last, self.score)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint, which itself is the last one."""
        return {"last": self.last, "score": self.score, "best": (self.best.path, self.best.score)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, when the last one was restored: it may be the best."""
        self.last, self.score = state["last"], state["score"]
        self.best.path, self.best.score = "", math.nan
        path, score = state["best"]
        for one in ((path, score if path else None), (self.last, self.score)):
            self.best.offer(*one)


def _best(policy: KeepPolicy) -> Best | None:
    if isinstance(policy, Best):
        return policy
    members = policy.policies if isinstance(policy, AnyOfKeep) else ()
    return next((found for found in map(_best, members) if found is not None), None)
