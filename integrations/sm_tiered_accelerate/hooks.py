"""`TieredHooks`: the weights alone through the tiers, by the hooks that Accelerate itself calls."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
from accelerate.utils import DistributedType  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered.errors import ConfigError, MismatchError
from sm_tiered.handle import SaveHandle
from sm_tiered_dcp import TieredCheckpointer
from sm_tiered_dcp.engine import RecipeLike

__all__ = ["TieredHooks"]

_FILE = "sm_tiered_weights.json"
"""Stands in Accelerate's directory, and says which checkpoint has the weights that belong to the rest in it."""
_STAYS = (
    "sm_tiered: with the hooks only the weights go through the tiers. Optimizers, schedulers, loaders, random states "
    "and custom objects are written to {} by Accelerate, neither verified nor promoted: use attach() to save all of it."
)


class TieredHooks:
    """For ``register_save_state_pre_hook(tiered.save_hook)`` and ``register_load_state_pre_hook(tiered.load_hook)``.

    Accelerate calls a save hook with the models' weights, which it then does not write itself; all else it writes
    where it always does. A directory of Accelerate's and the step in the tiers belong together: what loads one loads
    the other. To load an older one and go on from there leaves behind, in the tiers, what was saved after it.
    """

    def __init__(self, accelerator: Accelerator, recipe: RecipeLike) -> None:
        """Open the tiers of *recipe*. Collective.

        Raises:
            ConfigError: the recipe can't be used, or weights that only an engine has (FSDP, DeepSpeed, Megatron).
        """
        kind = accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ConfigError(
                f"hooks see no weights where distributed_type is {kind.value}: Accelerate writes them before it calls",
                hint="Use sm_tiered_accelerate.attach(accelerator, recipe).",
            )
        self._accelerator = accelerator
        self._checkpointer = TieredCheckpointer.from_recipe(recipe)
        self._next: int | None = None
        """Whatever is loaded in between, no step is used twice: a directory's is found by it."""
        self._warned = False
        self.handle: SaveHandle | None = None
        """Of the last save."""

    def save_hook(self, models: list[torch.nn.Module], weights: list[dict[str, Any]], output_dir: str) -> None:
        """Save *weights* to all tiers, and take them off Accelerate's hands. Collective."""
        if not self._warned:
            self._warned = True
            warnings.warn(_STAYS.format(output_dir), stacklevel=2)
        step = self._checkpointer.unused_step() if self._next is None else self._next
        self.handle = self._checkpointer.save(step, _state(weights))
        self._next = step + 1
        weights.clear()
        if self._accelerator.is_local_main_process:
            # Last: a directory without it is one whose weights were not saved.
            (Path(output_dir) / _FILE).write_text(json.dumps({"step": step}))

    def load_hook(self, models: list[torch.nn.Module], input_dir: str) -> None:
        """Fill *models* with the weights that belong to *input_dir*, from the nearest tier. Collective.

        Raises:
            MismatchError: the directory was not saved with these hooks.
            TieredError: see `TieredCheckpointer.restore`.
        """
        path = Path(input_dir) / _FILE
        if not path.exists():
            raise MismatchError(
                f"{input_dir} has no {_FILE}: its weights are not in the tiers",
                hint="Load it without the hook, or from a directory that was saved with it.",
            )
        step = int(json.loads(path.read_text())["step"])
        self._checkpointer.restore(_state([model.state_dict() for model in models]), step)
        models.clear()

    def wait(self, timeout: float | None = None) -> None:
        """See `TieredCheckpointer.wait`."""
        self._checkpointer.wait(timeout)

    def close(self) -> None:
        """See `TieredCheckpointer.close`."""
        self._checkpointer.close()


def _state(weights: list[dict[str, Any]]) -> Mapping[str, Any]:
    return {f"model_{index}": dict(state) for index, state in enumerate(weights)}
