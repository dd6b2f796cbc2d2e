"""Train with Accelerate. Kill it wherever you like, start it again: it goes on from its newest step.

Usage: CHECKPOINTS=s3://bucket/prefix accelerate launch train_with_accelerate.py [--steps N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

from byte_lm import SMALL, ByteLM, Size, Windows
from sm_tiered_accelerate import attach


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=Path(__file__).with_name("accelerate.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()
    size = SMALL if options.small else Size()

    set_seed(1729)
    # A loader with a state goes on inside an epoch; others begin theirs anew.
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    model = ByteLM(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    loader = DataLoader(Windows(size.context), batch_size=1, shuffle=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    with attach(accelerator, options.recipe) as tiered:  # where checkpoints go, and when
        # The newest complete step, from the nearest tier; None if there never was one.
        step = tiered.restore() or 0
        accelerator.print(f"begins at step {step}", flush=True)
        while step < options.steps and not tiered.preempted:
            for text, following in loader:
                loss = F.cross_entropy(model(text).flatten(0, 1), following.flatten())
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                step += 1
                tiered.maybe_save(step)
                if step % 10 == 0:
                    accelerator.print(f"step {step}: loss {loss.item():.3f}", flush=True)
                if step == options.steps or tiered.preempted:
                    break


if __name__ == "__main__":
    main()
