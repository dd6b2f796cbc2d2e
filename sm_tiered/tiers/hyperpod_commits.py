"""Manifests on the HyperPod service: written once a checkpoint was seen whole, deleted before it is given up.

A manifest says that all shares stood there once, in one small blob, so that whoever asks need not look at each share.
The service has no conditions and may lose a share, so the shares stay what counts: who deletes or replaces one deletes
the manifest first, and who commits or decides what may go asks for the shares, its own among them. A manifest that
stands beside a lost share is found out by whoever reads the share, and deleted by whoever tries to commit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from sm_tiered import checksum
from sm_tiered.errors import TierError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.hyperpod_chain import newest_ordinal
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_manifests import MAX_MANIFEST_BYTES, commit_blob, manifest_rank, read_blob
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_slots import Found, Kind
from sm_tiered.tiers.shares import Share

__all__ = ["Commits"]

_log = logging.getLogger("sm_tiered")


class Commits:
    """Writes and deletes manifests. Threads may share it."""

    def __init__(self, service: HyperPodService, index: Index) -> None:
        self._service, self._index = service, index
        self._told: set[str] = set()

    def write(self, shares: Mapping[int, Found], data: bytes) -> None:
        """Write the manifest *data* where it has a place: all *shares*, which have just been seen, stand at one step.

        The commit does not depend on it: without, it is told by looks at the shares, at their cost. So where the
        service does not take it, that is said once in the log, and nothing else follows; where the slot is full of
        shares, as in a job that shrank, it waits until they are gone.
        """
        slot = self._place(shares)
        if slot is None or len(data) > MAX_MANIFEST_BYTES:
            return
        heads = [self._index.slots.sound(share) for _, share in sorted(shares.items())]
        blob = commit_blob(heads, data, slot.rank)
        try:
            self._write(slot, blob)
        except TierError as error:
            self._tell_once("%s takes no manifest, so that each look costs one at every share", slot, error)

    def _write(self, slot: Slot, blob: bytes) -> None:
        wanted = Found(slot=slot, kind=Kind.MANIFEST, commit=read_blob(blob))
        standing = self._index.slots.look(slot, fresh=True)
        # What is another program's stays, and so does a whole share: in a job that has grown it may stand there.
        free = self._has_room(slot) if standing is None else standing.kind is Kind.MANIFEST or bool(standing.problem)
        if standing == wanted or not free:
            return
        self._index.slots.forget(slot)
        if not self._service.put_small(slot, blob):
            raise TierUnavailableError(f"namespace {slot.namespace} was there and is gone", tier=self._service.tier)
        self._index.slots.wrote(wanted)

    def _tell_once(self, what: str, which: object, error: TierError) -> None:
        if what not in self._told:
            self._told.add(what)
            _log.warning(f"{what}: %s", which, error)

    def _place(self, shares: Mapping[int, Found]) -> Slot | None:
        """Return where the manifest of *shares* goes, or None where it has no place."""
        first = shares[0].slot
        member = self._member(first)
        rank = None if member is None else manifest_rank(member)
        together = all((one.slot.namespace, one.slot.wire) == (first.namespace, first.wire) for one in shares.values())
        if rank is None or len(shares) > rank or not together:
            return None
        return Slot(namespace=first.namespace, rank=rank, wire=first.wire)

    def _has_room(self, slot: Slot) -> bool:
        """See that the slot has a free step, else the service would drop its lowest: in a job that shrank, a share.

        Older manifests give way: the shares say what they say.
        """
        member = self._member(slot)
        if member is None:
            return False
        wires = [wire for wire in self._index.wires(member) if wire != slot.wire]
        # What an older attempt still writes may meet what a newer one writes there at the same time.
        needed = 2 if newest_ordinal(wires) > slot.wire // MAX_STEP else 1
        if len(wires) + needed <= member.kept:
            return True
        held = self._index.held(slot, wires)
        older = [found for found in held if found.kind is Kind.MANIFEST and found.slot.wire < slot.wire]
        surplus = len(held) + needed - member.kept
        if surplus > len(older):
            return False
        for found in older[: max(0, surplus)]:
            self._delete(found.slot)
        return True

    def make_way(self, home: Namespace, slot: Slot, share: Share) -> None:
        """Delete the manifest that *share*, about to be written to *slot*, makes untrue: that of another record.

        Where its slot does not answer, the share is written all the same: who believes an untrue one finds out when it
        reads the share.
        """
        rank = manifest_rank(home)
        if rank is None or share.world > rank:
            return
        try:
            self._make_way(home, slot, share)
        except TierUnavailableError as error:
            self._tell_once("what stands beside %s as its manifest can't be told", slot, error)

    def _make_way(self, home: Namespace, slot: Slot, share: Share) -> None:
        found = self._look(home, slot.wire)
        if found is None:
            return
        # The digest is that of one rank's record of one checkpoint: a twin's share never has it.
        told = found.commit.manifest.records.get(share.rank) if found.commit is not None else None
        if told != checksum.digest(share.record):
            self._delete(found.slot)

    def clear(self, member: Namespace, wire: int) -> None:
        """Delete whatever manifest stands at a step, before a share there is deleted."""
        found = self._look(member, wire)
        if found is not None:
            self._delete(found.slot)

    def take_back(self, checkpoint: CheckpointId) -> None:
        """`discard`, where a share is missing; where that can't be done now, who reads finds out."""
        try:
            self.discard(checkpoint)
        except TierError as error:
            self._tell_once("the manifest of %s stands beside a share that is missing", checkpoint, error)

    def discard(self, checkpoint: CheckpointId) -> Found | None:
        """Delete the manifest of *checkpoint*, a damaged one too; return it where it was whole.

        Where another process has just seen the last share and written it, this takes away what was true: that costs
        looks until the next commit or retention writes it again, and no more.
        """
        gone: Found | None = None
        for slot in self._index.manifest_slots(checkpoint):
            found = self._index.slots.look(slot, fresh=True)
            if found is None or found.kind is not Kind.MANIFEST or found.checkpoint not in (None, checkpoint):
                continue
            self._delete(slot)
            gone = gone or (found if found.commit is not None else None)
        return gone

    def _look(self, member: Namespace, wire: int) -> Found | None:
        """Return the manifest that stands at a step now, whole or not, whosesoever."""
        rank = manifest_rank(member)
        if rank is None:
            return None
        found = self._index.slots.look(Slot(namespace=member.name, rank=rank, wire=wire), fresh=True)
        return found if found is not None and found.kind is Kind.MANIFEST else None

    def _member(self, slot: Slot) -> Namespace | None:
        return next((member for member in self._index.chain.members() if member.name == slot.namespace), None)

    def _delete(self, slot: Slot) -> None:
        self._service.delete(slot)
        self._index.slots.forget(slot)
