"""Model and optimizer over two ranks: FSDP2, DDP and FSDP on gloo."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from sm_tiered.errors import StructureError
from sm_tiered_dcp.state import RngState, TrainState
from sm_tiered_dcp.target import Stored, Target
from sm_tiered_dcp.tree import flatten, signature

WORLD = 2


class Model(nn.Module):
    """Tied weights, and rows that do not divide by the number of ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 7), nn.Dropout(0.2), nn.Linear(7, 8)) for _ in range(2))
        self.register_buffer("scale", torch.ones(1))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden) * self.scale
        return self.head(hidden)


def _fsdp2(model: Model, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Run:
    def __init__(
        self,
        seed: int,
        wrap: Callable[[Model], nn.Module],
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        torch.manual_seed(seed)
        self.model = wrap(Model())
        self.optimizer = make(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.train_state = TrainState(self.model, self.optimizer, self.scheduler)
        self.state = {"train": self.train_state, "per_rank": {"rng": RngState(), "losses": []}}
        torch.manual_seed(seed + dist.get_rank())

    def train(self, steps: int) -> None:
        for _ in range(steps):
            tokens = torch.randint(0, 11, (5,))
            loss = nn.functional.cross_entropy(self.model(tokens), tokens.flip(0))
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.state["per_rank"]["losses"].append(loss.item())


def _local(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.to_local().detach().clone()
    if hasattr(value, "local_shards"):
        return [shard.tensor.clone() for shard in value.local_shards()]
    return value.detach().clone()


def _snapshot(state: dict[str, Any]) -> tuple[dict[str, Stored], dict[str, Any], dict[str, Any]]:
    flat = flatten(state, rank=dist.get_rank())
    tensors, values = {**flat.tensors, **flat.per_rank_tensors}, {**flat.values, **flat.per_rank_values}
    stored = {name: Stored(path=leaf.path, is_tensor=True) for name, leaf in tensors.items()}
    stored |= {name: Stored(path=leaf.path, is_tensor=False) for name, leaf in values.items()}
    return (
        stored,
        {name: _local(leaf.value) for name, leaf in tensors.items()},
        {name: copy.deepcopy(leaf.value) for name, leaf in values.items()},
    )


def _fill(state: dict[str, Any], saved: tuple[dict[str, Stored], dict[str, Any], dict[str, Any]]) -> None:
    stored, tensors, values = saved
    target = Target(state, rank=dist.get_rank())
    target.open(stored, stored_rank=dist.get_rank())
    target.check_names()
    for name, tensor in target.tensors.items():
        if hasattr(tensor, "local_shards"):
            for shard, there in zip(tensor.local_shards(), tensors[name], strict=True):
                shard.tensor.detach().copy_(there)
        else:
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).copy_(tensors[name])
    target.assign_values({name: copy.deepcopy(values[name]) for name in target.wanted_values})
    target.finish()


def _bits(value: Any) -> Any:
    if hasattr(value, "local_shards") or isinstance(value, torch.Tensor):
        local = _local(value)
        return [
            t.contiguous().view(-1).view(torch.uint8).tolist() for t in (local if isinstance(local, list) else [local])
        ]
    if isinstance(value, dict):
        return {key: _bits(entry) for key, entry in value.items()}
    return [_bits(entry) for entry in value] if isinstance(value, (list, tuple)) else repr(value)


def _everything(run: Run) -> Any:
    return _bits(
        [*get_state_dict(run.model, run.optimizer), run.scheduler.state_dict(), run.state["per_rank"]["losses"]]
    )


def _goes_on(wrap: Callable[[Model], nn.Module], make: Any = torch.optim.AdamW) -> None:
    run = Run(1, wrap, make)
    run.train(3)
    saved = _snapshot(run.state)
    run.train(3)
    other = Run(7, wrap, make)
    _fill(other.state, saved)
    other.train(3)
    assert _everything(other) == _everything(run)


def _fresh_stays_fresh(wrap: Callable[[Model], nn.Module]) -> None:
    plain = Run(1, wrap)
    plain.train(2)
    run = Run(1, wrap)
    saved = _snapshot(run.state)
    assert not run.optimizer.state
    run.train(2)
    assert _everything(run) == _everything(plain)
    other = Run(7, wrap)
    other.train(1)
    _fill(other.state, saved)
    assert not other.optimizer.state
    other.train(2)
    assert _everything(other) == _everything(plain)


def _same_as_dcp(run: Run) -> None:
    ours = run.train_state.state_dict()
    model, optimizer = cast("tuple[dict[str, Any], dict[str, Any]]", get_state_dict(run.model, run.optimizer))
    assert list(ours["model"]) == list(model)
    assert ours["optimizer"]["param_groups"] == optimizer["param_groups"]
    assert {name: set(entry) for name, entry in ours["optimizer"]["state"].items()} == {
        name: set(entry) for name, entry in optimizer["state"].items()
    }
    assert _bits({key: ours[key] for key in ("model", "optimizer")}) == _bits({"model": model, "optimizer": optimizer})
    for name, value in model.items():
        assert isinstance(ours["model"][name], DTensor) == isinstance(value, DTensor)


def _fsdp2_checks(mesh: DeviceMesh, folder: Path) -> None:
    def wrap(model: Model) -> nn.Module:
        return _fsdp2(model, mesh)

    _goes_on(wrap)
    _goes_on(wrap, lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9))
    _fresh_stays_fresh(wrap)
    run = Run(1, wrap)
    run.train(1)
    _same_as_dcp(run)
    with torch.no_grad():
        run.model(torch.arange(5))  # leaves the outermost module's parameters whole
    _same_as_dcp(run)
    flat = flatten(run.state, rank=mesh.get_rank())
    assert flat.tied == {"train.model.head.weight": "train.model.embedding.weight"}
    first = signature(flat, world=WORLD)
    run.train(1)
    assert signature(flatten(run.state, rank=mesh.get_rank()), world=WORLD) == first
    dcp_save({"train": run.train_state}, checkpoint_id=folder / "stock")
    other = Run(7, wrap)
    dcp_load({"train": other.train_state.loading()}, checkpoint_id=folder / "stock")
    assert _everything(other)[:3] == _everything(run)[:3]


def _tensor_checks(mesh: DeviceMesh) -> None:
    whole = torch.arange(10.0).reshape(5, 2)
    shards, copies = distribute_tensor(whole, mesh, [Shard(0)]), distribute_tensor(whole, mesh, [Replicate()])
    marks = [
        signature(flatten({"x": value}, rank=0))
        for value in (shards, copies, distribute_tensor(whole, mesh, [Shard(1)]), whole)
    ]
    assert len(set(marks)) == 4
    again = DTensor.from_local(shards.to_local(), mesh, [Shard(0)], shape=whole.shape, stride=whole.stride())
    assert flatten({"a": shards, "b": again, "c": copies}, rank=0).tied == {"b": "a"}
    assert signature(flatten({"x": {"y": shards}}, rank=0)) == signature(flatten({"x": {"y": shards + 1}}, rank=0))
    with pytest.raises(StructureError, match="x, a DTensor, has a pending sum"):
        flatten({"x": DTensor.from_local(whole, mesh, [Partial()])}, rank=0)
    with pytest.raises(StructureError, match=r"per_rank\.00000\.x is a DTensor"):
        flatten({"per_rank": {"x": shards}}, rank=0)
    with pytest.raises(StructureError, match=r"per_rank\.00000\.x\.y is a DTensor"):
        flatten({"z": {"a": shards, "b": shards}, "per_rank": {"x": {"y": shards}}}, rank=0)


def _rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        _tensor_checks(mesh)
        _fsdp2_checks(mesh, Path(folder))
        _goes_on(DistributedDataParallel)
        ddp = Run(1, DistributedDataParallel)
        ddp.train(1)
        _same_as_dcp(ddp)
        _goes_on(_fsdp1)
        _fresh_stays_fresh(_fsdp1)
    finally:
        dist.destroy_process_group()


def _fsdp1(model: Model) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def test_training_goes_on_bit_for_bit_on_two_ranks(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, (port, str(tmp_path)), nprocs=WORLD)
