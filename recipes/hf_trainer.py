"""Train with the Hugging Face Trainer. Kill it wherever you like, start it again: it goes on from its newest step.

Usage: python hf_trainer.py [--steps N]
       torchrun --nproc-per-node=2 hf_trainer.py [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from byte_lm import Corpus
from sm_tiered_accelerate import TieredTrainerCallback

CONTEXT = 64


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The sources of Python's standard library, one window of bytes after the other."""

    def __init__(self, first: int, count: int) -> None:
        self.text = Corpus().text.long()[first * CONTEXT : (first + count) * CONTEXT]

    def __len__(self) -> int:
        return len(self.text) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT]
        return {"input_ids": window, "labels": window}


def model(*, small: bool) -> LlamaForCausalLM:
    """A small Llama over bytes; nothing is downloaded."""
    width, layers = (64, 2) if small else (256, 6)
    config: Any = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=Path(__file__).with_name("hf_trainer.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()

    arguments = TrainingArguments(
        output_dir="hf_trainer",  # for what the Trainer itself is told to save: here, nothing
        save_strategy="no",  # where checkpoints go, and when, stands in the recipe
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        eval_strategy="steps",
        eval_steps=50,
        logging_steps=10,
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        seed=1729,
    )
    set_seed(1729)
    tiered = TieredTrainerCallback(options.recipe)
    trainer = Trainer(
        model=model(small=options.small),
        args=arguments,
        train_dataset=Windows(0, 4000),
        eval_dataset=Windows(4000, 64),
        callbacks=[tiered],  # the last, if there are others
    )
    tiered.log_with(trainer.log)
    # The newest complete step of the recipe's namespace, from the nearest tier; None if there never was one.
    found = tiered.resolve()
    print("begins anew" if found is None else f"goes on from {Path(found).name}", flush=True)
    trainer.train(resume_from_checkpoint=found)
    print(f"ends at step {trainer.state.global_step}", flush=True)


if __name__ == "__main__":
    main()
