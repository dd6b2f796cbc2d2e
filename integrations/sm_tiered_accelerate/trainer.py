"""`TieredTrainerCallback`: the Hugging Face Trainer saves by the policies of a recipe, and goes on from any tier."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from sm_tiered.errors import ConfigError, MismatchError, TieredError
from sm_tiered.file_loader import Get
from sm_tiered.recipe import load_recipe
from sm_tiered_accelerate.trainer_files import STATE_FILE, whose
from sm_tiered_accelerate.trainer_run import Run
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_dcp.tiered_files import TieredFiles

__all__ = ["TieredTrainerCallback"]


class TieredTrainerCallback(TrainerCallback):
    """Saves by the policies of a recipe: memory every N, durable every M, on preemption, at the end.

    ::

        tiered = TieredTrainerCallback("recipe.yaml")
        trainer = Trainer(..., callbacks=[tiered])
        trainer.train(resume_from_checkpoint=tiered.resolve())

    What the policies want, the Trainer writes into the memory tier, whatever ``save_strategy`` says; what that wants
    besides stands in ``output_dir`` as ever. Let it be the last of the callbacks: what others wish for after it is not
    known to it. The files are those of any checkpoint of the Trainer's, on each tier.
    """

    def __init__(self, recipe: RecipeLike) -> None:
        """Read *recipe*: a path, a mapping or a `sm_tiered.recipe.Recipe`.

        Raises:
            RecipeError: it can't be used.
        """
        self.recipe = load_recipe(recipe)
        self.preempted = False
        """Whether a SIGTERM ended the last training."""
        self._files: TieredFiles | None = None
        self._run: Run | None = None
        self._resolved: tuple[int | None] | None = None
        """What `resolve` found, since the tiers were opened."""
        self._log: Callable[[dict[str, float]], None] | None = None
        self._figures = dict[str, float]()

    # ---- what is asked for

    def resolve(self, step: int | None = None) -> str | None:
        """Return a directory with the newest complete, verified checkpoint, or that of *step*. Collective.

        It is called ``checkpoint-N``, has all that this rank reads, is for ``train(resume_from_checkpoint=…)`` alone,
        and gone after the first step. None when nothing was ever saved. Call it when `TrainingArguments` are made.

        Raises:
            ConfigError: there are several processes, and they have not found each other yet.
            MismatchError: another program wrote the checkpoint, or another number of ranks.
            RestoreError: see `TieredFiles.restore`.
        """
        found = list[Path]()
        files = self._open()
        restored = files.restore(
            found.append,
            step,
            called=lambda step: f"{PREFIX_CHECKPOINT_DIR}-{step}",
            inspect=_check_program,
            first=(STATE_FILE,),
            whose=whose,
            keep=True,
        )
        self._resolved = (restored,)
        if restored is None:
            return None
        counted = json.loads((found[-1] / STATE_FILE).read_text())["global_step"]
        if counted != restored:
            raise MismatchError(
                f"{STATE_FILE} is of step {counted}, the checkpoint of step {restored}",
                hint="Save with a TieredTrainerCallback: it takes the step from the Trainer.",
            )
        return str(found[-1])

    def latest(self) -> int | None:
        """Return the newest step that this process sees complete on any tier, or None. Not collective.

        Raises:
            ConfigError: it was not opened yet, or is closed.
            TierUnavailableError: a durable tier did not answer.
        """
        if self._files is None:
            raise ConfigError(
                "the tiers are not open", hint="They are from resolve(), or the start of a training, to its end."
            )
        return self._files.latest()

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save has ended on every tier it was due for; a training's end does so. Not collective.

        Args:
            timeout: in seconds; None: ``drain_timeout_secs`` of the recipe.

        Raises:
            DeadlineExceededError: one has not; it goes on in the background.
            SaveError: with ``on_error: raise``, what a save failed of.
        """
        if self._files is not None:
            self._files.wait(timeout)

    def log_with(self, log: Callable[[dict[str, float]], None]) -> None:
        """Let figures go to *log*: with ``trainer.log``, all that ``report_to`` names get them.

        A callback knows no trackers. Without this, the newest figures stand in ``state.log_history``.
        """
        self._log = log

    # ---- what the Trainer calls

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """See that this training can be served, and open the tiers if `resolve` has not.

        Raises:
            ConfigError: a checkpoint would not hold all of it, or it does not begin where `resolve` said.
            NamespaceInUseError: another launch trains in this namespace.
        """
        _check_training(args, state, model)
        if self._run is not None:  # the training before it has failed
            self._run.leave()
        files = self._open()
        _check_policies(files)
        self._check_start(files, state)
        self.preempted = False
        self._figures = {}
        self._run = Run(files, args, state, model, lambda found: self._tell(state, found))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell of what has become durable."""
        if self._run is not None:
            self._run.step_began()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the policies."""
        if self._run is not None:
            self._run.step_ended(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask them where the step was an epoch's last, or the training's."""
        if self._run is not None:
            self._run.epoch_ended(args, control)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Note what checkpoints are ranked by."""
        if self._run is not None:
            self._run.evaluated(args, control, metrics or {})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take in what the Trainer wrote, where the policies want it."""
        if self._run is not None:
            self._run.wrote(args, control)
            assert self._files is not None
            self.preempted = self._files.preempted

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the drain, and let go of the tiers.

        Raises:
            DeadlineExceededError: the drain took longer than ``drain_timeout_secs``; it goes on without us.
            SaveError: with ``on_error: raise``, what a save failed of.
        """
        run, self._run = self._run, None
        files, self._files = self._files, None
        self._resolved = None
        try:
            if run is not None:
                run.finish()
        finally:
            if files is not None:
                self.preempted = files.preempted
                files.abandon()  # it was waited for, or can't be

    # ---- how

    def _open(self) -> TieredFiles:
        if self._files is None:
            _check_launch()
            self._files = TieredFiles.from_recipe(self.recipe)
        return self._files

    def _check_start(self, files: TieredFiles, state: TrainerState) -> None:
        """See that a training that begins anew is meant to.

        Raises:
            ConfigError: it does not begin with what `resolve` returned.
        """
        step = state.global_step
        if self._resolved is not None:
            (resolved,) = self._resolved
            if resolved is not None and resolved != step:
                raise ConfigError(
                    f"resolve() returned {PREFIX_CHECKPOINT_DIR}-{resolved}, and this training begins at step {step}",
                    hint="Pass what it returns to train(resume_from_checkpoint=…), or do not call it.",
                )
            return
        if step or files.rank:
            return
        try:
            newest = files.latest()
        except TieredError as error:
            _warn(f"it can't be told what an earlier training has saved: {error}")
            return
        if newest is not None:
            _warn(
                f"this training begins at step 0, though step {newest} of an earlier one can be restored: "
                "train(resume_from_checkpoint=tiered.resolve()) goes on from there."
            )

    def _tell(self, state: TrainerState, found: dict[str, float]) -> None:
        if self._log is not None:
            self._log(found)
            return
        # Only the newest, for all of it is written with each checkpoint; and not last, where others look for theirs.
        history = state.log_history
        history[:] = [entry for entry in history if entry is not self._figures]
        self._figures = {**self._figures, **found, "epoch": state.epoch, "step": state.global_step}
        history.insert(max(0, len(history) - 1), self._figures)


def _check_training(args: TrainingArguments, state: TrainerState, model: Any) -> None:
    if args.save_only_model:
        raise ConfigError(
            "save_only_model is True: no training can go on from a checkpoint without optimizer and random state",
            hint="Only save_only_model=False will do: set it so in TrainingArguments.",
        )
    if state.is_hyper_param_search:
        raise ConfigError(
            "hyperparameter_search() can't be served: its trials would all be one training to the tiers",
            hint="Only Trainer.train() will do: leave the TieredTrainerCallback out of the search.",
        )
    if getattr(model, "is_distributed_loading_by_transformers", False):
        raise ConfigError(
            "the model was sharded when it was loaded (distributed_config): the Trainer can't save its optimizer then",
            hint="Load it whole, and shard it with TrainingArguments(fsdp=…).",
        )


def _check_policies(files: TieredFiles) -> None:
    if files.waits_for_metrics:
        raise ConfigError(
            "when_improved can't be served: the Trainer evaluates when a step has been saved already",
            hint="Set save_strategy='best' in TrainingArguments, and keep: {best: …} in the recipe.",
        )


def _check_launch() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world.isdigit() and int(world) > 1 and not torch.distributed.is_initialized():
        raise ConfigError(
            f"WORLD_SIZE is {world}, and these processes have not found each other yet",
            hint="Make the TrainingArguments before you call resolve(): they do that.",
        )


def _check_program(get: Get) -> None:
    try:
        get(STATE_FILE)
    except MismatchError as error:
        raise MismatchError(
            f"the Trainer did not write this checkpoint: it has no {STATE_FILE}",
            hint="Go on with the program that wrote it; a fresh start needs a namespace of its own.",
        ) from error


def _warn(text: str) -> None:
    warnings.warn(f"sm_tiered: {text}", stacklevel=2)
