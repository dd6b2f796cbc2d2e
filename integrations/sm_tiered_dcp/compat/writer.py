"""`SageMakerTieredStorageWriter`: the predecessor's writer, over our tiers."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any, NoReturn

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sm_tiered.errors import ConfigError, DeadlineExceededError, SaveError, TieredError, typed
from sm_tiered.handle import SaveHandle
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig
from sm_tiered_dcp.compat.load_guard import guard_of
from sm_tiered_dcp.compat.session import session_of
from sm_tiered_dcp.compat.steps import NOT_GIVEN, step_in, step_of_save
from sm_tiered_dcp.writer import TieredStorageWriter

__all__ = ["SageMakerTieredStorageWriter"]

_SAVERS = "AsyncCheckpointExecutor"
"""How the names of DCP's own threads begin."""
_OURS = "sm_tiered"
"""And those of this library's, which may begin at any time and stay."""
_POLL_SECS = 0.05
_SLACK_SECS = 30.0
_logger = logging.getLogger("sm_tiered_dcp")


class SageMakerTieredStorageWriter(TieredStorageWriter):
    """For ``dcp.save`` and ``dcp.async_save``, as its own stager; make one for each save.

    A save goes to memory, to the cluster's in-memory service where there is one, and to S3 when the config's
    ``save_to_s3`` is true at the call. ``async_save`` returns when the state is copied, DCP has planned, and every
    rank's share is recorded in memory, digests and all: no collective is left that could meet the training's. Its
    future then says whether this save is in memory and, once, what became known of earlier ones: a save that failed on
    S3 is the exception of a later future, whose own step is saved nevertheless. ``dcp.save`` raises only for its own
    step; what it knows of earlier ones it logs.
    """

    def __init__(
        self, checkpoint_config: SageMakerCheckpointConfig, path: str | os.PathLike[str] = "", step: int = NOT_GIVEN
    ) -> None:
        """Open what all writers and readers of this config share, the first time in a process. Collective then.

        Args:
            checkpoint_config: where to save.
            path: names the step as ``step_<n>``, when *step* is not given.
            step: the step of the save.

        Raises:
            ConfigError: the config can't be used, ``save_to_s3`` has no ``s3_tier_base_path``, or there is no step.
            TieredError: why the last load failed: the training would begin anew over what is there.
            SaveError: the step lies before the newest, which was loaded.
        """
        chosen = step_of_save(path, step)
        self._session = session_of(checkpoint_config)
        guard_of(checkpoint_config.namespace).check(self._session.engine.group, chosen)
        super().__init__(self._session.recipe, step=chosen)
        self.step = chosen
        """The step that is saved, unless DCP is given a ``checkpoint_id`` of another form."""
        self.checkpoint_config = checkpoint_config
        if checkpoint_config.save_to_s3:
            checkpoint_config.check_s3()
        self._failure: TieredError | None = None
        """Why `stage` did not copy: this save's first collective of DCP's is where all ranks may hear of it."""
        self._refused: TieredError | None = None
        self._saver_thread: threading.Thread | None = None
        self._entered = threading.Event()
        self._threads: frozenset[threading.Thread] = frozenset()
        """Those there were before DCP's."""

    # ---- AsyncStager

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy *state_dict* into memory; the future tells of what fails, for it must not end the training."""
        self._entered.clear()
        self._saver_thread = self._failure = None
        try:
            self._choose_tiers()
            super().stage(state_dict)
            self._follow()
        except Exception as error:  # whatever it is: a rank that left alone would let the others wait
            self._failure = typed(error)
        self._threads = frozenset(threading.enumerate())
        return state_dict

    def _check_group(self) -> None:
        """Any group will do: `synchronize_staging` keeps the training away from it."""

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether DCP's thread works on a group that the training uses too."""
        return not self._group_taken

    def synchronize_staging(self) -> None:
        """Wait until DCP's thread has ended: its collectives run on the default group, where the training's do.

        Raises:
            DeadlineExceededError: it has not, within the time that one collective may take.
        """
        # Longer than a collective in that thread, which then tells which rank is missing.
        end = time.monotonic() + 2 * self._engine.settings.group_timeout_secs + _SLACK_SECS
        while not self._entered.wait(_POLL_SECS):
            new = set(threading.enumerate()) - self._threads
            if all(thread.name.startswith(_OURS) for thread in new):
                return  # It has ended without a call to us: the future tells why.
            if time.monotonic() >= end:
                raise self._late()
        assert self._saver_thread is not None
        self._saver_thread.join(max(0.0, end - time.monotonic()))
        if self._saver_thread.is_alive():
            raise self._late()

    def _late(self) -> DeadlineExceededError:
        return DeadlineExceededError(
            "DCP has not planned the save in time",
            hint="Look at the other ranks' logs: one of them has ended or hangs.",
            step=self.step,
        )

    def __reduce__(self) -> NoReturn:
        self._enter()
        super().__reduce__()

    # ---- StorageWriter

    def reset(self, checkpoint_id: Any = None) -> None:
        """Take the step from DCP's ``checkpoint_id`` where that names one; any other is but a name."""
        self._enter()
        staged = self._staged
        try:
            super().reset(step_in(checkpoint_id))
        except ConfigError as error:
            if staged:
                error.hint = f"{error.hint} Step {self.step} is saved: dcp.async_save copies before it tells its id."
            raise

    def storage_meta(self) -> StorageMeta | None:
        """Agree with all ranks on the save. Collective.

        Raises:
            ConfigError: ``dcp.async_save`` was given another stager.
        """
        self._enter()
        self._refused, self._failure = self._failure, None
        if self._refused is not None:
            return
        if not self._staged:
            if threading.current_thread().name.startswith(_SAVERS):
                raise ConfigError(
                    "dcp.async_save was given an async_stager of its own",
                    hint="Leave it out: the writer copies the state itself, and agrees with all ranks while it does.",
                    step=self.step,
                )
            self._choose_tiers()
        super().storage_meta()

    def _enter(self) -> None:
        self._saver_thread = threading.current_thread()
        self._entered.set()

    def _choose_tiers(self) -> None:
        self._tiers = self._session.turns.take(self._the_step(), to_s3=self.checkpoint_config.save_to_s3)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy what *plan* names into memory, unless `stage` did; then tell what became of earlier saves."""
        if self._refused is not None:
            raise self._refused
        done = super().write_data(plan, planner)
        if not self._copied:
            self._follow()
            self._log(*self._session.turns.failures())
        elif self.handle is not None:
            _tell(self.handle, *self._session.turns.failures())
        return done

    def _follow(self) -> None:
        if self.handle is not None:
            self._session.turns.follow(self.handle)

    def _log(self, earlier: TieredError | None, more: int) -> None:
        if earlier is not None:
            extra = {"namespace": self.checkpoint_config.namespace, "rank": self._engine.group.rank, "step": self.step}
            _logger.error("an earlier save failed%s: %s", f" (and {more} more)" if more else "", earlier, extra=extra)


def _tell(handle: SaveHandle, earlier: TieredError | None, more: int) -> None:
    """Raise that *handle* was left out everywhere, or what an *earlier* save failed of, and *more* than that one."""
    left_out = [error for tier in handle.tiers if (error := handle.exception(tier)) is not None]
    if handle.tiers and len(left_out) == len(handle.tiers):
        raise left_out[0]
    if earlier is not None:
        others = f" (and {more} more)" if more else ""
        raise SaveError(
            f"step {handle.step} is saved, but an earlier save failed{others}: {earlier.message}",
            hint=earlier.hint,
            step=earlier.step,
            tier=earlier.tier,
            rank=earlier.rank,
            key=earlier.key,
        ) from earlier
