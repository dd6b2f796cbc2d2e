"""Which tensors of a checkpoint are meant: the model's, as far as the keys that lead to them tell, or a pattern's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sm_tiered.stored_tensors import StoredTensor

__all__ = ["model_prefix", "is_model", "is_moment", "picked"]

_OPTIMIZER = re.compile(r"optim|per_rank|^(?:lr_)?schedulers?$|^rng", re.IGNORECASE)
"""Keys, whole or in part, below which nothing is a model's."""
_WEIGHTS_FILE = re.compile(r"(?:.*/)?(?:[^/]*\.safetensors|pytorch_model[^/]*\.bin|model[^/]*\.bin)")
_MODEL_KEYS = frozenset({"model", "module", "state_dict", "model_state_dict"})
_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg"),
        *("acc_delta", "sum", "mu_product", "mu", "nu", "momentum", "velocity"),
    }
)
"""What optimizers call the state that every step changes."""


def is_model(tensor: StoredTensor) -> bool:
    """Whether *tensor* is one of a model, as far as names tell: not an optimizer's, nor one that each rank has."""
    keys = [str(key) for key in tensor.path[:-1]] or tensor.name.split(".")
    if tensor.file is not None:
        # Lightning keeps the model's in its checkpoint's `state_dict`, others in files of their own.
        return keys[1:2] == ["state_dict"] or _WEIGHTS_FILE.fullmatch(tensor.file) is not None
    return not any(_OPTIMIZER.search(key) for key in keys[:3])


def is_moment(tensor: StoredTensor) -> bool:
    """Whether *tensor* is state that an optimizer changes with every step, such as Adam's averages."""
    *keys, last = (str(key) for key in tensor.path)
    return last in _MOMENTS and any("optim" in key.lower() or key == "state" for key in keys)


def picked(
    tensors: Mapping[str, StoredTensor], *, prefix: str | None, patterns: Sequence[str], every: bool
) -> dict[str, StoredTensor]:
    """Return those of *tensors*, the model's or *every*, that begin with *prefix* and match one of *patterns*."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if (every or is_model(tensor))
        and name.startswith(prefix or "")
        and (not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))
    }


def model_prefix(names: Sequence[str]) -> str:
    """Return what all *names* begin with up to the key that a model was saved under; empty where there is no such."""
    keys = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for each in zip(*keys, strict=False):
        if len(set(each)) > 1:
            break
        shared.append(each[0])
    ends = [place for place, key in enumerate(shared, 1) if key in _MODEL_KEYS]
    return "".join(f"{key}." for key in shared[: max(ends)]) if ends else ""
