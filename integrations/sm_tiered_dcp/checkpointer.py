"""`TieredCheckpointer`: the loop's own interface. Saves by policy, restores from the nearest verified tier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sm_tiered import layout
from sm_tiered_dcp.collector import collector_paused
from sm_tiered_dcp.engine import Engine
from sm_tiered_dcp.loop import SaveLoop
from sm_tiered_dcp.state_loader import PerRankRule, StateLoader
from sm_tiered_dcp.state_saver import State, StateSaver

__all__ = ["TieredCheckpointer"]


class TieredCheckpointer(SaveLoop[State]):
    """Checkpoints of one job: every N steps into memory, every M into durable tiers, as the recipe says.

    ``from_recipe``, ``restore``, ``prepare``, ``maybe_save`` where something may be due, ``save`` and ``finish`` are
    collective; ``latest``, ``wait``, ``close`` and handles never are. As a context manager it calls `finish` at a
    normal end where the recipe saves ``on_end``, and always `close`.
    """

    def _make_saver(self, engine: Engine) -> StateSaver:
        return StateSaver.of(engine)

    def prepare(self, state: Mapping[str, Any]) -> None:
        """Plan *state* and prepare memory for it in the background, so that the first save is as fast as the next.

        `restore` does so by itself where it finds a checkpoint. Collective; calls ``state_dict()``.
        """
        self._open.store.check_process()
        StateSaver.of(self._open).prepare(state)

    def restore(
        self,
        state: Mapping[str, Any],
        step: int | None = None,
        *,
        per_rank: PerRankRule | None = None,
        without: Sequence[str] = (),
        weights_only: bool = False,
    ) -> int | None:
        """Fill *state* in place from the newest complete, verified checkpoint, or from *step*; return its step.

        None when nothing was ever saved; the state is untouched then. Nothing is called on the state before all ranks
        know which checkpoint they will load. Collective.

        Args:
            state: a dict of tensors, nested Python values and Stateful objects, as it is saved.
            step: this step instead of the newest; what was saved after it is left behind. Where several launches
                saved it, the one on the present timeline is taken, else the newest launch's.
            per_rank: for another world size than the checkpoint's: ``per_rank(rank, world, saved_world)`` returns the
                saved rank whose ``per_rank`` values this rank takes, or None to leave its own.
            without: names of what was saved and is not wanted, with all below them, e.g. ``["train.optimizer"]`` where
                the model is only evaluated.
            weights_only: unpickle nothing that ``torch.load(weights_only=True)`` refuses, even where the recipe says
                ``allow_pickle: true``.

        Raises:
            ConfigError: *step* or *without* can't be used.
            CheckpointNotFoundError: no tier has *step*.
            MismatchError: the state and the checkpoint do not fit.
            TierUnavailableError: a tier did not answer, so what is newest can't be known.
            NothingRestorableError: checkpoints exist and none can be restored; the state is as it was.
            RestoreIncompleteError: a load failed after bytes were placed: the state must not be used.
        """
        engine = self._open
        wanted = layout.check_step(step) if step is not None else None
        settings = replace(engine.settings, allow_pickle=engine.settings.allow_pickle and not weights_only)
        loader = StateLoader(state, settings, engine.group, per_rank, without)
        with collector_paused():
            engine.saver.quiesce()
            self.restored = engine.store.restore(loader, step=wanted)
            if self.restored is None:
                return None
            engine.remember(self.restored)
            StateSaver.of(engine).prepare(state)
        return self.restored.step
