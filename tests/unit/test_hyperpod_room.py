"""Room on the HyperPod tier: steps in the order of attempts, and nothing is dropped that must stay."""

from __future__ import annotations

import pytest

from sm_tiered import layout
from sm_tiered.errors import TierFullError, TierRefusedError
from sm_tiered.inventory import list_checkpoints, read_attempts
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_sharing import (
    FIRST,
    KEPT,
    SECOND,
    THIRD,
    WIRE,
    at,
    attempt_record,
    bare,
    foreign,
    save,
    share,
    whole,
)

# ---- steps


def test_a_lower_step_of_a_newer_attempt_is_the_newest_and_stays(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tier, at(FIRST, step), 2, 100)
    for step in (100, 200):
        tier.drop(at(FIRST, step))
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 300), chosen=True))
    save(tier, at(SECOND, 310), 2, 100)
    other = bare(daemon.url)
    assert list_checkpoints(other)[-1] == at(SECOND, 310)
    assert whole(other, at(SECOND, 310))
    assert whole(other, at(FIRST, 500))
    assert read_attempts(other)[0][SECOND].chosen
    assert daemon.dropped == []
    other.close()


def test_shares_of_dead_attempts_make_room_and_whole_checkpoints_stay(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    save(tier, at(FIRST, 20), 2, 100)
    for ordinal in range(2, 30):
        attempt = Attempt(ordinal=ordinal, utc_secs=ordinal, nonce=f"{ordinal:08x}")
        tier.put_share(share(at(attempt, 5), 0, 2, 100))  # rank 1 never comes
    assert daemon.dropped == []
    assert whole(tier, at(FIRST, 10))
    assert whole(tier, at(FIRST, 20))
    assert len(daemon.namespaces["run"].steps[0]) == KEPT
    newest = Attempt(ordinal=30, utc_secs=30, nonce="00000030")
    save(tier, at(newest, 30), 2, 100)
    assert whole(tier, at(newest, 30))
    assert daemon.dropped == []


def test_when_all_steps_are_taken_by_whole_checkpoints_it_is_full(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in range(10, 60, 10):
        save(tier, at(FIRST, step), 2, 100)
    with pytest.raises(TierFullError, match="all its 5 steps") as caught:
        tier.put_share(share(at(SECOND, 1), 1, 2, 100))
    assert (caught.value.rank, caught.value.tier) == (1, "cluster")
    assert all(whole(tier, at(FIRST, step)) for step in range(10, 60, 10))
    tier.drop(at(FIRST, 10))
    save(tier, at(SECOND, 1), 2, 100)
    assert daemon.dropped == []
    assert whole(tier, at(SECOND, 1))


def test_writing_a_share_again_needs_no_more_room(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in range(10, 60, 10):
        save(tier, at(FIRST, step), 2, 100)
    save(tier, at(FIRST, 30), 2, 100)
    assert daemon.dropped == []


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("newer", [at(SECOND, 1), at(FIRST, 60)])
def test_damage_gives_way_only_when_nothing_else_does(
    daemon: StandInDaemon, tier: HyperPodTier, newer: CheckpointId, rank: int
) -> None:
    """Else a tier that holds something damaged would refuse every save once."""
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 2, 100)
    tier.put_share(share(at(FIRST, 50), 0, 2, 100))
    tier.put_share(share(at(FIRST, 50), 1, 2, 100))
    daemon.flip("run", rank, WIRE + 30, 8 * 60)
    other = bare(daemon.url)
    other.put_share(share(newer, 0, 2, 100))
    left = [wire - WIRE for wire in daemon.namespaces["run"].steps[0]]
    assert left[:4] == [10, 20, 40, 50]
    other.close()


def test_what_was_never_whole_gives_way_before_what_is_damaged(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 2, 100)
    tier.put_share(share(at(FIRST, 50), 0, 2, 100))
    daemon.flip("run", 0, WIRE + 30, 8 * 60)
    other = bare(daemon.url)
    other.put_share(share(at(SECOND, 1), 0, 2, 100))
    assert [wire - WIRE for wire in daemon.namespaces["run"].steps[0]][:4] == [10, 20, 30, 40]
    other.close()


def test_drop_deletes_rank_0_first_and_nothing_else(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 3, 100)
    save(tier, at(FIRST, 20), 3, 100)
    daemon.restart()
    tier.drop(at(FIRST, 10))
    tier.drop(at(FIRST, 10))
    tier.drop(at(THIRD, 99))
    deleted = [request.path for request in daemon.requests if request.method == "DELETE"]
    first, *rest = (f"/v1/cp/checkpoints/run/{rank}/{WIRE + 10}" for rank in range(3))
    assert (deleted[0], sorted(deleted[1:])) == (first, rest)  # the rest at once, in no order
    assert whole(tier, at(FIRST, 20))


def test_drop_leaves_a_twins_shares(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Another attempt of the same ordinal may stand in the same place."""
    twin = Attempt(ordinal=1, utc_secs=9, nonce="99999999")
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url)
    other.put_share(share(at(twin, 10), 1, 2, 100))
    tier.drop(at(FIRST, 10))
    assert daemon.namespaces["run"].steps == {1: [WIRE + 10]}
    third = bare(daemon.url)
    assert list_checkpoints(third) == [at(twin, 10)]
    for one in (other, third):
        one.close()


def test_the_probe_is_cleaned_up_and_not_repeated(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url)
    save(other, at(FIRST, 20), 2, 100)
    probes = [request.method for request in daemon.requests if "/9000" in request.path]
    assert probes == ["POST", "GET", "DELETE"]
    assert daemon.namespaces["run"].steps == {rank: [WIRE + 10, WIRE + 20] for rank in (0, 1)}
    other.close()


def test_a_probe_that_was_left_behind_is_no_checkpoint(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    daemon.namespaces["run"].blobs[0][900_000 * WIRE + 5] = foreign(b"9000000000000005")
    assert list_checkpoints(tier) == [at(FIRST, 10)]
    save(tier, at(FIRST, 20), 2, 100)
    assert list_checkpoints(tier) == [at(FIRST, 10), at(FIRST, 20)]


def test_trials_that_were_left_behind_give_way_first(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 1), 1, 100)
    for number in range(3):
        daemon.namespaces["run"].blobs[0][900_000 * WIRE + number] = foreign(b"9")
    for step in (2, 3, 4):
        other = bare(daemon.url)
        other.put_share(share(at(FIRST, step), 0, 1, 100))
        other.close()
    assert list_checkpoints(tier) == [at(FIRST, step) for step in (1, 2, 3, 4)]
    assert daemon.dropped == []


# ---- beside manifests


def stale(daemon: StandInDaemon, tier: HyperPodTier, step: int, lost: int, world: int = 2) -> None:
    """Commit a checkpoint that loses a share afterwards."""
    save(tier, at(FIRST, step), world, 100)
    assert tier.confirm(at(FIRST, step))
    del daemon.namespaces["run"].blobs[lost][WIRE + step]


def test_what_lost_a_share_makes_room_although_a_manifest_stands(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    stale(daemon, tier, 10, lost=1)
    for step in (20, 30, 40, 50):
        save(tier, at(FIRST, step), 2, 100)
    daemon.restart()
    other.put_share(share(at(SECOND, 1), 0, 2, 100))
    deleted = [request.path.split("/")[-2:] for request in daemon.requests if request.method == "DELETE"]
    assert [one for one in deleted if one[1] == str(WIRE + 10)] == [["2", str(WIRE + 10)], ["0", str(WIRE + 10)]]
    assert list_checkpoints(other) == [*(at(FIRST, step) for step in (20, 30, 40, 50)), at(SECOND, 1)]
    assert daemon.dropped == []


def test_in_a_job_that_shrank_no_manifest_displaces_a_share(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """The slot that manifests have now held the shares of a rank."""
    tier.put_share(share(at(FIRST, 1), 0, 2, 100))
    tier.drop(at(FIRST, 1))
    assert daemon.namespaces["run"].num_ranks == 4
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 3, 100)
    tier.drop(at(FIRST, 40))
    daemon.namespaces["run"].blobs[2][WIRE + 40] = daemon.namespaces["run"].blobs[2][WIRE + 30]
    daemon.namespaces["run"].blobs[2][WIRE + 50] = daemon.namespaces["run"].blobs[2][WIRE + 30]
    smaller = bare(daemon.url)
    save(smaller, at(SECOND, 60), 2, 100)
    assert smaller.confirm(at(SECOND, 60))
    assert all(whole(smaller, at(FIRST, step)) for step in (10, 20, 30))
    assert daemon.dropped == []
    tier.drop(at(FIRST, 10))
    assert smaller.confirm(at(SECOND, 60))
    assert 2 * WIRE + 60 in daemon.namespaces["run"].steps[2]
    assert daemon.dropped == []
    smaller.close()


def test_manifests_of_older_checkpoints_give_way_to_newer_ones(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """Those that were left behind are the oldest; what stands without its own is told by its shares."""
    for step in (10, 20, 30, 40, 50):
        stale(daemon, tier, step, lost=0, world=1)
    save(other, at(SECOND, 60), 1, 100)
    assert other.confirm(at(SECOND, 60))
    assert [wire % WIRE for wire in daemon.namespaces["run"].steps[1]] == [20, 30, 40, 50, 60]
    assert daemon.dropped == []


def test_in_a_job_that_grew_manifests_give_way_to_shares(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 1, 100)
        assert tier.confirm(at(FIRST, step))
    assert daemon.namespaces["run"].num_ranks == 3
    daemon.namespaces["run"].blobs[1][WIRE + 5] = daemon.namespaces["run"].blobs[1][WIRE + 10]
    larger = bare(daemon.url)
    save(larger, at(SECOND, 50), 2, 100)
    assert whole(larger, at(SECOND, 50))
    assert all(whole(larger, at(FIRST, step)) for step in (10, 20, 30, 40))
    assert WIRE + 40 in daemon.namespaces["run"].steps[1]
    assert daemon.dropped == []
    larger.close()


# ---- an old job beside a new one


def test_what_an_older_attempt_still_had_to_send_is_taken_where_there_is_room(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    """A job that was killed and started again at once: the drainer still has the last step of the first launch."""
    for step in (10, 20, 30):
        save(tier, at(FIRST, step), 1, 100)
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 40)))
    save(tier, at(FIRST, 40), 1, 100)
    assert list_checkpoints(tier)[-1] == at(FIRST, 40)
    assert daemon.dropped == []


def test_an_older_attempt_leaves_the_last_room_to_a_newer_one(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Each would see room for one more, and the service drops the lowest."""
    for step in (10, 20, 30, 40):
        save(tier, at(FIRST, step), 1, 100)
    newer = bare(daemon.url)
    newer.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 40)))
    with pytest.raises(TierRefusedError, match="attempt 2 of this run has begun") as caught:
        tier.put_share(share(at(FIRST, 50), 0, 1, 100))
    assert (caught.value.tier, caught.value.step, caught.value.rank) == ("cluster", 50, 0)
    failed = share(at(FIRST, 50), 0, 1, failed="late")
    with pytest.raises(TierRefusedError, match="has begun"):
        tier.put_if_absent(layout.in_dir(at(FIRST, 50), layout.record_name(0)), failed.record)
    newer.put_share(share(at(SECOND, 41), 0, 1, 100))
    assert list_checkpoints(newer) == [*(at(FIRST, step) for step in (10, 20, 30, 40)), at(SECOND, 41)]
    assert daemon.dropped == []
    newer.close()


def test_a_trial_of_another_is_no_newer_attempt(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 1, 100)
    daemon.namespaces["run"].blobs[1] = {900_000 * WIRE + 5: foreign(b"9000000000000005")}
    tier.put_share(share(at(FIRST, 20), 0, 1, 100))
    assert whole(tier, at(FIRST, 20))
