"""Trainings that are killed and go on: every loss and the final weights are those of one that never was."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.dcp_jobs import bits, recipe, steps

JOB = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]
STEPS = 10


class Job:
    """One training, launch after launch."""

    def __init__(self, root: Path, memory: Path, strategy: str) -> None:
        self.out, self.memory, self.strategy = root / "out", memory, strategy
        self.devices = 1 if strategy == "auto" else 2
        self.recipe = root / "recipe.json"
        root.mkdir()
        saves: dict[str, Any] = {
            "memory": {"save": {"every_n_steps": 2}},
            "disk": {"save": {"every_n_steps": 4}},
        }
        self.recipe.write_text(json.dumps(recipe(root, memory, **saves)))

    def launch(self, kill_at: int | None = None) -> str:
        """Train to the end, or to the kill; return what was printed."""
        command = [sys.executable, str(JOB), self.out, self.recipe, STEPS, self.devices, self.strategy, kill_at or ""]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == (-signal.SIGKILL if kill_at else 0), done.stderr[-3000:]
        return done.stdout + done.stderr

    def losses(self) -> list[dict[str, str]]:
        """Return, for each rank, the last loss of each batch."""
        found: list[dict[str, str]] = []
        for rank in range(self.devices):
            lines = Path(f"{self.out}.{rank}").read_text().splitlines()
            found.append({line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines})
        return found

    def began_at(self) -> list[int]:
        """Return the steps at which rank 0's launches began."""
        seen = [line.split() for line in Path(f"{self.out}.0").read_text().splitlines()]
        batches = [(int(step), int(batch)) for step, batch, _ in seen]
        again = (now for before, now in zip(batches, batches[1:], strict=False) if now <= before)
        return [step for step, _ in (batches[0], *again)]


def same(one: Job, other: Job) -> None:
    """Both trained on the same batches with the same losses, to the same weights."""
    assert one.losses() == other.losses()
    assert len(one.losses()[0]) >= 1.5 * STEPS
    weights = [torch.load(f"{job.out}.pt", weights_only=True) for job in (one, other)]
    assert bits(weights[0]) == bits(weights[1])


@pytest.mark.parametrize(("strategy", "kills"), [("auto", (7, 9)), ("ddp", (5, 9)), ("fsdp2", (5, 9))])
def test_a_killed_training_goes_on_bit_for_bit(
    tmp_path: Path, memory_dir: Path, strategy: str, kills: tuple[int, int]
) -> None:
    plain, killed = (Job(tmp_path / name, memory_dir / name, strategy) for name in ("plain", "killed"))
    plain.launch()
    for step in kills:
        killed.launch(kill_at=step)
    shutil.rmtree(killed.memory)
    killed.launch()
    assert killed.began_at() == [0, kills[0] - 1, 8]
    same(killed, plain)
    shards = "*.distcp" if strategy == "fsdp2" else "__0_0.ckpt"
    assert all(steps(killed.memory, shards).values())
    events = "".join(path.read_text() for path in (killed.memory / "run-1" / "events").glob("rank-*.jsonl"))
    assert re.search(r'"event": ?"Restored".*"disk"', events)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("devices", [1, 3])
def test_another_number_of_ranks_goes_on_from_the_same_step(
    tmp_path: Path, memory_dir: Path, strategy: str, devices: int
) -> None:
    job = Job(tmp_path / "job", memory_dir, strategy)
    job.launch(kill_at=5)
    job.devices = devices
    printed = job.launch()
    assert "step 4 restored from" in printed
    assert job.began_at() == [0, 4]
