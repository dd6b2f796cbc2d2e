"""The same from a LightningCLI YAML, with the recipe as a path or inline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import nn

from sm_tiered_lightning import TieredCheckpoint, TieredCheckpointIO
from tests.distributed.dcp_jobs import recipe, steps


class Model(LightningModule):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        samples: Any = torch.rand(32, 3)
        return torch.utils.data.DataLoader(samples, batch_size=2)


def write(folder: Path, recipe: Any, max_steps: int) -> str:
    """Write what a LightningCLI reads; return its path."""
    given = {"init_args": {"recipe": recipe}}
    trainer = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": max_steps,
        "default_root_dir": str(folder),
        "plugins": [{"class_path": "sm_tiered_lightning.TieredCheckpointIO", **given}],
        "callbacks": [{"class_path": "sm_tiered_lightning.TieredCheckpoint", **given}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": trainer, "ckpt_path": "tiered://latest"}, sort_keys=False))
    return str(path)


@pytest.mark.parametrize("inline", [True, False])
def test_a_training_from_a_config_saves_and_goes_on(tmp_path: Path, memory_dir: Path, inline: bool) -> None:
    which: Any = recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 2}}, disk={"save": None})
    if not inline:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(which, sort_keys=False))
        which = str(tmp_path / "recipe.yaml")
    for max_steps in (4, 6):
        made = LightningCLI(
            Model,
            args=["fit", "--config", write(tmp_path, which, max_steps)],
            save_config_callback=None,
        )
        assert made.trainer.global_step == max_steps
        assert isinstance(made.trainer.strategy.checkpoint_io, TieredCheckpointIO)
        assert isinstance(made.trainer.checkpoint_callback, TieredCheckpoint)
        assert max(steps(memory_dir)) == max_steps
