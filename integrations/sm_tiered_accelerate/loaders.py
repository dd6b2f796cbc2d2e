"""What a resumed training needs of its dataloaders beyond what Accelerate saves.

Accelerate forgets how many times a loader was begun, by which it shuffles, and fetches a batch ahead: what that draws
of the random numbers was drawn before the save, and is drawn again after it.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered_dcp import RngState

__all__ = ["FILE", "Loaders"]

FILE = "sm_tiered_loaders.bin"
"""Each rank's own; `Accelerator.load_state` does not look at it."""


class Loaders:
    """Watches the loaders that an Accelerator has prepared; those that have no state begin their epoch anew."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._watched: list[_Watched] = []

    def watch(self) -> None:
        """Watch those that are prepared now, and leave those that no longer are.

        An iteration that has begun before is resumed as without us: at its place, with other random numbers.
        """
        loaders: Sequence[Any] = cast(Any, self._accelerator)._dataloaders
        known = {id(watched.loader): watched for watched in self._watched}
        self._watched = [known.pop(id(loader), None) or _Watched(loader) for loader in loaders]
        for gone in known.values():
            gone.release()

    def release(self) -> None:
        """Leave the loaders as they were."""
        while self._watched:
            self._watched.pop().release()

    def to_bytes(self) -> bytes:
        """Return the state of all, as a file."""
        stream = io.BytesIO()
        torch.save([watched.state() for watched in self._watched], stream)
        return stream.getvalue()

    def restore(self, data: bytes) -> None:
        """Let the loaders go on from the state in *data*, which they have loaded for their own part."""
        self.watch()
        states: list[dict[str, Any]] = torch.load(io.BytesIO(data), weights_only=True)
        for watched, state in zip(self._watched, states, strict=True):
            watched.resume(state)


class _Watched:
    """One loader."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self._base: Any = getattr(loader, "base_dataloader", None)
        self._begun: dict[str, Any] | None = None
        """The random generators before the present iteration began: its workers' seeds follow from it."""
        self._ordered: dict[str, Any] | None = None
        """Those before its first batch: its order follows from it."""
        self._ahead: dict[str, Any] | None = None
        """Those before the fetch of the batch that is ahead; None where none is."""
        self._iteration = -1
        """The loader's own number of the present one."""
        self._resumes: Mapping[str, Any] | None = None
        """What the next iteration goes on from."""
        self._trained: dict[str, Any] | None = None
        """While one is resumed: the generators as the training left them."""
        self._stock: tuple[Callable[[], None], Callable[[], Any]] | None = None
        if getattr(loader, "use_stateful_dataloader", False) and hasattr(loader, "_update_state_dict"):
            # The first is called before each fetch, once the state of the batches until then is noted.
            self._stock = loader._update_state_dict, self._base.__iter__
            loader._update_state_dict = self._before_fetch
            self._base.__iter__ = self._begin  # asked for by name, so that the instance's own is found

    def release(self) -> None:
        if self._stock is not None:
            del self.loader._update_state_dict, self._base.__iter__

    def state(self) -> dict[str, Any]:
        iteration: Any = getattr(self.loader, "iteration", None)
        if self._ahead is None and iteration == self._iteration:
            iteration += 1  # its last batch was given: Accelerate counts it when it is asked for one more
        return {
            "iteration": iteration,
            "begun": self._begun,
            "ordered": self._ordered,
            "ahead": self._ahead,
            "ended": self._ahead is None and self._iteration >= 0,
            "shuffler": self._shuffler(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        if state["iteration"] is not None:
            self.loader.iteration = state["iteration"]
        self._resumes = state if self._stock is not None else None

    def _generators(self) -> dict[str, Any]:
        return {"rng": RngState().state_dict(), "shuffler": self._shuffler()}

    def _set(self, generators: Mapping[str, Any]) -> None:
        RngState().load_state_dict(generators["rng"])
        if generators["shuffler"] is not None and self._shuffles():
            self.loader.synchronized_generator.set_state(torch.tensor(generators["shuffler"], dtype=torch.uint8))

    def _shuffles(self) -> bool:
        return isinstance(getattr(self.loader, "synchronized_generator", None), torch.Generator)

    def _shuffler(self) -> list[int] | None:
        """The state of the generator that all ranks shuffle by, where there are several."""
        return self.loader.synchronized_generator.get_state().tolist() if self._shuffles() else None

    def _before_fetch(self) -> None:
        assert self._stock is not None
        self._stock[0]()
        trained, self._trained = self._trained, None
        if trained is not None:
            RngState().load_state_dict(trained)
        self._ahead = None if self.loader.end_of_dataloader else RngState().state_dict()
        self._iteration = self.loader.iteration

    def _begin(self) -> Any:
        """Begin an iteration; where one is resumed, with the random numbers that it was begun with."""
        assert self._stock is not None
        resumes, self._resumes = self._resumes, None
        if resumes is None and self._begun is None and hasattr(self._base, "_initial_iter_for_state_dict"):
            # Accelerate asked for a state when it prepared the loader. torchdata would begin with the iterator that it
            # made for that, and draw nothing: a resumed training has none, and would draw.
            self._base._initial_iter_for_state_dict = False
        now = self._generators()
        if resumes is not None and resumes["ahead"] is not None and resumes["ordered"] is not None:
            return self._resumed(resumes, now)
        if resumes is not None and resumes["ended"]:
            # What was saved had ended: that was its end, and this is the next, begun as it would have been.
            self._stock[1]()
            now["shuffler"] = resumes["shuffler"]
            self._set(now)
        self._begun = now
        iterator = self._stock[1]()
        self._ordered = self._generators()
        return iterator

    def _resumed(self, resumes: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
        assert self._stock is not None
        self._begun, self._ordered = resumes["begun"], resumes["ordered"]
        self._set(resumes["begun"])
        iterator = self._stock[1]()
        self._set(resumes["ordered"])
        _draw_the_order(iterator)
        RngState().load_state_dict(resumes["ahead"])
        self._trained = now["rng"]
        return iterator


def _draw_the_order(iterator: Any) -> None:
    """Let a sampler draw now that would draw with the first batch, after other numbers than when it was begun."""
    order = getattr(iterator, "_sampler_iter", None)
    if order is None or hasattr(order, "state_dict"):
        return  # another release of torchdata, or a sampler that has a state
    first: list[Any] = list(itertools.islice(order, 1))
    iterator._sampler_iter = itertools.chain(first, order)
