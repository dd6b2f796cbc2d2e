"""What saves cost the training: time that it waits, time until it is safe in memory, private memory, bytes."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint  # what every job that uses DCP has loaded is none of our cost  # noqa: F401
from states import gpt_state, state_bytes
from timing import Peak, Yardstick, anonymous_bytes, secs_of, together

__all__ = ["WARM_SECS", "first", "memory", "opened", "recipe", "slowest", "state_dict", "steady"]

WARM_SECS = 120.0
_STEP_SECS = 0.25
"""A training step between two saves, in which what is left of the first one's work is done."""


def recipe(path: str, s3: str | None = None) -> dict[str, Any]:
    """Return a recipe with memory at *path*, and S3 at the address *s3*."""
    tiers: dict[str, Any] = {"memory": {"kind": "memory", "path": path, "keep": {"latest": 1}}}
    if s3 is not None:
        tiers["s3"] = {
            "kind": "s3",
            "uri": "s3://bench/checkpoints",
            "endpoint_url": s3,
            "allow_http": True,
            "region": "us-east-1",
            "force_path_style": True,
            "keep": {"latest": 1},
        }
    return {"version": 1, "namespace": "bench", "tiers": tiers, "on_error": "raise"}


def opened(path: str, state: dict[str, Any], s3: str | None = None) -> Any:
    """Return a checkpointer whose pages for *state* are prepared."""
    from sm_tiered_dcp import TieredCheckpointer

    checkpointer = TieredCheckpointer.from_recipe(recipe(path, s3))
    checkpointer.prepare(state)
    store: Any = checkpointer._open.store
    assert store.arena.wait(WARM_SECS)
    return checkpointer


def steady(path: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save again and again, each time after a copy of as many bytes; the slowest rank counts."""
    state = gpt_state(tensors, size)
    yardstick = Yardstick(state_bytes(state))
    checkpointer = opened(path, state)
    samples: dict[str, list[float]] = {"copy": [], "blocked": [], "acknowledged": [], "state_dict": []}
    for step in range(runs + 2):
        samples["copy"].append(yardstick.secs())
        together()
        begun = time.perf_counter()
        handle = checkpointer.save(step, state)
        samples["blocked"].append(time.perf_counter() - begun)
        handle.wait("memory")
        samples["acknowledged"].append(time.perf_counter() - begun)
        time.sleep(_STEP_SECS)
    stored = _stored_bytes(path)
    checkpointer.close()
    found = {name: slowest(times[2:]) for name, times in samples.items() if times}
    return {**found, "stored_bytes": stored, "state_bytes": _sum(state_bytes(state))}


def first(path: str, tensors: int, size: int) -> dict[str, Any]:
    """Save once, after start-up has fetched the pages."""
    state = gpt_state(tensors, size)
    yardstick = Yardstick(state_bytes(state))
    checkpointer = opened(path, state)
    copies = [yardstick.secs() for _ in range(3)]
    blocked = secs_of(lambda: checkpointer.save(0, state))
    checkpointer.close()
    return {"copy": copies, "blocked": [blocked]}


def memory(path: str, tensors: int, size: int, runs: int, s3: str | None = None) -> dict[str, Any]:
    """Look how much private memory a job has more while it saves, from before our first import on."""
    state = gpt_state(tensors, size)
    gc.collect()
    before = anonymous_bytes()
    with Peak(anonymous_bytes) as peak:
        checkpointer = opened(path, state, s3)
        for step in range(runs):
            checkpointer.save(step, state).wait("memory")
            time.sleep(_STEP_SECS)
        settled = anonymous_bytes()
        checkpointer.close()
    return {"peak_bytes": peak.highest - before, "settled_bytes": settled - before}


def state_dict(params: int, runs: int) -> dict[str, Any]:
    """Ask a model of *params* parameters and its Adam for their state, as each save of a `TrainState` does."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    from sm_tiered_dcp import TrainState

    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(params // 2)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    train = TrainState(model, optimizer)
    train.state_dict()
    return {
        "ours": [secs_of(train.state_dict) for _ in range(runs)],
        "get_state_dict": [secs_of(lambda: get_state_dict(model, optimizer)) for _ in range(runs)],
    }


def _stored_bytes(path: str) -> int:
    newest = max(Path(path).glob("bench/step_*"))
    return sum(file.stat().st_size for file in newest.iterdir())


def slowest(times: list[float]) -> list[float]:
    """Return for each of *times* the longest of all ranks."""
    if not dist.is_initialized():
        return times
    found = torch.tensor(times, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def _sum(value: int) -> int:
    if not dist.is_initialized():
        return value
    found = torch.tensor(value)
    dist.all_reduce(found)
    return int(found)
