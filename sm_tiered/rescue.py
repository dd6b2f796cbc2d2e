"""After a failure: the newest step that this process knows to be whole in memory goes to the durable tiers.

No rank is asked to take part, for any may be gone; nothing is captured, for the state may be half updated.
"""

from __future__ import annotations

from sm_tiered import deadline
from sm_tiered.errors import TieredError
from sm_tiered.handle import SaveHandle
from sm_tiered.inventory import read_records
from sm_tiered.promotions import Promotions
from sm_tiered.records import CheckpointId
from sm_tiered.store import Store

__all__ = ["RESCUE_SECS", "promote_newest"]

RESCUE_SECS = 5.0
"""How long a training that has failed is held up to learn which step is whole."""


def promote_newest(saves: dict[CheckpointId, SaveHandle], store: Store, promotions: Promotions) -> int | None:
    """Hand all that this node has of the newest whole step of *saves* to the drainer; return the step.

    None where no step is whole, or where that step is on its way to every durable tier already, or there.
    """
    memory = store.tiers.memory
    if memory is None:
        return None
    with deadline.within(RESCUE_SECS):
        newest = next((save for save in reversed(saves.items()) if _is_whole(save[1], memory.name)), None)
    if newest is None:
        return None
    checkpoint, handle = newest
    lacking = {tier for tier in store.tiers.durable if not _is_sent(handle, tier)}
    if not lacking:
        return None
    promotions.enqueue(checkpoint, lacking, ranks=read_records(memory, checkpoint))
    return checkpoint.step


def _is_sent(handle: SaveHandle, tier: str) -> bool:
    try:
        return tier in handle.tiers and handle.exception(tier) is None
    except TieredError:
        return True  # it can't be told; the drainer has what it was given


def _is_whole(handle: SaveHandle, memory: str) -> bool:
    try:
        return memory in handle.tiers and handle.done(memory) and handle.exception(memory) is None
    except TieredError:
        return False  # nobody is left to ask; an older one may have been told of
