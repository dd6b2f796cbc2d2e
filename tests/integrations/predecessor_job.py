"""A job that saves with the predecessor, run in a child: ``python predecessor_job.py JSON`` or, to import, its state.

The JSON object: ``namespace``, ``steps``, ``world``, and ``base`` and ``endpoint`` (S3), ``s3_steps`` (those that go
there; else all), ``by_step`` (the layout for Ray), ``daemon`` (the address of the cluster's service), ``extra``
(``pickle``: the state has what only a pickle can store).
"""

from __future__ import annotations

import datetime
import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

VIEW = (20, 50)
"""The shape of what a view is a row of."""


def local_state(step: int) -> dict[str, Any]:
    """What every rank holds of *step*."""
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)  # no sum, whose bits depend on the number of threads
    optimizer.step()
    scheduler.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "odd": {
            "scalar": torch.tensor(float(step)),
            "bf16": torch.randn(5, 3).to(torch.bfloat16),
            "none": torch.zeros(0, 4),
            "view": torch.randn(*VIEW)[3],
            "turned": torch.randn(4, 7).t(),
            "flags": torch.tensor([True, False]),
            "complex": torch.randn(3, dtype=torch.complex64).conj(),
            "nested": [torch.arange(3), {"deep": torch.ones(2)}],
        },
        "values": {"text": "a b", "tuple": (1, 2.5, None), "big": 2**70, "inside": {"t": [torch.arange(2)]}},
        "step": step,
        "epoch": step // 10,
    }


def state(step: int, *, sharded: bool) -> dict[str, Any]:
    """The state of *step*; *sharded*: with a tensor of which each rank has some rows."""
    found = local_state(step)
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        found["sharded"] = distribute_tensor(whole(step), mesh, [Shard(0)])
    return found


def whole(step: int) -> torch.Tensor:
    """The tensor that is sharded."""
    return torch.arange(5 * 4, dtype=torch.float32).reshape(5, 4) + step


class Odd:
    """What only a pickle can store."""


def _rank(rank: int, wanted: dict[str, Any], store: str) -> None:
    import s3torchconnector
    from s3torchconnector import S3ClientConfig

    if wanted.get("endpoint"):
        replaced: Any = s3torchconnector
        replaced.S3Checkpoint = functools.partial(
            s3torchconnector.S3Checkpoint,
            endpoint=wanted["endpoint"],
            s3client_config=S3ClientConfig(force_path_style=True),
        )
    from amzn_sagemaker_checkpointing.checkpointing.filesystem.filesystem import (  # pyright: ignore
        SageMakerTieredStorageWriter,
    )
    from amzn_sagemaker_checkpointing.config.in_memory_client import InMemoryClientConfig  # pyright: ignore
    from amzn_sagemaker_checkpointing.config.sagemaker_checkpoint_config import (  # pyright: ignore
        SageMakerCheckpointConfig,
    )

    defaults: Any = InMemoryClientConfig.__init__
    url = wanted.get("daemon") or "http://127.0.0.1:9"
    defaults.__defaults__ = (url, *defaults.__defaults__[1:])
    world = wanted["world"]
    if world > 1:
        file = dist.FileStore(store, world)
        dist.init_process_group("gloo", store=file, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    place: dict[str, Any] = {"s3_tier_base_path": wanted.get("base", "")}
    if wanted.get("by_step"):
        from amzn_sagemaker_checkpointing.config.s3_path_strategy import RayS3PathStrategy  # pyright: ignore

        place = {"s3_path_strategy": RayS3PathStrategy(wanted["base"])}
    config = SageMakerCheckpointConfig(namespace=wanted["namespace"], world_size=world, **place)
    for step in wanted["steps"]:
        config.save_to_s3 = bool(wanted.get("base")) and step in wanted.get("s3_steps", wanted["steps"])
        saved = state(step, sharded=world > 1)
        if wanted.get("extra") == "pickle":
            saved["extra"] = Odd()
        writer = SageMakerTieredStorageWriter(checkpoint_config=config, step=step)
        dcp.save(saved, storage_writer=writer, no_dist=world == 1)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Run the ranks."""
    import torch.multiprocessing as mp

    wanted = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        if wanted["world"] == 1:
            _rank(0, wanted, store)
        else:
            mp.start_processes(_rank, args=(wanted, store), nprocs=wanted["world"], start_method="fork")


if __name__ == "__main__":
    main()
