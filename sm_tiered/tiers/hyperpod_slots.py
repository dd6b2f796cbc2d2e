"""What stands in single slots of the HyperPod service: looked at once, and remembered while it is whole."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from sm_tiered import checksum, deadline
from sm_tiered.errors import CorruptPartError, FormatError, KeyNotFoundError
from sm_tiered.layout import MAX_STEP
from sm_tiered.manifest import attempt_record_from_json
from sm_tiered.records import CheckpointId
from sm_tiered.sealed_json import MAX_BYTES
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_chain import wire_steps
from sm_tiered.tiers.hyperpod_client import Body
from sm_tiered.tiers.hyperpod_looks import once, unsay
from sm_tiered.tiers.hyperpod_manifests import MANIFEST_MAGIC, Commit, parse_commit, parse_commit_head
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered.tiers.hyperpod_shares import ATTEMPT_MAGIC, FIRST_BYTES, SHARE_MAGIC, Head, header_length, parse_head

__all__ = ["Found", "Kind", "Leave", "Slots"]

_RECORDS_BYTES = 16 * 1024 * 1024
"""Records that were read last are kept up to here."""

_ATTEMPT_BYTES = 1024 * 1024
"""Records of attempts are shorter."""


Leave = Callable[[Slot, Head, Body], None]
"""Takes a share of which header and record were received, and closes it some time."""


class Kind(Enum):
    """What a blob is, or was before it was damaged, as far as can be told."""

    SHARE = "share"
    MANIFEST = "manifest"
    OTHER = "other"
    """Another program's, another run's, or the record of an attempt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A blob in a slot."""

    slot: Slot
    kind: Kind
    head: Head | None = None
    """Of a share; None: it is damaged, or none of this run."""
    commit: Commit | None = None
    """A manifest blob; None: it is damaged, or none of this run."""
    problem: str | None = None
    """What is wrong with a share or a manifest of this run."""

    @property
    def checkpoint(self) -> CheckpointId | None:
        """Whose it is, where it tells."""
        told = self.head or self.commit
        return None if told is None else told.checkpoint


class Slots:
    """Looks into slots. Threads may share it."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings, namespace: str) -> None:
        self._service, self._namespace = service, namespace
        self._found: dict[Slot, Found] = {}
        self._records: dict[tuple[Slot, str], bytes] = {}
        self._attempts: dict[Slot, bytes] = {}
        self._fetch_secs = settings.retry_deadline_secs + deadline.allowance(_RECORDS_BYTES)
        self.look_secs = 2 * self._fetch_secs
        """The longest that a look may take: what comes damaged is asked for once more."""

    def look(self, slot: Slot, *, fresh: bool = False, leave: Leave | None = None) -> Found | None:
        """Return what stands in *slot*, or None; what was whole when it was looked at last is not asked for again.

        *fresh*: ask again, once in a pass. *leave*: what takes a share that was asked for and is to be read on, instead
        of closing it. What this process has written is not known before it was looked at: the service may have lost it.
        """
        known = None if fresh else self._found.get(slot)
        return known or once((self, slot), lambda: self._look(slot, leave)[0])

    def peek(self, slot: Slot) -> Found | None:
        """Return what is known to stand in *slot*, without asking."""
        return self._found.get(slot)

    def wrote(self, found: Found) -> None:
        """Remember a manifest that was just written: should it be missed later, a share of it may be gone."""
        self.forget(found.slot)
        self._found[found.slot] = found

    def _look(self, slot: Slot, leave: Leave | None = None) -> tuple[Found | None, bytes]:
        """Return what stands in *slot* now, and its record."""
        found, record = self._fetch(slot, leave)
        if found is not None and found.problem is not None:
            found, record = self._fetch(slot, leave)  # what comes damaged may have been damaged on its way
        before = self._found.get(slot)
        if found is None or found.checkpoint is None or before != found:
            self.forget(slot)
        if found is not None and found.checkpoint is not None:
            self._found[slot] = found
            if found.head is not None:
                self._keep((slot, found.head.seal), record)
        return found, record

    def forget(self, slot: Slot) -> None:
        """Look at *slot* anew the next time."""
        unsay((self, slot))
        before = self._found.pop(slot, None)
        if before is not None and before.head is not None:
            self._records.pop((slot, before.head.seal), None)

    def keep_only(self, standing: Container[tuple[str, int]]) -> None:
        """Forget what stood at other than these pairs of namespace and step."""
        for slot in [slot for slot in list(self._found) if (slot.namespace, slot.wire) not in standing]:
            self.forget(slot)
        for slot in [slot for slot in list(self._attempts) if (slot.namespace, slot.wire) not in standing]:
            self.forget_attempt(slot)

    def _fetch(self, slot: Slot, leave: Leave | None) -> tuple[Found | None, bytes]:
        with deadline.within(self._fetch_secs):
            try:
                body = self._service.open(slot)
            except KeyNotFoundError:
                return None, b""
            left = False
            try:
                first = body.take(FIRST_BYTES)
                if first.startswith(MANIFEST_MAGIC):
                    return self._judge_manifest(slot, first, body), b""
                found, record = self._judge(slot, first, body)
                if leave is not None and found.head is not None:
                    left = True
                    leave(slot, found.head, body)
                return found, record
            finally:
                if not left:
                    body.close()

    def _judge(self, slot: Slot, first: bytes, body: Body) -> tuple[Found, bytes]:
        if not first.startswith(SHARE_MAGIC) and (slot.wire < MAX_STEP or first.startswith(ATTEMPT_MAGIC)):
            return Found(slot=slot, kind=Kind.OTHER), b""  # another program counts steps without attempts
        try:
            return self._share(slot, first, body)
        except FormatError as error:
            problem = f"the share of rank {slot.rank} is damaged: {error.message}"
            return Found(slot=slot, kind=Kind.SHARE, problem=problem), b""

    def _share(self, slot: Slot, first: bytes, body: Body) -> tuple[Found, bytes]:
        if not first.startswith(SHARE_MAGIC):
            raise FormatError(f"it begins with {first[:8]!r}")
        head = parse_head(body.take(header_length(first)))
        if head.namespace != self._namespace:
            return Found(slot=slot, kind=Kind.OTHER), b""
        if head.rank != slot.rank or slot.wire not in wire_steps(head.checkpoint):
            raise FormatError(f"it is that of {head.checkpoint}, rank {head.rank}")
        if body.size is not None and body.size != head.size:
            raise FormatError(f"it is {body.size} bytes long, {head.size} were sent")
        if head.record.size > MAX_BYTES:
            raise FormatError(f"a record of {head.record.size} bytes is none")
        record = body.take(head.record.size)
        if checksum.digest(record) != head.record_digest:
            raise FormatError(f"its record differs from its digest, or ends after {len(record)} bytes")
        return Found(slot=slot, kind=Kind.SHARE, head=head), record

    def _judge_manifest(self, slot: Slot, first: bytes, body: Body) -> Found:
        try:
            head = parse_commit_head(body.take(header_length(first)))
            if head.namespace != self._namespace:
                return Found(slot=slot, kind=Kind.OTHER)
            if head.rank != slot.rank or slot.wire not in wire_steps(head.checkpoint):
                raise FormatError(f"it is that of {head.checkpoint}, from slot {head.rank}")
            # A byte more than it should have: one that goes on is none.
            return Found(slot=slot, kind=Kind.MANIFEST, commit=parse_commit(head, body.take(head.size + 1)))
        except FormatError as error:
            return Found(slot=slot, kind=Kind.MANIFEST, problem=f"the manifest is damaged: {error.message}")

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
