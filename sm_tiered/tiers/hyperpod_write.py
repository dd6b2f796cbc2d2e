"""Writing to the HyperPod service: shares, and records of ranks that failed."""

from __future__ import annotations

from dataclasses import replace

from sm_tiered.errors import KeyExistsError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.manifest import record_from_json
from sm_tiered.records import CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_attempts import Attempts
from sm_tiered.tiers.hyperpod_chain import wire_steps
from sm_tiered.tiers.hyperpod_commits import Commits
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_looks import each
from sm_tiered.tiers.hyperpod_room import Room
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_shares import outgoing
from sm_tiered.tiers.hyperpod_whole import Whole
from sm_tiered.tiers.shares import Share

__all__ = ["Writer"]


class Writer:
    """Writes and deletes what *index* shows."""

    def __init__(
        self,
        service: HyperPodService,
        index: Index,
        commits: Commits,
        whole: Whole,
        settings: HyperPodSettings,
        namespace: str,
    ) -> None:
        self._service, self._index, self._commits, self._whole = service, index, commits, whole
        self._settings, self._namespace = settings, namespace
        self._room = Room(service, index, commits, whole, settings)
        self.attempts = Attempts(service, index, self._room, settings, namespace)

    def put_share(self, share: Share) -> None:
        """See `ShareTier.put_share`. Shares of older checkpoints that were never whole make room for it."""
        attempt, chain = share.checkpoint.attempt, self._index.chain
        try:
            home = chain.home(
                attempt, world=share.world, slot=share.rank, empty=lambda member: self._room.empty(member, attempt)
            )
            slot = self._slot(home, share)
            if self._room.make(home, slot, share.checkpoint):
                self._commits.make_way(home, slot, share)
            self.attempts.write(home, attempt)
            out = outgoing(share, namespace=self._namespace, attempt=self.attempts.text(attempt))
            self._index.slots.forget(slot)
            if not self._service.put(slot, out.chunks, out.head.size, out.meta()):
                message = f"namespace {slot.namespace} was there and is gone"
                raise TierUnavailableError(message, tier=self._settings.name)
        except TierError:
            chain.forget()  # a service that was started again has none of its namespaces
            raise

    def _slot(self, home: Namespace, share: Share) -> Slot:
        large, small = wire_steps(share.checkpoint)
        counts = self._index.chain.counts_large(home, share.rank)
        return Slot(namespace=home.name, rank=share.rank, wire=large if counts else small)

    def put_record(self, key: str, checkpoint: CheckpointId, rank: int, data: bytes) -> None:
        """Write the record of a rank that failed, as a share without parts, unless a share stands there.

        Raises:
            TierRefusedError: it tells of no failure: others come with their parts.
        """
        record = record_from_json(data)
        if not record.failed or (record.checkpoint, record.rank) != (checkpoint, rank):
            message = f"{key}: only the record of a rank that failed is written by itself"
            raise TierRefusedError(message, hint="Use put_share.", tier=self._settings.name, key=key)
        if self._index.find(checkpoint, rank, fresh=True) is not None:
            raise KeyExistsError(f"{key} is there already", tier=self._settings.name, key=key)
        self.put_share(Share(checkpoint=checkpoint, rank=rank, world=record.world, record=data))

    def drop(self, checkpoint: CheckpointId) -> None:
        """See `ShareTier.drop`. Each share is looked at: another attempt of the same ordinal may stand in its place."""
        told = self._commits.discard(checkpoint)
        if told is not None and told.commit is not None:
            slots = [replace(told.slot, rank=rank) for rank in range(told.commit.manifest.world)]
        else:
            slots = [found.slot for found in self._whole.shares(checkpoint)]
        if slots:  # without the first, it is no checkpoint any more
            self._drop(slots[0], checkpoint)
        each(lambda slot: self._drop(slot, checkpoint), slots[1:], secs=2 * self._index.slots.look_secs)

    def _drop(self, slot: Slot, checkpoint: CheckpointId) -> None:
        if self._is_of(slot, checkpoint):
            self._room.delete(slot)

    def _is_of(self, slot: Slot, checkpoint: CheckpointId) -> bool:
        """Whether what stands in the slot now is of *checkpoint*; what is damaged can't tell otherwise."""
        now = self._index.slots.look(slot, fresh=True)
        return now is not None and (now.problem is not None if now.head is None else now.head.checkpoint == checkpoint)
