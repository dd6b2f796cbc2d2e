"""Model and optimizers under FullyShardedDataParallel: only DCP's own functions can take its flat parameters apart."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from sm_tiered_dcp.optimizers import group_settings, parameters_of, untouched_random_state

__all__ = ["Fsdp1State"]


class Fsdp1State:
    """The model and optimizer halves of a `TrainState`. Its methods are collective."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, tuple(optimizers)

    def state_dict(self, with_state: bool | None) -> dict[str, Any]:
        """Return the state; *with_state*: whether that of the optimizers is to be loaded, None when saving."""
        found: dict[str, Any] = {"model": get_model_state_dict(self._model)}
        if not self._optimizers:
            return found
        has = any(optimizer.state for optimizer in self._optimizers)
        if with_state or (with_state is None and self._any_rank(has)):
            with self._without_gradients():
                found["optimizer"] = get_optimizer_state_dict(self._model, self._optimizers)
            if not has:  # It was made just now, as if by a step: the load makes it again.
                self._clear()
        else:
            groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
            settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
            found["optimizer"] = {"state": {}, "param_groups": settings}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make *state_dict* the state of model and optimizers."""
        if "model" in state_dict:
            set_model_state_dict(self._model, dict(state_dict["model"]), options=StateDictOptions(strict=True))
        saved = state_dict.get("optimizer")
        if not self._optimizers or saved is None:
            return
        if saved.get("state"):
            with self._without_gradients():
                set_optimizer_state_dict(self._model, self._optimizers, saved)
            return
        self._clear()
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for position, group in enumerate(groups):
            group.update(group_settings(saved.get("param_groups", []), (), position))

    def _any_rank(self, has: bool) -> bool:
        """Whether it is so on any rank: one whose shard holds frozen weights only never makes optimizer state."""
        module = next((m for m in self._model.modules() if isinstance(m, FullyShardedDataParallel)), None)
        if module is None:
            return has
        found = torch.tensor(int(has), device=module.compute_device)
        cast("Any", dist).all_reduce(found, op=dist.ReduceOp.MAX, group=module.process_group)
        return bool(found.item())

    def _clear(self) -> None:
        for optimizer in self._optimizers:
            optimizer.state.clear()

    @contextmanager
    def _without_gradients(self) -> Generator[None, None, None]:
        # With gradients there, DCP takes it that the optimizer has all the state that it will have.
        params = [param for optimizer in self._optimizers for param in parameters_of(optimizer)]
        grads = [param.grad for param in params]
        with untouched_random_state(params):
            try:
                for param in params:
                    param.grad = None
                yield
            finally:
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
