"""Taking over what the predecessor wrote, where our tiers have nothing."""

from __future__ import annotations

import time

from sm_tiered import deadline
from sm_tiered.errors import TieredError, error_from_json, error_to_json, typed
from sm_tiered.recipe import Recipe
from sm_tiered.settings import Settings
from sm_tiered_dcp.engine import Engine

__all__ = ["adopt"]

_BEAT_SECS = 5.0
_GRACE_SECS = 5.0
"""How long after its deadline an import may still end by itself, and say what it waited for."""


def adopt(engine: Engine, recipe: Recipe, *, step: int | None) -> bool:
    """Import the newest checkpoint of the predecessor, or *step*; return whether there was one. Collective.

    Rank 0 does it; the others hear of it every few seconds, so that no collective takes as long as an import. It has
    the recipe's ``commit_deadline_secs``, see `sm_tiered_dcp.predecessor.adopt`; should a call in it never return, all
    ranks raise soon after that nevertheless, and it is left to its thread.

    Raises:
        DeadlineExceededError: it has not ended in time.
        TieredError: one is there and can't be taken over, or that can't be told.
    """
    task: deadline.Task[bool] | None = None
    if engine.group.rank == 0:
        task = deadline.Task(lambda: _adopt(recipe, step))
    end = time.monotonic() + engine.settings.commit_deadline_secs + _GRACE_SECS
    while True:
        ended, found, failure = engine.group.gather(_state(task, end, engine.settings, step))[0]
        if ended:
            if failure is not None:
                raise error_from_json(failure)
            return bool(found)


def _adopt(recipe: Recipe, step: int | None) -> bool:
    from sm_tiered_dcp import predecessor

    return predecessor.adopt(recipe, step=step)


def _state(
    task: deadline.Task[bool] | None, end: float, settings: Settings, step: int | None
) -> tuple[bool, bool, dict[str, object] | None]:
    """Whether it has ended, what was found, and why that could not be told. At *end*, a time, it is given up."""
    if task is None:
        return False, False, None
    if not task.wait(min(_BEAT_SECS, end - time.monotonic())):
        if time.monotonic() < end:
            return False, False, None
        from sm_tiered_dcp import predecessor

        return True, False, error_to_json(predecessor.too_late(settings, "a call in it does not return", step=step))
    try:
        return True, task.result(0.0), None
    except TieredError as error:
        return True, False, error_to_json(error)
    except Exception as error:
        return True, False, error_to_json(typed(error))
