"""What a place of the predecessor's may send is bounded by what its metadata says; so is how many ranks it tells of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.errors import CorruptPartError, FormatError, TierUnavailableError
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered_dcp.predecessor import Source, import_step, look_at
from sm_tiered_dcp.predecessor.origins import open_daemon
from sm_tiered_dcp.predecessor.reception import BEHIND_BYTES
from tests.integrations.predecessor_endless import Endless, endless
from tests.integrations.predecessor_made import NAMESPACE, Made, directory, source, two_ranks
from tests.integrations.test_predecessor_cli import filled

SHARDS = two_ranks(10).shards
SLACK = 4 * 1024 * 1024
"""What the kernel's buffers and one read take besides."""


def settings(url: str, *, secs: float = 10.0) -> HyperPodSettings:
    return HyperPodSettings(
        name="cluster", save=None, keep=Latest(3), url=url, retry_attempts=2, retry_deadline_secs=secs
    )


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as found:
        filled(found, 10)
        yield found


def brought(place: Source, tmp_path: Path, **options: Any) -> Any:
    return import_step(place, place.listed()[0], directory(tmp_path / "out", "ours"), namespace="ours", **options)


# ---- bytes


def test_a_shard_that_never_ends_is_received_as_far_as_the_metadata_says(daemon: StandInDaemon, tmp_path: Path) -> None:
    limit = len(SHARDS[1]) + BEHIND_BYTES
    with (
        endless(daemon.url, Endless(f"{NAMESPACE}/1/10")) as service,
        closing(open_daemon(settings(service.url), NAMESPACE)) as place,
        pytest.raises(CorruptPartError) as caught,
    ):
        brought(place, tmp_path)
    assert service.sent < service.asked * (limit + SLACK)
    assert caught.value.rank == 1
    assert f"the metadata says {len(SHARDS[1])} bytes" in caught.value.message
    assert f"above {limit}" in caught.value.message
    assert "theirs/1/10" in caught.value.message
    assert "Import an older step" in (caught.value.hint or "")


@pytest.mark.parametrize("announced", [2**40, len(SHARDS[1]) + BEHIND_BYTES + 1])
def test_a_shard_that_is_announced_longer_is_not_received(
    announced: int, daemon: StandInDaemon, tmp_path: Path
) -> None:
    with (
        endless(daemon.url, Endless(f"{NAMESPACE}/1/10", announces=announced)) as service,
        closing(open_daemon(settings(service.url), NAMESPACE)) as place,
        pytest.raises(CorruptPartError, match=f"{announced} bytes are announced") as caught,
    ):
        brought(place, tmp_path)
    assert caught.value.rank == 1
    assert service.sent < service.asked * SLACK


def test_what_stands_behind_the_last_value_is_no_harm(daemon: StandInDaemon, tmp_path: Path) -> None:
    blob = daemon.namespaces[NAMESPACE].blobs[1][10]
    daemon.namespaces[NAMESPACE].blobs[1][10] = replace(
        blob, data=blob.data + bytes(1000), size=blob.size + 1000, meta=""
    )
    with closing(open_daemon(settings(daemon.url), NAMESPACE)) as place:
        assert brought(place, tmp_path).world == 2


def test_metadata_that_never_ends_is_bounded_too(daemon: StandInDaemon, tmp_path: Path) -> None:
    from sm_tiered_dcp.predecessor import reception as room

    most = 3 * 1024 * 1024
    with (
        pytest.MonkeyPatch.context() as patch,
        endless(daemon.url, Endless(f"{NAMESPACE}/2/10", begins_with=b"\x80")) as service,
        closing(open_daemon(settings(service.url), NAMESPACE)) as place,
    ):
        patch.setattr(room, "MAX_BYTES", most)
        with pytest.raises(CorruptPartError, match=f"above {most}"):
            brought(place, tmp_path)
    assert service.sent < service.asked * (most + SLACK)


