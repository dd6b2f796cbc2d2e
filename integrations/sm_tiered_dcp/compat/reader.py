"""`SageMakerTieredStorageReader`: the predecessor's reader, over our tiers and over what the predecessor left."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from sm_tiered.errors import CheckpointNotFoundError
from sm_tiered_dcp.compat.adoption import adopt
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig, check_kind
from sm_tiered_dcp.compat.fresh_optimizers import find_fresh_optimizers
from sm_tiered_dcp.compat.load_guard import guard_of
from sm_tiered_dcp.compat.session import session_of
from sm_tiered_dcp.compat.steps import step_of_load
from sm_tiered_dcp.reader import TieredStorageReader

__all__ = ["SageMakerTieredStorageReader"]


class SageMakerTieredStorageReader(TieredStorageReader):
    """For ``dcp.load``: the newest checkpoint that is whole on any tier, the same on all ranks, or one step.

    Where our tiers have none, the newest that the predecessor wrote for this namespace is taken over first. A fresh
    optimizer's ``state_dict()`` has no moments yet, and DCP loads only what it is given: they are put in.
    After a load that failed no writer can be made until one has succeeded: see `load_guard`.
    """

    def __init__(self, checkpoint_config: SageMakerCheckpointConfig, step: int | None = None) -> None:
        """Open what all writers and readers of this config share, the first time in a process. Collective then.

        Args:
            checkpoint_config: where to look.
            step: the step to load; None: the newest.

        Raises:
            ConfigError: the config or the step can't be used.
        """
        self._guard = guard_of(check_kind(checkpoint_config).namespace)
        with self._guard.opening():
            self._session = session_of(checkpoint_config)
            super().__init__(self._session.recipe, step=step)
        self.checkpoint_config = checkpoint_config
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a load; take the step from DCP's ``checkpoint_id``, if there is one.

        Raises:
            ConfigError: it names another step than the reader was made for; or none, where the reader has none.
        """
        self._guard.begins()
        self._metadata = None
        try:
            super().reset(step_of_load(checkpoint_id, self._asked))
        except Exception as error:
            self._guard.ended(error, named=True)
            raise

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Choose the checkpoint with all ranks and return its metadata. Collective.

        Raises:
            CheckpointNotFoundError: nothing was ever saved, by us or by the predecessor.
            RestoreError: see `sm_tiered.restore.walk`.
        """
        self._guard.begins()
        try:
            self._metadata = self._found(*args, **options)
        except Exception as error:
            self._guard.ended(error, named=self._step is not None)
            raise
        return self._metadata

    def _found(self, *args: Any, **options: Any) -> Metadata:
        try:
            return super().read_metadata(*args, **options)
        except CheckpointNotFoundError as error:
            if not adopt(self._engine, self._session.recipe, step=self._step):
                if self._step is None:
                    error.hint = "This is a first run: the training starts from the beginning."
                raise
        return super().read_metadata(*args, **options)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and place what *plan* names, verified, and what a fresh optimizer could not ask for.

        Raises:
            MismatchError: an optimizer would get its moments in part.
        """
        metadata, named = self._metadata, self._step is not None
        try:
            fresh = find_fresh_optimizers(planner, metadata) if metadata is not None else []
            done = super().read_data(plan, planner)
            for optimizer in fresh:
                assert metadata is not None
                optimizer.fill(metadata, super().read_data)
        except Exception as error:
            self._guard.ended(error, named=named)
            raise
        self._guard.ended(None, named=named, step=self.step)
        return done
