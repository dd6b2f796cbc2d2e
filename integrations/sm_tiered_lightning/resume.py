"""What Lightning does not take up again where a checkpoint was loaded: the random numbers, and the right epoch.

Its loops have no public names for either; the tests compare resumed trainings with ones that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from sm_tiered_dcp import RngState
from sm_tiered_lightning.lookahead import Lookahead

__all__ = ["resume"]


def resume(trainer: Trainer, own: dict[str, Any], *, rank: int) -> None:
    """Take up what `own_state` kept, when the training starts and Lightning has restored what it restores.

    Of another rank's state (there are more ranks now) only its loaders are taken.
    """
    lookahead = Lookahead(trainer)
    fit_loop: Any = trainer.fit_loop
    if _goes_on_with_next_epoch(trainer):
        lookahead.forget_what_is_ahead(own["loaders"])
    # Lightning takes itself for restarting until the epoch has ended, and leaves out the schedulers' step of its end.
    fit_loop._restarting = False
    if own["rank"] != rank:
        return
    if own["rng_ahead"] is not None:
        lookahead.fetch_again(own["loaders"], own["rng_ahead"])
    _restore_rng_before_first_batch(trainer, own["rng"])


def _goes_on_with_next_epoch(trainer: Trainer) -> bool:
    """Where the checkpoint was saved at the end of an epoch, begin the next one, and return whether that is so.

    With ``max_steps`` Lightning (2.6) runs an empty epoch first, and is one ahead in its count from then on: loaders
    that shuffle by epoch give other batches. With ``max_epochs`` it goes on with iterators that were made before the
    samplers knew their epoch.
    """
    fit_loop: Any = trainer.fit_loop
    progress = fit_loop.epoch_progress
    if not (fit_loop.restarted_on_epoch_end or fit_loop.resumed_on_epoch_end):
        return False
    if progress.total.completed < progress.total.processed:
        progress.increment_completed()
    fit_loop.reset_restart_stage()
    fit_loop._resuming_from_checkpoint = False
    fit_loop.epoch_loop.restarting = False
    return True


def _restore_rng_before_first_batch(trainer: Trainer, state: dict[str, Any]) -> None:
    """Set the random generators where the training drew from them next after the save.

    That is where an epoch makes its iterators; inside an epoch, where the next batch is fetched. Lightning calls no
    hook at either place.
    """
    loop: Any = trainer.fit_loop.epoch_loop
    begin_epoch: Callable[[Any], None] = loop.on_run_start

    def at_start_of_epoch(fetcher: Any) -> None:
        del loop.on_run_start
        made = fetcher.combined_loader._iterator
        RngState().load_state_dict(state)
        begin_epoch(fetcher)
        if fetcher.combined_loader._iterator is made:
            _before_next_fetch(fetcher, lambda: RngState().load_state_dict(state))

    loop.on_run_start = at_start_of_epoch


def _before_next_fetch(fetcher: Any, action: Callable[[], None]) -> None:
    profile = fetcher._start_profiler

    def once() -> None:
        fetcher._start_profiler = profile
        action()
        profile()

    fetcher._start_profiler = once
