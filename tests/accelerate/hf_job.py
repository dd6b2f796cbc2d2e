"""A small training with the Hugging Face Trainer: accumulation, a scheduler, dropout, shuffled data.

Its functions run in ranks of `tests.distributed.dcp_jobs`; transformers is loaded in these alone.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sm_tiered_accelerate.trainer import TieredTrainerCallback
from tests.distributed.dcp_jobs import bits

VOCABULARY = 9000
"""Enough for files of more than a mebibyte, which go into the arena."""


class Tokens(Dataset[dict[str, torch.Tensor]]):
    """Samples of eight random tokens."""

    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(VOCABULARY, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Journal(Trainer):
    """Writes down the loss of each batch, with the step it belongs to."""

    losses: list[str]
    out: str | None = None

    def training_step(self, *given: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*given, **options)
        line = f"{self.state.global_step} {float(loss).hex()}"
        self.losses = [*getattr(self, "losses", []), line]
        if self.out is not None:
            with Path(f"{self.out}.{self.args.process_index}").open("a") as file:
                file.write(f"{line}\n")
        return loss


class Cut(TrainerCallback):
    """Ends its process, or asks for its end, in the middle of a step."""

    def __init__(self, tiered: TieredTrainerCallback, at: int, how: str = "kill") -> None:
        self.tiered, self.at, self.how = tiered, at, how

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.at:
            return
        if self.how == "kill":
            self.tiered.wait()
            if args.world_size > 1:
                torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "raise":
            raise ZeroDivisionError("cut")
        if args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def join(rank: int, world: int) -> None:
    """Be what torchrun would make of this process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if world:
        found = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
        os.environ.update({name: str(value) for name, value in found.items()})


def trainer(out: Path | str, *callbacks: TrainerCallback, **options: Any) -> Journal:
    """Make a Trainer that writes to *out*; *options* change its arguments. Each has the same model and data."""
    given: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 3,
    }
    arguments = TrainingArguments(**{**given, **options})
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.2,
    )
    return Journal(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Tokens(),
        eval_dataset=Tokens(4),
        callbacks=list(callbacks),
    )


def weights(made: Trainer) -> Any:
    """Return model, moments and schedule, to the bit."""
    parts: list[Any] = [made.model, made.optimizer, made.lr_scheduler]
    model, optimizer, scheduler = (part.state_dict() for part in parts)
    return bits([model, optimizer["state"], scheduler])


def train(
    rank: int, world: int, which: Any, root: str, cut_at: int | None = None, **options: Any
) -> tuple[str | None, Any]:
    """Train to the end, or until it is cut in step *cut_at*; return what was resumed from and what came of it."""
    join(rank, world)
    tiered = TieredTrainerCallback(which)
    cut = [Cut(tiered, cut_at)] if cut_at is not None else []
    made = trainer(f"{root}/hf", *cut, tiered, **options)
    made.out = f"{root}/losses"
    found = tiered.resolve()
    name = found and Path(found).name
    if rank == 0:
        with Path(f"{root}/losses.began").open("a") as file:
            file.write(f"{name}\n")
    made.train(resume_from_checkpoint=found)
    return name, weights(made)
