"""Records of attempts on the HyperPod service: in the last slot, and in the header of each share of the attempt."""

from __future__ import annotations

from sm_tiered.errors import KeyExistsError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.records import Attempt, AttemptRecord
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import attempt_wire
from sm_tiered.tiers.hyperpod_index import Index
from sm_tiered.tiers.hyperpod_room import Room
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from sm_tiered.tiers.hyperpod_shares import ATTEMPT_MAGIC

__all__ = ["Attempts"]


class Attempts:
    """Writes and deletes records of attempts."""

    def __init__(
        self, service: HyperPodService, index: Index, room: Room, settings: HyperPodSettings, namespace: str
    ) -> None:
        self._service, self._index, self._room = service, index, room
        self._settings, self._namespace = settings, namespace
        self._told: dict[Attempt, bytes] = {}

    def put(self, key: str, attempt: Attempt, data: bytes) -> None:
        """Write the record of *attempt*: at once where there is a namespace, else with its first share.

        One that tells of a choice waits only where nothing at all stands: what it chooses against stands elsewhere
        then.
        """
        record = self._parsed(data)
        if record.attempt != attempt:
            raise TierRefusedError(f"{key}: that is the record of another attempt", tier=self._settings.name, key=key)
        standing = self._index.attempt(attempt)
        if standing is None:
            self._index.refresh()
            standing = self._index.attempts(self._index.firsts()).get(attempt)
        self._told[attempt] = standing or data
        if standing is not None:
            raise KeyExistsError(f"{key} is there already", tier=self._settings.name, key=key)
        self._index.waiting[attempt] = data
        try:
            home = self._home(record)
            if home is not None:
                self.write(home, attempt)
        except TierError:
            self._index.chain.forget()
            raise

    def _home(self, record: AttemptRecord) -> Namespace | None:
        chain, attempt = self._index.chain, record.attempt
        found = chain.standing_home(attempt, world=1, slot=None)
        if found is not None or not record.chosen or not chain.members():
            return found
        # How many ranks there will be is not known: as many as there were, most likely.
        world = self._index.likely_ranks()
        return chain.home(attempt, world=world, slot=None, empty=lambda member: self._room.empty(member, attempt))

    def delete(self, attempt: Attempt) -> None:
        """Delete the record of *attempt* where it stands by itself."""
        self._told.pop(attempt, None)
        self._index.waiting.pop(attempt, None)
        for slot in self._index.attempt_slots(attempt):
            if self._index.attempt_in(slot) == attempt:
                self._room.delete(slot)

    def write(self, home: Namespace, attempt: Attempt) -> None:
        """Write the record of *attempt* to *home* where it waits for that.

        Of two attempts of one ordinal the later one's record stands by itself; both stand in their shares.
        """
        data = self._index.waiting.get(attempt)
        if data is None:
            return
        large = self._index.chain.counts_large(home, None)
        slot = Slot(namespace=home.name, rank=home.ranks - 1, wire=attempt_wire(attempt, large=large))
        other = self._index.attempt_in(slot)
        wanted = other is None or not large or other < attempt
        if wanted and self._room.make_for_attempt(home, slot, self._parsed(data)):
            if not self._service.put_small(slot, ATTEMPT_MAGIC + data):
                message = f"namespace {slot.namespace} was there and is gone"
                raise TierUnavailableError(message, tier=self._settings.name)
            self._index.slots.forget_attempt(slot)
        self._index.waiting.pop(attempt, None)

    def text(self, attempt: Attempt) -> str | None:
        """Return the record of *attempt* as its shares hold it, or None where none is known."""
        data = self._told.get(attempt) or self._index.attempt(attempt)
        if data is None:
            return None
        self._told[attempt] = data
        return data.decode()

    def _parsed(self, data: bytes) -> AttemptRecord:
        record = attempt_record_from_json(data)
        if record.namespace != self._namespace:
            raise TierRefusedError(f"the record is of namespace {record.namespace!r}", tier=self._settings.name)
        return record
