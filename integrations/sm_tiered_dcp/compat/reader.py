"""`SageMakerTieredStorageReader`: the predecessor's reader, over our tiers and over what the predecessor left."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from sm_tiered.errors import CheckpointNotFoundError, typed
from sm_tiered_dcp.compat.adoption import adopt
from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig
from sm_tiered_dcp.compat.fresh_optimizers import fill_fresh_optimizers
from sm_tiered_dcp.compat.session import session_to_load
from sm_tiered_dcp.compat.steps import step_in
from sm_tiered_dcp.reader import TieredStorageReader

__all__ = ["SageMakerTieredStorageReader"]


class SageMakerTieredStorageReader(TieredStorageReader):
    """For ``dcp.load``: the newest checkpoint that is whole on any tier, the same on all ranks, or one step.

    Where our tiers have none, the newest that the predecessor wrote for this namespace is taken over first. A fresh
    optimizer's ``state_dict()`` has no moments yet, and DCP loads only what it is given: they are put in.
    """

    def __init__(self, checkpoint_config: SageMakerCheckpointConfig, step: int | None = None) -> None:
        """Open what all writers and readers of this config share, the first time in a process. Collective then.

        Args:
            checkpoint_config: where to look.
            step: the step to load; None: the newest.

        Raises:
            ConfigError: the config or the step can't be used.
        """
        self._session = session_to_load(checkpoint_config)
        super().__init__(self._session.recipe, step=step)
        self.checkpoint_config = checkpoint_config
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Begin a load; take the step from DCP's ``checkpoint_id`` where that names one."""
        super().reset(step_in(checkpoint_id))

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Choose the checkpoint with all ranks and return its metadata. Collective.

        Raises:
            CheckpointNotFoundError: nothing was ever saved, by us or by the predecessor.
            RestoreError: see `sm_tiered.restore.walk`.
        """
        self._session.load_begins()
        try:
            self._metadata = self._found(*args, **options)
        except Exception as error:
            self._session.load_ended(typed(error))
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
        """Read and place what *plan* names, verified, and what a fresh optimizer could not ask for."""
        try:
            done = super().read_data(plan, planner)
            if self._metadata is not None:
                fill_fresh_optimizers(planner, self._metadata, super().read_data)
        except Exception as error:
            self._session.load_ended(typed(error))
            raise
        self._session.load_ended(None)
        return done
