"""The Lightning recipes and their scripts, small: they train, and go on from what their recipe says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.scripts import run_script

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]


def adapted(name: str, folder: Path, memory: Path, **changes: str) -> Path:
    """Copy a recipe, its memory tier in *memory*, with some of its text changed."""
    text = (RECIPES / name).read_text()
    for old, new in {"kind: memory": f"kind: memory\n    path: {memory}", **changes}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    copy = folder / name
    copy.write_text(text)
    return copy


def train_forked(script: str, recipe: Path, steps: int, *, ranks: int, **environment: str) -> str:
    """Run a recipe's script on ranks that are there already, as under torchrun; return what it printed."""
    arguments = ("--small", "--recipe", recipe, "--steps", steps)
    ran = run_script(RECIPES / script, *arguments, cwd=recipe.parent, env=environment, ranks=ranks)
    assert ran.statuses == [0] * max(1, ranks), ran.printed[-3000:]
    return ran.printed


def train(recipe: Path, steps: int, **environment: str) -> str:
    """Run the recipe's script as a user would, in the recipe's folder; return what it printed."""
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    own = {name: value for name, value in os.environ.items() if name != "TRAINING_JOB_NAME"}
    script = str(RECIPES / recipe.with_suffix(".py").name)
    done = subprocess.run(
        [sys.executable, script, "--small", "--recipe", str(recipe), "--steps", str(steps)],
        cwd=recipe.parent,
        env={**own, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_ddp_saves_to_memory_and_at_the_end_to_the_disk(tmp_path: Path, memory_dir: Path) -> None:
    train(adapted("lightning_ddp.yaml", tmp_path, memory_dir), 12)
    assert list((memory_dir / "lightning-ddp").glob("step_0000000010-*/record-00001.json"))
    assert list((tmp_path / "checkpoints/lightning-ddp").glob("step_0000000012-*/manifest.json"))


def test_fsdp2_goes_on_from_s3_after_the_node_is_lost(tmp_path: Path, memory_dir: Path, s3_client: S3Client) -> None:
    s3_client.create_bucket(Bucket="lightning-recipes")
    at = f"endpoint_url: {s3_client.meta.endpoint_url}\n    allow_http: true\n    force_path_style: true"
    recipe = adapted("lightning_fsdp2.yaml", tmp_path, memory_dir, **{"uri:": f"{at}\n    region: us-east-1\n    uri:"})
    train_forked("lightning_fsdp2.py", recipe, 12, ranks=2, CHECKPOINTS="s3://lightning-recipes/runs")
    shutil.rmtree(memory_dir)
    assert "step 12 restored from s3" in train(recipe, 14, CHECKPOINTS="s3://lightning-recipes/runs")
