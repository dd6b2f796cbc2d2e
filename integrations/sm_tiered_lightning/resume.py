"""What Lightning does not take up again where a checkpoint was loaded: the random numbers, and the right epoch.

Its loops have no public names for either; the tests compare resumed trainings with ones that never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from lightning.fabric.utilities import data
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from sm_tiered_dcp import RngState
from sm_tiered_lightning.lookahead import Lookahead
from sm_tiered_lightning.overrides import Overrides

__all__ = ["loaders_made", "resume"]


def loaders_made(trainer: Trainer) -> dict[str, Any]:
    """Return when the loaders of the training and of its validation were made, and what their generators are like."""
    fit_loop: Any = trainer.fit_loop
    val_loop = fit_loop.epoch_loop.val_loop
    return {
        "train_in": fit_loop._last_train_dl_reload_epoch,
        "val_in": val_loop._last_val_dl_reload_epoch,
        "val": val_loop._combined_loader is not None,
        "generators": [generator.get_state() for generator in _generators(fit_loop)],
    }


def resume(trainer: Trainer, own: dict[str, Any], *, rank: int) -> Overrides:
    """Take up what `own_state` kept, when the training starts and Lightning has restored what it restores.

    Of another rank's state (there are more ranks now) only its loaders are taken. Returns what is still to happen when
    the first epoch begins, to be taken off where none does.
    """
    pending = Overrides()
    fit_loop: Any = trainer.fit_loop
    at_epochs_end = _goes_on_with_next_epoch(trainer)
    if own["made"] is not None:
        _make_when_it_was_made(trainer, own["made"])
    if at_epochs_end:
        _leave_loaders_where_they_ended(fit_loop, own["loaders"])
    else:
        _begin_epoch_again(trainer)
        if own["rng_ahead"] is None:
            _make_iterators_again(fit_loop, own["loaders"])
    # Lightning takes itself for restarting until the epoch has ended, and leaves out the schedulers' step of its end.
    fit_loop._restarting = False
    if own["rank"] != rank:
        return pending
    if own["rng_ahead"] is not None:
        Lookahead(trainer).fetch_again(own["loaders"], own["rng_ahead"])
    restore = partial(_restore_rng, fit_loop, own)
    if at_epochs_end:
        _before_next_epoch(fit_loop, restore, pending)
    else:
        _before_next_batch(fit_loop.epoch_loop, restore, pending)
    return pending


def _make_when_it_was_made(trainer: Trainer, made: dict[str, Any]) -> None:
    """Making loaders may draw random numbers: let that be before those of the save are set, or after, as it was."""
    fit_loop: Any = trainer.fit_loop
    val_loop = fit_loop.epoch_loop.val_loop
    if made["val"] and val_loop._combined_loader is None:
        trainer.validating = True
        val_loop.setup_data()
        trainer.training = True
    elif not made["val"]:
        val_loop._combined_loader = None
    fit_loop._last_train_dl_reload_epoch, val_loop._last_val_dl_reload_epoch = made["train_in"], made["val_in"]


def _begin_epoch_again(trainer: Trainer) -> None:
    """Lightning calls no hook of an epoch's start inside it, and how much is accumulated is set there."""
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, GradientAccumulationScheduler):
            callback.on_train_epoch_start(trainer, trainer.lightning_module)


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
    if not loaders:
        return
    combined._load_state_dicts(loaders)
    stateful: list[Any] = [loader for loader in combined.flattened if hasattr(loader, "load_state_dict")]
    for loader, state in zip(stateful, loaders, strict=True):
        if isinstance(state, dict) and cast("dict[str, Any]", state).get("_iterator_finished"):
            continue  # an iterator that has been asked in vain knows that it has ended
        iterator = iter(loader)
        if fit_loop._data_fetcher.length is not None and data.sized_len(loader) == fit_loop.max_batches:
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


def _generators(fit_loop: Any) -> list[torch.Generator]:
    """Return the generators that loaders and their samplers have of their own, each once."""
    found: dict[int, torch.Generator] = {}
    for loader in fit_loop._combined_loader.flattened:
        for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _restore_rng(fit_loop: Any, own: dict[str, Any]) -> None:
    RngState().load_state_dict(own["rng"])
    generators: list[torch.Generator] = _generators(fit_loop)
    states: list[torch.Tensor] = own["made"]["generators"] if own["made"] else []
    if len(generators) == len(states):  # else there are other loaders now
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _before_next_epoch(fit_loop: Any, action: Callable[[], None], pending: Overrides) -> None:
    """Call *action* before anything of the epoch is done, its loaders made anew among it."""
    begin: Callable[[], None] = fit_loop.on_advance_start

    def at_start_of_epoch() -> None:
        pending.take_off()
        action()
        begin()

    pending.put(fit_loop, "on_advance_start", at_start_of_epoch)


def _before_next_batch(epoch_loop: Any, action: Callable[[], None], pending: Overrides) -> None:
    """Call *action* where the next batch is fetched; Lightning calls no hook there."""
    begin: Callable[[Any], None] = epoch_loop.on_run_start

    def at_start_of_epoch(fetcher: Any) -> None:
        pending.take_off()
        begin(fetcher)
        profile = fetcher._start_profiler

        def once() -> None:
            fetcher._start_profiler = profile
            action()
            profile()

        fetcher._start_profiler = once

    pending.put(epoch_loop, "on_run_start", at_start_of_epoch)
