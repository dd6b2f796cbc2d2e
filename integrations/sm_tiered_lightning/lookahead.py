"""Loaders without a length: Lightning fetches one batch ahead, and their state is then one batch too far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from sm_tiered_dcp import RngState
from sm_tiered_lightning.overrides import Overrides

__all__ = ["Lookahead"]


@dataclass(frozen=True, slots=True)
class _Before:
    loaders: list[Any]
    rng: dict[str, Any]


class Lookahead:
    """Remembers what loaders and random generators were like before the fetch of a batch not yet trained on."""

    def __init__(self, trainer: Trainer) -> None:
        self._loop: Any = trainer.fit_loop
        self._overrides = Overrides()
        self._before: _Before | None = None

    def bind(self) -> None:
        """Begin to remember, where Lightning fetches ahead and a loader has a state."""
        self.unbind()
        fetcher, epoch_loop = self._loop._data_fetcher, self._loop.epoch_loop
        if getattr(fetcher, "prefetch_batches", 0) and fetcher.length is None and self._states():
            self._overrides.put(epoch_loop, "_on_before_fetch", self._noting(epoch_loop._on_before_fetch))

    def unbind(self) -> None:
        """Give the loop back; can be called many times."""
        self._overrides.take_off()
        self._before = None

    def _noting(self, fetch: Callable[[], None]) -> Callable[[], None]:
        def note() -> None:
            self._before = _Before(self._states(), RngState().state_dict())
            fetch()

        return note

    def _states(self) -> list[Any]:
        states: list[Any] = self._loop._combined_loader._state_dicts()
        return states

    def correct(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Put the loaders' state before the batch that is ahead into *checkpoint*; return the generators' of then.

        None where no batch is ahead.
        """
        if self._before is None or not self._loop._data_fetcher.batches:
            return None
        checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self._before.loaders
        return self._before.rng

    def fetch_again(self, loaders: list[Any], rng: dict[str, Any]) -> None:
        """Fetch the batch that is ahead with the random numbers that it was fetched with before the save."""
        fetcher = self._loop._data_fetcher
        self._loop._combined_loader._load_state_dicts(loaders)
        # Not before the iterators are made, which draw numbers too.
        fetcher._start_profiler = lambda: RngState().load_state_dict(rng)
        iter(fetcher)
