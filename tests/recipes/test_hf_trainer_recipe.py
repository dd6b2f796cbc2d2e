"""The recipe of the Hugging Face Trainer and its script, small: it trains, and goes on from what its recipe says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipes.test_lightning_recipes import RECIPES, ROOT, adapted, train_forked

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]


def train(recipe: Path, steps: int, *, ranks: int = 1) -> str:
    """Run the script as a user would, in the recipe's folder; return what it printed."""
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    own = {name: value for name, value in os.environ.items() if name not in ("TRAINING_JOB_NAME", "CHECKPOINTS")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    command = [*(launcher if ranks > 1 else []), str(RECIPES / "hf_trainer.py"), "--small"]
    done = subprocess.run(
        [sys.executable, *command, "--recipe", str(recipe), "--steps", str(steps)],
        cwd=recipe.parent,
        env={**own, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_it_goes_on_from_the_disk_after_the_node_is_lost(tmp_path: Path, memory_dir: Path) -> None:
    recipe = adapted("hf_trainer.yaml", tmp_path, memory_dir)
    assert "begins anew" in train_forked("hf_trainer.py", recipe, 12, ranks=0)
    assert list((memory_dir / "hf-trainer").glob("step_0000000010-*/optimizer.pt"))
    assert list((tmp_path / "checkpoints/hf-trainer").glob("step_0000000012-*/manifest.json"))
    assert not list((tmp_path / "hf_trainer").glob("*"))
    shutil.rmtree(memory_dir)
    printed = train(recipe, 14)
    assert "goes on from checkpoint-12" in printed
    assert "ends at step 14" in printed
    assert "sm_tiered/durable_step" in printed


@pytest.mark.long
def test_it_runs_under_torchrun(tmp_path: Path, memory_dir: Path) -> None:
    recipe = adapted("hf_trainer.yaml", tmp_path, memory_dir)
    train(recipe, 12, ranks=2)
    assert "goes on from checkpoint-12" in train(recipe, 14, ranks=2)
    assert list((memory_dir / "hf-trainer").glob("step_0000000014-*/record-00001.json"))
