"""Optimizer state by parameter name, without ever making an optimizer step that training did not make.

DCP's own functions create Adam's state with step 1 when they are asked for that of an optimizer which has none yet:
training then goes on from another place. Here state is created aside, and the optimizer gets it only with a load.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch.optim import Optimizer

from sm_tiered.errors import MismatchError, StructureError

__all__ = [
    "Named",
    "group_settings",
    "initial_state",
    "load_optimizers",
    "parameters_of",
    "state_of_optimizers",
    "untouched_random_state",
]

Named = dict[str, Any]

_PARAMS = "params"
_CHUNK_BYTES = 64 * 1024 * 1024
"""Parameters whose state is created at a time: they are copied, and have gradients, meanwhile."""


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return the parameters of *optimizer*, in the order in which it numbers them."""
    return [param for group in optimizer.param_groups for param in group[_PARAMS]]


def state_of_optimizers(optimizers: Sequence[Optimizer], name_of: Callable[[torch.Tensor], str]) -> Named:
    """Return what DCP's `get_optimizer_state_dict` would, live, and with the state that there is: maybe none.

    Raises:
        StructureError: two optimizers have state for one parameter.
    """
    state: Named = {}
    groups: list[Named] = []
    for optimizer in optimizers:
        found = optimizer.state_dict()  # with what hooks and subclasses make of it
        names = [name_of(param) for param in parameters_of(optimizer)]
        for key, entry in found["state"].items():
            name = names[key] if type(key) is int else key
            if name in state:
                message = f"two optimizers have state for {name!r}"
                raise StructureError(message, hint="Give one of them to TrainState as a keyword of its own")
            state[name] = dict(cast("Named", entry)) if type(entry) is dict else entry
        groups += [{**group, _PARAMS: [names[index] for index in group[_PARAMS]]} for group in found["param_groups"]]
    return {"state": state, "param_groups": groups}


def initial_state(optimizer: Optimizer, lacking: Iterable[torch.Tensor]) -> dict[torch.Tensor, Any]:
    """Return state for *lacking* parameters as a first step would create it; its values mean nothing.

    The optimizer, the parameters, their gradients and the random state are left as they were, to the bit.

    Raises:
        MismatchError: the optimizer can't make a step of its own.
    """
    made: dict[torch.Tensor, Any] = {}
    state: dict[Any, Any] = cast("Any", optimizer).state
    known: set[Any] = {*state}
    with _set_aside(optimizer):
        for chunk in _chunks(lacking):
            kept = [param.detach().clone() for param in chunk]
            for param in chunk:
                param.grad = torch.zeros_like(param)
            try:
                # The class's: the instance's may be wrapped by a scheduler that counts steps.
                cast("Any", type(optimizer)).step(optimizer)
            except Exception as error:
                message = f"{type(optimizer).__name__} can't create its state for a load: {error}"
                raise MismatchError(message, hint="Make one step before restore, then it has its state") from error
            finally:
                for param, values in zip(chunk, kept, strict=True):
                    param.grad = None
                    param.detach().copy_(values)
                for key in {*state} - known:
                    made[key] = state.pop(key)
    return made


def _chunks(params: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    chunk: list[torch.Tensor] = []
    size = 0
    for param in params:
        chunk.append(param)
        size += param.numel() * param.element_size()
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


@contextmanager
def _set_aside(optimizer: Optimizer) -> Generator[None, None, None]:
    """No gradients and no hooks; afterwards these, the groups' settings and the random state are as they were."""
    params = parameters_of(optimizer)
    grads = [param.grad for param in params]
    groups = [dict(group) for group in optimizer.param_groups]
    hooks = [getattr(optimizer, f"_optimizer_step_{when}_hooks", {}) for when in ("pre", "post")]
    kept_hooks = [dict(found) for found in hooks]
    with untouched_random_state(params), torch.no_grad():
        try:
            for param in params:
                param.grad = None
            for found in hooks:
                found.clear()
            yield
        finally:
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            for group, kept in zip(optimizer.param_groups, groups, strict=True):
                group.clear()
                group.update(kept)
            for found, kept in zip(hooks, kept_hooks, strict=True):
                found.update(kept)


def untouched_random_state(params: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Return a context after which the CPU's generator, and those of the devices of *params*, are as they were."""
    devices = sorted({param.device.index or 0 for param in params if param.is_cuda})
    return cast("Any", torch.random).fork_rng(devices=devices)


def load_optimizers(
    optimizers: Sequence[Optimizer],
    name_of: Callable[[torch.Tensor], str],
    saved: Mapping[str, Any],
    created: Mapping[str, Named],
) -> None:
    """Give *saved*, of the form that `state_of_optimizers` returns, to *optimizers*: state that it lacks is dropped.

    Args:
        optimizers: in any number and grouping, as long as parameters that share a group agree on its settings.
        name_of: a parameter's name.
        saved: maybe with the very tensors that the optimizers hold.
        created: state that `initial_state` created for this load, by name.

    Raises:
        MismatchError: parameters of one group were saved with different settings.
    """
    state = cast("Named", saved.get("state", {}))
    every = {name_of(param) for optimizer in optimizers for param in parameters_of(optimizer)}
    others = {key: value for key, value in state.items() if key not in every}
    position = 0
    for optimizer in optimizers:
        params = parameters_of(optimizer)
        names = [name_of(param) for param in params]
        numbers = iter(range(len(names)))
        groups: list[Named] = []
        for group in optimizer.param_groups:
            indices = [next(numbers) for _ in group[_PARAMS]]
            settings = group_settings(saved.get("param_groups", []), [names[index] for index in indices], position)
            live = {key: value for key, value in group.items() if key != _PARAMS}
            groups.append({**live, **settings, _PARAMS: indices})
            position += 1
        given = {index: state[name] for index, name in enumerate(names) if name in state}
        own = {id(value) for found in (*optimizer.state.values(), *created.values()) for value in _tensors(found)}
        optimizer.load_state_dict({"state": {**others, **given}, "param_groups": groups})
        if type(optimizer).load_state_dict is Optimizer.load_state_dict:
            for index, entry in given.items():
                _keep_own(optimizer.state[params[index]], entry, own)


def _tensors(entry: object) -> list[torch.Tensor]:
    held = cast("Named", entry).values() if isinstance(entry, dict) else ()
    return [value for value in held if isinstance(value, torch.Tensor)]


def _keep_own(loaded: Named, given: Named, own: set[int]) -> None:
    # load_state_dict() casts state to the parameter's dtype: an optimizer that keeps more digits would lose them.
    for key, value in given.items():
        if id(value) in own and loaded.get(key) is not value:
            loaded[key] = value


def group_settings(saved: Sequence[Mapping[str, Any]], names: Sequence[str], position: int) -> Named:
    """Return what was saved for the group that holds *names*, or nothing.

    Raises:
        MismatchError: there are several such groups, and they differ.
    """
    wanted = set(names)
    found = [group for group in saved if wanted.intersection(group.get(_PARAMS, ()))]
    if not names or not any(_PARAMS in group for group in saved):
        found = saved[position : position + 1]
    settings = [{key: value for key, value in group.items() if key != _PARAMS} for group in found]
    if any(repr(other) != repr(settings[0]) for other in settings[1:]):
        message = f"{names[0]} and {len(names) - 1} more are one group here, and were saved with different settings"
        raise MismatchError(message, hint="Group the optimizer's parameters as they were when it was saved")
    return settings[0] if settings else {}
