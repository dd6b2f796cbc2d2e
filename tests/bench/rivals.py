"""The same state saved to tmpfs by torch itself: into fresh files, for torch recycles none."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from states import gpt_state, state_bytes
from timing import Yardstick, together
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

__all__ = ["KINDS", "rival"]

KINDS = {
    "torch.save": "torch.save to tmpfs",
    "dcp.save": "dcp.save to tmpfs",
    "thread": "dcp.async_save, thread",
    "process": "dcp.async_save, process",
}


def rival(path: str, kind: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save in the way *kind*; return how long that blocked, and until the files were there."""
    warnings.filterwarnings("ignore")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = gpt_state(tensors, size)
    yardstick = Yardstick(state_bytes(state))
    samples: dict[str, list[float]] = {"copy": [], "blocked": [], "complete": []}
    for step in range(runs + 1):
        target = Path(path) / f"step_{step}"
        samples["copy"].append(yardstick.secs())
        together()
        begun = time.perf_counter()
        finish = _begin(kind, state, target)
        samples["blocked"].append(time.perf_counter() - begun)
        finish()
        samples["complete"].append(time.perf_counter() - begun)
        shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink()
    return {name: times[1:] for name, times in samples.items()}


def _begin(kind: str, state: dict[str, Any], target: Path) -> Callable[[], object]:
    if kind == "torch.save":
        torch.save(state, target)
    elif kind == "dcp.save":
        dcp.save(state, checkpoint_id=target)
    else:
        executor = AsyncCheckpointerType.PROCESS if kind == "process" else AsyncCheckpointerType.THREAD
        answer: Any = dcp.async_save(state, checkpoint_id=target, async_checkpointer_type=executor)
        return answer.result
    return lambda: None
