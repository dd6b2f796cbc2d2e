"""What writers and readers of one config share in a process: the engine, and whose turn it is."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed

from sm_tiered.errors import TieredError, typed
from sm_tiered.recipe import Recipe
from sm_tiered_dcp.compat.cluster import agree_on_service
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig, check_config
from sm_tiered_dcp.compat.load_guard import guard_of
from sm_tiered_dcp.compat.logs import Logs
from sm_tiered_dcp.compat.recipe import S3, recipe_of
from sm_tiered_dcp.compat.turns import Turns
from sm_tiered_dcp.engine import Engine, Lease, open_engine

__all__ = ["Session", "session_of"]

dist: Any = torch.distributed  # its functions are only partly typed

_OPENING_SECS = 600.0
"""How long the first collective may take: the recipe, which could say, is not known yet."""
_POLL_SECS = 0.1
_logger = logging.getLogger("sm_tiered_dcp")


@dataclass(slots=True, eq=False)
class Session:
    """One config's engine in this process; it and its memory are held until the process ends."""

    key: object
    """What it was opened for."""
    recipe: Recipe
    lease: Lease
    turns: Turns
    logs: Logs

    @property
    def engine(self) -> Engine:
        """The engine that all share."""
        return self.lease.engine

    def finish(self) -> None:
        """Wait until S3 has what was to go there, as long as the recipe says. Not collective."""
        end = time.monotonic() + self.engine.settings.drain_timeout_secs
        told = False
        while (late := self.turns.on_their_way()) and time.monotonic() < end:
            if not told:
                told = True
                self._say_waiting(late[-1].step, end)
            for handle in late:
                with suppress(TieredError):
                    handle.wait(S3, timeout=max(0.0, end - time.monotonic()))
        if (step := self._send_owed()) is not None:
            self._say_waiting(step, end)
            self._wait_for_queue(end)
        self._tell_failures()

    def _say_waiting(self, step: int, end: float) -> None:
        _logger.info(
            "waiting until S3 has step %d, for %.0f s at most (drain_timeout_secs); a signal ends the wait, and the "
            "drainer goes on without this process",
            step,
            max(0.0, end - time.monotonic()),
            extra=self._extra(step),
        )

    def _send_owed(self) -> int | None:
        """Hand the newest step to the drainer, in place of one whose turn had not come; return it."""
        engine = self.engine
        if self.turns.owed is None:
            return None
        step = engine.saver.promote_newest(frozenset({S3}))
        if step is None or engine.store.queue is None:
            return None
        self.turns.give_way(step, "it is the newest, and the training has ended")
        return step

    def _wait_for_queue(self, end: float) -> None:
        store = self.engine.store
        assert store.queue is not None
        while any(entry.tier == S3 for entry in store.queue.entries()) and time.monotonic() < end:
            store.start_drainer()
            time.sleep(_POLL_SECS)

    def _tell_failures(self) -> None:
        self.turns.look()
        first, more = self.turns.failures()
        if first is not None:
            more_text = f" ({more} more saves failed)" if more else ""
            _logger.error("%s%s", first, more_text, extra=self._extra(first.step))

    def _extra(self, step: int | None) -> dict[str, object]:
        return {"namespace": self.recipe.namespace, "rank": self.engine.group.rank, "step": step}

    def hand_over(self) -> None:
        """Leave what is on its way to the drainer, tell what failed, and close. Not collective."""
        try:
            self._send_owed()
            self._tell_failures()
        finally:
            self.close()

    def close(self) -> None:
        """Let the engine go, whoever still holds it. Not collective."""
        self.engine.end()
        self.logs.close()


_sessions: dict[tuple[int, str], Session] = {}


def session_of(config: object) -> Session:
    """Return the session of *config*, opened if there is none yet. Collective then.

    Raises:
        ConfigError: the config can't be used, or does not fit this job.
        TieredError: the tiers can't be opened.
    """
    checked = check_config(config)
    name, key = (os.getpid(), checked.namespace), (checked.s3_base, _job())
    found = _sessions.get(name)
    if found is not None and found.key != key:
        _sessions.pop(name).hand_over()
        found = None
    if found is None:
        found = _sessions[name] = _open(checked, key)
    found.logs.use(checked.logger)
    return found


def _open(config: SageMakerCheckpointConfig, key: object) -> Session:
    rank = int(dist.get_rank()) if _job() is not None else 0
    first = os.environ.get("LOCAL_RANK", str(rank)) == "0"
    logs = Logs(namespace=config.namespace, rank=rank, logger=config.logger, first=first)
    try:
        recipe = recipe_of(config, agree_on_service(_OPENING_SECS))
        lease = Lease(open_engine(recipe), "session")
    except BaseException:
        logs.close()
        raise
    guard = guard_of(config.namespace)
    # A reader that one rank alone could not make is asked about by all.
    guard.unchecked = any(lease.engine.group.gather(guard.unchecked))
    return Session(key=key, recipe=recipe, lease=lease, turns=Turns(lease.engine), logs=logs)


def _job() -> weakref.ref[Any] | None:
    """What tells this process group from an earlier one; None without."""
    return weakref.ref(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None


@atexit.register
def _finish_all() -> None:
    """Wait for S3: a script just ends, and its container, and with it the drainer, may end with it.

    Not after an exception that nobody caught, which Python leaves in `sys` before it comes here. A script that ends by
    ``sys.exit(1)`` waits as one that is done does: at this point Python has dropped the SystemExit and tells its status
    to nobody. Something in the place of ``sys.exit`` would see some of these calls, and also those that somebody
    catches, after which the last save would not be waited for. So it is said what is waited for, and what ends that;
    a script that has failed should raise, and ``SM_TIERED__DRAIN_TIMEOUT_SECS`` bounds the wait of any.
    """
    if any(getattr(sys, name, None) is not None for name in ("last_exc", "last_value")):
        return  # The training has failed: whoever watches must learn of it now.
    for (pid, _), session in list(_sessions.items()):
        if pid == os.getpid():
            try:
                session.finish()
            except Exception as error:  # the other sessions' saves are no worse for it
                _logger.error("%s", typed(error))  # noqa: TRY400 - a trace adds nothing
