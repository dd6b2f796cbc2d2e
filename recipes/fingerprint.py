"""What two runs must agree on to the last bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["fingerprint"]


def fingerprint(model: nn.Module, optimizer: Optimizer, losses: Sequence[float]) -> dict[str, str | list[str]]:
    """Return digests of this rank's shards and random state, and every loss without rounding."""
    weights = dict(model.named_parameters())
    moments = {
        f"{name}.{key}": torch.as_tensor(value)
        for name, parameter in weights.items()
        for key, value in optimizer.state[parameter].items()
    }
    return {
        "weights": _digest(weights),
        "optimizer": _digest(moments),
        "random state": _digest({"cpu": torch.get_rng_state()}),
        "losses": [loss.hex() for loss in losses],
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        found.update(local.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
