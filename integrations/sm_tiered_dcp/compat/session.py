"""What writers and readers of one config share in a process: the engine, whose turn it is, how the last load went."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed

from sm_tiered.errors import CheckpointNotFoundError, RestoreError, TieredError, error_from_json, error_to_json
from sm_tiered.recipe import Recipe
from sm_tiered_dcp.compat.cluster import agree_on_service
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig, check_config
from sm_tiered_dcp.compat.logs import begin_logs
from sm_tiered_dcp.compat.recipe import S3, recipe_of
from sm_tiered_dcp.compat.turns import Turns
from sm_tiered_dcp.engine import Engine, Lease, open_engine

__all__ = ["Session", "session_of", "session_to_load"]

dist: Any = torch.distributed  # its functions are only partly typed

_OPENING_SECS = 600.0
"""How long the first collective may take: the recipe, which could say, is not known yet."""
_POLL_SECS = 0.1
_FRESH = (
    "The last load failed, so this run would start from scratch over checkpoints that may be there: repeat the load. "
    "A fresh start needs a new namespace."
)
_logger = logging.getLogger("sm_tiered_dcp")


@dataclass(slots=True, eq=False)
class Session:
    """One config's engine in this process."""

    key: object
    """What it was opened for."""
    recipe: Recipe
    lease: Lease
    turns: Turns
    undo_logs: Callable[[], None]
    logger: logging.Logger | None
    load_failure: TieredError | None = None
    """Why the last load has not ended well."""
    load_unchecked: bool = False
    """Whether a load was begun since a writer last asked how the loads went."""

    @property
    def engine(self) -> Engine:
        """The engine that all share."""
        return self.lease.engine

    # ---- loads

    def load_begins(self) -> None:
        """Until it is said that it ended well, it did not: DCP itself may refuse what was found."""
        self.load_unchecked = True
        self.load_failure = RestoreError("the last load did not end", hint="It raised the reason.")

    def load_ended(self, error: TieredError | None) -> None:
        """Say how the load went; that nothing was ever saved is well."""
        self.load_failure = None if isinstance(error, CheckpointNotFoundError) else error

    def check_load(self) -> None:
        """Raise on all ranks what the last load failed of. Collective after a load.

        Scripts catch whatever a load raises and begin anew: then the job would go on as if nothing had been saved.
        """
        if not self.load_unchecked:
            return
        failure = self.load_failure
        failures = self.engine.group.gather(error_to_json(failure) if failure is not None else None)
        found = failure or next((error_from_json(facts) for facts in failures if facts is not None), None)
        if found is None:
            self.load_unchecked = False
            return
        again = error_from_json(error_to_json(found))
        again.hint = f"{found.hint} {_FRESH}" if found.hint else _FRESH
        raise again from found

    # ---- the end

    def finish(self) -> None:
        """Wait until S3 has what was to go there, as long as the recipe says. Not collective."""
        engine, end = self.engine, time.monotonic() + self.engine.settings.drain_timeout_secs
        if S3 not in {tier.name for tier in engine.settings.tiers}:
            return
        told = False
        while (late := self.turns.on_their_way()) and time.monotonic() < end:
            if not told:
                told = True
                _logger.info("waiting until S3 has step %d", late[-1].step, extra=self._extra(late[-1].step))
            for handle in late:
                with suppress(TieredError):
                    handle.wait(S3, timeout=max(0.0, end - time.monotonic()))
        if self.turns.owed is not None:
            self._send_owed(end)
        for failure in self.turns.failures():
            _logger.error("%s", failure, extra=self._extra(failure.step))

    def _send_owed(self, end: float) -> None:
        """Bring the newest step to S3, in place of one whose turn had not come."""
        engine = self.engine
        step = engine.saver.promote_newest(frozenset({S3}))
        if step is None or engine.store.queue is None:
            return
        self.turns.give_way(step, "it is the newest, and the training has ended")
        _logger.info("waiting until S3 has step %d", step, extra=self._extra(step))
        while any(entry.tier == S3 for entry in engine.store.queue.entries()) and time.monotonic() < end:
            engine.store.start_drainer()
            time.sleep(_POLL_SECS)

    def _extra(self, step: int | None) -> dict[str, object]:
        return {"namespace": self.recipe.namespace, "rank": self.engine.group.rank, "step": step}

    def close(self) -> None:
        """Let the engine go, with all that still hold it. Not collective."""
        engine = self.engine
        # A group that was destroyed with the job's own can't be destroyed again.
        with suppress(ValueError):
            while engine.users > 0:
                engine.close()
        self.undo_logs()


_sessions: dict[tuple[int, str], Session] = {}
_not_opened: dict[tuple[int, str], TieredError] = {}
"""Why a reader could not even begin to load."""


def session_to_load(config: object) -> Session:
    """Return the session of *config*; that there can be none counts as a load that failed. Otherwise `session_of`."""
    try:
        return session_of(config)
    except TieredError as error:
        if isinstance(config, SageMakerCheckpointConfig):
            _not_opened[os.getpid(), config.namespace] = error
        raise


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
        _sessions.pop(name).close()
        found = None
    if found is None:
        found = _sessions[name] = _open(checked, key)
    elif found.logger is not checked.logger:
        found.undo_logs()
        found.undo_logs, found.logger = _begin_logs(checked), checked.logger
    return found


def _open(config: SageMakerCheckpointConfig, key: object) -> Session:
    undo_logs = _begin_logs(config)
    try:
        recipe = recipe_of(config, agree_on_service(_OPENING_SECS))
        lease = Lease(open_engine(recipe), "session")
    except BaseException:
        undo_logs()
        raise
    found = Session(
        key=key, recipe=recipe, lease=lease, turns=Turns(lease.engine), undo_logs=undo_logs, logger=config.logger
    )
    found.load_failure = _not_opened.pop((os.getpid(), config.namespace), None)
    found.load_unchecked = any(lease.engine.group.gather(found.load_failure is not None))
    return found


def _begin_logs(config: SageMakerCheckpointConfig) -> Callable[[], None]:
    rank = int(dist.get_rank()) if _job() is not None else 0
    first = os.environ.get("LOCAL_RANK", str(rank)) == "0"
    return begin_logs(namespace=config.namespace, rank=rank, logger=config.logger, first=first)


def _job() -> int | None:
    """What tells this process group from an earlier one; None without."""
    return id(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else None


@atexit.register
def _finish_all() -> None:
    """A script just ends; its container, and with it the drainer, may end with it."""
    if getattr(sys, "last_value", None) is not None:
        return  # The training has failed: whoever watches must learn of it now.
    for (pid, _), session in list(_sessions.items()):
        if pid == os.getpid():
            try:
                session.finish()
            except TieredError as error:
                _logger.error("%s", error)  # noqa: TRY400 - a trace adds nothing
