"""Train with Lightning and FSDP2: each rank saves its own shards, and nothing is gathered.

Usage: CHECKPOINTS=s3://bucket/prefix python lightning_fsdp2.py [--steps N] [--devices N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy

from byte_lm import SMALL, Size
from lightning_lm import LightningLM
from sm_tiered_lightning import tiered


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=Path(__file__).with_name("lightning_fsdp2.yaml"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    options = parser.parse_args()

    seed_everything(1729)
    trainer = Trainer(
        max_steps=options.steps,
        devices=options.devices,
        strategy=ModelParallelStrategy(data_parallel_size=options.devices, tensor_parallel_size=1),
        use_distributed_sampler=False,  # Lightning's own has no position that could be saved
        **tiered(options.recipe),  # where checkpoints go, and when: plugin and callback in one
    )
    # Another number of devices may load it, too.
    trainer.fit(LightningLM(SMALL if options.small else Size(), sharded=True), ckpt_path="tiered://latest")


if __name__ == "__main__":
    main()
