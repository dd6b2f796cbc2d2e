"""Which steps there are, without restoring one."""

from __future__ import annotations

from sm_tiered.errors import TierUnavailableError
from sm_tiered.group import Group, SoloGroup
from sm_tiered.inventory import read_holding
from sm_tiered.resolve import Survey, Tiers, survey, unknown

__all__ = ["newest_complete", "unused_step"]


def newest_complete(tiers: Tiers) -> int | None:
    """Return the newest step that this process sees complete on any of *tiers*, or None. Not collective.

    Raises:
        TierUnavailableError: a durable tier did not answer, or an optional one where no other has anything.
    """
    with tiers.reading():
        return _newest_complete(tiers)


def _newest_complete(tiers: Tiers) -> int | None:
    seen = _survey(SoloGroup(), tiers)
    asked, skipped = tiers.without(seen.skipped), dict(seen.skipped)
    for checkpoint in seen.candidates:
        if asked.memory and read_holding(asked.memory, checkpoint, durable=False).problem is None:
            return checkpoint.step
        for name, tier in asked.durable.items():
            try:
                if name not in skipped and read_holding(tier, checkpoint, durable=True).problem is None:
                    return checkpoint.step
            except TierUnavailableError as error:
                if name not in asked.optional:
                    raise
                skipped[name] = error.message
    for name, reason in skipped.items():
        raise unknown(name, reason)
    return None


def unused_step(group: Group, tiers: Tiers) -> int:
    """Return a step above all that any rank sees on any of *tiers*, complete or not. Collective.

    Raises:
        TierUnavailableError: a durable tier did not answer.
    """
    return 1 + max((checkpoint.step for checkpoint in _survey(group, tiers).found), default=-1)


def _survey(group: Group, tiers: Tiers) -> Survey:
    found = survey(group, tiers)
    for name, reason in found.unreachable.items():
        raise TierUnavailableError(f"can't tell what is newest: {reason}", tier=name)
    return found
