"""States to save: GPT-like parameters in fp32 with Adam's two moments and step for each, of a given number and size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

__all__ = ["gpt_state", "state_bytes", "tensors_of"]

_PER_PARAM = 4
"""The parameter, exp_avg, exp_avg_sq and step."""
_PER_BLOCK = 12
_NOISE = 1 << 20


def gpt_state(tensors: int, size: int, *, fill: float | None = None, whole: bool = False) -> dict[str, Any]:
    """Return a state of *tensors* tensors and about *size* bytes over all ranks, each byte in RAM.

    With several ranks each holds its rows of every tensor, as FSDP2 shards them, or all of it, *whole*, as with DDP.
    Numbers are the same at each call, or all *fill*.
    """
    world = 1 if whole else _world()
    shapes = _shapes(tensors // _PER_PARAM, size // (3 * torch.float32.itemsize))
    noise, count = torch.randn(_NOISE, generator=torch.Generator().manual_seed(1729 + _rank())), itertools.count()

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        made = torch.empty(shape[0] // world, *shape[1:])
        for piece in made.view(-1).split(_NOISE):
            # No two pieces are alike; to draw a GiB of numbers would take longer than to measure.
            piece.fill_(fill) if fill is not None else torch.add(noise[: len(piece)], next(count), out=piece)
        return made if world == 1 else _sharded(made)

    step = 0.0 if fill is None else fill
    return {
        "model": {name: tensor(shape) for name, shape in shapes.items()},
        "optimizer": {
            name: {"exp_avg": tensor(shape), "exp_avg_sq": tensor(shape), "step": torch.tensor(step)}
            for name, shape in shapes.items()
        },
    }


def tensors_of(state: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of *state* as this rank has them in memory."""
    found: list[torch.Tensor] = []
    for value in state.values():
        if isinstance(value, dict):
            found += tensors_of(value)
        else:
            found.append(value.to_local() if isinstance(value, DTensor) else value)
    return found


def state_bytes(state: dict[str, Any]) -> int:
    """Return how many bytes of *state* this rank has."""
    return sum(tensor.nbytes for tensor in tensors_of(state))


def _shapes(count: int, elements: int) -> dict[str, tuple[int, ...]]:
    """Name *count* parameters with about *elements* numbers: an embedding, and blocks as in GPT-2."""
    blocks = (count - 4) // _PER_BLOCK
    width = max(16, int(math.sqrt(0.75 * elements / (_PER_BLOCK * blocks))) // 16 * 16)
    block = {
        **{f"{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")},
        "attn.qkv.weight": (3 * width, width),
        "attn.qkv.bias": (3 * width,),
        "attn.out.weight": (width, width),
        "attn.out.bias": (width,),
        "mlp.up.weight": (4 * width, width),
        "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width),
        "mlp.down.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"wpe.weight": (1024, width), "ln_f.weight": (width,), "ln_f.bias": (width,)}
    shapes |= {f"h.{index}.{name}": shape for index in range(blocks) for name, shape in block.items()}
    shapes |= {f"extra.{index}": (width,) for index in range(count - 1 - len(shapes))}
    rest = elements - sum(math.prod(shape) for shape in shapes.values())
    return {"wte.weight": (max(2, rest // width // 2 * 2), width), **shapes}


def _sharded(local: torch.Tensor) -> DTensor:
    global _mesh
    _mesh = _mesh or init_device_mesh("cpu", (_world(),))
    return DTensor.from_local(local, _mesh, [Shard(0)])


_mesh: Any = None


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
