"""One recipe in one process, as plugin and callback share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sm_tiered.handle import SaveHandle
from sm_tiered.recipe import Recipe
from sm_tiered_dcp import Archive, TieredCheckpointer
from sm_tiered_lightning.own_state import own_state, put_back
from sm_tiered_lightning.uri import Wanted

__all__ = ["FreshStart", "Session"]


class FreshStart(dict[str, Any]):
    """What Lightning is given when nothing was ever saved: false, so that it restores nothing, yet of some version."""

    def __bool__(self) -> bool:
        return False


class Session:
    """Saves and loads Lightning's own checkpoint as one stock ``.ckpt`` file, with what is each rank's beside it."""

    def __init__(self, recipe: Recipe) -> None:
        """Open the tiers. Collective."""
        self.checkpointer = TieredCheckpointer.from_recipe(recipe)
        self.rng: dict[str, Any] | None = None
        """Of the checkpoint that was loaded, until the training has taken it."""

    def maybe_save(
        self, step: int, dump: Callable[[], dict[str, Any]], metrics: Mapping[str, float]
    ) -> SaveHandle | None:
        """Save what *dump* returns where the policies want *step*; it is called only then. Collective."""
        return self.checkpointer.maybe_save(step, lambda: _state(dump()), metrics=metrics)

    def save(self, step: int, checkpoint: dict[str, Any]) -> SaveHandle:
        """Save *checkpoint* to all tiers. Collective."""
        return self.checkpointer.save(step, _state(checkpoint))

    def load(self, wanted: Wanted) -> dict[str, Any]:
        """Return the checkpoint that is *wanted*, the same on every rank but for what is each rank's. Collective.

        Raises: see `TieredCheckpointer.restore`.
        """
        archive, per_rank = Archive(), {"lightning": (None,)}
        found = self.checkpointer.restore({"checkpoint": archive, "per_rank": per_rank}, wanted.step)
        if found is None:
            return FreshStart({"pytorch-lightning_version": _version()})
        (own,) = per_rank["lightning"]
        assert isinstance(own, dict)
        put_back(own, archive.value)
        self.rng = own["rng"]
        return archive.value

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.checkpointer.rank == 0

    @property
    def metrics(self) -> frozenset[str]:
        """The names of the metrics that keep policies rank checkpoints by."""
        return self.checkpointer.metrics

    def finish(self) -> None:
        """Save what waits for the end of the training, and wait for the drain. Collective."""
        self.checkpointer.finish()

    def close(self, *, abandon: bool) -> None:
        """Wait for the drain and let go; *abandon*: let go at once, the training has failed."""
        if abandon:
            self.checkpointer.abandon()
        else:
            self.checkpointer.close()


def _state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    # A tuple is one value, whatever tensors stand in it.
    return {"checkpoint": Archive(checkpoint), "per_rank": {"lightning": (own_state(checkpoint),)}}


def _version() -> str:
    import lightning

    return str(lightning.__version__)
