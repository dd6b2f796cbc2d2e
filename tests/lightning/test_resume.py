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
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
import torch

from tests.distributed.dcp_jobs import bits, recipe, steps
from tests.scripts import run_script
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

JOB = Path(__file__).with_name("job.py")
ROOT = Path(__file__).parents[2]
STEPS = 10
ENDS = {"kill": -signal.SIGKILL, "term": 0, "raise": 1}
"""How rank 0's process ends."""
KILLS = [(5, "kill", 4), (9, "kill", 8)]
ALL = [(2, "term", 3), (5, "kill", 4), (7, "raise", 6)]
"""In which step it is cut, how, and which step is the newest then."""


class Job:
    """One training, launch after launch."""

    def __init__(
        self, root: Path, memory: Path, strategy: str, s3: S3Client | None = None, *, forked: bool = False
    ) -> None:
        self.forked = forked
        self.out, self.disk, self.memory, self.strategy = root / "out", root / "disk", memory, strategy
        self.s3 = s3
        self.devices = 1 if strategy == "auto" else 2
        self.recipe = root / "recipe.json"
        root.mkdir()
        near, far = ({"save": {"any": [{"every_n_steps": every}, "on_preemption"]}} for every in (2, 4))
        durable = {"disk": far} if s3 is None else {"disk": None, "tiers": {"s3": {**self.bucket(s3), **far}}}
        self.recipe.write_text(json.dumps(recipe(root, memory, memory=near, **durable)))

    def launch(self, cut_at: int | None = None, how: str = "kill") -> str:
        """Train to the end, or until it is cut; return what was printed."""
        cut = [cut_at, how] if cut_at is not None else []
        arguments = [self.out, self.recipe, STEPS, self.devices, self.strategy, *cut]
        wanted = ENDS[how] if cut else 0
        if self.forked:
            ran = run_script(JOB, *arguments, cwd=self.recipe.parent, ranks=self.devices if self.devices > 1 else 0)
            assert ran.statuses == [wanted] * self.devices, ran.printed[-3000:]
            return ran.printed
        command = [sys.executable, JOB, *arguments]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'integrations'}"}
        done = subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == wanted, done.stderr[-3000:]
        return done.stdout + done.stderr

    def losses(self) -> list[dict[str, str]]:
        """Return, for each rank, the last loss of each batch."""
        found: list[dict[str, str]] = []
        for rank in range(self.devices):
            lines = Path(f"{self.out}.{rank}").read_text().splitlines()
            found.append({line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in lines})
        return found

    def bucket(self, s3: S3Client) -> dict[str, Any]:
        """Make a bucket; return the tier in it."""
        s3.create_bucket(Bucket=self.out.parent.name)
        return {
            "kind": "s3",
            "uri": f"s3://{self.out.parent.name}/checkpoints",
            "endpoint_url": s3.meta.endpoint_url,
            "allow_http": True,
            "region": "us-east-1",
            "force_path_style": True,
        }

    def durable(self) -> int:
        """Return the newest step that is whole on the durable tier."""
        if self.s3 is None:
            keys = list(map(str, self.disk.rglob("*")))
        else:
            listed = self.s3.list_objects_v2(Bucket=self.out.parent.name)
            keys = [found.get("Key", "") for found in listed.get("Contents", ())]
        whole = (re.search(r"step_(\d+)-[^/]*/manifest\.json$", key) for key in keys)
        return max((int(found[1]) for found in whole if found), default=0)

    def began_at(self) -> list[int]:
        """Return the steps at which the launches began."""
        return [int(line) for line in Path(f"{self.out}.began").read_text().split()]


def same(one: Job, other: Job) -> None:
    """Both trained on the same batches with the same losses, to the same weights."""
    assert one.losses() == other.losses()
    assert len(one.losses()[0]) >= 1.5 * STEPS
    weights = [torch.load(f"{job.out}.pt", weights_only=True) for job in (one, other)]
    assert bits(weights[0]) == bits(weights[1])


@pytest.mark.parametrize(
    ("strategy", "cuts", "tier", "forked"),
    [
        ("auto", KILLS, "s3", True),
        ("ddp", KILLS, "disk", True),
        ("fsdp2", KILLS[:1], "disk", True),
        pytest.param("ddp", ALL, "disk", False, marks=pytest.mark.long),
        pytest.param("auto", KILLS, "s3", False, marks=pytest.mark.long),
        pytest.param("fsdp2", KILLS, "s3", False, marks=pytest.mark.long),
        pytest.param("auto", ALL, "disk", False, marks=pytest.mark.long),
        pytest.param("ddp", KILLS, "s3", False, marks=pytest.mark.long),
        pytest.param("ddp", KILLS, "disk", False, marks=pytest.mark.long),
        pytest.param("ddp", ALL, "s3", False, marks=pytest.mark.long),
        pytest.param("fsdp2", ALL, "s3", False, marks=pytest.mark.long),
    ],
)
def test_a_training_that_was_cut_goes_on_bit_for_bit(
    tmp_path: Path,
    memory_dir: Path,
    s3_client: S3Client,
    strategy: str,
    cuts: list[tuple[int, str, int]],
    tier: str,
    forked: bool,
) -> None:
    s3 = s3_client if tier == "s3" else None
    own = uuid4().hex[:8]  # names of buckets, too
    plain, cut = (
        Job(tmp_path / f"{own}-{name}", memory_dir / name, strategy, s3, forked=forked) for name in ("plain", "cut")
    )
    plain.launch()
    for step, how, newest in cuts:
        cut.launch(step, how)
        assert max(steps(cut.memory)) == newest
        if how != "kill":
            wait_until(lambda newest=newest: cut.durable() == newest, f"step {newest} is not brought to safety")
    shutil.rmtree(cut.memory)
    durable = cut.durable()
    cut.launch()
    assert cut.began_at() == [0, *(newest for _, _, newest in cuts[:-1]), durable]
    same(cut, plain)
    shards = "*.distcp" if strategy == "fsdp2" else "__0_0.ckpt"
    assert all(steps(cut.memory, shards).values())
    events = "".join(path.read_text() for path in (cut.memory / "run-1" / "events").glob("rank-*.jsonl"))
    assert re.search(rf'"event": ?"Restored".*"{tier}"', events)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("devices", [1, 3])
def test_another_number_of_ranks_goes_on_from_the_same_step(
    tmp_path: Path, memory_dir: Path, strategy: str, devices: int
) -> None:
    job = Job(tmp_path / "job", memory_dir, strategy)
    job.launch(5)
    job.devices = devices
    printed = job.launch()
    assert "step 4 restored from" in printed
    assert job.began_at() == [0, 4]
