"""A training job as you would write it: FSDP2 and `TieredCheckpointer`. `quickstart.py` starts it, and kills it.

What is about checkpoints is marked with (1) to (4). The rest trains, or tells the supervisor how far it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from byte_lm import SMALL, Corpus, Size
from fingerprint import fingerprint
from fsdp2_lm import make_model, train_step
from journal import Journal
from sm_tiered_dcp import RngState, TieredCheckpointer, TrainState

HERE = Path(__file__).parent


def train(size: Size, steps: int, journal: Journal) -> None:
    """Train to *steps*, from wherever an earlier launch got to."""
    rank, corpus = dist.get_rank(), Corpus()
    model = make_model(size, torch.device("cpu"))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, T_max=steps)

    # (1) Everything that the next step depends on. `TrainState` knows how model, optimizer and scheduler are saved
    # when they are sharded; plain values just stand there; what differs by rank goes under "per_rank".
    state: dict[str, Any] = {
        "train": TrainState(model, optimizer, scheduler),
        "progress": {"losses": []},
        "per_rank": {"rng": RngState()},
    }

    # (2) The recipe says where checkpoints go, and how often.
    with TieredCheckpointer.from_recipe(HERE / "quickstart.yaml") as checkpointer:
        # (3) Fills `state` from the newest checkpoint that every rank can read and verify: from memory if it is still
        # there, else from disk. None: nothing was ever saved.
        start = checkpointer.restore(state)
        if checkpointer.restored is not None:
            taken = checkpointer.restored
            journal.write(restored=taken.step, tier=taken.tier, secs=taken.secs)

        for step in range((start or 0) + 1, steps + 1):
            loss = train_step(model, optimizer, corpus.batch(step, rank, size))
            scheduler.step()
            state["progress"]["losses"].append(loss)

            # (4) Saves if a policy of the recipe wants this step. When it returns, training may go on and change
            # everything; the rest happens in the background, and goes on when this process is killed.
            handle = checkpointer.maybe_save(step, state)

            saved = {"saved_to": handle.tiers, "blocked_secs": handle.blocked_secs} if handle else {}
            journal.write(step=step, loss=loss, **saved)
            if step % 20 == 15:
                # Only so that the demonstration works with steps of any speed: what was due on disk is there now.
                checkpointer.wait()

    journal.write(finished=steps, fingerprint=fingerprint(model, optimizer, state["progress"]["losses"]))


def main() -> None:
    """Join the other ranks, train, leave."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--journal", type=Path, required=True, help="directory for the supervisor's progress files")
    options = parser.parse_args()

    # Sums in another order are other sums: one thread makes a run repeatable, and is as fast at this size.
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        journal = Journal(options.journal / f"rank-{dist.get_rank()}.jsonl")
        train(SMALL if options.small else Size(), options.steps, journal)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
