"""What `save_state` costs a training with Accelerate: its own, on tmpfs and on a disk, and through the tiers."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_bench import Idle
from save_bench import WARM_SECS, recipe, slowest
from states import gpt_state, state_bytes
from timing import Yardstick, together

__all__ = ["saves"]

_FIELDS = ("copy", "blocked", "stock")


def saves(path: str, kind: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save *runs* + 1 times; the slowest rank counts, and the first save does not.

    Args:
        path: where the memory tier is.
        kind: ``tmpfs`` or ``disk``, Accelerate's own there, or ``ours``.
        tensors: how many there are in the state.
        size: of the state, in bytes.
        runs: how many saves are measured.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    from accelerate import Accelerator

    state = gpt_state(tensors, size, whole=True)
    model = torch.nn.ParameterList(torch.nn.Parameter(tensor, False) for tensor in state["model"].values())
    optimizer = Idle([*model])
    optimizer.state.update(zip(model, state["optimizer"].values(), strict=True))
    accelerator: Any = Accelerator(cpu=True)
    accelerator._models, accelerator._optimizers = [model], [accelerator.prepare_optimizer(optimizer)]
    save = _ours(accelerator, path) if kind == "ours" else _theirs(accelerator, path if kind == "tmpfs" else None)
    yardstick = Yardstick(state_bytes(state))
    samples: dict[str, list[float]] = {name: [] for name in _FIELDS}
    for _ in range(runs + 1):
        samples["copy"].append(yardstick.secs())
        together()
        begun = time.perf_counter()
        stock_secs, finish = save()
        samples["blocked"].append(time.perf_counter() - begun)
        samples["stock"].append(stock_secs)
        finish()
        together()
    return {**{name: slowest(times[1:]) for name, times in samples.items()}, "state_bytes": state_bytes(state)}


Save = Callable[[], tuple[float, Callable[[], object]]]
"""Saves; returns how long Accelerate's own code took of it, in seconds, and what waits and tidies."""


def _ours(accelerator: Any, path: str) -> Save:
    from sm_tiered_accelerate import attach

    tiered: Any = attach(accelerator, recipe(path))
    spent = [0.0]
    stock = tiered._stock.save

    def timed(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        try:
            return stock(*arguments, **options)
        finally:
            spent[0] = time.perf_counter() - begun

    tiered._stock.save = timed

    def finish() -> None:
        tiered.wait()
        # The first save plans, and then pages are prepared beside the training.
        assert tiered._files._open.store.arena.wait(WARM_SECS)

    def save() -> tuple[float, Callable[[], object]]:
        accelerator.save_state()
        return spent[0], finish

    return save


def _theirs(accelerator: Any, base: str | None) -> Save:
    def save() -> tuple[float, Callable[[], object]]:
        directory = Path(tempfile.mkdtemp(dir=base))
        begun = time.perf_counter()
        accelerator.save_state(str(directory))
        return time.perf_counter() - begun, lambda: shutil.rmtree(directory)

    return save
