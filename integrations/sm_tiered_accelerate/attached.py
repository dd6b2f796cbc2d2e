"""`attach`: an Accelerator whose `save_state` and `load_state` go through the tiers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered.errors import CheckpointNotFoundError, ConfigError
from sm_tiered.figures import Figures, left_out
from sm_tiered.handle import SaveHandle
from sm_tiered.recipe import load_recipe
from sm_tiered.records import Attempt
from sm_tiered.restore import Restored
from sm_tiered_accelerate.copies import Copies
from sm_tiered_accelerate.places import destination, is_s3, wanted
from sm_tiered_accelerate.stock import Stock
from sm_tiered_dcp.engine import RecipeLike
from sm_tiered_dcp.files import FileSet
from sm_tiered_dcp.tiered_files import TieredFiles

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["TieredAccelerator", "attach"]


def attach(accelerator: Accelerator, recipe: RecipeLike) -> TieredAccelerator:
    """Let *accelerator* save and load through the tiers of *recipe*, until `TieredAccelerator.detach`. Collective.

    Raises:
        ConfigError: it is attached already, its ``total_limit`` is set, or the recipe can't be used.
        NamespaceInUseError: trainers of another launch are alive in this memory directory.
    """
    if isinstance(getattr(cast(Any, accelerator).save_state, "__self__", None), TieredAccelerator):
        raise ConfigError(
            "this Accelerator is attached already", hint="Attach it once; detach() it before it gets another recipe."
        )
    limit = cast(Any, accelerator).project_configuration.total_limit
    if limit is not None:
        raise ConfigError(
            f"ProjectConfiguration(total_limit={limit}) and the recipe's keep policies would both delete checkpoints",
            hint="Leave total_limit out; set `keep: {latest: N}` on the tiers of the recipe.",
        )
    return TieredAccelerator(accelerator, TieredFiles.from_recipe(load_recipe(recipe)))


class TieredAccelerator:
    """What `attach` returns. As a context manager it ends the training as `finish` does, and detaches.

    ``maybe_save`` where something may be due, ``save``, ``restore``, ``finish`` and the accelerator's own
    ``save_state`` and ``load_state`` are collective; the rest is not.
    """

    def __init__(self, accelerator: Accelerator, files: TieredFiles) -> None:
        """Use `attach`."""
        self._accelerator, self._files, self._settings = accelerator, files, files.settings
        self._stock = Stock(accelerator)
        memory, settings = files.memory, files.settings
        raises, patience = settings.on_error == "raise", settings.drain_timeout_secs
        self._copies = Copies(memory, raises=raises, timeout_secs=patience)
        self._figures = Figures(self._log, memory.name if memory is not None else None)
        self._step: int | None = None
        """Where the training is, as far as it told."""
        self._saved_step: int | None = None
        instance = cast(Any, accelerator)
        instance.save_state, instance.load_state = self._save_state, self._load_state
        self._stock.loaders.watch()

    # ---- what a training loop calls

    @property
    def preempted(self) -> bool:
        """Whether a SIGTERM had come to any rank by the last `maybe_save`: the same on every rank."""
        return self._files.preempted

    @property
    def restored(self) -> Restored | None:
        """What the last `restore` took: step, tier, seconds; None when nothing was ever saved."""
        return self._files.restored

    def restore(self, step: int | None = None) -> int | None:
        """Load the newest complete, verified checkpoint, or *step*, into all that was prepared; return its step.

        None when nothing was ever saved; nothing is touched then. Accelerate itself reads the files, once every rank
        has verified them: custom objects it unpickles.

        Raises:
            ConfigError: nothing was prepared yet.
            MismatchError: it was saved from another model or setup; nothing was touched.
            TieredError: see `TieredFiles.restore`.
        """
        return self._load(step, None, None, {})

    def _load(
        self,
        step: int | None,
        attempt: Attempt | None,
        load_kwargs: dict[str, Any] | None,
        options: Mapping[str, Any],
    ) -> int | None:
        found = self._stock.restore(self._files, step, attempt, load_kwargs, options)
        if found is not None:
            self._saved_step, self._step = found, None
        return found

    def maybe_save(
        self, step: int, *, metrics: Mapping[str, float] | None = None, epochs_ended: int | None = None
    ) -> SaveHandle | None:
        """Save to the tiers whose policy wants *step*; None when none does. Call it once a step, on every rank.

        Args:
            step: of the training, 0 <= step < 10**10.
            metrics: by name; those that keep policies rank by must be among them, or none.
            epochs_ended: where an epoch ends with this step, how many are over.

        Raises:
            ConfigError: nothing was prepared yet, or an argument can't be used.
            SaveError: with ``on_error: raise``, what an earlier save failed of.
        """
        self._stock.loaders.watch()
        handle = self._files.maybe_save(step, self._take, metrics=metrics, epochs_ended=epochs_ended)
        self._step = step
        if handle is not None:
            self._note(handle)
        self._look()
        return handle

    def save(
        self, step: int, tiers: Sequence[str] | None = None, *, metrics: Mapping[str, float] | None = None
    ) -> SaveHandle:
        """Save as *step* to *tiers* (None: all), whatever the policies say.

        Raises: see `maybe_save`.
        """
        handle = self._files.save(step, self._take, tiers, metrics=metrics)
        self._step = step
        self._note(handle)
        return handle

    def latest(self) -> int | None:
        """Return the newest step that this process sees complete on any tier, or None."""
        return self._files.latest()

    def finish(self) -> SaveHandle | None:
        """End the training: save what ``on_end`` wants, and wait until all is durable and copied.

        Raises:
            DeadlineExceededError: it took longer than ``drain_timeout_secs``; it goes on without us.
            SaveError: with ``on_error: raise``, what a save failed of.
        """
        handle = self._files.finish()
        if handle is not None:
            self._note(handle)
        self._copies.wait()
        self._look()
        return handle

    def wait(self, timeout: float | None = None) -> None:
        """Wait until every save has ended on every tier, and every copy is made; see `SaveLoop.wait`."""
        self._files.wait(timeout)
        self._copies.wait(timeout)
        self._look()

    def detach(self) -> None:
        """Give the accelerator its own methods back, wait as `wait` does, and let go. Can be called many times."""
        self._give_back()
        try:
            self._copies.close()
        finally:
            self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._files.__exit__(kind, error, trace)
            if error is None:
                self._copies.close()
        finally:
            # Not before: what `on_end` saves are loaders that are watched.
            self._give_back()
            self._copies.abandon()

    # ---- what the accelerator calls itself

    def _save_state(
        self, output_dir: str | None = None, safe_serialization: bool = True, **save_model_func_kwargs: Any
    ) -> Path:
        """`Accelerator.save_state` through the tiers; returns a directory, as that does."""
        automatic = self._accelerator.project_configuration.automatic_checkpoint_naming
        where = destination(None if automatic else output_dir, self._settings)
        step, again = self._next_step(), self._next_step() == self._saved_step

        def take(_: int) -> FileSet:
            self._copies.deliver()
            return self._stock.take(self._files, safe_serialization, save_model_func_kwargs)

        handle = self._files.save(step, take, where.tiers)
        self._note(handle)
        self._look()
        if where.copy_to is None:
            return self._directory()
        if again or not self._can_copy(handle):
            self._stock.save(str(where.copy_to), safe_serialization, **save_model_func_kwargs)
        else:
            assert self._files.newest is not None
            self._copies.add(self._files.newest, where.copy_to, step)
        return where.copy_to

    def _can_copy(self, handle: SaveHandle) -> bool:
        """Whether the save was to stand in memory, on all ranks alike: where this rank failed, its copy will."""
        memory = self._files.memory
        return memory is not None and not left_out(handle, memory.name)

    def _load_state(
        self,
        input_dir: str | None = None,
        load_kwargs: dict[str, Any] | None = None,
        **load_model_func_kwargs: Any,
    ) -> None:
        """`Accelerator.load_state`: from the tiers, unless *input_dir* is a directory."""
        if input_dir is not None and not is_s3(os.fspath(input_dir)):
            self._files.together(self._copies.wait)  # one of them may be of that directory
            self._stock.load(input_dir, load_kwargs, **load_model_func_kwargs)
            return
        named = wanted(os.fspath(input_dir), self._settings) if input_dir is not None else None
        step, attempt = (named.step, named.attempt) if named is not None else (None, None)
        if self._load(step, attempt, load_kwargs, load_model_func_kwargs) is None:
            raise CheckpointNotFoundError(
                f"nothing was ever saved in namespace {self._settings.namespace!r}",
                hint="TieredAccelerator.restore() returns None here instead.",
            )

    # ---- saving

    def _take(self, step: int) -> FileSet:
        self._copies.deliver()
        return self._stock.take(self._files, True, {})

    def _directory(self) -> Path:
        """Where the last save stands: in memory, if this node has any, else relative to a tier's namespace."""
        memory, saved = self._files.memory, self._files.newest
        assert saved is not None
        return Path(memory.root if memory is not None else "") / saved.directory

    def _next_step(self) -> int:
        """The step of a save that is given none: where the training is, if it tells, else one more than the last."""
        if self._step is not None and self._step >= (self._saved_step or 0):
            return self._step
        return 0 if self._saved_step is None else self._saved_step + 1

    def _note(self, handle: SaveHandle) -> None:
        self._saved_step = handle.step
        self._figures.saved(handle)

    def _give_back(self) -> None:
        instance = vars(self._accelerator)
        if instance.get("save_state") == self._save_state:
            del instance["save_state"], instance["load_state"]
            self._stock.loaders.release()

    # ---- figures

    def _look(self) -> None:
        self._figures.look(self._step if self._step is not None else self._saved_step or 0)

    def _log(self, found: Mapping[str, float]) -> None:
        cast(Any, self._accelerator).log(dict(found), step=self._step if self._step is not None else self._saved_step)
