"""What Lightning does not take up again where a checkpoint was loaded: the random numbers, and the right epoch.

Its loops have no public names for either; the tests compare resumed trainings with ones that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities import data
from lightning.pytorch import Trainer

from sm_tiered_dcp import RngState
from sm_tiered_lightning.lookahead import Lookahead
from sm_tiered_lightning.overrides import Overrides

__all__ = ["reloaded_in", "resume"]


def reloaded_in(trainer: Trainer) -> tuple[float, float]:
    """Return the epochs in which the loaders of the training and of its validation were made."""
    fit_loop: Any = trainer.fit_loop
    return fit_loop._last_train_dl_reload_epoch, fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch


def resume(trainer: Trainer, own: dict[str, Any], *, rank: int) -> Overrides:
    """Take up what `own_state` kept, when the training starts and Lightning has restored what it restores.

    Of another rank's state (there are more ranks now) only its loaders are taken. Returns what is still to happen when
    the first epoch begins, to be taken off where none does.
    """
    pending = Overrides()
    fit_loop: Any = trainer.fit_loop
    if own["reloaded_in"] is not None:
        val_loop = fit_loop.epoch_loop.val_loop
        fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch = own["reloaded_in"]
    at_epochs_end = _goes_on_with_next_epoch(trainer)
    if at_epochs_end:
        _leave_loaders_where_they_ended(fit_loop, own["loaders"])
    elif own["rng_ahead"] is None:
        _make_iterators_again(fit_loop, own["loaders"])
    # Lightning takes itself for restarting until the epoch has ended, and leaves out the schedulers' step of its end.
    fit_loop._restarting = False
    if own["rank"] != rank:
        return pending
    if own["rng_ahead"] is not None:
        Lookahead(trainer).fetch_again(own["loaders"], own["rng_ahead"])
    if at_epochs_end:
        _restore_rng_before_next_epoch(fit_loop, own["rng"], pending)
    else:
        _restore_rng_before_next_batch(fit_loop.epoch_loop, own["rng"], pending)
    return pending


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


def _leave_loaders_where_they_ended(fit_loop: Any, loaders: list[Any] | None) -> None:
    """Load what the loaders were like after their epoch, so that the next iterators are those of the next epoch.

    With ``max_epochs`` Lightning (2.6) does not load it at all.
    """
    combined, fit_loop._combined_loader_states_to_load = fit_loop._combined_loader, []
    combined._load_state_dicts(loaders or [])
    if not loaders or fit_loop._data_fetcher.length is None:
        return  # an iterator that has been asked in vain knows that it has ended
    for loader in combined.flattened:
        if not hasattr(loader, "load_state_dict"):
            continue
        iterator = iter(loader)
        if data.sized_len(loader) == fit_loop.max_batches:
            # A sampler that is a generator takes up its position when it is first asked, not when it is loaded.
            next(iterator, None)
        elif getattr(getattr(loader, "sampler", None), "next_yielded", None) is not None:
            loader.sampler.next_yielded = None


def _make_iterators_again(fit_loop: Any, loaders: list[Any] | None) -> None:
    """Lightning makes the iterators before samplers know their epoch, and loaders with workers fetch at once."""
    if not loaders or not fit_loop.epoch_progress.current.processed:
        return
    for loader in fit_loop._combined_loader.flattened:
        vars(data)["_set_sampler_epoch"](loader, fit_loop.epoch_progress.current.processed)
    fit_loop._combined_loader._load_state_dicts(loaders)
    iter(fit_loop._data_fetcher)


def _restore_rng_before_next_epoch(fit_loop: Any, state: dict[str, Any], pending: Overrides) -> None:
    """Set the random generators before anything of the epoch is done, its loaders made anew among it."""
    begin: Callable[[], None] = fit_loop.on_advance_start

    def at_start_of_epoch() -> None:
        pending.take_off()
        RngState().load_state_dict(state)
        begin()

    pending.put(fit_loop, "on_advance_start", at_start_of_epoch)


def _restore_rng_before_next_batch(epoch_loop: Any, state: dict[str, Any], pending: Overrides) -> None:
    """Set the random generators where the next batch is fetched; Lightning calls no hook there."""
    begin: Callable[[Any], None] = epoch_loop.on_run_start

    def at_start_of_epoch(fetcher: Any) -> None:
        pending.take_off()
        begin(fetcher)
        profile = fetcher._start_profiler

        def once() -> None:
            fetcher._start_profiler = profile
            RngState().load_state_dict(state)
            profile()

        fetcher._start_profiler = once

    pending.put(epoch_loop, "on_run_start", at_start_of_epoch)
