"""Which tiers a save goes to: all ranks alike, each tier by itself, so that a slow one holds up no other."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

from sm_tiered.errors import SaveSkippedError, TieredError, typed
from sm_tiered.events import DurableSkipped
from sm_tiered.handle import SaveHandle
from sm_tiered_dcp.compat.recipe import CLUSTER, MEMORY, S3
from sm_tiered_dcp.engine import Engine

__all__ = ["Turns"]

_EXPECTED_SECS = 10.0
"""A save that is on its way to S3 for longer holds up no other."""
_LONGEST_REST = 64
"""So many saves, at most, leave a service alone that has failed."""


class Turns:
    """What is under way to each tier, and whose turn is next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._has = {tier.name for tier in engine.settings.tiers}
        self._open: list[tuple[SaveHandle, str]] = []
        self._failures: list[TieredError] = []
        self._lock = threading.Lock()
        """For them: DCP's thread tells them."""
        self._rest, self._failed = 0, 0
        """Saves for which the service is left alone, and how often it has failed on end."""
        self.owed: int | None = None
        """The newest step that was to go to S3 while another was on its way there."""

    def take(self, step: int, *, to_s3: bool) -> tuple[str, ...]:
        """Return the tiers that *step* goes to. Collective.

        S3 takes one step at a time. One that comes within seconds of another waits for that one until it is 10 s old,
        and then gives its turn to the next save: S3 saves that are further apart hold up nobody, nor does memory.
        """
        self.look()
        if to_s3:
            self._wait_for_s3()
        busy = {tier for _, tier in self._open}
        mine = [to_s3, S3 in busy, CLUSTER in busy or self._rest > 0]
        wanted, s3_busy, service_busy = map(bool, self._engine.group.max([int(flag) for flag in mine]))
        self._rest = max(0, self._rest - 1)
        tiers = [MEMORY]
        if CLUSTER in self._has and not service_busy:
            tiers.append(CLUSTER)
        if S3 in self._has and (wanted or self.owed is not None):
            if not s3_busy:
                tiers.append(S3)
                self.give_way(step, "the save before it was still on its way there")
            elif wanted:
                self.give_way(step, "the save before it is still on its way there")
                self.owed = step
        return tuple(tiers)

    def _wait_for_s3(self) -> None:
        for handle in self.on_their_way():
            left = _EXPECTED_SECS - (time.monotonic() - handle.begun_at)
            if left > 0:
                with suppress(TieredError):  # `look` tells of it
                    handle.wait(S3, timeout=left)
        self.look()

    def give_way(self, step: int, reason: str) -> None:
        """Let *step* take the place on S3 of the one that is owed, and tell of it."""
        older, self.owed = self.owed, None
        if older is not None and older != step:
            told = f"step {step} takes its place: {reason}"
            self._engine.store.events.emit(DurableSkipped(step=older, tier=S3, reason=told))

    def follow(self, handle: SaveHandle) -> None:
        """See how the save of *handle* goes on, until it has ended everywhere."""
        known = {(id(other), tier) for other, tier in self._open}
        self._open += [(handle, tier) for tier in handle.tiers if (id(handle), tier) not in known]

    def look(self) -> None:
        """Take note of what has ended since."""
        pending, self._open = self._open, []
        for handle, tier in pending:
            done, error = _state(handle, tier)
            if not done:
                self._open.append((handle, tier))
            elif tier == CLUSTER:
                self._failed = 0 if error is None else self._failed + 1
                self._rest = min(2**self._failed, _LONGEST_REST) if error is not None else 0
            elif error is not None and not isinstance(error, SaveSkippedError):
                with self._lock:
                    self._failures.append(error)

    def failures(self) -> list[TieredError]:
        """Return, once, why earlier saves are not in memory or on S3."""
        with self._lock:
            found, self._failures = self._failures, []
        return found

    def on_their_way(self) -> list[SaveHandle]:
        """Return the saves that S3 does not have yet."""
        self.look()
        return [handle for handle, tier in self._open if tier == S3]


def _state(handle: SaveHandle, tier: str) -> tuple[bool, TieredError | None]:
    """How it stands; a tier that can't be asked has ended."""
    try:
        return handle.done(tier), handle.exception(tier)
    except Exception as error:
        return True, typed(error)
