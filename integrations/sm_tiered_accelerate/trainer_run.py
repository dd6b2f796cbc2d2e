"""One training of the Hugging Face Trainer, from its start to its end: what is asked, written and saved when."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.training_args import TrainingArguments

from sm_tiered.figures import Figures
from sm_tiered.schedule import Due
from sm_tiered_accelerate.trainer_files import STATE_FILE, Detour, Intake
from sm_tiered_dcp.tiered_files import TieredFiles

__all__ = ["Run"]


@dataclass(slots=True, kw_only=True)
class _Pending:
    """A save that the policies want, until the Trainer has written it."""

    due: Due
    ending: bool
    undecided: bool = False
    """Whether an evaluation comes before the save: then it is decided only after that where it is written."""


class Run:
    """One training, from its start to its end."""

    def __init__(
        self,
        files: TieredFiles,
        args: TrainingArguments,
        state: TrainerState,
        model: Any,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """Serve the Trainer that is about to train *model* by *args*; *log* gets figures. Collective."""
        self._files, self._state, self._model, self._log = files, state, model, log
        self._staging = files.staging_here()
        nodes, given = set(files.gather(files.ranks_here[0])), _loose(args)
        sharded = given.fsdp or given.deepspeed or given.parallelism_config
        self._each_node = len(nodes) > 1 and files.memory is not None and not sharded
        self._detour = Detour()
        self._began = state.global_step
        self._asked: int | None = None
        self._pending: _Pending | None = None
        self._metrics: tuple[int, dict[str, Any]] = (-1, {})
        self._best: str | None = None
        self._figures = Figures(self._tell, files.memory.name if files.memory is not None else None)

    # ---- what the Trainer tells of

    def step_began(self) -> None:
        """Tell of what has become durable."""
        # Only here: what is logged makes the Trainer forget that it was about to log, at any later moment of a step.
        self._figures.look(self._state.global_step)

    def step_ended(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Ask the policies, unless the epoch's end follows, which belongs to this step."""
        self._detour.end()
        self._files.let_go()  # the Trainer reads random state from it when the first batch is there
        if not (self._epochs_ended() or control.should_training_stop or control.should_epoch_stop):
            self._ask(args, control)

    def epoch_ended(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Ask the policies where a whole epoch is over, or the training."""
        self._detour.end()
        step, ended = self._state.global_step, self._epochs_ended()
        over = control.should_training_stop or step >= self._state.max_steps
        ending = over and not self._files.preempted
        if step > self._began and (step != self._asked or ended or ending):
            self._ask(args, control, ended, ending=ending)

    def evaluated(self, args: TrainingArguments, control: TrainerControl, metrics: Mapping[str, Any]) -> None:
        """Note metrics, which belong to this step, and decide where a save that follows is written."""
        step, (noted, found) = self._state.global_step, self._metrics
        self._metrics = (step, {**(found if noted == step else {}), **metrics})
        if self._pending is None or not self._pending.undecided:
            return
        if args.save_strategy != SaveStrategy.BEST:
            self._divert(args)
        else:
            best = _is_best(args, self._state, self._metrics[1])
            if best is None:  # several evaluations make one
                return
            if not best:  # the Trainer forgets every other wish for a save then
                self._divert(args, save_strategy=SaveStrategy.NO)
        self._pending.undecided = False

    def wrote(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Take in what the Trainer wrote. Collective, and so is what comes before it."""
        step, staged = self._state.global_step, self._detour.taken
        directory = Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{step}")
        try:
            if staged:
                self._put_best_back(args, directory)
        finally:
            self._detour.end()
        pending, self._pending = self._pending, None
        if pending is None:
            return
        intake = Intake(files=self._files, directory=directory, staged=staged)
        handle = self._files.save_due(step, intake.take, pending.due, metrics=self._ranked(step), urgent=pending.ending)
        if handle is not None and self._state.is_world_process_zero:
            self._figures.saved(handle)
        if self._files.preempted:
            control.should_training_stop = True

    def finish(self) -> None:
        """Wait for the drain; where nothing was left to train, what was restored is what the end wants.

        Raises: see `TieredFiles.finish`.
        """
        self.leave()
        if self._pending is not None:
            tiers = ", ".join(sorted(self._pending.due.tiers))
            warnings.warn(f"sm_tiered: the Trainer did not write the last save that {tiers} wanted", stacklevel=2)
        if self._asked is None:
            self._files.finish()
        else:
            self._files.wait()
        self._figures.look(self._state.global_step)

    def leave(self) -> None:
        """Give the Trainer's arguments back. Can be called many times."""
        self._detour.end()

    # ---- asking

    def _ask(
        self, args: TrainingArguments, control: TrainerControl, ended: int | None = None, *, ending: bool = False
    ) -> None:
        step, late = self._state.global_step, self._pending
        self._asked = step
        due = self._files.ask(step, epochs_ended=ended, ending=ending)
        if late is not None:  # the Trainer did not write it
            due = replace(due, tiers=due.tiers | late.due.tiers)
        if not due.tiers:
            control.should_training_stop |= self._files.preempted
            return
        wanted = control.should_save or args.push_to_hub
        if args.save_strategy == SaveStrategy.BEST and control.should_evaluate:
            wanted = False  # whatever was wished for, the evaluation decides
        control.should_save = True
        undecided = control.should_evaluate and not wanted
        self._pending = _Pending(due=due, ending=ending, undecided=undecided)
        if not wanted and not undecided:
            self._divert(args)

    def _epochs_ended(self) -> int | None:
        """How many epochs are over where one ends with this step. Not where the data does not say how long it is."""
        epoch = self._state.epoch
        return int(epoch) if epoch and float(epoch).is_integer() else None

    def _ranked(self, step: int) -> dict[str, Any]:
        """The metrics that checkpoints are ranked by, where all of them are of this step."""
        noted, found = self._metrics
        wanted = self._files.metrics
        return {name: found[name] for name in wanted} if noted == step and wanted <= found.keys() else {}

    # ---- where the Trainer writes

    def _divert(self, args: TrainingArguments, **others: Any) -> None:
        """Let the Trainer write what only the policies want into memory."""
        if args.push_to_hub:
            return
        self._best = self._state.best_model_checkpoint
        if self._each_node:
            # Each node's memory is to have all of it.
            others["save_on_each_node"] = True
            self._detour.take(args, self._staging, **others)
            self._detour.write_on_each_node(self._model)
        else:
            self._detour.take(args, self._staging, **others)

    def _put_best_back(self, args: TrainingArguments, directory: Path) -> None:
        """The Trainer takes what it writes at the best step for the best model's; this will be gone in a moment."""
        if self._state.best_model_checkpoint == str(directory):
            self._state.best_model_checkpoint = self._best
            if _loose(args).should_save:
                self._state.save_to_json(str(directory / STATE_FILE))

    # ---- figures

    def _tell(self, found: Mapping[str, float]) -> None:
        self._log(dict(found))


def _loose(args: TrainingArguments) -> Any:
    """Return *args* without its types, which are not all known."""
    return args


def _is_best(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, Any]) -> bool | None:
    """Whether the Trainer will find these *metrics* the best; None where they have not what it looks at."""
    name = args.metric_for_best_model or ""
    value = metrics.get(name if name.startswith("eval_") else f"eval_{name}")
    if value is None or state.best_metric is None:
        return None if value is None else True
    return bool(value > state.best_metric) if args.greater_is_better else bool(value < state.best_metric)
