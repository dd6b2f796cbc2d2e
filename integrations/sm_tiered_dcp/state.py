"""A model with its optimizers and schedulers as one Stateful object, by parameter names, for saves that cost little.

Names and structure are those of DCP's `get_state_dict`, so that any number of ranks can load what another number saved.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.optim import Optimizer

from sm_tiered.errors import StructureError
from sm_tiered_dcp.leaves import Stateful, state_for
from sm_tiered_dcp.optimizers import Named, initial_state, load_optimizers, parameters_of, state_of_optimizers
from sm_tiered_dcp.rng import RngState
from sm_tiered_dcp.state_fsdp1 import Fsdp1State

__all__ = ["RngState", "TrainState"]

_MODEL, _OPTIMIZER, _SCHEDULER = "model", "optimizer", "scheduler"
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")
"""Attributes under which DDP, torch.compile and activation checkpointing keep the module that they wrap."""


class TrainState:
    """Everything that training goes on from.

    Plain modules, FSDP, FSDP2, tensor parallel, DDP and compiled ones, in any combination that `get_state_dict` takes.
    An optimizer that has made no step is saved without state, and is without state after a restore of that.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        scheduler: Any | None = None,
        **others: Any,
    ) -> None:
        """Hold the objects; nothing is asked of them yet.

        Args:
            model: the outermost module.
            optimizer: those whose parameters are the model's; stored together, as one.
            scheduler: anything with ``state_dict`` and ``load_state_dict``; so are *others*.

        Raises:
            StructureError: an object can't be asked for its state.
        """
        self._model = model
        self._optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
        self._rest: dict[str, Any] = {**({} if scheduler is None else {_SCHEDULER: scheduler}), **others}
        for name, value in {_MODEL: model, **dict(enumerate(self._optimizers)), **self._rest}.items():
            if not isinstance(value, Stateful):
                message = f"TrainState: {name} is a {type(value).__name__} without state_dict and load_state_dict"
                raise StructureError(message, hint="Put plain values beside the TrainState: {'train': ..., 'epoch': 3}")
        self._names = _Names(model)
        self._fsdp1 = Fsdp1State(model, self._optimizers) if _has_fsdp1(model) else None
        self._created: dict[str, Named] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as it is now: live tensors, not copies. For saving; nothing is created."""
        return self._state_dict(None)

    def state_dict_for(self, stored: Collection[str]) -> dict[str, Any]:
        """Return what is to be filled with the values called *stored*, relative to this object.

        Optimizer state that the checkpoint has and the optimizer lacks is created, aside: the optimizer gets it in
        `load_state_dict`.
        """
        return self._state_dict(stored)

    def loading(self, stored: Collection[str] | None = None) -> Stateful:
        """Return what stock ``dcp.load`` is given in place of this object: ``dcp.load({"train": state.loading()})``.

        Stock DCP asks for the state before it has read what there is: an optimizer without state would stay so.

        Args:
            stored: names in the checkpoint, relative to this object; None: it has state for every parameter that
                requires a gradient.
        """
        return _Loading(self, self._with_all_state() if stored is None else stored)

    def _state_dict(self, stored: Collection[str] | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._fsdp1 is not None:
            found |= self._fsdp1.state_dict(None if stored is None else bool(_with_state(stored)))
        else:
            found[_MODEL], by_param = self._names.model_state()
            if self._optimizers:
                found[_OPTIMIZER] = self._optimizer_state(_NameOf(self._model, by_param), stored)
        for name, value in self._rest.items():
            below = [other[len(name) + 1 :] for other in stored or () if other.startswith(f"{name}.")]
            found[name] = value.state_dict() if stored is None else state_for(name, value, below)
        return found

    def _optimizer_state(self, name_of: _NameOf, stored: Collection[str] | None) -> Named:
        self._created = {}
        found = state_of_optimizers(self._optimizers, name_of)
        if stored is None or not any(name.startswith(f"{_OPTIMIZER}.") for name in stored):
            return found
        wanted = _with_state(stored)
        for optimizer in self._optimizers:
            names = {param: name_of(param) for param in parameters_of(optimizer)}
            lacking = [param for param, name in names.items() if name in wanted and name not in found["state"]]
            made = initial_state(optimizer, lacking) if lacking else {}
            self._created |= {names[param]: entry for param, entry in made.items() if param in names}
        both = {**found["state"], **{name: dict(entry) for name, entry in self._created.items()}}
        state = {name: entry for name, entry in both.items() if name in wanted}
        if state or f"{_OPTIMIZER}.state" in stored:
            return {"state": state, "param_groups": found["param_groups"]}
        return {"param_groups": found["param_groups"]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Make *state_dict* the state of all objects; tensors that are theirs already are left in place.

        Raises:
            MismatchError: parameters of one group were saved with different settings.
        """
        if self._fsdp1 is not None:
            self._fsdp1.load_state_dict(state_dict)
        else:
            live, by_param = self._names.model_state()
            given = cast("Named", state_dict.get(_MODEL, {}))
            if given and not (_same(given, live) and all(map(_loads_plainly, self._model.modules()))):
                set_model_state_dict(self._model, dict(given), options=StateDictOptions(strict=True))
            if self._optimizers and _OPTIMIZER in state_dict:
                name_of = _NameOf(self._model, by_param)
                load_optimizers(self._optimizers, name_of, state_dict[_OPTIMIZER], self._created)
        self._created = {}
        for name, value in self._rest.items():
            if name in state_dict:
                value.load_state_dict(state_dict[name])

    def _with_all_state(self) -> list[str]:
        if self._fsdp1 is not None:
            return [f"{_OPTIMIZER}.state.*."]  # all or nothing
        _, by_param = self._names.model_state()
        params = [param for optimizer in self._optimizers for param in parameters_of(optimizer) if param.requires_grad]
        name_of = _NameOf(self._model, by_param)
        return [f"{_OPTIMIZER}.param_groups.0", *(f"{_OPTIMIZER}.state.{name_of(param)}." for param in params)]


