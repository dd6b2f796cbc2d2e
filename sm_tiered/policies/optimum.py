"""How often to save: the interval that loses the least time to saves and to failures together.

All times are in seconds. With work that is saved after every ``T`` seconds of training, saves that block training for
``d`` seconds and failures ``M`` seconds apart on average (exponentially distributed), a failure loses ``T / 2`` on
average and the share of time that is lost is about ``d / T + T / (2 M)``. Young (1974), "A first order approximation to
the optimum checkpoint interval", Communications of the ACM 17(9), doi:10.1145/361147.361115, takes its minimum::

    T = sqrt(2 d M)

Daly (2006), "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22(3), doi:10.1016/j.future.2004.11.016, equation 37, holds where ``d`` is not small beside ``M`` too::

    T = sqrt(2 d M) (1 + sqrt(d / (2 M)) / 3 + d / (18 M)) - d      for d < 2 M
    T = M                                                           for d >= 2 M

Restart time and the time until a save is usable (a commit on S3 comes after the save) are lost at every failure,
whatever ``T`` is, so neither moves the optimum.
"""

from __future__ import annotations

import math

__all__ = ["expected_secs", "lost_share", "optimal_interval_secs"]


def optimal_interval_secs(cost_secs: float, mtbf_secs: float) -> float:
    """Return Daly's interval, in seconds of training between two saves.

    Args:
        cost_secs: how long one save blocks training, at least 0.
        mtbf_secs: mean time between failures, above 0.
    """
    if cost_secs >= 2 * mtbf_secs:
        return mtbf_secs
    ratio = cost_secs / (2 * mtbf_secs)
    return math.sqrt(2 * cost_secs * mtbf_secs) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_secs


def expected_secs(
    work_secs: float,
    interval_secs: float,
    *,
    cost_secs: float,
    mtbf_secs: float,
    lag_secs: float = 0.0,
    restart_secs: float = 0.0,
) -> float:
    """Return how long *work_secs* of training take on average, saves, failures and restarts included.

    Daly (2006), equation 20, where a failure may strike during a save or a restart too, with the *lag_secs* until a
    save is usable counted as more work that each failure repeats. Infinite where failures leave no time at all.
    """
    segment = (interval_secs + cost_secs) / mtbf_secs
    if segment > 500:
        return math.inf
    again = math.exp((restart_secs + lag_secs) / mtbf_secs)
    return mtbf_secs * again * math.expm1(segment) * work_secs / interval_secs


def lost_share(interval_secs: float, *, cost_secs: float, mtbf_secs: float, lag_secs: float = 0.0) -> float:
    """Return the share of all time that goes to saves and to work done again, 0 to 1."""
    whole = expected_secs(1.0, interval_secs, cost_secs=cost_secs, mtbf_secs=mtbf_secs, lag_secs=lag_secs)
    return 1.0 - 1.0 / whole
