"""The metrics by which checkpoints are ranked: where they belong to the step that is saved, and not to an older one."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from sm_tiered.errors import ConfigError
from sm_tiered_lightning.moments import is_epochs_last_batch

__all__ = ["Metrics"]


class Metrics:
    """Reads what the training logged, after a validation and at the end of an epoch.

    Between those Lightning still has the last values, of another step's weights.
    """

    def __init__(self, trainer: Trainer, wanted: frozenset[str]) -> None:
        self._trainer, self._wanted = trainer, wanted
        self._validated_at = -1
        self._warned = set[str]()

    def note_validation(self, step: int, *, decided: bool) -> None:
        """Say that a validation has ended at *step*; *decided*: whether that one is saved is settled already."""
        if not decided:
            self._validated_at = step
        elif self._wanted:
            self._warn(
                f"a validation within an accumulation ranks no checkpoint by {sorted(self._wanted)}; make "
                "val_check_interval a multiple of accumulate_grad_batches"
            )

    def at(self, step: int) -> dict[str, float]:
        """Return all wanted metrics of *step* as rank 0 has them, or none.

        Raises:
            ConfigError: an epoch has ended with a validation, and one was never logged.
        """
        ended, validated = is_epochs_last_batch(self._trainer), self._validated_at == step
        if not self._wanted or not (validated or ended):
            return {}
        logged = {name: float(value) for name, value in self._trainer.callback_metrics.items()}
        logged = self._trainer.strategy.broadcast(logged)
        missing = sorted(self._wanted - logged.keys())
        if missing:
            self._tell(missing[0], sorted(logged), certain=ended and validated)
            return {}
        return {name: logged[name] for name in self._wanted}

    def _tell(self, name: str, logged: list[str], *, certain: bool) -> None:
        text = f"the recipe keeps the best by {name!r}, which was not logged; there are {logged}"
        if certain:
            raise ConfigError(text, hint=f"Log it, self.log({name!r}, ...), or correct its name in the recipe.")
        self._warn(text)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            rank_zero_warn(f"sm_tiered: {text}")
