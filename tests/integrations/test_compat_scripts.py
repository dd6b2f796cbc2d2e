"""The two scripts of amzn-sagemaker-checkpointing's documentation with only their import lines changed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from tests.integrations.compat_scripts.jobs import BUCKETS, ScriptJob, digests

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Start = Callable[..., ScriptJob]


@pytest.fixture
def namespace() -> str:
    return f"job-{uuid4().hex[:12]}"


@pytest.fixture
def start(namespace: str, s3_endpoint: str, s3_client: S3Client, tmp_path: Path, memory_dir: Path) -> Start:
    """Return what starts a script, each time with a folder of its own."""
    for bucket in BUCKETS.values():
        s3_client.create_bucket(Bucket=bucket)

    def start(script: str, world: int, **env: str) -> ScriptJob:
        given = {
            "TRAINING_JOB_NAME": namespace,
            "AWS_ENDPOINT_URL": s3_endpoint,
            "AWS_REGION": "us-east-1",
            "CHECKPOINT_MEMORY": str(memory_dir),
            "SAVE_SECS": "0.02",
        }
        return ScriptJob(script, world, tmp_path / uuid4().hex[:8], {**given, **env})

    return start


def in_memory(memory_dir: Path, namespace: str, world: int) -> list[int]:
    """Return the steps of which all records stand in memory."""
    found = [path for path in memory_dir.glob(f"{namespace}/step_*") if len([*path.glob("record-*.json")]) == world]
    return sorted(int(path.name.split("-")[0].removeprefix("step_")) for path in found)


def on_s3(client: S3Client, script: str, namespace: str) -> list[int]:
    """Return the steps that are committed on S3."""
    found = client.list_objects_v2(Bucket=BUCKETS[script], Prefix=f"checkpoints/{namespace}/step_")
    keys = [entry["Key"] for entry in found.get("Contents", []) if "Key" in entry]
    return sorted(int(match[1]) for key in keys if (match := re.search(r"/step_(\d+)-.*/manifest\.json$", key)))


def test_the_quick_start_runs_to_its_end_and_loads_what_it_saved(
    start: Start, namespace: str, s3_client: S3Client
) -> None:
    with start("quick_start", 1) as job:
        assert job.wait() == [0], job.printed()
    printed = job.printed()
    assert "Failure in saving" not in printed
    assert len(job.lines("saved")) == 100
    latest = job.lines("loaded")[0]
    assert latest["step"] == 990
    assert digests(job)[990] == {latest["digest"]}
    # The process has ended: what it was asked to bring to S3 last is there, or what took its place.
    steps = on_s3(s3_client, "quick_start", namespace)
    assert max(steps) >= 950
    skipped = {int(step) for step in re.findall(r"Step (\d+): not promoted to s3", printed)}
    assert skipped.isdisjoint(steps)
    assert set(range(0, 1000, 50)) <= {*steps, *skipped}, "no step that was to go to S3 is left out without a word"
    loaded = [line["step"] for line in job.lines("loaded")]
    assert loaded == ([990, 500] if 500 in steps else [990])


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_distributed_example_is_killed_and_goes_on_with_the_very_state_that_it_saved(
    world: int, start: Start, namespace: str, memory_dir: Path
) -> None:
    with start("distributed_example", world) as first:
        first.until("step 120 is in memory", lambda: max(in_memory(memory_dir, namespace, world), default=0) >= 120)
        first.kill()
    assert "No checkpoint found, starting from scratch" in first.printed()
    with start("distributed_example", world) as second:
        second.until("it saves again", lambda: len(second.lines("saved", world - 1)) > 1)
        second.kill()
    saved = digests(first)
    assert not second.lines("loaded")[1:]
    for rank in range(world):
        (loaded,) = second.lines("loaded", rank)
        assert loaded["step"] >= 120
        assert saved[loaded["step"]] == {loaded["digest"]}, "the model, the optimizer's moments and the scheduler"
        assert f"Resumed training from step {loaded['step'] + 1}" in second.printed(rank)
        assert [line["step"] for line in second.lines("saved", rank)][0] == (loaded["step"] // 10 + 1) * 10


@pytest.mark.long
def test_the_distributed_example_goes_on_from_s3_when_the_memory_is_gone(
    start: Start, namespace: str, memory_dir: Path, s3_client: S3Client
) -> None:
    with start("distributed_example", 2, SAVE_SECS="0.3") as first:
        first.until("S3 has step 50", lambda: max(on_s3(s3_client, "distributed_example", namespace), default=0) >= 50)
        first.kill()
    shutil.rmtree(memory_dir / namespace)
    with start("distributed_example", 2) as second:
        second.until("it saves again", lambda: len(second.lines("saved", 1)) > 1)
        second.kill()
    saved, steps = digests(first), on_s3(s3_client, "distributed_example", namespace)
    for rank in range(2):
        (loaded,) = second.lines("loaded", rank)
        assert loaded["step"] >= 50
        assert loaded["step"] in steps
        assert saved[loaded["step"]] == {loaded["digest"]}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_the_distributed_example_runs_to_its_end_with_two_ranks(
    start: Start, namespace: str, s3_client: S3Client
) -> None:
    with start("distributed_example", 2) as job:
        assert job.wait(380) == [0, 0], job.printed()
    assert max(on_s3(s3_client, "distributed_example", namespace)) >= 950
    assert all(len(found) == 1 for found in digests(job).values())
    assert "Traceback" not in job.printed(1).partition("opened a000001")[2]
