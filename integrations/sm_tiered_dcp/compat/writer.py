"""`SageMakerTieredStorageWriter`: the predecessor's writer, over our tiers."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from sm_tiered.errors import DeadlineExceededError, SaveError, TieredError, typed
from sm_tiered.handle import SaveHandle
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig
from sm_tiered_dcp.compat.session import session_of
from sm_tiered_dcp.compat.steps import NOT_GIVEN, step_in, step_of_save
from sm_tiered_dcp.writer import TieredStorageWriter

__all__ = ["SageMakerTieredStorageWriter"]


class SageMakerTieredStorageWriter(TieredStorageWriter):
    """For ``dcp.save`` and ``dcp.async_save``; one for each save, or one for many.

    A save goes to memory, to the cluster's in-memory service where there is one, and to S3 when the config's
    ``save_to_s3`` is true at the call. ``async_save`` returns when the state is copied, DCP has planned, and every
    rank's share is recorded in memory: no collective is left that could meet the training's. Its future then says
    whether this save is in memory and, once, what became known of earlier ones: a save that failed on S3 is the
    exception of a later future, whose own step is saved nevertheless. ``dcp.save`` raises only for its own step.
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
            ConfigError: the config can't be used, or there is no step.
            TieredError: why the last load failed: the training would begin anew over what is there.
        """
        chosen = step_of_save(path, step)
        self._session = session_of(checkpoint_config)
        self._session.check_load()
        super().__init__(self._session.recipe, step=chosen)
        self.step = chosen
        """The step that is saved, unless DCP is given a ``checkpoint_id`` of another form."""
        self.checkpoint_config = checkpoint_config
        if checkpoint_config.save_to_s3:
            checkpoint_config.check_s3()
        self._failure: TieredError | None = None
        self._saver_thread: threading.Thread | None = None
        self._entered = threading.Event()

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
        end = time.monotonic() + self._engine.settings.group_timeout_secs
        if self._entered.wait(max(0.0, end - time.monotonic())):
            assert self._saver_thread is not None
            self._saver_thread.join(max(0.0, end - time.monotonic()))
        if self._saver_thread is None or self._saver_thread.is_alive():
            raise DeadlineExceededError(
                "DCP has not planned the save in time",
                hint="Look at the other ranks' logs: one of them has ended or hangs.",
                step=self.step,
            )

    # ---- StorageWriter

    def reset(self, checkpoint_id: Any = None) -> None:
        """Take the step from DCP's ``checkpoint_id`` where that names one; any other is but a name."""
        self._enter()
        super().reset(step_in(checkpoint_id))

    def storage_meta(self) -> StorageMeta | None:
        """Agree with all ranks on the save. Collective."""
        self._enter()
        if self._failure is not None:
            return
        if not self._staged:
            self._choose_tiers()
        super().storage_meta()

    def _enter(self) -> None:
        self._saver_thread = threading.current_thread()
        self._entered.set()

    def _choose_tiers(self) -> None:
        wanted = self.checkpoint_config.save_to_s3
        if wanted:
            self.checkpoint_config.check_s3()
        self._tiers = self._session.turns.take(self._the_step(), to_s3=wanted)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Copy what *plan* names into memory, unless `stage` did; then tell what became of earlier saves."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        done = super().write_data(plan, planner)
        if not self._copied:
            self._follow()
        elif self.handle is not None:
            _tell(self.handle, self._session.turns.failures())
        return done

    def _follow(self) -> None:
        if self.handle is not None:
            self._session.turns.follow(self.handle)


def _tell(handle: SaveHandle, earlier: list[TieredError]) -> None:
    """Raise that *handle* was left out everywhere, or what *earlier* saves failed of."""
    left_out = [error for tier in handle.tiers if (error := handle.exception(tier)) is not None]
    if handle.tiers and len(left_out) == len(handle.tiers):
        raise left_out[0]
    if earlier:
        first = earlier[0]
        more = f" (and {len(earlier) - 1} more)" if len(earlier) > 1 else ""
        raise SaveError(
            f"step {handle.step} is saved, but an earlier save failed{more}: {first.message}",
            hint=first.hint,
            step=first.step,
            tier=first.tier,
            rank=first.rank,
            key=first.key,
        ) from first
