"""One recipe in one process, as plugin and callback share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from sm_tiered.handle import SaveHandle
from sm_tiered.recipe import Recipe
from sm_tiered_dcp import Archive, TieredCheckpointer, TrainState
from sm_tiered_lightning.own_state import own_state, put_back, taken_from
from sm_tiered_lightning.uri import Wanted

__all__ = ["FreshStart", "Session", "Snapshot"]

_OPTIMIZERS = "train.optimizer"


class FreshStart(dict[str, Any]):
    """What Lightning is given when nothing was ever saved: false, so that it restores nothing, yet of some version."""

    def __bool__(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What is saved of a trainer."""

    checkpoint: dict[str, Any]
    """As Lightning dumps it: one stock ``.ckpt`` file, rank 0's."""
    train: TrainState | None = None
    """Model and optimizers where they are sharded, each rank's share of them; not in the checkpoint then."""
    rng_ahead: dict[str, Any] | None = None
    made: dict[str, Any] | None = None
    """These two: see `own_state`."""


class Session:
    """Saves and loads trainers: Lightning's own checkpoint, shards, and what is each rank's alone."""

    def __init__(self, recipe: Recipe) -> None:
        """Open the tiers. Collective."""
        self.checkpointer = TieredCheckpointer.from_recipe(recipe)
        self.own: dict[str, Any] | None = None
        """This rank's own state in the checkpoint that was loaded, until the training has taken it."""
        self.asked = False
        """Whether anything was asked for, be it there or not."""

    def maybe_save(
        self, step: int, take: Callable[[], Snapshot], metrics: Mapping[str, float], epochs_ended: int | None
    ) -> SaveHandle | None:
        """Save what *take* returns where the policies want *step*; it is called only then. Collective."""
        return self.checkpointer.maybe_save(
            step, lambda: self._state(take()), metrics=metrics, epochs_ended=epochs_ended
        )

    def save(self, step: int, taken: Snapshot) -> SaveHandle:
        """Save *taken* to all tiers. Collective."""
        return self.checkpointer.save(step, self._state(taken))

    def load(
        self, wanted: Wanted, train: TrainState | None = None, *, fits: bool, weights_only: bool
    ) -> dict[str, Any]:
        """Return the checkpoint that is *wanted*, the same on every rank but for what is each rank's. Collective.

        Args:
            wanted: which one.
            train: where they are sharded, model and optimizers, to be filled.
            fits: whether it is trained on; else optimizers are left alone.
            weights_only: whether nothing is unpickled, whatever the recipe says.

        Raises: see `TieredCheckpointer.restore`.
        """
        self.asked = True
        archive, per_rank = Archive(), {"lightning": (None,)}
        state: dict[str, Any] = {"checkpoint": archive, "per_rank": per_rank}
        if train is not None:
            state["train"] = train
        without = () if fits or train is None else (_OPTIMIZERS,)
        found = self.checkpointer.restore(
            state, wanted.step, per_rank=taken_from, without=without, weights_only=weights_only
        )
        restored = self.checkpointer.restored
        if found is None or restored is None:
            rank_zero_info("sm_tiered: nothing was ever saved in this namespace")
            return FreshStart({"pytorch-lightning_version": _version()})
        rank_zero_info(f"sm_tiered: step {found} restored from {restored.tier} in {restored.secs:.2f} s")
        (own,) = per_rank["lightning"]
        assert isinstance(own, dict)
        put_back(own, archive.value)
        self.own = own
        return archive.value

    def close(self, *, abandon: bool) -> None:
        """Wait for the drain and let go; *abandon*: let go at once, the training has failed."""
        if abandon:
            self.checkpointer.abandon()
        else:
            self.checkpointer.close()

    def _state(self, taken: Snapshot) -> dict[str, Any]:
        own = own_state(
            taken.checkpoint,
            rank=self.checkpointer.rank,
            rng_ahead=taken.rng_ahead,
            made=taken.made,
        )
        # A tuple is one value, whatever tensors stand in it.
        state = {"checkpoint": Archive(taken.checkpoint), "per_rank": {"lightning": (own,)}}
        return state if taken.train is None else {**state, "train": taken.train}


def _version() -> str:
    import lightning

    return str(lightning.__version__)
