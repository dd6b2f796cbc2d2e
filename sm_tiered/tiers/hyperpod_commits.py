"""Manifests on the HyperPod service: written once a checkpoint was seen whole, deleted before it stops being so.

A manifest says that all shares stood there once, in one small blob, so that whoever asks need not look at each share.
The service has no conditions, so the shares stay what counts: who deletes or replaces one deletes the manifest first,
and who decides what may go asks for the shares. A manifest that stands all the same beside a lost share is found by
whoever reads the share, and deleted by whoever finds it while confirming.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import monotonic

from sm_tiered import checksum
from sm_tiered.errors import TierError, TierUnavailableError
from sm_tiered.layout import MAX_STEP
from sm_tiered.records import CheckpointId
from sm_tiered.tiers.hyperpod_chain import PROBE_ORDINAL
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_looks import each
from sm_tiered.tiers.hyperpod_manifests import MAX_MANIFEST_BYTES, commit_blob, manifest_rank, read_blob
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_slots import OWN_SECS, Found, Kind
from sm_tiered.tiers.shares import Share

__all__ = ["Commits"]

_log = logging.getLogger("sm_tiered")


class Commits:
    """Writes and deletes manifests. Threads may share it."""

    def __init__(self, service: HyperPodService, index: Index) -> None:
        self._service, self._index = service, index
        self._refused = False
        self._free: dict[Slot, float] = {}

    def write(self, shares: Mapping[int, Found], data: bytes) -> None:
        """Write the manifest *data* where it has a place: all *shares*, which have just been seen, stand at one step.

        The commit does not depend on it: without, it is told by looks at the shares, at their cost. So where the
        service refuses it, that is said once in the log, and nothing else follows; where the slot is full of shares, as
        in a job that shrank, it waits until they are gone. Where the service does not answer, nothing could be said of
        the shares either.

        Raises:
            TierUnavailableError: the service does not answer, or the namespace is gone.
        """
        slot = self._place(shares)
        if slot is None or len(data) > MAX_MANIFEST_BYTES:
            return
        heads = [self._index.slots.sound(share) for _, share in sorted(shares.items())]
        blob = commit_blob(heads, data, slot.rank)
        found = Found(slot=slot, kind=Kind.MANIFEST, commit=read_blob(blob))
        began = self._free.pop(slot, None)
        is_free = began is not None and monotonic() - began < OWN_SECS
        standing = None if is_free else self._index.slots.look(slot, fresh=True)
        if standing == found or (standing is not None and standing.kind is Kind.OTHER):
            return
        try:
            if standing is None and not self._has_room(slot):
                return
            self._index.slots.forget(slot)
            if not self._service.put_small(slot, blob):
                raise TierUnavailableError(f"namespace {slot.namespace} was there and is gone", tier=self._service.tier)
        except TierUnavailableError:
            raise
        except TierError as error:
            if not self._refused:
                _log.warning("%s takes no manifests, so that each look costs one at every share: %s", slot, error)
            self._refused = True
            return
        self._index.slots.wrote(found)

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
        newest = max((wire // MAX_STEP for wire in wires if wire // MAX_STEP != PROBE_ORDINAL), default=0)
        # What an older attempt still writes may meet what a newer one writes there at the same time.
        needed = 2 if newest > slot.wire // MAX_STEP else 1
        if len(wires) + needed <= member.kept:
            return True
        slots = [Slot(namespace=slot.namespace, rank=slot.rank, wire=wire) for wire in sorted(wires)]
        looks = each(self._index.slots.look, slots, secs=self._index.slots.look_secs)
        held = [found for found in looks if found is not None]
        older = [found for found in held if found.kind is Kind.MANIFEST and found.slot.wire < slot.wire]
        surplus = len(held) + needed - member.kept
        if surplus > len(older):
            return False
        for found in older[: max(0, surplus)]:
            self._delete(found.slot)
        return True

    def begin(self, home: Namespace, wire: int) -> None:
        """Remember that nothing stands at a step that is about to be written to.

        What others write to the slot of manifests within a minute says the same, or is a twin's, whose shares give way
        to those that are written here: so `write` need not look. Where steps tell of no attempt, it may be another
        program's.
        """
        rank = manifest_rank(home)
        if rank is not None and wire >= MAX_STEP:
            slot = Slot(namespace=home.name, rank=rank, wire=wire)
            self._free = {slot: monotonic()}

    def make_way(self, home: Namespace, slot: Slot, share: Share) -> None:
        """Delete the manifest that *share*, about to be written to *slot*, makes untrue: that of another record."""
        rank = manifest_rank(home)
        found = self._look(home, slot.wire) if rank is not None and share.world <= rank else None
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
