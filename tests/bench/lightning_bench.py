"""What a save costs a Lightning training: with Lightning's own plugins, on a disk, and with ours."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from loop_bench import training_step
from save_bench import WARM_SECS, recipe, slowest
from states import gpt_state, state_bytes
from timing import Peak, Yardstick, anonymous_bytes, secs_of, together

__all__ = ["saves"]

_STEPS = 8
"""Training steps that are timed before a save and after it."""


class Idle(torch.optim.AdamW):
    """An optimizer with all its state, which costs nothing: saves are measured here."""

    def step(self, closure: Any = None) -> Any:
        """Let the gradients be made."""
        return closure() if closure is not None else None


class Model(LightningModule):
    """The parameters of a GPT with Adam's state for each; only one more number is trained."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(tensor, requires_grad=False) for tensor in state["model"].values()
        )
        self.trained = torch.nn.Parameter(torch.ones(1))
        self.moments = list(state["optimizer"].values())

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.trained.square().sum() * batch.mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = Idle([*self.weights, self.trained])
        optimizer.state.update(zip(self.weights, self.moments, strict=True))
        return optimizer

    def train_dataloader(self) -> Any:
        samples: Any = torch.ones(64, 1)
        return torch.utils.data.DataLoader(samples)


class Measure(Callback):
    """Saves at the end of each batch, and times all there is to it; the first save is not counted."""

    def __init__(self, save: Callable[[Trainer, int], Callable[[], object]], size: int) -> None:
        self.save, self.yardstick, self.step = save, Yardstick(size), training_step()
        self.samples: dict[str, list[float]] = {
            name: [] for name in ("copy", "dump", "blocked", "complete", "alone", "beside")
        }
        self.peak = Peak(anonymous_bytes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: DDP sends the weights around in copies when it wraps the model.
        self.peak.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak.__exit__(None, None, None)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        found = self.samples
        connector: Any = vars(trainer)["_checkpoint_connector"]
        found["copy"].append(self.yardstick.secs())
        found["dump"].append(secs_of(lambda: connector.dump_checkpoint(weights_only=False)))
        found["alone"].append(self._steps())
        together()
        begun = time.perf_counter()
        finish = self.save(trainer, trainer.global_step)
        found["blocked"].append(time.perf_counter() - begun)
        found["beside"].append(self._steps())
        finish()
        found["complete"].append(time.perf_counter() - begun)
        together()

    def _steps(self) -> float:
        return statistics.mean(secs_of(self.step) for _ in range(_STEPS))


def saves(path: str, kind: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Train *runs* + 1 steps and save after each; the slowest rank counts. Every rank has the whole state.

    Args:
        path: where the memory tier is.
        kind: ``torch`` or ``async``, Lightning's own plugins on a disk, or ``ours``.
        tensors: how many there are in the state.
        size: of the state, in bytes.
        runs: how many saves are measured.
    """
    _quiet()
    state = gpt_state(tensors, size, whole=True)
    model, measured = Model(state), state_bytes(state)
    measure = Measure(_ours if kind == "ours" else _theirs(kind), measured)
    gc.collect()
    before = anonymous_bytes()
    with tempfile.TemporaryDirectory() as disk:
        os.chdir(disk)
        world = dist.get_world_size() if dist.is_initialized() else 1
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy="ddp" if world > 1 else "auto",
            max_steps=runs + 1,
            logger=False,
            enable_checkpointing=kind == "ours",
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[measure, *_callbacks(kind, path)],
            plugins=[LightningEnvironment(), *_plugins(kind)] if world > 1 else _plugins(kind),
        )
        trainer.fit(model)
    found = {name: slowest(times[1:]) for name, times in measure.samples.items()}
    return {**found, "peak_bytes": measure.peak.highest - before, "state_bytes": measured}


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))


def _plugins(kind: str) -> list[Any]:
    if kind == "ours":
        return []
    return [AsyncCheckpointIO(TorchCheckpointIO()) if kind == "async" else TorchCheckpointIO()]


def _callbacks(kind: str, path: str) -> list[Callback]:
    if kind != "ours":
        return []
    from sm_tiered_lightning import TieredCheckpoint

    return [TieredCheckpoint(recipe(path))]


def _ours(trainer: Trainer, step: int) -> Callable[[], object]:
    trainer.save_checkpoint(f"tiered://step/{step}")
    io: Any = trainer.strategy.checkpoint_io
    checkpointer = io.session.checkpointer

    def finish() -> None:
        checkpointer.wait()
        # The first save plans, and then pages are prepared beside the training.
        assert checkpointer._open.store.arena.wait(WARM_SECS)

    return finish


def _theirs(kind: str) -> Callable[[Trainer, int], Callable[[], object]]:
    def save(trainer: Trainer, step: int) -> Callable[[], object]:
        path = os.path.join(os.getcwd(), f"{step}.ckpt")
        trainer.save_checkpoint(path)

        def finish() -> None:
            io: Any = trainer.strategy.checkpoint_io
            if kind == "async" and io._executor is not None:
                io._executor.submit(lambda: None).result()  # it has one worker
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

        return finish

    return save
