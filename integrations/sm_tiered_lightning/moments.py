"""When a global step is over: the moments at which a training can be cut and go on as if it never was.

Lightning has no hook there. At the end of a batch and of an epoch its hooks come before validation, before the
schedulers that look at metrics, and before its own counters; so what follows them is called here by the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from sm_tiered_lightning.overrides import Overrides

__all__ = ["Moments"]


class Moments:
    """Calls *ask* on every rank after each batch that is not its epoch's last, and after each epoch.

    It is given how many epochs are over then, and None within one. *end* is called when the training is over, before
    callbacks hear of it: some put other weights into the model then.
    """

    def __init__(self, trainer: Trainer, ask: Callable[[int | None], None], end: Callable[[], None]) -> None:
        self._trainer, self._ask, self._end = trainer, ask, end
        self._overrides = Overrides()

    def bind(self) -> None:
        """Begin to call; `unbind` ends it."""
        self.unbind()
        fit_loop: Any = self._trainer.fit_loop
        for loop, ask in ((fit_loop.epoch_loop, self._after_batch), (fit_loop, self._after_epoch)):
            self._overrides.put(loop, "on_advance_end", _then(loop.on_advance_end, ask))
        over: Callable[[], None] = fit_loop.on_run_end

        def end() -> None:
            self._end()
            over()

        self._overrides.put(fit_loop, "on_run_end", end)

    def unbind(self) -> None:
        """Give the loops back; can be called many times."""
        self._overrides.take_off()

    def _after_batch(self) -> None:
        # What follows an epoch's last batch, the epoch's end, belongs to its step.
        if not is_epochs_last_batch(self._trainer):
            self._ask(None)

    def _after_epoch(self) -> None:
        # Lightning counts an epoch as over that `max_steps` or a stop cut short.
        fit_loop: Any = self._trainer.fit_loop
        ended = is_epochs_last_batch(self._trainer)
        self._ask(fit_loop.epoch_progress.current.processed if ended else None)


def is_epochs_last_batch(trainer: Trainer) -> bool:
    """Whether the last batch that was trained on is the last of its epoch."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop._num_ready_batches_reached())


def leave_sigterm_to_policies(trainer: Trainer) -> Overrides:
    """Keep a SIGTERM from ending the training within a step, or on one rank before the others: `stop` will end it.

    Lightning's own handler makes a collective call wherever the training is, and a training that accumulates gradients
    ends in the middle of a step. That is so until what is returned is taken off.
    """
    connector: Any = vars(trainer)["_signal_connector"]
    passed_on: list[int] = []

    def pass_on(number: int, _frame: Any) -> None:
        launcher = trainer.strategy.launcher
        if launcher is not None and not passed_on:
            passed_on.append(number)
            launcher.kill(number)

    overrides = Overrides()
    overrides.put(connector, "_sigterm_notifier_fn", pass_on)
    return overrides


def stop(trainer: Trainer) -> None:
    """End the training as Lightning does after a SIGTERM.

    Raises:
        SIGTERMException: always.
    """
    connector: Any = vars(trainer)["_signal_connector"]
    connector.received_sigterm = True
    raise SIGTERMException


def _then(call: Callable[..., None], ask: Callable[[], None]) -> Callable[..., None]:
    def both(*arguments: Any) -> None:
        try:
            call(*arguments)
        except SIGTERMException:
            ask()
            raise
        ask()

    return both
