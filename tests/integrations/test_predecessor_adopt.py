"""Taking over on the fly what the predecessor left, where our tiers hold nothing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sm_tiered.errors import (
    CorruptPartError,
    DeadlineExceededError,
    NothingRestorableError,
    TierUnavailableError,
)
from sm_tiered.recipe import Recipe
from sm_tiered.settings import S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered_dcp import TieredCheckpointer
from sm_tiered_dcp.predecessor import adopt
from tests.integrations.predecessor_endless import Endless, endless
from tests.integrations.predecessor_made import NAMESPACE, two_ranks
from tests.integrations.predecessor_place import BASE, Place, empty_state, same, wanted_state
from tests.integrations.test_predecessor_cli import filled
from tests.predecessor import NEWEST

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

pytestmark = [
    pytest.mark.xdist_group("predecessor"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


@pytest.fixture(scope="module")
def place(make_s3_settings: Callable[..., S3Settings]) -> Iterator[Place]:
    with StandInDaemon() as daemon:
        yield Place(make_s3_settings(prefix=BASE), daemon)


@pytest.fixture(autouse=True)
def no_faults(place: Place) -> None:
    place.daemon.restart()


def adopting(tmp_path: Path, place: Place, namespace: str, *, s3: bool, cluster: bool, url: str = "") -> Recipe:
    tiers: dict[str, Any] = {"memory": {"kind": "memory", "path": str(tmp_path / "mem"), "allow_disk": True}}
    if cluster:
        retry = {"attempts": 1, "deadline_secs": 1}
        tiers["cluster"] = {"kind": "hyperpod", "url": url or place.daemon.url, "retry": retry}
    if s3:
        tiers["s3"] = {
            "kind": "s3",
            "uri": f"s3://{place.settings.bucket}/{BASE}",
            "endpoint_url": place.settings.endpoint_url,
            "region": "us-east-1",
            "force_path_style": True,
            "allow_http": True,
        }
    return Recipe.parse({"version": 1, "namespace": namespace, "tiers": tiers})


@pytest.fixture(scope="module")
def mixed(place: Place) -> str:
    """A namespace with step 20 in S3 and steps 20 and 30 in the cluster's memory."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}.items():
            patch.setenv(name, value)
        place.save(NEWEST, "mixed", 1, steps=[20, 30], s3_steps=[20])
    return "mixed"


def test_on_the_fly_the_newest_of_all_places_is_taken(
    place: Place, mixed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = adopting(tmp_path, place, mixed, s3=True, cluster=True)
    with caplog.at_level(logging.INFO, logger="sm_tiered"):
        assert adopt(made)
    assert "took over" in caplog.text
    assert "step 30, which amzn-sagemaker-checkpointing wrote on 1 ranks" in caplog.text
    with TieredCheckpointer.from_recipe(made) as checkpointer:
        assert checkpointer.latest() == 30
        state = empty_state(1)
        assert checkpointer.restore(state) == 30
        same(state, wanted_state(30, 1))


def test_on_the_fly_a_damaged_newest_is_passed_over_and_that_is_said(
    place: Place, mixed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = adopting(tmp_path, place, mixed, s3=False, cluster=True)
    place.daemon.flip(mixed, 0, 30, 8 * 5000)
    try:
        source = place.service(mixed)
        (newest, *_) = source.listed()
        with pytest.raises(CorruptPartError, match="differs from its checksum"), source.shard(newest, 0, end=10**6):
            pass
        assert adopt(made)
    finally:
        place.daemon.flip(mixed, 0, 30, 8 * 5000)
    assert "step 30 is not taken over" in caplog.text
    with TieredCheckpointer.from_recipe(made) as checkpointer:
        assert checkpointer.latest() == 20


def test_on_the_fly_nothing_silence_and_damage_are_three_answers(place: Place, mixed: str, tmp_path: Path) -> None:
    assert not adopt(adopting(tmp_path, place, "never-used", s3=True, cluster=True))
    assert not adopt(adopting(tmp_path, place, mixed, s3=True, cluster=True), step=77)
    nobody = "http://127.0.0.1:9"
    with pytest.raises(TierUnavailableError, match="does not answer"):
        adopt(adopting(tmp_path, place, "never-used", s3=True, cluster=True, url=nobody))
    place.daemon.flip(mixed, 1, 30, 3)  # of the metadata: it is no pickle any more, and its checksum is another
    place.daemon.flip(mixed, 1, 20, 800)
    try:
        with pytest.raises(NothingRestorableError, match="no checkpoint .* can be used: .*differs from its checksum"):
            adopt(adopting(tmp_path, place, mixed, s3=False, cluster=True))
    finally:
        place.daemon.flip(mixed, 1, 30, 3)
        place.daemon.flip(mixed, 1, 20, 800)


def test_on_the_fly_a_step_that_may_be_of_two_saves_is_passed_over_unless_asked_for(
    place: Place, s3_client: S3Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def put(step: int, *names: str) -> None:
        found = two_ranks(step)
        files = {f"rank_{rank}/step_{step}/checkpoint.pt": data for rank, data in enumerate(found.shards)}
        files[f"rank_0/step_{step}/metadata.metadata"] = found.pickled()
        for name in names or tuple(files):
            key = f"{BASE}/doubted/{name}"
            s3_client.put_object(Bucket=place.settings.bucket, Key=key, Body=files[name])

    put(10)
    put(20)
    time.sleep(1.1)  # the clock of S3 has whole seconds
    put(20, "rank_1/step_20/checkpoint.pt")
    made = adopting(tmp_path, place, "doubted", s3=True, cluster=False)
    assert adopt(made)
    assert "step_20 is not taken over: step 20: the shard of rank 1 was written after the metadata" in caplog.text
    with TieredCheckpointer.from_recipe(made) as checkpointer:
        assert checkpointer.latest() == 10
    caplog.clear()
    assert adopt(made, step=20)
    assert "the shard of rank 1 was written after the metadata" in caplog.text
    with TieredCheckpointer.from_recipe(made) as checkpointer:
        assert checkpointer.latest() == 20


@pytest.mark.parametrize("slow", ["a shard", "the metadata"])
def test_on_the_fly_a_place_that_answers_in_drops_ends_with_the_commit_deadline(slow: str, tmp_path: Path) -> None:
    slot = {"a shard": f"{NAMESPACE}/1/10", "the metadata": f"{NAMESPACE}/2/10"}[slow]
    drops = Endless(slot, piece=b"x", pause_secs=0.05, begins_with=b"" if slow == "a shard" else b"\x80")
    with StandInDaemon() as daemon, endless(daemon.url, drops) as service:
        filled(daemon, 10)
        retry = {"attempts": 3, "deadline_secs": 3600}
        tiers = {
            "memory": {"kind": "memory", "path": str(tmp_path / "mem"), "allow_disk": True},
            "cluster": {"kind": "hyperpod", "url": service.url, "retry": retry},
        }
        recipe = {"version": 1, "namespace": NAMESPACE, "commit_deadline_secs": 2, "tiers": tiers}
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=rf"longer than commit_deadline_secs, 2 s: .*{slot}") as caught:
            adopt(Recipe.parse(recipe))
    assert 1.9 < time.monotonic() - began < 8.0
    assert "SM_TIERED__COMMIT_DEADLINE_SECS" in (caught.value.hint or "")


def test_on_the_fly_a_place_that_is_gone_is_told_as_such_before_that_deadline(tmp_path: Path, place: Place) -> None:
    with pytest.raises(TierUnavailableError, match="does not answer"):
        adopt(adopting(tmp_path, place, "never-used", s3=False, cluster=True, url="http://127.0.0.1:9"))
