"""`TieredCheckpoint`: asks the recipe's policies, once for each global step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from sm_tiered.errors import ConfigError
from sm_tiered.recipe import load_recipe
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO
from sm_tiered_lightning.resume import go_on_with_next_epoch, restore_rng_before_first_batch
from sm_tiered_lightning.session import Session
from sm_tiered_lightning.uri import step_uri

__all__ = ["TieredCheckpoint"]

_SUPPORTED = (SingleDeviceStrategy, DDPStrategy)


class TieredCheckpoint(Checkpoint):
    """Saves by the policies of a recipe: memory every N, durable every M, on preemption, at the end.

    A `Checkpoint`, so that Lightning adds none of its own. Works with a `TieredCheckpointIO` of the same recipe or
    without one: then it installs one, and ``ckpt_path="tiered://latest"`` works all the same.
    """

    def __init__(self, recipe: RecipeLike) -> None:
        """Read *recipe*: a path, a mapping or a `sm_tiered.recipe.Recipe`.

        Raises:
            RecipeError: it can't be used.
        """
        self.recipe = load_recipe(recipe)
        self.last_model_path = ""
        """URI of the newest step that was saved."""
        self._io: TieredCheckpointIO | None = None
        self._asked = -1
        """The last global step that the policies were asked about."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that this training can be served, and join the plugin or install one.

        Raises:
            ConfigError: the strategy can't be served, or the plugin has another recipe.
        """
        strategy: Any = trainer.strategy
        if type(strategy) not in _SUPPORTED:
            raise ConfigError(
                f"the strategy {type(strategy).__name__} can't be served",
                hint="Use a single device or DDPStrategy.",
            )
        io = strategy.checkpoint_io
        if not isinstance(io, TieredCheckpointIO):
            io = strategy.checkpoint_io = TieredCheckpointIO(self.recipe, files=io)
        elif io.recipe != self.recipe:
            raise ConfigError(
                "TieredCheckpoint and TieredCheckpointIO have different recipes", hint="Give both the same one."
            )
        self._io = io
        io.fitting = stage == "fit"
        _save_on_every_rank(strategy, io)
        if stage == "fit":
            self._asked = -1
            _ = self._session  # a namespace that is in use is heard of before the training starts

    @property
    def _session(self) -> Session:
        assert self._io is not None
        return self._io.session

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up where the checkpoint that was loaded left off."""
        session = self._session
        self._asked = trainer.global_step
        if session.rng is not None:
            go_on_with_next_epoch(trainer)
            restore_rng_before_first_batch(trainer, session.rng)
            session.rng = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask the policies, where this batch ended a step and neither validation nor the end of the epoch follows.

        Lightning goes on in the wrong epoch from what was saved between an epoch's last batch and its end.
        """
        loop: Any = trainer.fit_loop
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if not validates and not loop.epoch_loop._num_ready_batches_reached():
            self._ask(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the policies about the step that validation followed, now that its metrics are known."""
        loop: Any = trainer.fit_loop.epoch_loop
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not loop._num_ready_batches_reached():
            self._ask(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the policies about the last step of the epoch."""
        self._ask(trainer)

    def _ask(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == self._asked or vars(trainer).get("fast_dev_run"):
            return
        self._asked = step
        connector: Any = vars(trainer)["_checkpoint_connector"]

        def dump() -> dict[str, Any]:
            self.last_model_path = step_uri(step)  # first, for it is part of what is saved
            return connector.dump_checkpoint(weights_only=False)

        self._session.maybe_save(step, dump, _metrics(trainer, self._session))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what waits for the end of the training, and wait for the drain."""
        self._session.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint."""
        return {"last_model_path": self.last_model_path}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.last_model_path = state_dict["last_model_path"]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the tiers."""
        if self._io is not None:
            self._io.teardown()


def _save_on_every_rank(strategy: Any, io: TieredCheckpointIO) -> None:
    """Lightning calls the plugin on rank 0 alone, and a save is every rank's."""

    io.on_every_rank = True
    strategy.save_checkpoint = io.save_checkpoint


def _metrics(trainer: Trainer, session: Session) -> Mapping[str, float]:
    """Return the metrics that keep policies rank checkpoints by, as far as they were logged."""
    logged = trainer.callback_metrics
    return {name: float(logged[name]) for name in session.metrics if name in logged}
