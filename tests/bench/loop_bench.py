"""What a training loop feels of the drain that goes on beside it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from save_bench import opened
from states import gpt_state
from timing import secs_of

__all__ = ["loop", "training_step"]

_STEP_SECS = 0.05
_ALONE_STEPS = 30


def loop(path: str, s3: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Train alone, then while a checkpoint drains; return the mean step of each round of both."""
    state = gpt_state(tensors, size)
    checkpointer = opened(path, state, s3)
    step = training_step()
    checkpointer.save(0, state).wait("s3", timeout=120)  # the drainer is there from now on
    alone: list[float] = []
    beside: list[float] = []
    for round_ in range(1, runs + 1):
        alone.append(statistics.mean(secs_of(step) for _ in range(_ALONE_STEPS)))
        handle = checkpointer.save(round_, state)
        handle.wait("memory")
        times: list[float] = []
        while not handle.done("s3"):
            times.append(secs_of(step))
        beside.append(statistics.mean(times))
    checkpointer.close()
    return {"alone": alone, "beside": beside}


def training_step() -> Any:
    """Return a step of about 50 ms on one thread: matrix products, as training is."""
    weights = torch.randn(512, 512)
    repeats = 1

    def step() -> None:
        data = weights
        for _ in range(repeats):
            data = (data @ weights).tanh()

    step()
    begun = time.perf_counter()
    for _ in range(20):
        step()
    repeats = max(1, round(_STEP_SECS / ((time.perf_counter() - begun) / 20)))
    return step
