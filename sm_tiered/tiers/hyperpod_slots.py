"""What stands in single slots of the HyperPod service: looked at once, and remembered while it is whole."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass

from sm_tiered import checksum, deadline
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.layout import MAX_STEP
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.sealed_json import MAX_BYTES
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import wire_steps
from sm_tiered.tiers.hyperpod_client import Body
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered.tiers.hyperpod_shares import ATTEMPT_MAGIC, FIRST_BYTES, SHARE_MAGIC, Head, header_length, parse_head

__all__ = ["Found", "Slots"]

_RECORDS_BYTES = 16 * 1024 * 1024
"""Records that were read last are kept up to here."""

_ATTEMPT_BYTES = 1024 * 1024
"""Records of attempts are shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A blob in a slot."""

    slot: Slot
    head: Head | None
    """None: it is damaged, or no share of this run."""
    problem: str | None = None
    """What is wrong with a share of this run."""


class Slots:
    """Looks into slots. Threads may share it."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings, namespace: str) -> None:
        self._service, self._settings, self._namespace = service, settings, namespace
        self._found: dict[Slot, Found] = {}
        self._records: dict[tuple[Slot, str], bytes] = {}
        self._attempts: dict[Slot, bytes] = {}
        self.look_secs = 2 * self._fetch_secs()
        """The longest that a look may take: what comes damaged is asked for once more."""

    def look(self, slot: Slot, *, fresh: bool = False) -> Found | None:
        """Return what stands in *slot*, or None; what was whole when it was looked at last is not asked for again."""
        known = None if fresh else self._found.get(slot)
        if known is not None:
            return known
        return self._look(slot)[0]

    def peek(self, slot: Slot) -> Found | None:
        """Return what is known to stand in *slot*, without asking."""
        return self._found.get(slot)

    def _look(self, slot: Slot) -> tuple[Found | None, bytes]:
        """Return what stands in *slot* now, and its record."""
        found, record = self._fetch(slot)
        if found is not None and found.problem is not None:
            found, record = self._fetch(slot)  # what comes damaged may have been damaged on its way
        before = self._found.get(slot)
        if found is None or found.head is None or (before is not None and before.head != found.head):
            self.forget(slot)
        if found is not None and found.head is not None:
            self._found[slot] = found
            self._keep((slot, found.head.seal), record)
        return found, record

    def forget(self, slot: Slot) -> None:
        """Look at *slot* anew the next time."""
        before = self._found.pop(slot, None)
        if before is not None and before.head is not None:
            self._records.pop((slot, before.head.seal), None)

    def keep_only(self, standing: Container[tuple[str, int]]) -> None:
        """Forget what stood at other than these pairs of namespace and step."""
        for slot in [slot for slot in list(self._found) if (slot.namespace, slot.wire) not in standing]:
            self.forget(slot)
        for slot in [slot for slot in list(self._attempts) if (slot.namespace, slot.wire) not in standing]:
            self.forget_attempt(slot)

    def _fetch_secs(self) -> float:
        return self._settings.retry_deadline_secs + deadline.allowance(_RECORDS_BYTES)

    def _fetch(self, slot: Slot) -> tuple[Found | None, bytes]:
        with deadline.within(self._fetch_secs()):
            try:
                body = self._service.open(slot)
            except KeyNotFoundError:
                return None, b""
            try:
                return self._judge(slot, body)
            except FormatError as error:
                problem = f"the share of rank {slot.rank} is damaged: {error.message}"
                return Found(slot=slot, head=None, problem=problem), b""
            finally:
                body.close()

    def _judge(self, slot: Slot, body: Body) -> tuple[Found, bytes]:
        first = body.take(FIRST_BYTES)
        if not first.startswith(SHARE_MAGIC):
            if slot.wire < MAX_STEP or first.startswith(ATTEMPT_MAGIC):
                return Found(slot=slot, head=None), b""  # another program counts steps without attempts
            raise FormatError(f"it begins with {first[:8]!r}")
        head = parse_head(body.take(header_length(first)))
        if head.namespace != self._namespace:
            return Found(slot=slot, head=None), b""
        if head.rank != slot.rank or slot.wire not in wire_steps(head.checkpoint):
            raise FormatError(f"it is that of {head.checkpoint}, rank {head.rank}")
        if body.size is not None and body.size != head.size:
            raise FormatError(f"it is {body.size} bytes long, {head.size} were sent")
        if head.record.size > MAX_BYTES:
            raise FormatError(f"a record of {head.record.size} bytes is none")
        record = body.take(head.record.size)
        if checksum.digest(record) != head.record_digest:
            raise FormatError(f"its record differs from its digest, or ends after {len(record)} bytes")
        return Found(slot=slot, head=head), record

    def _keep(self, key: tuple[Slot, str], record: bytes) -> None:
        # Single steps that are atomic: threads need no lock, which a fork could leave locked.
        self._records.pop(key, None)
        self._records[key] = record
        kept = list(self._records.items())
        surplus = sum(len(data) for _, data in kept) - _RECORDS_BYTES
        for old, data in kept[:-1]:
            if surplus <= 0:
                break
            self._records.pop(old, None)
            surplus -= len(data)

    def record(self, found: Found) -> bytes:
        """Return the record of a share.

        Raises:
            CorruptPartError: it is damaged.
            KeyNotFoundError: it is gone.
        """
        data = self._records.get((found.slot, self.sound(found).seal))
        if data is not None:
            return data
        now, data = self._look(found.slot)
        if now is None:
            raise KeyNotFoundError(f"share {found.slot} is gone", tier=self._service.tier)
        self.sound(now)
        return data

    def sound(self, found: Found) -> Head:
        """Return the head of a share.

        Raises:
            CorruptPartError: it is damaged.
        """
        if found.head is None:
            raise CorruptPartError(found.problem or f"{found.slot} is no share of ours", tier=self._service.tier)
        return found.head

    def attempt(self, slot: Slot) -> bytes | None:
        """Return the record of an attempt of this run that stands in *slot*, damaged or not, or None."""
        known = self._attempts.get(slot)
        if known is not None:
            return known
        try:
            body = self._service.open(slot)
        except KeyNotFoundError:
            return None
        try:
            if body.take(len(ATTEMPT_MAGIC)) != ATTEMPT_MAGIC:
                return None
            found = body.take(_ATTEMPT_BYTES)
        finally:
            body.close()
        with suppress(FormatError):
            if attempt_record_from_json(found).namespace != self._namespace:
                return None
        self._attempts[slot] = found
        return found

    def forget_attempt(self, slot: Slot) -> None:
        """Ask anew for the record of an attempt in *slot* the next time."""
        self._attempts.pop(slot, None)
