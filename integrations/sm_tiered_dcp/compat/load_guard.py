"""Whether a training may begin to save: not where its load failed, for it would begin anew over what is there."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from sm_tiered.errors import (
    CheckpointNotFoundError,
    RestoreError,
    SaveError,
    TieredError,
    error_from_json,
    error_to_json,
    typed,
)
from sm_tiered.group import Group

__all__ = ["LoadGuard", "guard_of"]

_FRESH = (
    "The last load failed, so this run would start from scratch over checkpoints that may be there: repeat the load. "
    "A fresh start needs a new namespace."
)
_logger = logging.getLogger("sm_tiered_dcp")


@dataclass(slots=True, eq=False)
class LoadGuard:
    """How the loads of one namespace went in this process, whichever readers did them."""

    failure: TieredError | None = None
    """Why the last load has not ended well."""
    newest: int | None = None
    """The step that was loaded as the newest, until a writer has been made since."""
    unchecked: bool = False
    """Whether a reader was made or used since a writer last asked how the loads went."""
    idle: bool = False
    """Whether a reader was made, and no load has begun since."""
    under_way: bool = False
    """Whether this process has loaded or saved something: it does not begin from scratch."""

    @contextmanager
    def opening(self) -> Generator[None]:
        """That a reader can't be made is a load that failed."""
        self.unchecked = self.idle = True
        try:
            yield
        except Exception as error:
            self.failure = typed(error)
            raise

    def begins(self) -> None:
        """Until it is said that it ended well, it did not: DCP itself, or the state's own code, may raise."""
        self.unchecked, self.newest, self.idle = True, None, False
        self.failure = RestoreError("the last load did not end", hint="It raised the reason.")

    def ended(self, error: Exception | None, *, named: bool, step: int | None = None) -> None:
        """Say how the load went, of a *named* step or of the newest, and which *step* was loaded.

        That nothing was ever saved is well; that a named step is not there is so only where the training is under way.
        """
        absent = isinstance(error, CheckpointNotFoundError) and (self.under_way or not named)
        self.failure = None if error is None or absent else typed(error)
        if error is None:
            self.under_way, self.newest = True, None if named else step

    def check(self, group: Group, step: int) -> None:
        """Raise on all ranks why *step* can't be saved after the last load. Collective after a load.

        Scripts catch whatever a load raises and begin anew: then the job would go on as if nothing had been saved.
        """
        if self.unchecked:
            self._ask(group, step)
        if self.idle and not self.under_way:
            # DCP asks the state for its own before it tells the reader of a load: what raises there is not known here.
            _logger.warning("step %d: nothing was loaded, though a reader was made: the training begins anew", step)
        self.unchecked, self.newest, self.idle, self.under_way = False, None, False, True

    def _ask(self, group: Group, step: int) -> None:
        failure = self._failure(step)
        failures = group.gather(error_to_json(failure) if failure is not None else None)
        found = failure or next((error_from_json(facts) for facts in failures if facts is not None), None)
        if found is not None:
            raise found from self.failure

    def _failure(self, step: int) -> TieredError | None:
        if self.failure is not None:
            again = error_from_json(error_to_json(self.failure))
            again.hint = f"{again.hint} {_FRESH}" if again.hint else _FRESH
            return again
        if self.newest is not None and step < self.newest:
            return SaveError(
                f"step {step} is to be saved, but step {self.newest} was loaded: has the training begun from scratch?",
                hint="Load again, and use what was loaded. To go back on purpose, load the step to go back to by its "
                "number: SageMakerTieredStorageReader(config, step=…).",
                step=step,
            )
        return None


_guards: dict[tuple[int, str], LoadGuard] = {}


def guard_of(namespace: str) -> LoadGuard:
    """Return this process's guard of *namespace*: it outlives engines, and exists before any."""
    return _guards.setdefault((os.getpid(), namespace), LoadGuard())
