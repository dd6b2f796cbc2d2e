"""What a checkpoint says of the Accelerator that it was saved from, so that another one is refused before it loads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import accelerate  # pyright: ignore[reportMissingTypeStubs]
from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
from accelerate.utils import DistributedType  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered.errors import MismatchError
from sm_tiered.file_loader import Get

__all__ = ["FILE", "check", "facts_of", "read", "to_json"]

FILE = "sm_tiered_accelerate.json"
"""Stands beside what Accelerate wrote; `Accelerator.load_state` does not look at it."""

_COUNTED = {
    "models": "_models",
    "optimizers": "_optimizers",
    "schedulers": "_schedulers",
    "dataloaders": "_dataloaders",
    "objects registered for checkpointing": "_custom_objects",
}
_ENGINES = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Those with files of their own; all others have the same."""
_SHOWN = 3


def facts_of(accelerator: Accelerator) -> dict[str, Any]:
    """Return what is compared, and the iteration, which Accelerate forgets."""
    private = cast(Any, accelerator)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return {
        "accelerate": accelerate.__version__,
        "iteration": accelerator.project_configuration.iteration,
        "engine": accelerator.distributed_type.value if accelerator.distributed_type in _ENGINES else None,
        "fsdp_state": str(plugin.state_dict_type) if plugin is not None else None,
        "scaler": private.scaler is not None,
        "counts": {what: len(getattr(private, name)) for what, name in _COUNTED.items()},
        "models": _models(accelerator),
    }


def _models(accelerator: Accelerator) -> list[dict[str, list[int]]]:
    """The shape of every parameter by its name, as far as all ranks have the same."""
    private = cast(Any, accelerator)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        return [{} for _ in private._models]  # each stage of a pipeline has others
    # Other engines than FSDP2 tell the shape of this rank's shard.
    whole = accelerator.distributed_type not in _ENGINES or private.is_fsdp2
    return [
        {name: list(parameter.shape) if whole else [] for name, parameter in model.named_parameters()}
        for model in private._models
    ]


def to_json(accelerator: Accelerator) -> bytes:
    """Return `facts_of` as the bytes of the file."""
    return json.dumps(facts_of(accelerator), sort_keys=True).encode()


def read(get: Get) -> dict[str, Any]:
    """Return the facts that stand in a checkpoint.

    Raises:
        MismatchError: there are none: it was not saved by an attached Accelerator.
    """
    try:
        return cast("dict[str, Any]", json.loads(get(FILE)))
    except ValueError as error:
        raise MismatchError(f"{FILE} is no JSON: {error}", hint="Restore an older step.") from error


def check(stored: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Compare *stored* with *accelerator*.

    Raises:
        MismatchError: it would not load; the message says what differs.
    """
    present = facts_of(accelerator)
    for what, count in present["counts"].items():
        saved = stored["counts"].get(what)
        if saved != count:
            raise MismatchError(
                f"the checkpoint has {saved} {what}, this Accelerator {count}",
                hint="Prepare and register the same objects, in the same order, before restore().",
            )
    for what, hint in (
        ("engine", "Launch it as it was launched when it was saved."),
        ("fsdp_state", "Set fsdp_state_dict_type as it was when it was saved."),
        ("scaler", "Set mixed_precision as it was when it was saved."),
    ):
        if stored.get(what) != present[what]:
            message = f"the checkpoint was saved with {what} {stored.get(what)!r}, this is {present[what]!r}"
            raise MismatchError(message, hint=hint)
    for index, (saved, own) in enumerate(zip(stored["models"], present["models"], strict=True)):
        _compare(index, saved, own)


def _compare(index: int, saved: Mapping[str, Sequence[int]], own: Mapping[str, Sequence[int]]) -> None:
    hint = "Build the model as it was built when it was saved, or use a new namespace."
    missing, added = saved.keys() - own.keys(), own.keys() - saved.keys()
    if missing or added:
        told = [f"has {_some(missing)}"] * bool(missing) + [f"lacks {_some(added)}"] * bool(added)
        raise MismatchError(f"model {index}: the checkpoint {' and '.join(told)}", hint=hint)
    for name, shape in own.items():
        if list(saved[name]) != list(shape):
            message = f"model {index}: {name} has shape {list(saved[name])} in the checkpoint, {list(shape)} here"
            raise MismatchError(message, hint=hint)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + more
