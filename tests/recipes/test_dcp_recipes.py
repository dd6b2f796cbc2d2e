"""Recipes of plain DCP and FSDP2, run as they stand: one node, a shared directory with a node lost, a large model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.recipes.launching import (
    RECIPES,
    durable_steps,
    handed_over,
    launched,
    lose_memory,
    losses,
    repeats,
    s3_steps,
    torchrun,
)
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]
ENDLESS = "--steps=1000000"


def test_a_single_node_goes_on_from_memory_after_a_kill_and_from_the_disk_without_it(
    tmp_path: Path, memory_dir: Path
) -> None:
    memory, disk = memory_dir / "tier", tmp_path / "checkpoints"
    env = {"CHECKPOINT_MEMORY": str(memory), "TRAINING_JOB_NAME": "lm-1"}  # and CHECKPOINTS by default
    with launched(tmp_path, "single_node.yaml", ENDLESS, env=env) as first:
        first.reach(60)
        wait_until(lambda: durable_steps(disk) or handed_over(memory), "the drainer has nothing")
        killed_at = first.kill()
    wait_until(lambda: durable_steps(disk), "the drainer did not bring on what the killed ranks left", secs=90)
    assert first.text.startswith("begins at step 0: nothing was ever saved\n")

    with launched(tmp_path, "single_node.yaml", ENDLESS, env=env) as second:
        second.reach(killed_at + 10)
        second.kill()
    step, tier = second.restored()
    assert tier == "memory"
    assert step % 10 == 0
    assert killed_at - 10 <= step <= killed_at + 10

    lose_memory(memory, "lm-1")
    newest = durable_steps(disk)[-1]
    with torchrun(tmp_path, "single_node.yaml", f"--steps={newest + 20}", env=env) as third:
        printed, errors = third.communicate(timeout=110)
    assert third.returncode == 0, errors
    assert printed.startswith(f"step {newest} restored from durable in ")
    assert printed.endswith(f"ends at step {newest + 20}\n")
    assert durable_steps(disk)[-1] == newest + 20
    assert newest + 10 in losses(printed)
    assert repeats(first.losses(), second.losses())
    assert repeats(first.losses() | second.losses(), losses(printed))


@pytest.mark.long
def test_a_single_node_goes_on_from_s3_too(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    text = (RECIPES / "single_node.yaml").read_text()
    on_disk, in_s3 = text.index("  durable: #"), text.index("  # durable:\n")
    recipe = tmp_path / "in_s3.yaml"
    recipe.write_text(
        text[:on_disk] + text[in_s3:].replace("  # ", "  ").replace("s3://my-bucket/checkpoints", "${CHECKPOINTS}")
    )
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory_dir / "tier"), "TRAINING_JOB_NAME": "lm-5"}
    with launched(tmp_path, str(recipe), "--steps=57", env=env) as first:
        assert first.end() == [0, 0], first.text
    assert 57 in s3_steps(s3_client, bucket["CHECKPOINTS"])
    lose_memory(memory_dir / "tier", "lm-5")
    with launched(tmp_path, str(recipe), "--steps=60", env=env) as second:
        assert second.end() == [0, 0], second.text
    assert second.restored() == (57, "durable")


def test_a_machine_that_is_lost_costs_the_steps_since_the_shared_directory_had_one(
    tmp_path: Path, memory_dir: Path
) -> None:
    shared = tmp_path / "fsx"
    env = {"CHECKPOINTS": str(shared), "TRAINING_JOB_NAME": "lm-2"}
    machines = [{"CHECKPOINT_MEMORY": str(memory_dir / f"machine-{number}")} for number in range(2)]
    with launched(tmp_path, "shared_filesystem.yaml", ENDLESS, env=env, ranks=machines) as first:
        first.reach(60)
        wait_until(lambda: durable_steps(shared) or handed_over(*memory_dir.iterdir()), "the drainers have nothing")
        first.kill()
    wait_until(lambda: durable_steps(shared), "the drainers did not bring on what the killed ranks left", secs=90)
    assert (memory_dir / "machine-0/lm-2").is_dir()
    lose_memory(memory_dir / "machine-1", "lm-2")
    newest = durable_steps(shared)[-1]
    with launched(tmp_path, "shared_filesystem.yaml", ENDLESS, env=env, ranks=machines) as second:
        second.reach(newest + 10)
        second.kill()
    step, tier = second.restored()
    assert step == newest
    assert tier in ("shared", "memory+shared"), "the machine that is left may still have it in memory"
    assert repeats(first.losses(), second.losses())


def test_machines_that_are_given_different_directories_are_refused_with_a_sentence(
    tmp_path: Path, memory_dir: Path
) -> None:
    machines = [
        {"CHECKPOINT_MEMORY": str(memory_dir / str(n)), "CHECKPOINTS": str(tmp_path / f"own-{n}")} for n in range(2)
    ]
    with launched(tmp_path, "shared_filesystem.yaml", "--steps=10", env={}, ranks=machines) as refused:
        assert refused.end() == [1, 1], refused.text
    for rank, output in enumerate(refused.outputs):
        assert f"rank {rank}: rank 1 has another recipe than rank 0: tiers differ" in output.read_text()
        assert "Traceback" not in output.read_text()


def test_a_large_model_that_does_not_fit_its_budget_is_told_how_much_it_needs(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str]
) -> None:
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory_dir / "tier"), "MEMORY_BUDGET": "1MiB", "MEMORY_EVERY": "2"}
    with launched(tmp_path, "large_model.yaml", "--steps=10", env=env) as refused:
        assert refused.end() == [1, 1], refused.text
    needed = re.search(
        r"^rank 0: memory tier: ([\d.]+ MiB) are needed for \d checkpoints, tiers.memory.budget is 1.0 MiB. "
        r"Raise the budget to \1, or lower keep.latest.$",
        refused.text,
        re.MULTILINE,
    )
    assert needed is not None, refused.text
    assert "Traceback" not in refused.text
    # (keep.latest + 2) x the bytes of the node: fp32 weights and Adam's two moments, sharded over both ranks.
    size = 3 * 12 * parameters()
    assert size <= float(needed[1].split()[0]) * 2**20 < size + 2 * 2**20, "generators and headers take a little more"


def parameters() -> int:
    """How many the small model has: embedding, position, two blocks, the last norm."""
    width, context = 64, 64
    block = 2 * 2 * width + (3 * width + 1 + width + 1) * width + 8 * width * width + 5 * width
    return 256 * width + context * width + 2 * block + 2 * width


def test_a_large_model_within_its_budget_keeps_one_generation_in_memory(
    tmp_path: Path, memory_dir: Path, bucket: dict[str, str], s3_client: S3Client
) -> None:
    memory = memory_dir / "tier"
    env = {**bucket, "CHECKPOINT_MEMORY": str(memory), "MEMORY_BUDGET": "8MiB", "TRAINING_JOB_NAME": "lm-3"}
    fast = {"MEMORY_EVERY": "2", "DURABLE_EVERY": "4"}
    with launched(tmp_path, "large_model.yaml", "--steps=10", env={**env, **fast}) as run:
        assert run.end() == [0, 0], run.text
    assert run.text.endswith("ends at step 10\n")
    in_memory = sorted(int(found.parent.name[5:15]) for found in memory.glob("lm-3/step_*/record-00001.json"))
    assert in_memory[-1] == 10
    assert sum(found.stat().st_blocks * 512 for found in memory.rglob("*")) <= 8 * 2**20
    assert s3_steps(s3_client, bucket["CHECKPOINTS"])[-1] == 10
