"""What is whole in memory goes to the durable tiers though nothing is saved: after a failure, or where all is done.

After a failure no rank is asked to take part, for any may be gone; nothing is captured, for the state may be half
updated.
"""

from __future__ import annotations

from sm_tiered import deadline
from sm_tiered.errors import TieredError
from sm_tiered.handle import SaveHandle
from sm_tiered.inventory import read_manifest, read_records
from sm_tiered.manifest import record_from_json
from sm_tiered.promotions import Promotions
from sm_tiered.records import CheckpointId
from sm_tiered.restore import Restored
from sm_tiered.store import Store
from sm_tiered.tiers.base import Tier

__all__ = ["RESCUE_SECS", "lacking", "promote_newest"]

RESCUE_SECS = 5.0
"""How long a training that has failed is held up to learn which step is whole."""


def promote_newest(
    saves: dict[CheckpointId, SaveHandle],
    store: Store,
    promotions: Promotions,
    tiers: frozenset[str] | None = None,
) -> int | None:
    """Hand all that this node has of the newest whole step of *saves* to the drainer; return the step.

    *tiers*: the durable tiers that want it; None: all. None is returned where no step is whole, or where that step is
    on its way to every one of them already, or there.
    """
    memory = store.tiers.memory
    if memory is None:
        return None
    with deadline.within(RESCUE_SECS):
        newest = next((save for save in reversed(saves.items()) if _is_whole(save[1], memory.name)), None)
    if newest is None:
        return None
    checkpoint, handle = newest
    wanted = store.tiers.durable.keys() if tiers is None else store.tiers.durable.keys() & tiers
    unsent = {tier for tier in wanted if not _is_sent(handle, tier)}
    if not unsent:
        return None
    promotions.enqueue(checkpoint, unsent, ranks=read_records(memory, checkpoint))
    return checkpoint.step


def lacking(restored: Restored, store: Store, tiers: frozenset[str]) -> frozenset[str]:
    """Return those of *tiers* that have not what was *restored* from memory, where this rank can bring its share there.

    Empty where it came from a durable tier, or was saved by another number of ranks.
    """
    memory, rank = store.tiers.memory, store.group.rank
    if memory is None or restored.tier != memory.name:
        return frozenset()
    record = read_records(memory, restored.checkpoint, range(rank, rank + 1)).get(rank)
    if record is None or record_from_json(record).world != store.group.world:
        return frozenset()
    durable = store.tiers.durable
    return frozenset(tier for tier in tiers & durable.keys() if not _stands(durable[tier], restored.checkpoint))


def _stands(tier: Tier, checkpoint: CheckpointId) -> bool:
    try:
        return read_manifest(tier, checkpoint) is not None
    except TieredError:
        return False  # the drainer will tell


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
