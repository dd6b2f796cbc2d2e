"""What is not believed of the HyperPod service: that what was written still stands, whoever wrote it."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest

from sm_tiered import layout, retention
from sm_tiered.commit import Outcome, try_commit
from sm_tiered.finish import Finisher
from sm_tiered.inventory import list_checkpoints, read_holding
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt
from sm_tiered.resolve import Tiers
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_requests import about
from tests.unit.hyperpod_sharing import FIRST, MIB, WIRE, at, bare, save, share

HERE = at(FIRST, 10)
PLACE = WIRE + 10
TWIN = at(Attempt(ordinal=1, utc_secs=1_800_000_000, nonce="99999999"), 10)


def none_made(_records: Mapping[int, bytes]) -> dict[str, bytes]:
    return {}


def lose(daemon: StandInDaemon, rank: int, wire: int = PLACE) -> None:
    del daemon.namespaces["run"].blobs[rank][wire]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_last_whole_one_does_not_go_for_one_of_which_a_share_was_lost_at_once(
    daemon: StandInDaemon, tier: HyperPodTier, rank: int
) -> None:
    save(tier, HERE, 2, 100)
    assert tier.confirm(HERE)
    save(tier, at(FIRST, 20), 2, 100)
    lose(daemon, rank, WIRE + 20)
    assert tier.confirm(at(FIRST, 20)) is False
    retention.apply(tier, "run", retention.plan(tier, Latest(1), attempt=FIRST, in_flight_secs=1000.0))
    assert read_holding(tier, HERE, durable=True).problem is None


def test_the_last_whole_one_does_not_go_for_one_that_was_whole_when_it_was_committed(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    for step in (10, 20):
        save(tier, at(FIRST, step), 2, 100)
        assert tier.confirm(at(FIRST, step))
    lose(daemon, 1, WIRE + 20)
    chosen = retention.plan(tier, Latest(1), attempt=FIRST, in_flight_secs=1000.0)
    assert (chosen.delete, chosen.committed) == ((), {HERE})


def test_a_service_that_began_anew_has_what_was_written_since(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    tier.put_share(share(HERE, 0, 2, 100))
    assert try_commit(tier, HERE, world=2, compose=none_made) is Outcome.WAITING
    daemon.namespaces.clear()
    other.put_share(share(HERE, 1, 2, 100))
    assert try_commit(tier, HERE, world=2, compose=none_made) is Outcome.WAITING
    tier.put_share(share(HERE, 0, 2, 100))
    assert try_commit(tier, HERE, world=2, compose=none_made) is Outcome.COMMITTED


@pytest.mark.parametrize("begins_anew", [True, False])
def test_who_waits_for_another_to_commit_does_not_count_its_own_share_unseen(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, begins_anew: bool
) -> None:
    tier.put_share(share(HERE, 1, 2, 100))
    assert try_commit(tier, HERE, world=2, compose=none_made, lead=False) is Outcome.WAITING
    if begins_anew:
        daemon.namespaces.clear()
    else:
        lose(daemon, 1)
    other.put_share(share(HERE, 0, 2, 100))
    assert try_commit(tier, HERE, world=2, compose=none_made, lead=False) is Outcome.WAITING


def test_of_two_attempts_of_one_ordinal_the_one_whose_shares_stand_is_committed(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, HERE, 2, 100)
    save(other, TWIN, 2, 100)
    assert other.confirm(TWIN)
    assert tier.confirm(HERE) is False
    third = bare(daemon.url)
    assert list_checkpoints(third) == [TWIN]
    for one in (tier, other, third):
        one.drop(HERE)
    assert read_holding(third, TWIN, durable=True).problem is None
    third.close()


def test_a_manifest_that_outlived_its_shares_takes_nobody_elses_along(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """As where two attempts of one ordinal write at once."""
    save(tier, HERE, 2, 100)
    assert tier.confirm(HERE)
    stale = daemon.namespaces["run"].blobs[2][PLACE]
    save(other, TWIN, 2, 100)
    daemon.namespaces["run"].blobs[2][PLACE] = stale
    other.drop(HERE)
    assert f"DELETE 0/{PLACE}" not in about(daemon, "DELETE")
    assert other.confirm(TWIN)


def test_what_was_looked_at_and_not_read_is_let_go(tier: HyperPodTier, other: HyperPodTier) -> None:
    """As where a restore finds all in the node's own memory: the service would hold a share for the whole training."""
    save(tier, HERE, 1, 8 * MIB)
    assert tier.confirm(HERE)
    tiers = Tiers(memory=None, durable={"cluster": other}, compose=Finisher().compose)
    with tiers.reading():
        assert read_holding(other, HERE, durable=True).problem is None
        assert [cursor for cursor in other._reader._cursors.values() if cursor._body is not None]
    assert not [cursor for cursor in other._reader._cursors.values() if cursor._body is not None]


def test_a_look_does_not_wait_for_who_reads_the_share(tier: HyperPodTier, other: HyperPodTier) -> None:
    save(tier, HERE, 1, MIB)
    buffer = memoryview(bytearray(10))
    other.read_into(layout.in_dir(HERE, "__0_0.distcp"), 0, buffer)
    (cursor,) = other._reader._cursors.values()
    other._index.slots.forget(next(iter(other._reader._cursors)))
    with cursor._lock:
        looked = threading.Thread(target=lambda: other.get(layout.in_dir(HERE, layout.record_name(0))))
        looked.start()
        looked.join(20)
        assert not looked.is_alive()
