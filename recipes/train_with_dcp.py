"""Train with plain DCP and FSDP2. Kill it wherever you like, start it again: it goes on from its newest step.

Usage: torchrun --nproc-per-node=2 train_with_dcp.py [--recipe single_node.yaml] [--steps N]

One script for all recipes but those of frameworks: where checkpoints go, and when, stands in the recipe alone.
It exits with 0 at its last step, with 143 where a SIGTERM ended it before, and with 1 where it could not go on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import spot_notice
from byte_lm import SMALL, Corpus, Size
from fsdp2_lm import make_model, train_step
from sm_tiered.errors import TieredError
from sm_tiered_dcp import RngState, TieredCheckpointer, TrainState

PREEMPTED = 143
"""128 + SIGTERM: to Slurm, Kubernetes and a shell, a job that was told to stop and may be started again."""


def say(text: str) -> None:
    """Print *text* once for all ranks."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def train(recipe: Path, size: Size, steps: int, device: torch.device, *, heed_spot: bool) -> int:
    """Train to *steps*, from wherever an earlier launch got to; return the exit status."""
    rank, corpus = dist.get_rank(), Corpus()
    model = make_model(size, device)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, T_max=1000)

    # Everything that the next step depends on; what differs by rank goes under "per_rank".
    state: dict[str, Any] = {"train": TrainState(model, optimizer, scheduler), "per_rank": {"rng": RngState()}}

    with TieredCheckpointer.from_recipe(recipe) as checkpointer:
        # From the nearest tier that has it whole and verified. None: nothing was ever saved.
        step = checkpointer.restore(state) or 0
        found = checkpointer.restored
        say(
            f"step {found.step} restored from {found.tier} in {found.secs:.2f} s"
            if found
            else "begins at step 0: nothing was ever saved"
        )
        if heed_spot and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            spot_notice.watch()  # not before now: until there is a checkpointer, a SIGTERM just kills
        while step < steps and not checkpointer.preempted:
            step += 1
            text, following = corpus.batch(step, rank, size)
            loss = train_step(model, optimizer, (text.to(device), following.to(device)))
            scheduler.step()
            # Saves if a policy of the recipe wants this step. A SIGTERM to any rank ends the loop on all, here.
            checkpointer.maybe_save(step, state)
            if step % 10 == 0:
                say(f"step {step}: loss {loss:.4f}")
        preempted = checkpointer.preempted and step < steps
        if preempted:
            say(f"told to stop after step {step}; waiting for the durable tiers")
        # At its end the block waits for what is on its way to durable tiers: at most drain_timeout_secs.
    say(f"stopped after step {step}" if preempted else f"ends at step {step}")
    return PREEMPTED if preempted else 0


def main() -> int:
    """Join the other ranks, train, leave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_name("single_node.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--spot", action="store_true", help="heed the interruption notices of EC2 spot instances")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error(f"start it with torchrun: torchrun --nproc-per-node=2 {sys.argv[0]} …")

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        torch.set_num_threads(1)  # sums in another order are other sums
    dist.init_process_group(backend)
    try:
        size = SMALL if options.small else Size()
        return train(options.recipe, size, options.steps, device, heed_spot=options.spot)
    except TieredError as error:  # says what to do about it, which a traceback does not
        print(f"rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
