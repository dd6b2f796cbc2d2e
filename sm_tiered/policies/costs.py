"""When to save by what saving costs, as it was measured: how long a save blocks training, on the slowest rank.

Both policies save the first time they are asked after step 0, since nothing is measured before a save.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from sm_tiered.errors import PolicyError
from sm_tiered.policies.context import Need, SaveContext, check_secs, describe
from sm_tiered.policies.optimum import optimal_interval_secs
from sm_tiered.policies.save import Composable

__all__ = ["MaxOverhead", "Optimal"]

_MEASURED = frozenset({Need.CLOCK, Need.COST})


@dataclass(frozen=True, slots=True)
class MaxOverhead(Composable):
    """Save as often as it costs no more than *share* of the training time between two saves to this tier.

    Alone it saves as often as that allows; ``EveryNSteps(10) & MaxOverhead(0.01)`` stretches an interval only where it
    has to. After CheckFreq (Mohan et al., FAST'21), which chooses its interval so.
    """

    share: float
    """0 < share < 1, e.g. 0.01 for 1 %."""

    def __post_init__(self) -> None:
        share = cast(object, self.share)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            text = f"MaxOverhead: share must be a number above 0 and below 1, got {describe(share)}"
            raise PolicyError(text, hint="0.01 means 1 % of the training time.")

    @property
    def needs(self) -> frozenset[Need]:
        """The clock, and what saves cost."""
        return _MEASURED

    def should_save(self, context: SaveContext) -> bool:
        """Whether enough has been trained since the last save to pay for one."""
        interval = 0.0 if context.cost_secs is None else context.cost_secs / self.share
        return context.step > 0 and context.secs_since_saved >= interval


@dataclass(frozen=True, slots=True)
class Optimal(Composable):
    """Save at the interval that loses the least time to saves and failures together; see `sm_tiered.policies.optimum`.

    ``T = sqrt(2 d M)`` to first order (Young 1974; Daly 2006 has the terms that follow), in seconds: ``d`` is how long
    a save blocks training, measured; ``M`` the mean time between the failures that this tier is there for, so each tier
    has its own. For the memory tier these are deaths of processes, for a durable tier losses of a node. That a durable
    save is usable only once it is committed does not move ``T``; a busy drain stretches it by itself.
    """

    mtbf_secs: float
    """Mean time between failures, above 0; of the whole job, so 1/n of one node's on n nodes."""
    observe: bool = False
    """Whether failures of this namespace correct *mtbf_secs*, which then counts as one failure seen before."""

    def __post_init__(self) -> None:
        check_secs("Optimal", self.mtbf_secs, name="mtbf_secs")
        if not isinstance(self.observe, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PolicyError(f"Optimal: observe must be true or false, got {describe(self.observe)}")

    @property
    def needs(self) -> frozenset[Need]:
        """The clock, and what saves cost."""
        return _MEASURED

    def interval_secs(self, context: SaveContext) -> float:
        """Return ``T``, in seconds of training; 0 while nothing is measured."""
        if context.cost_secs is None:
            return 0.0
        mtbf = self.mtbf_secs
        if self.observe and math.isfinite(context.observed_secs):
            mtbf = (mtbf + max(0.0, context.observed_secs)) / (1 + context.failures)
        return optimal_interval_secs(context.cost_secs, mtbf)

    def should_save(self, context: SaveContext) -> bool:
        """Whether the interval is over."""
        return context.step > 0 and context.secs_since_saved >= self.interval_secs(context)
