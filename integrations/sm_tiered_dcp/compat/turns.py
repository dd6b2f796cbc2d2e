"""Which tiers a save goes to: all ranks alike, each tier by itself, so that a slow one holds up no other."""

from __future__ import annotations

import threading

from sm_tiered.errors import ConfigError, SaveSkippedError, TieredError, typed
from sm_tiered.events import DurableSkipped
from sm_tiered.handle import SaveHandle
from sm_tiered_dcp.compat.recipe import CLUSTER, MEMORY, S3
from sm_tiered_dcp.engine import Engine

__all__ = ["Turns"]

_LONGEST_REST = 64
"""So many saves, at most, leave a service alone that has failed."""


class Turns:
    """What is under way to each tier, and whose turn is next."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._has = {tier.name for tier in engine.settings.tiers}
        self._open: list[tuple[SaveHandle, str]] = []
        self._failure: TieredError | None = None
        """The first of them that nobody was told of."""
        self._more = 0
        self._lock = threading.Lock()
        """For both: DCP's thread tells them."""
        self._rest, self._pause = 0, 0
        """Saves for which the service is left alone, and how many that were when it failed last."""
        self.owed: int | None = None
        """The newest step that was to go to S3 while another was on its way there."""

    def take(self, step: int, *, to_s3: bool) -> tuple[str, ...]:
        """Return the tiers that *step* goes to. Collective.

        S3 takes one step at a time, and no save waits for it: one that comes while another is on its way gives its
        turn to the next save after that.

        Raises:
            ConfigError: on all ranks: one of them has *to_s3*, and there was no S3 when its config was first used.
        """
        self.look()
        busy = {tier for _, tier in self._open}
        mine = [to_s3, self.owed is not None, S3 in busy, CLUSTER in busy or self._rest > 0]
        wanted, owing, s3_busy, service_busy = map(bool, self._engine.group.max([int(flag) for flag in mine]))
        # Not before: a rank that left alone would let the others wait for its vote.
        if wanted and S3 not in self._has:
            raise ConfigError(
                "save_to_s3=True, but there was no s3_tier_base_path when this writer was made",
                hint="Set s3_tier_base_path first, on all ranks, then make the writer.",
                step=step,
            )
        self._rest = max(0, self._rest - 1)
        tiers = [MEMORY]
        if CLUSTER in self._has and not service_busy:
            tiers.append(CLUSTER)
        if wanted and s3_busy:
            self.give_way(step, "the save before it is still on its way there")
            self.owed = step
        elif S3 in self._has and (wanted or owing) and not s3_busy:
            tiers.append(S3)
        return tuple(tiers)

    def give_way(self, step: int, reason: str) -> None:
        """Let *step* take the place on S3 of the one that is owed, and tell of it."""
        older, self.owed = self.owed, None
        if older is not None and older != step:
            told = f"step {step} takes its place: {reason}"
            self._engine.store.events.emit(DurableSkipped(step=older, tier=S3, reason=told))

    def follow(self, handle: SaveHandle) -> None:
        """See how the save of *handle* goes on, until it has ended everywhere."""
        if S3 in handle.tiers and not handle.skipped(S3):
            self.give_way(handle.step, "the save before it was still on its way there")
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
                self._pause = min(2 * self._pause or 2, _LONGEST_REST) if error is not None else 0
                self._rest = self._pause
            elif error is not None and not isinstance(error, SaveSkippedError):
                with self._lock:
                    self._more += self._failure is not None
                    self._failure = self._failure or error

    def failures(self) -> tuple[TieredError | None, int]:
        """Return, once, why the first of the earlier saves that failed is not in memory or on S3, and how many more."""
        with self._lock:
            found = self._failure, self._more
            self._failure, self._more = None, 0
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
