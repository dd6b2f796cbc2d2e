"""Whether a checkpoint stands whole on the HyperPod service, asked anew, in threads, and no oftener than need be."""

from __future__ import annotations

import threading
import time

import pytest

from sm_tiered import deadline, layout
from sm_tiered.errors import CorruptPartError, KeyNotFoundError, TierUnavailableError
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_looks import THREADS, each
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES
from sm_tiered.tiers.shares import ShareTier
from tests.unit.hyperpod_sharing import FIRST, WIRE, at, bare, manifest_of, save, settings, share

HERE = at(FIRST, 10)
MANIFEST = layout.in_dir(HERE, layout.MANIFEST)


def looks(daemon: StandInDaemon) -> list[int]:
    """Return the ranks that were looked at, in order."""
    paths = [request.path for request in daemon.requests if request.method == "GET"]
    return [int(path.split("/")[-2]) for path in paths if "/checkpoints/" in path and "latest" not in path]


# ---- confirm


def test_it_is_confirmed_once_the_last_share_is_there(tier: HyperPodTier) -> None:
    assert tier.confirm(HERE) is False
    for rank in (2, 0, 1):
        assert tier.confirm(HERE) is False
        tier.put_share(share(HERE, rank, 3, 100))
    assert tier.confirm(HERE) is True


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_share_that_was_lost_after_it_was_seen_is_missed(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, rank: int
) -> None:
    records = save(tier, HERE, 3, 100)
    assert other.confirm(HERE)
    assert other.get(MANIFEST).data == manifest_of(records)
    lost = daemon.namespaces["run"].blobs[rank].pop(WIRE + 10)
    assert other.confirm(HERE) is False
    with pytest.raises(KeyNotFoundError):  # what was remembered is what was seen last
        other.get(MANIFEST)
    daemon.namespaces["run"].blobs[rank][WIRE + 10] = lost
    assert other.confirm(HERE) is True
    assert other.get(MANIFEST).data == manifest_of(records)


def test_all_shares_lost_together_are_missed(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, HERE, 2, 100)
    assert tier.confirm(HERE)
    daemon.namespaces.clear()
    assert tier.confirm(HERE) is False


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("seen", [True, False])
def test_a_damaged_share_is_damage(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, rank: int, seen: bool
) -> None:
    save(tier, HERE, 2, 100)
    if seen:
        assert other.confirm(HERE)
    daemon.flip("run", rank, WIRE + 10, 8 * FIRST_BYTES + 50)
    with pytest.raises(CorruptPartError, match=f"rank {rank} is damaged"):
        other.confirm(HERE)


def test_a_rank_that_failed_is_not_whole(tier: HyperPodTier) -> None:
    tier.put_share(share(HERE, 0, 2, 100))
    tier.put_if_absent(layout.in_dir(HERE, layout.record_name(1)), share(HERE, 1, 2, failed="no room").record)
    assert tier.confirm(HERE) is False


def test_each_share_is_asked_for_each_time_it_is_confirmed(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, HERE, 20, 10)
    for _ in range(2):
        daemon.restart()
        assert other.confirm(HERE)
        assert sorted(set(looks(daemon)) - {20}) == sorted(one for one in looks(daemon) if one < 20) == list(range(20))


def test_while_shares_are_missing_few_are_asked_for(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for rank in range(30):
        tier.put_share(share(HERE, rank, 60, 10))
    tier.confirm(HERE)
    daemon.restart()
    for _ in range(3):
        assert tier.confirm(HERE) is False
        with pytest.raises(KeyNotFoundError):
            tier.get(MANIFEST)
    assert len(looks(daemon)) <= 3 * 2 * (2 + THREADS)
    assert set(looks(daemon)) <= {*range(30, 60), 60}  # the last is where the manifest would be


def test_it_is_repeated_where_the_service_fails_once(daemon: StandInDaemon) -> None:
    tier = open_tier(settings(daemon.url), "run")
    assert isinstance(tier, ShareTier)
    writer = bare(daemon.url)
    save(writer, HERE, 4, 10)
    writer.close()
    daemon.restart(DaemonFault(kind="status", method="GET", path=r"/2/10000000010$", times=1))
    assert tier.confirm(HERE)
    assert len(daemon.fired) == 1
    tier.close()


def test_more_ranks_than_the_deadline_was_made_for_are_given_time(daemon: StandInDaemon) -> None:
    """64 looks of 0.1 s, where an operation has half a second."""
    tier = bare(daemon.url)
    save(tier, HERE, 64, 10)
    tier.close()
    slow = open_tier(settings(daemon.url, retry_deadline_secs=0.5, retry_attempts=1), "run")
    daemon.restart(DaemonFault(kind="late", method="GET", path=r"/\d+/10000000010$", secs=0.1))
    assert isinstance(slow, ShareTier)
    assert slow.confirm(HERE)
    slow.close()
    other = open_tier(settings(daemon.url, retry_deadline_secs=0.5, retry_attempts=1), "run")
    assert len(other.list(layout.checkpoint_dir(HERE))) == 129
    assert other.get(MANIFEST).data
    other.close()


# ---- threads


def test_answers_come_in_the_order_of_what_was_asked() -> None:
    met = threading.Barrier(THREADS, timeout=10)

    def call(item: int) -> int:
        if item < THREADS:
            met.wait()  # as many are under way at once
        return item * item

    assert each(call, range(50), secs=5.0) == [n * n for n in range(50)]


def test_after_enough_no_more_is_asked() -> None:
    asked: list[int] = []

    def call(item: int) -> int:
        asked.append(item)
        return item

    found = each(call, range(1000), secs=5.0, enough=lambda answer: answer >= 3)
    assert found[:4] == [0, 1, 2, 3]
    assert len(asked) == len(found) <= 4 + THREADS


def test_the_first_that_fails_is_told_and_the_others_end() -> None:
    def call(item: int) -> int:
        if item >= 5:
            raise KeyNotFoundError(f"item {item}")
        return item

    with pytest.raises(KeyNotFoundError, match="item 5"):
        each(call, range(1000), secs=5.0)


def test_the_deadline_outside_holds_in_the_threads() -> None:
    left: list[float] = []
    with deadline.within(7.0):
        each(lambda _: left.append(deadline.remaining(1000.0)), range(20), secs=5.0)
    assert len(left) == 20
    assert max(left) <= 7.0


def test_what_does_not_end_is_given_up() -> None:
    never = threading.Event()
    began = time.monotonic()
    try:
        with deadline.within(0.1), pytest.raises(TierUnavailableError, match="no answers to all"):
            each(lambda _: never.wait(50), range(3), secs=60.0)
        assert time.monotonic() - began < 40
    finally:
        never.set()
