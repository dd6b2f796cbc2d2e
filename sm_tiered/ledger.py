"""What has been promised and is not yet told: every save on every tier until its end has been delivered."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import cast

from sm_tiered import deadline
from sm_tiered.errors import DeadlineExceededError, SaveSkippedError, TieredError, typed
from sm_tiered.events import SaveDurable, SaveFailed, SaveSkipped
from sm_tiered.handle import LOOK_SECS, SaveHandle, TierState
from sm_tiered.store import Store

__all__ = ["Ledger"]


class Ledger:
    """The open entries of one rank."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: list[tuple[SaveHandle, str]] = []
        self._failure: TieredError | None = None
        self._saved_step = 0
        """Of the newest save."""

    def track(self, handle: SaveHandle, tier: str, state: TierState) -> None:
        """Follow how the save of *handle* goes on *tier*."""
        settings = self._store.settings
        durable = tier in self._store.tiers.durable
        handle.add(tier, state, settings.drain_timeout_secs if durable else settings.group_timeout_secs)
        self._open.append((handle, tier))
        self._saved_step = handle.step

    def skip(self, handle: SaveHandle, reason: str, tiers: Iterable[str]) -> None:
        """Say that the save is left out on those of *tiers* that it is not on the way to."""
        for tier in sorted(set(tiers) - set(handle.tiers)):
            state = TierState()
            state.settle(SaveSkippedError(reason, step=handle.step, tier=tier))
            self.track(handle, tier, state)
            self._store.events.emit(SaveSkipped(step=handle.step, reason=f"{tier}: {reason}", tier=tier))

    def deliver(self) -> TieredError | None:
        """Tell once, as an event, of each save that is durable or failed; return what ``on_error: raise`` wants raised.

        The caller raises it where all ranks can hear of it: a rank that left alone would let the others wait.
        """
        pending, self._open = self._open, []
        for handle, tier in pending:
            if not _done(handle, tier):
                self._open.append((handle, tier))
            elif (error := handle.exception(tier)) is None:
                self._tell_durable(handle, tier)
            elif not isinstance(error, SaveSkippedError):
                self._store.events.emit(SaveFailed(step=handle.step, tier=tier, error=str(error)))
                self._failure = self._failure or error
        failure, self._failure = self._failure, None
        return failure if self._store.settings.on_error == "raise" else None

    def _tell_durable(self, handle: SaveHandle, tier: str) -> None:
        if tier in self._store.tiers.durable:
            secs, lag = time.monotonic() - handle.begun_at, max(0, self._saved_step - handle.step)
            self._store.events.emit(SaveDurable(step=handle.step, tier=tier, secs=secs, lag_steps=lag))

    def wait(self, timeout_secs: float) -> None:
        """Wait until every save has ended on every tier, then `deliver`. Not collective.

        Raises:
            DeadlineExceededError: one has not; it goes on in the background.
        """
        with deadline.within(timeout_secs + LOOK_SECS):
            late = self._await_all(time.monotonic() + timeout_secs)
            failure = self.deliver()
        if failure is not None or late is not None:
            raise cast("TieredError", failure or late)

    def _await_all(self, end: float) -> DeadlineExceededError | None:
        late: DeadlineExceededError | None = None
        for handle, tier in list(self._open):
            try:
                handle.wait(tier, timeout=max(0.0, end - time.monotonic()))
            except DeadlineExceededError as error:
                if not handle.done(tier):
                    late = error
            except TieredError:
                continue  # deliver() tells of it.
        return late


def _done(handle: SaveHandle, tier: str) -> bool:
    """Whether it has ended; a tier that can't even be asked has, for one rank must not leave the others waiting."""
    try:
        return handle.done(tier)
    except Exception as error:
        handle.settle(tier, typed(error))
        return True
