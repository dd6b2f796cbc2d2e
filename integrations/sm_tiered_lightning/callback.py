"""`TieredCheckpoint`: asks the recipe's policies, once for each global step."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from sm_tiered.errors import ConfigError
from sm_tiered.recipe import load_recipe
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_lightning.checkpoint_io import TieredCheckpointIO
from sm_tiered_lightning.fit import Fit
from sm_tiered_lightning.moments import leave_sigterm_to_policies
from sm_tiered_lightning.overrides import Overrides
from sm_tiered_lightning.paths import BestModel, Paths
from sm_tiered_lightning.post_mortem import PostMortem
from sm_tiered_lightning.report import Report
from sm_tiered_lightning.serving import check_strategy, serve, shards, shards_state

__all__ = ["TieredCheckpoint"]


class TieredCheckpoint(Checkpoint):
    """Saves by the policies of a recipe: memory every N, durable every M, on preemption, at the end.

    A `Checkpoint`, so that Lightning adds none of its own. Works with a `TieredCheckpointIO` of the same recipe or
    without one: then it installs one, and ``ckpt_path="tiered://latest"`` works all the same.
    """

    save_top_k = -1
    """Loggers ask for it: all are kept that the recipe keeps."""

    def __init__(self, recipe: RecipeLike, *, on_exception: Literal["promote", "save"] = "promote") -> None:
        """Read *recipe*.

        Args:
            recipe: a path, a mapping or a `sm_tiered.recipe.Recipe`.
            on_exception: the newest step in memory always goes to the durable tiers then; ``save`` also keeps the
                state as it failed, under a name that nothing goes on from: see `PostMortem`.

        Raises:
            RecipeError: it can't be used.
            ConfigError: *on_exception* can't.
        """
        self.recipe = load_recipe(recipe)
        if on_exception not in ("promote", "save"):
            raise ConfigError(f"on_exception is {on_exception!r}", hint="Give 'promote' or 'save'.")
        self._post_mortem = PostMortem(self.recipe.settings()) if on_exception == "save" else None
        self._paths = Paths(best=BestModel.of(self.recipe.settings()))
        self._io: TieredCheckpointIO | None = None
        self._fit: Fit | None = None
        self._sigterm = Overrides()

    @property
    def last_model_path(self) -> str:
        """URI of the newest step that was saved."""
        return self._paths.last

    @property
    def best_model_path(self) -> str:
        """URI of the best step, by the metric of the recipe's ``keep: best``; empty where there is none."""
        return self._paths.best.path

    @property
    def best_model_score(self) -> torch.Tensor | None:
        """The metric of the best step."""
        return torch.tensor(self._paths.best.score) if self._paths.best.path else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See that this training can be served, and join the plugin or install one.

        Raises:
            ConfigError: the strategy can't be served, not with ``on_exception='save'`` where it shards its state, or
                the plugin has another recipe or is wrapped by another one.
            NamespaceInUseError: another launch trains in this namespace.
        """
        strategy: Any = trainer.strategy
        check_strategy(strategy)
        if self._post_mortem is not None and shards_state(strategy):
            raise ConfigError(
                f"on_exception='save' can't be had with {type(strategy).__name__}: each rank has a share only",
                hint="Leave it out: the newest step in memory goes to the durable tiers all the same.",
            )
        io = self._io = self._joined(strategy)
        io.attach(partial(shards, strategy), fits=stage == "fit")
        serve(strategy, io)
        # A namespace that is in use is heard of before the training starts.
        if stage == "fit" and io.session.checkpointer.notices_sigterm:
            self._sigterm = leave_sigterm_to_policies(trainer)

    def _joined(self, strategy: Any) -> TieredCheckpointIO:
        """Return the plugin of *strategy*, or install one."""
        io = strategy.checkpoint_io
        if isinstance(getattr(io, "checkpoint_io", None), TieredCheckpointIO):
            raise ConfigError(
                f"{type(io).__name__} wraps the TieredCheckpointIO",
                hint="Give that to the Trainer as it is: it saves in the background by itself.",
            )
        if not isinstance(io, TieredCheckpointIO):
            io = strategy.checkpoint_io = TieredCheckpointIO(self.recipe, files=io)
        elif io.recipe != self.recipe:
            raise ConfigError(
                "TieredCheckpoint and TieredCheckpointIO have different recipes", hint="Give both the same one."
            )
        return io

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up where the checkpoint that was loaded left off, and begin to ask the policies."""
        assert self._io is not None
        session = self._io.session
        if vars(trainer).get("fast_dev_run"):
            session.own = None
            return
        memory = self.recipe.settings().memory
        self._fit = Fit(trainer, session, self._paths, Report(trainer, self, memory.name if memory else None))
        self._fit.begin()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that metrics belong to this step."""
        if self._fit is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._fit.note_validation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Bring the newest step in memory to the durable tiers; a state that may be half updated is not captured."""
        if self._io is None:
            return
        self._io.fail()
        if trainer.validating or trainer.sanity_checking:
            # Lightning leaves the module as it was evaluated, and another training would go on with that.
            loop: Any = trainer.fit_loop.epoch_loop
            loop.val_loop._module_mode.restore(pl_module)
        fit, self._fit = self._fit, None
        try:
            if fit is not None and not fit.stopped:
                fit.rescue(self._post_mortem)
        finally:
            self._let_go(fit)

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept in a checkpoint."""
        return self._paths.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self._paths.load_state_dict(state_dict)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the tiers."""
        fit, self._fit = self._fit, None
        self._let_go(fit)
        if self._io is not None:
            self._io.teardown()

    def _let_go(self, fit: Fit | None) -> None:
        """Give Lightning back what stands in for its own."""
        if fit is not None:
            fit.end()
        self._sigterm.take_off()
