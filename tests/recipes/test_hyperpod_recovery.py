"""HyperPod: killed, a node lost, the service restarted, or both: the recipe goes on from what its page says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.inventory import list_checkpoints, read_holding
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers import open_tier
from tests.recipes.launching import Launch, launched, lose_memory, repeats, s3_steps
from tests.recipes.test_hyperpod_recipe import environment
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(240)]

RECIPE = "hyperpod/recipe.yaml"
MANY = "--steps=1000000"


@pytest.fixture
def env(bucket: dict[str, str], memory_dir: Path, cluster: dict[str, str]) -> dict[str, str]:
    """What the pods' manifest sets, and where memory, service and bucket of the test are."""
    return {**environment(), **bucket, **cluster, "CHECKPOINT_MEMORY": str(memory_dir / "tier")}


def cluster_steps(service: StandInDaemon, namespace: str) -> list[int]:
    """Return the steps that are complete in the cluster's memory."""
    settings = HyperPodSettings(name="cluster", save=None, keep=Latest(n=3), url=service.url)
    tier = open_tier(replace(settings, retry_attempts=1), namespace)
    try:
        found = [c for c in list_checkpoints(tier) if read_holding(tier, c, durable=True).problem is None]
    finally:
        tier.close()
    return sorted(checkpoint.step for checkpoint in found)


def let_drain(run: Launch, env: dict[str, str], enough: Callable[[], object]) -> None:
    """Give the drainer the cores until *enough* is there, nothing is left, or it has to wait for a rank's share."""
    queue, left, end = Path(env["CHECKPOINT_MEMORY"]) / env["TRAINING_JOB_NAME"] / ".queue", set[Path](), 0.0
    with run.paused():
        while not enough() and (found := set(queue.glob("*step_*"))):
            if found != left:
                left, end = found, time.monotonic() + 1.5
            if time.monotonic() > end:
                return
            time.sleep(0.1)


def train_until_the_cluster_has_more(
    run: Launch, service: StandInDaemon, client: S3Client, env: dict[str, str]
) -> None:
    """Train until S3 has a step and the cluster a later one, and kill all."""

    def has_more() -> bool:
        durable = s3_steps(client, env["CHECKPOINTS"])
        return bool(durable) and cluster_steps(service, env["TRAINING_JOB_NAME"])[-1:] > durable[-1:]

    run.reach(50)
    for _ in range(40):
        let_drain(run, env, has_more)
        if has_more():
            run.kill()
            return
        run.reach(max(run.losses()) + 10)
    raise AssertionError("the cluster's memory never has a later step than S3")


def test_a_node_is_lost_and_the_newest_tenth_step_is_in_the_clusters_memory(
    tmp_path: Path, memory_dir: Path, env: dict[str, str], service: StandInDaemon, s3_client: S3Client
) -> None:
    name = env["TRAINING_JOB_NAME"]
    with launched(tmp_path, RECIPE, MANY, env=env) as first:
        train_until_the_cluster_has_more(first, service, s3_client, env)
    lose_memory(memory_dir / "tier", name)
    newest, durable = cluster_steps(service, name)[-1], s3_steps(s3_client, env["CHECKPOINTS"])[-1]
    assert newest % 10 == 0
    assert newest > durable
    with launched(tmp_path, RECIPE, MANY, env=env) as second:
        second.reach(newest + 20)
        let_drain(second, env, lambda: cluster_steps(service, name)[-1:] > [newest])
        second.kill()
    assert second.restored() == (newest, "cluster")
    assert repeats(first.losses(), second.losses())

    # The service is restarted, so what it had is gone, and the node is lost: from S3.
    lose_memory(memory_dir / "tier", name)
    service.memory.reset()
    expected = s3_steps(s3_client, env["CHECKPOINTS"])[-1]
    with launched(tmp_path, RECIPE, MANY, env=env) as fourth:
        fourth.reach(expected + 10)
        # What is saved from now on is in the cluster's memory again.
        while not cluster_steps(service, name):
            let_drain(fourth, env, lambda: cluster_steps(service, name))
            fourth.reach(max(fourth.losses()) + 10)
        fourth.kill()
    step, tier = fourth.restored()
    assert tier == "s3"
    assert step >= expected, "the drainer of the lost node may have brought one more there"


def test_the_service_goes_away_and_training_does_not_notice_but_it_is_said(
    tmp_path: Path, memory_dir: Path, env: dict[str, str], service: StandInDaemon, s3_client: S3Client
) -> None:
    name = env["TRAINING_JOB_NAME"]
    with launched(tmp_path, RECIPE, "--steps=35", env=env) as first:
        first.reach(10)
        wait_until(lambda: cluster_steps(service, name), "the cluster has nothing")
        service.__exit__()
        assert first.end() == [0, 0], first.text
    assert s3_steps(s3_client, env["CHECKPOINTS"]) == [35]
    with launched(tmp_path, RECIPE, "--steps=45", env=env) as second:
        assert second.end() == [0, 0], second.text
    assert second.restored() == (35, "memory")
    lose_memory(memory_dir / "tier", name)
    with launched(tmp_path, RECIPE, "--steps=46", env=env) as third:
        assert third.end() == [0, 0], third.text
    assert third.restored() == (45, "s3")
    assert "cluster does not answer" in third.text
