"""What a save gives back: how it stands on each tier, without a collective."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from sm_tiered import deadline
from sm_tiered.errors import ConfigError, DeadlineExceededError, SaveSkippedError, TieredError

__all__ = ["LOOK_SECS", "SaveHandle", "TierState"]

_POLL_SECS = (0.001, 0.1)
LOOK_SECS = 1.0
"""How far a look may overrun a wait: it asks the other ranks, one of which may hang."""


class TierState:
    """How one save stands on one tier. Whoever learns the end sets it once; *look* asks the world outside."""

    def __init__(self, look: Callable[[], tuple[bool, TieredError | None]] | None = None) -> None:
        self._look = look
        self._lock = threading.Lock()
        self._done = False
        self._error: TieredError | None = None

    def settle(self, error: TieredError | None) -> None:
        """Say that it ended, well (None) or not; the first word counts."""
        with self._lock:
            if not self._done:
                self._done, self._error = True, error

    def done(self) -> bool:
        """Return whether it ended."""
        if not self._done and self._look is not None:
            done, error = self._look()
            if done:
                self.settle(error)
        return self._done

    @property
    def error(self) -> TieredError | None:
        """Why it failed; None while it has not, or when it ended well."""
        return self._error


class SaveHandle:
    """One save of one step, as this rank sees it. Nothing here is collective; tiers are called as in the recipe."""

    def __init__(self, *, step: int, nudge: Callable[[], None]) -> None:
        self.step = step
        self.begun_at = time.monotonic()
        self.blocked_secs = 0.0
        """How long the call that made this held up the training."""
        self.saved_bytes = 0
        """Bytes of what this rank saved."""
        self._tiers: dict[str, TierState] = {}
        self._timeouts: dict[str, float] = {}
        self._nudge = nudge

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that this save was asked for."""
        return tuple(self._tiers)

    def add(self, tier: str, state: TierState, timeout_secs: float) -> None:
        """Ask for one more tier."""
        self._tiers[tier] = state
        self._timeouts[tier] = timeout_secs

    def state(self, tier: str) -> TierState | None:
        """Return how it stands on *tier*, if it was asked for."""
        return self._tiers.get(tier)

    def settle(self, tier: str, error: TieredError | None) -> None:
        """Say how the save on *tier* ended, if it was asked for."""
        if tier in self._tiers:
            self._tiers[tier].settle(error)

    def skipped(self, tier: str) -> bool:
        """Return whether the save was left out on *tier*."""
        return isinstance(self.exception(tier), SaveSkippedError)

    def done(self, tier: str) -> bool:
        """Return whether the save on *tier* has ended, well or not."""
        return self._state(tier).done()

    def exception(self, tier: str) -> TieredError | None:
        """Return why the save on *tier* failed; None while it is under way or when it is safe there."""
        state = self._state(tier)
        return state.error if state.done() else None

    def wait(self, tier: str, timeout: float | None = None) -> None:
        """Return once the checkpoint is complete on *tier*: for memory, once every rank's record is written.

        Args:
            tier: its name in the recipe.
            timeout: in seconds; None: the recipe's own deadline for that tier.

        Raises:
            TieredError: it failed there.
            DeadlineExceededError: it has not ended yet.
        """
        state = self._state(tier)
        limit = self._timeouts[tier] if timeout is None else timeout
        if math.isnan(limit):
            raise ConfigError("timeout is nan", hint="Give seconds, or None for the recipe's own deadline.")
        with deadline.within(max(0.0, limit) + LOOK_SECS):
            self._await(state, tier, limit)
        if state.error is not None:
            raise state.error

    def _await(self, state: TierState, tier: str, limit: float) -> None:
        begun = nudged = time.monotonic()
        end = begun + limit
        while not state.done():
            if time.monotonic() >= end:
                raise DeadlineExceededError(
                    f"not complete after {limit:.1f} s",
                    hint="It goes on in the background: wait again.",
                    step=self.step,
                    tier=tier,
                )
            now = time.monotonic()
            # A small share of the wait so far: a short one is told of at once, a long one costs nothing.
            pause = min(max(_POLL_SECS[0], (now - begun) / 32), _POLL_SECS[1])
            time.sleep(min(pause, max(0.0, end - now)))
            if time.monotonic() - nudged > 1.0:
                self._nudge()
                nudged = time.monotonic()

    def _state(self, tier: str) -> TierState:
        try:
            return self._tiers[tier]
        except KeyError:
            raise ConfigError(
                f"tier {tier!r} is not among those of this save: {list(self._tiers)}", step=self.step
            ) from None

    def __repr__(self) -> str:
        states = {
            name: "under way" if not state.done() else type(state.error).__name__ if state.error else "complete"
            for name, state in self._tiers.items()
        }
        return f"SaveHandle(step={self.step}, {states})"
