"""How often the HyperPod service is asked: by a commit, by retention, by others; and what may not be believed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sm_tiered import layout, retention
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.policies.keep import Latest
from sm_tiered.recipe import Recipe
from sm_tiered.records import CheckpointId
from sm_tiered.retention import Kept
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.shares import ShareTier
from tests.unit.hyperpod_requests import about, asked
from tests.unit.hyperpod_sharing import FIRST, WIRE, at, attempt_record, bare, manifest_of, save, settings, share

HERE = at(FIRST, 10)
PLACE = WIRE + 10
FAR = 1000.0


@pytest.fixture
def repeating(daemon: StandInDaemon) -> Iterator[ShareTier]:
    """The tier as a drainer has it."""
    tier = open_tier(settings(daemon.url), "run")
    assert isinstance(tier, ShareTier)
    yield tier
    tier.close()


def pruned(tier: ShareTier, keep: int = 2) -> list[CheckpointId]:
    chosen = retention.plan(tier, Latest(keep), attempt=FIRST, in_flight_secs=FAR)
    return retention.apply(tier, "run", chosen)


def shares_of(daemon: StandInDaemon, world: int, method: str = "GET") -> list[str]:
    """Return the looks at shares, as they came."""
    return [text for rank in range(world) for text in about(daemon, method, rank)]


# ---- a commit


def test_a_commit_looks_at_each_share_once_its_own_too(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, HERE, 3, 100)
    daemon.restart()
    assert tier.confirm(HERE)
    assert sorted(about(daemon, "GET")) == [f"GET {rank}/{PLACE}" for rank in range(4)]
    assert about(daemon, "POST") == [f"POST 3/{PLACE}"]


def test_many_ranks_are_seen_by_one_and_told_to_all(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    records = save(tier, HERE, 32, 10)
    daemon.restart()
    assert other.confirm(HERE)
    assert sorted(shares_of(daemon, 32)) == sorted(f"GET {rank}/{PLACE}" for rank in range(32))
    assert [text for text in asked(daemon) if text.startswith("POST")] == [f"POST 32/{PLACE}"]
    third = bare(daemon.url)
    third.looks("")
    daemon.restart()
    assert third.get(layout.in_dir(HERE, layout.MANIFEST)).data == manifest_of(records)
    assert asked(daemon) == [f"GET 32/{PLACE}"]
    third.close()


def test_a_listing_of_many_asks_once_for_each(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    for step in range(1, 5):
        save(tier, at(FIRST, step), 8, 10)
        assert tier.confirm(at(FIRST, step))
    daemon.restart()
    assert len(other.list("step_")) == 4 * 17
    assert sorted(about(daemon, "GET")) == [f"GET 8/{WIRE + step}" for step in range(1, 5)]
    daemon.restart()
    assert list_checkpoints(other) == [at(FIRST, step) for step in range(1, 5)]
    assert about(daemon, "GET") == []


# ---- a save in the steady state


def test_a_steady_save_of_one_rank_asks_little(daemon: StandInDaemon, repeating: ShareTier) -> None:
    """Of shares it asks for its own before the commit, for those that stay before one goes, and for that one."""
    repeating.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for step in range(1, 7):
        daemon.restart()
        made = share(at(FIRST, step), 0, 1, 1000)
        repeating.put_share(made)
        assert repeating.confirm(at(FIRST, step))
        assert read_manifest(repeating, at(FIRST, step)) is not None
        if step > 3:
            before = len(daemon.requests)
            assert shares_of(daemon, 1) == [f"GET 0/{WIRE + step}"]
            assert before <= 10 + 1, asked(daemon)  # the last is what reads the manifest here
        assert pruned(repeating) == ([at(FIRST, step - 2)] if step > 2 else [])
    # At step 0 stands the record of the attempt, alone.
    wanted = [WIRE, WIRE, WIRE + 4, WIRE + 5, WIRE + 6, WIRE + 6]
    assert sorted(shares_of(daemon, 1)) == [f"GET 0/{wire}" for wire in wanted]
    assert about(daemon, "DELETE") == [f"DELETE 1/{WIRE + 4}", f"DELETE 0/{WIRE + 4}"]
    assert len(daemon.requests) <= 26, asked(daemon)
    assert daemon.dropped == []


def test_one_pass_of_retention_looks_at_each_share_once(
    daemon: StandInDaemon, tier: HyperPodTier, repeating: ShareTier
) -> None:
    for step in (1, 2, 3):
        save(tier, at(FIRST, step), 4, 10)
        assert tier.confirm(at(FIRST, step))
    list_checkpoints(repeating)
    daemon.restart()
    assert pruned(repeating) == [at(FIRST, 1)]
    looked = shares_of(daemon, 4)
    # Those that stay, and the one that goes just before it does.
    assert sorted(looked) == sorted(f"GET {rank}/{WIRE + step}" for rank in range(4) for step in (1, 2, 3))
    assert len(about(daemon, "GET", 4)) == 4  # the manifests of all, and the first once more before it goes


def test_a_pass_begins_with_nothing_it_has_learnt_before(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, HERE, 2, 100)
    assert tier.confirm(HERE)
    with tier.asking_once():
        assert list_checkpoints(tier) == [HERE]
        daemon.restart()
        tier.list("step_")
        assert tier.confirm(HERE)
        assert [text for text in asked(daemon) if text.startswith("GET") and "/" not in text] == []
        with tier.asking_once():  # it is part of the one around it
            tier.list("step_")
            assert "GET latest" not in asked(daemon)
    daemon.restart()
    tier.list("step_")
    assert "GET latest" in asked(daemon)


def test_a_pass_sees_what_it_has_done_itself(tier: HyperPodTier, other: HyperPodTier) -> None:
    save(tier, HERE, 2, 100)
    with other.asking_once():
        assert other.confirm(HERE)
        assert read_manifest(other, HERE) is not None
        other.drop(HERE)
        assert other.confirm(HERE) is False
        assert read_manifest(other, HERE) is None


# ---- what may go


@pytest.mark.parametrize("rank", [0, 1])
def test_what_lost_a_share_is_not_counted_whatever_its_manifest_says(
    daemon: StandInDaemon, tier: HyperPodTier, repeating: ShareTier, rank: int
) -> None:
    for step in (1, 2, 3):
        save(tier, at(FIRST, step), 2, 10)
        assert tier.confirm(at(FIRST, step))
    del daemon.namespaces["run"].blobs[rank][WIRE + 2]
    chosen = retention.plan(repeating, Latest(2), attempt=FIRST, in_flight_secs=FAR)
    assert (chosen.delete, chosen.kept[at(FIRST, 2)]) == ((), {Kept.IN_FLIGHT})
    assert sorted(chosen.committed) == [at(FIRST, 1), at(FIRST, 3)]
    assert retention.plan(repeating, Latest(2), attempt=FIRST, in_flight_secs=-1.0).delete == (at(FIRST, 2),)
    assert daemon.namespaces["run"].steps[2] == [WIRE + 1, WIRE + 2, WIRE + 3], "a plan changes nothing"
    assert retention.apply(repeating, "run", chosen) == []
    assert daemon.namespaces["run"].steps[2] == [WIRE + 1, WIRE + 3]


def test_where_the_newest_is_lost_nothing_goes(daemon: StandInDaemon, tier: HyperPodTier, repeating: ShareTier) -> None:
    for step in (1, 2):
        save(tier, at(FIRST, step), 2, 10)
        assert tier.confirm(at(FIRST, step))
    for step in (1, 2):
        del daemon.namespaces["run"].blobs[1][WIRE + step]
    chosen = retention.plan(repeating, Latest(1), attempt=FIRST, in_flight_secs=FAR)
    assert (chosen.delete, chosen.waits) == ((), True)


def test_would_keep_asks_anew_too(daemon: StandInDaemon, tier: HyperPodTier, repeating: ShareTier) -> None:
    from sm_tiered.policies.context import CommittedCheckpoint

    for step in (2, 3):
        save(tier, at(FIRST, step), 2, 10)
        assert tier.confirm(at(FIRST, step))
    newcomer = CommittedCheckpoint(checkpoint=at(FIRST, 1), saved_at=1.0, metrics={})
    assert retention.would_keep(repeating, Latest(2), newcomer) is False
    del daemon.namespaces["run"].blobs[1][WIRE + 2]
    assert retention.would_keep(repeating, Latest(2), newcomer) is True


# ---- restore


def test_a_restore_that_believes_a_manifest_goes_on_where_a_share_is_gone_or_damaged(
    daemon: StandInDaemon,
) -> None:
    from sm_tiered.group import SoloGroup
    from sm_tiered.testing.plain import PlainEngine

    def engine() -> PlainEngine:
        tiers = {"cluster": {"kind": "hyperpod", "url": daemon.url, "keep": {"latest": 5}}}
        return PlainEngine(Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers}).settings(), SoloGroup())

    job = engine()
    for step in (1, 2, 3, 4):
        job.save(step, b"state of %d" % step, ["cluster"]).wait("cluster", timeout=10)
    job.close()
    stored = daemon.namespaces["run"].blobs
    assert len(stored[1]) == 4, "each has its manifest"
    last = max(stored[0])
    del stored[0][last]
    daemon.flip("run", 0, last - 1, 8 * 60)
    daemon.flip("run", 0, last - 2, 8 * (len(stored[0][last - 2].data) - 1))
    again = engine()
    assert again.restore() == (1, b"state of 1")
    again.close()
