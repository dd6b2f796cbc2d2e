"""Train with Lightning and DDP. Kill it wherever you like, start it again: it goes on from its newest step.

Usage: python lightning_ddp.py [--steps N] [--devices N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything

from byte_lm import SMALL, Size
from lightning_lm import LightningLM
from sm_tiered_lightning import tiered


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=Path(__file__).with_name("lightning_ddp.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()

    seed_everything(1729)
    trainer = Trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy="ddp",
        use_distributed_sampler=False,  # Lightning's own has no position that could be saved
        **tiered(options.recipe),  # where checkpoints go, and when: plugin and callback in one
    )
    # The newest complete step of the recipe's namespace, from the nearest tier; a fresh start if there never was one.
    trainer.fit(LightningLM(SMALL if options.small else Size()), ckpt_path="tiered://latest")


if __name__ == "__main__":
    main()
