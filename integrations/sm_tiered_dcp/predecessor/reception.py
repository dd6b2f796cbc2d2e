"""What stands in a slot of the cluster's service, received: so much of it as it may be, in time, and compared."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import xxhash

from sm_tiered import deadline
from sm_tiered.errors import CorruptPartError, TierUnavailableError
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_client import Body
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered_dcp.predecessor.temporary import using_temporary
from sm_tiered_dcp.predecessor.unpickling import MAX_BYTES

__all__ = ["BEHIND_BYTES", "Reception"]

BEHIND_BYTES = 1024 * 1024
"""So much may stand behind the last value of a shard: a save leaves nothing there, but it would do no harm."""
_RECEIVE_BYTES = 1024 * 1024


class Reception:
    """Receives from one service. Nothing is asked for again here."""

    def __init__(self, service: HyperPodService, settings: HyperPodSettings) -> None:
        self._service, self._settings = service, settings

    def receive(self, slot: Slot, take: Callable[[bytes], Any], *, end: int | None) -> tuple[int, bool]:
        """Give all that stands in *slot* to *take*; return its size, and whether it was compared with a checksum.

        Nothing that answers is believed to stop by itself: how much is taken, and for how long, has an end. *end*: as
        `Source.shard` has it; None: metadata stands there.

        Raises:
            CorruptPartError: it differs from its checksum, or is longer than it may be.
            TierUnavailableError: not all of it came, or not in time.
        """
        most = MAX_BYTES if end is None else end + BEHIND_BYTES
        body, found, size = self._service.open(slot), xxhash.xxh3_128(), 0
        try:
            if body.size is not None and body.size > most:
                raise self._too_long(slot, end, most, f"{body.size} bytes are announced")
            with deadline.within(self._settings.retry_deadline_secs + deadline.allowance(most)):
                while piece := body.receive(_RECEIVE_BYTES):
                    size += len(piece)
                    if size > most:
                        raise self._too_long(slot, end, most, f"{size} bytes came, and it goes on")
                    found.update(piece)
                    with using_temporary(str(slot), body.size):
                        take(piece)
                    self._check_in_time(slot, size)
        finally:
            body.close()
        if body.size is not None and size != body.size:
            raise TierUnavailableError(
                f"{slot}: {size} of {body.size} bytes came",
                hint="Try again; nothing was written over.",
                tier=self._settings.name,
            )
        return size, self._check(body, found.digest(), slot)

    def _too_long(self, slot: Slot, end: int | None, most: int, told: str) -> CorruptPartError:
        if end is None:
            what = f"the metadata in {slot} is longer than any: {told}, above {most}"
        else:
            what = f"the shard of rank {slot.rank} in {slot}: {told}, above {most}; the metadata says {end} bytes"
        return CorruptPartError(
            what,
            hint="It is of another save than its metadata, or no shard at all. Import an older step, or from S3.",
            step=slot.wire,
            rank=None if end is None else slot.rank,
            tier=self._settings.name,
        )

    def _check_in_time(self, slot: Slot, size: int) -> None:
        if deadline.remaining(1.0) <= 0:
            raise TierUnavailableError(
                f"{slot}: only {size} bytes had come when the deadline passed",
                hint="Try again when the service is less busy, or let it have longer: retry.deadline_secs of the "
                "recipe's hyperpod tier.",
                tier=self._settings.name,
            )

    def _check(self, body: Body, digest: bytes, slot: Slot) -> bool:
        """Return whether there is a checksum that it could be compared with: it may have none, or one of a kind that
        the predecessor does not write.
        """
        if not body.meta:
            return False
        try:
            told = json.loads(body.meta)
            known = told["algorithm"] == "xxh3_128"
            right = not known or base64.b64decode(told["checksum"], validate=True) == digest
        except (ValueError, TypeError, KeyError, RecursionError):
            known = right = False
        if not right:
            raise CorruptPartError(
                f"{slot} differs from its checksum, {body.meta[:80]!r}",
                hint="Import an older step, or from S3.",
                tier=self._settings.name,
            )
        return known
