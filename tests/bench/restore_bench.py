"""How long a new process takes to have its state back from memory, every byte of it verified."""

from __future__ import annotations

from typing import Any

import torch
from save_bench import opened, recipe
from states import gpt_state, state_bytes, tensors_of
from timing import Peak, Yardstick, anonymous_bytes, secs_of

__all__ = ["leave", "restore"]


def leave(path: str, tensors: int, size: int) -> None:
    """Save a checkpoint into memory, and end."""
    state = gpt_state(tensors, size)
    checkpointer = opened(path, state)
    checkpointer.save(7, state).wait("memory")
    checkpointer.close()


def restore(path: str, tensors: int, size: int, threads: int) -> dict[str, Any]:
    """Restore into a state whose pages are there, with *threads* intra-op threads, and compare it."""
    from sm_tiered_dcp import TieredCheckpointer

    torch.set_num_threads(threads)
    state = gpt_state(tensors, size, fill=1.0)
    yardstick = Yardstick(state_bytes(state))
    copies = [yardstick.secs() for _ in range(3)]
    checkpointer = TieredCheckpointer.from_recipe(recipe(path))
    before = anonymous_bytes()
    with Peak(anonymous_bytes, every_secs=0.01) as peak:
        restored = secs_of(lambda: checkpointer.restore(state))
    private = peak.highest - before
    checkpointer.close()
    saved = gpt_state(tensors, size)
    if not all(map(torch.equal, tensors_of(state), tensors_of(saved))):
        raise RuntimeError("what was restored is not what was saved")
    return {"copy": copies, "restored": [restored], "peak_bytes": private}
