"""The Accelerate recipe and its script, small: killed by a lost node, it goes on from S3."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.recipes.test_lightning_recipes import RECIPES, ROOT, adapted, train_forked

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]


def train(recipe: Path, steps: int) -> str:
    """Launch the script on two processes, as its first lines say; return what it printed."""
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    own = {name: value for name, value in os.environ.items() if name != "TRAINING_JOB_NAME"}
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1")
    fixed = ("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
    script = (str(RECIPES / "train_with_accelerate.py"), "--small", f"--recipe={recipe}", f"--steps={steps}")
    done = subprocess.run(
        [*launcher, *fixed, *script],
        cwd=recipe.parent,
        env={**own, "PYTHONPATH": path, "CHECKPOINTS": "s3://accelerate-recipes/runs"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_goes_on_from_s3_after_the_node_is_lost(tmp_path: Path, memory_dir: Path, s3_client: S3Client) -> None:
    s3_client.create_bucket(Bucket="accelerate-recipes")
    at = f"endpoint_url: {s3_client.meta.endpoint_url}\n    allow_http: true\n    force_path_style: true"
    recipe = adapted("accelerate.yaml", tmp_path, memory_dir, **{"uri:": f"{at}\n    region: us-east-1\n    uri:"})
    given = {"CHECKPOINTS": "s3://accelerate-recipes/runs", "ACCELERATE_USE_CPU": "true"}
    assert "begins at step 0" in train_forked("train_with_accelerate.py", recipe, 12, ranks=0, **given)
    shutil.rmtree(memory_dir)
    assert "begins at step 12" in train(recipe, 14)