def test_a_shard_that_comes_in_drops_is_given_up(daemon: StandInDaemon, tmp_path: Path) -> None:
    service = Endless(f"{NAMESPACE}/1/10", piece=b"x", pause_secs=0.05)
    began = time.monotonic()
    with (
        endless(daemon.url, service),
        closing(open_daemon(settings(service.url, secs=0.5), NAMESPACE)) as place,
        pytest.raises(TierUnavailableError, match=r"theirs/1/10: only \d+ bytes had come when the deadline passed"),
    ):
        brought(place, tmp_path)
    assert time.monotonic() - began < 10.0


# ---- ranks


def of_ranks(*ranks: int) -> Made:
    """A checkpoint whose two shards are said to be of those ranks."""
    found = two_ranks(10)
    for place in found.metadata.storage_data.values():
        place.rank = ranks[place.rank]
    return found


def put(base: Path, found: Made, *ranks: int) -> None:
    """Write it, each shard where its rank puts it."""
    for rank, data in zip(ranks, found.shards, strict=True):
        path = base / NAMESPACE / f"rank_{rank}/step_10/checkpoint.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    found.put(base, 10, but=["rank_0/checkpoint.pt", "rank_1/checkpoint.pt"])


@pytest.mark.parametrize("dry", [True, False])
def test_metadata_that_tells_of_far_more_ranks_than_are_listed_is_refused(dry: bool, tmp_path: Path) -> None:
    put(tmp_path / "base", of_ranks(0, 99_999), 0, 99_999)
    place, target = source(tmp_path / "base"), directory(tmp_path / "out", "ours")
    with pytest.raises(FormatError, match="tells of 100000 ranks, and shards of 2 are listed: 0, 99999; ") as caught:
        (look_at if dry else import_step)(place, place.listed()[0], target, namespace="ours")
    assert caught.value.rank == 99_999
    assert "allowed are 256 ranks for each shard" in caught.value.message
    assert "Import an older step" in (caught.value.hint or "")
    assert target.list("step_") == []


@pytest.mark.parametrize("other", [8, 255])
def test_a_save_of_one_rank_of_each_node_is_taken(other: int, tmp_path: Path) -> None:
    put(tmp_path / "base", of_ranks(0, other), 0, other)
    place = source(tmp_path / "base")
    found = import_step(place, place.listed()[0], directory(tmp_path / "out", "ours"), namespace="ours")
    assert (found.world, found.doubts) == (other + 1, ())


@pytest.mark.parametrize("more", [b"", b"of another save"])
def test_a_rank_that_the_metadata_does_not_tell_of_is_harmless_where_times_tell(more: bytes, tmp_path: Path) -> None:
    path = tmp_path / "base" / NAMESPACE / "rank_7/step_10/checkpoint.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(more)
    two_ranks(10).put(tmp_path / "base", 10)
    place = source(tmp_path / "base")
    found = import_step(place, place.listed()[0], directory(tmp_path / "o", "ours"), namespace="ours", asked=False)
    assert (found.world, found.doubts) == (2, ())


def with_more(daemon: StandInDaemon, data: bytes) -> None:
    """Let the namespace have five slots, and rank 3 something of step 10 that no metadata names."""
    store = daemon.namespaces[NAMESPACE]
    store.blobs[3] = {10: replace(store.blobs[1][10], data=bytearray(data), size=len(data), meta="")}
    store.num_ranks = 5


def test_a_service_that_has_more_shards_than_the_metadata_tells_of_is_doubted(
    daemon: StandInDaemon, tmp_path: Path
) -> None:
    with_more(daemon, b"x" * 50)
    with closing(open_daemon(settings(daemon.url), NAMESPACE)) as place:
        with pytest.raises(CorruptPartError, match="of 2 ranks, and 3 are listed: that of rank 3 ") as caught:
            brought(place, tmp_path, asked=False)
        assert "--step 10" in (caught.value.hint or "")
        assert brought(place, tmp_path).doubts == (caught.value.message,)


def test_a_service_that_has_a_rank_without_a_byte_is_not(daemon: StandInDaemon, tmp_path: Path) -> None:
    with_more(daemon, b"")
    with closing(open_daemon(settings(daemon.url), NAMESPACE)) as place:
        assert brought(place, tmp_path, asked=False).doubts == ()