@dataclass(frozen=True, slots=True)
class _Loading:
    """A `TrainState` whose `state_dict` is to be filled."""

    owner: TrainState
    stored: Collection[str]

    def state_dict(self) -> dict[str, Any]:
        return self.owner.state_dict_for(self.stored)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.owner.load_state_dict(state_dict)


class _Names:
    """A model's state under DCP's names: as its own, but without what wrappers put in between."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._keys: list[str] = []
        self._fqns: list[str] = []

    def model_state(self) -> tuple[Named, dict[int, str]]:
        """Return the live state by name, and for the id of each tensor in it its first name."""
        # Asked for anew each time: FSDP2 puts whole parameters in place of its shards and back. Variables, because to
        # detach a DTensor costs more than all the rest.
        raw = self._model.state_dict(keep_vars=True)
        keys = list(raw)
        if keys != self._keys:
            self._keys, self._fqns = keys, self._dcp_names(keys)
        values = list(raw.values())
        by_tensor = dict(zip(map(id, reversed(values)), reversed(self._fqns), strict=True))
        return dict(zip(self._fqns, values, strict=True)), by_tensor

    def _dcp_names(self, keys: list[str]) -> list[str]:
        if not any(wrapper in key.split(".") for key in keys for wrapper in _WRAPPERS):
            return keys
        # DCP renames in the order of the keys, and leaves alone what needs no new name.
        named = get_model_state_dict(self._model)
        new = iter([name for name in named if name not in set(keys)])
        return [key if key in named else next(new) for key in keys]


class _NameOf:
    """Finds the name of a parameter."""

    def __init__(self, model: nn.Module, by_tensor: Mapping[int, str]) -> None:
        self._model, self._by_tensor = model, by_tensor

    def __call__(self, param: torch.Tensor) -> str:
        name = self._by_tensor.get(id(param))
        if name is None:
            shape = tuple(param.shape)
            message = f"the optimizer has a parameter of shape {shape} that is not in the model's state_dict()"
            raise StructureError(message, hint="Give TrainState the module that holds all parameters of the optimizer")
        return name


def _has_fsdp1(model: nn.Module) -> bool:
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules())


def _with_state(stored: Collection[str]) -> set[str]:
    """Return all that may be a parameter's name in the names of stored optimizer state."""
    found: set[str] = set()
    for name in stored:
        if name.startswith(f"{_OPTIMIZER}.state."):
            rest = name.removeprefix(f"{_OPTIMIZER}.state.")
            while "." in rest:
                rest = rest.rpartition(".")[0]
                found.add(rest)
    return found


def _same(given: Named, live: Named) -> bool:
    return given.keys() == live.keys() and all(given[name] is value for name, value in live.items())


def _loads_plainly(module: nn.Module) -> bool:
    """Whether to fill the module's tensors in place is all that its ``load_state_dict`` would do."""
    kind: Any = type(module)
    held: Any = module
    # FSDP2 has one hook on each of its modules, which sees to it that the shards are in place: `state_dict` did.
    own_hooks = 1 if isinstance(module, FSDPModule) else 0
    return (
        kind.load_state_dict.__module__.startswith("torch.nn.")
        and kind._load_from_state_dict.__module__.startswith("torch.nn.")
        and len(held._load_state_dict_pre_hooks) <= own_hooks
        and not held._load_state_dict_post_hooks
    )
