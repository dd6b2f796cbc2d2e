"""The byte transformer of `byte_lm.py`, sharded with FSDP2, and one step of its training. Nothing about checkpoints."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW

from byte_lm import ByteLM, Size

__all__ = ["make_model", "train_step"]

SEED = 1729


def make_model(size: Size, device: torch.device) -> ByteLM:
    """Make the model on *device* and shard it over all ranks."""
    # The same seed everywhere: FSDP2 keeps a shard of what each rank made, it does not send rank 0's weights around.
    torch.manual_seed(SEED)
    model = ByteLM(size).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # From here on another one on each rank, so that dropout differs.
    torch.manual_seed(SEED + 1 + dist.get_rank())
    return model


def train_step(model: ByteLM, optimizer: AdamW, batch: tuple[Tensor, Tensor]) -> float:
    """Learn from one batch on each rank; return the mean loss, the same on all."""
    text, following = batch
    loss = F.cross_entropy(model(text).flatten(0, 1), following.flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return mean.item()
