"""The namespaces of the HyperPod service that a run uses: large enough, in a chain, and never another's."""

from __future__ import annotations

import pytest

from sm_tiered import layout
from sm_tiered.errors import TierRefusedError, TierUnavailableError
from sm_tiered.inventory import list_checkpoints, read_attempts
from sm_tiered.manifest import attempt_record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon, StoredNamespace
from sm_tiered.tiers import hyperpod_chain
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_client import Body
from tests.unit.hyperpod_sharing import (
    FIRST,
    KEPT,
    SECOND,
    WIRE,
    at,
    attempt_record,
    bare,
    data_of,
    foreign,
    read,
    save,
    share,
    whole,
)


def nth(ordinal: int) -> Attempt:
    return Attempt(ordinal=ordinal, utc_secs=1_700_000_000 + ordinal, nonce=f"{ordinal:08x}")


def test_a_namespace_has_two_slots_more_than_ranks_and_three_steps_more_than_are_kept(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 3, 100)
    found = daemon.namespaces["run"]
    assert (list(daemon.namespaces), found.num_ranks, found.steps_retained) == (["run"], 5, KEPT)


@pytest.mark.parametrize(
    ("before", "after", "namespaces"),
    [(2, 1, ["run"]), (4, 2, ["run"]), (2, 3, ["run"]), (2, 4, ["run", "run__2"]), (1, 4, ["run", "run__2"])],
)
def test_a_job_of_another_size_reads_what_was_and_finds_room(
    daemon: StandInDaemon, tier: HyperPodTier, before: int, after: int, namespaces: list[str]
) -> None:
    save(tier, at(FIRST, 10), before, 100, 7)
    other = bare(daemon.url)
    save(other, at(SECOND, 20), after, 100, 9)
    assert list(daemon.namespaces) == namespaces
    third = bare(daemon.url)
    assert list_checkpoints(third) == [at(FIRST, 10), at(SECOND, 20)]
    assert whole(third, at(FIRST, 10))
    assert whole(third, at(SECOND, 20))
    assert read(third, at(FIRST, 10), f"__{before - 1}_1.distcp", 7) == data_of(10, before - 1, 1, 7)
    assert read(third, at(SECOND, 20), f"__{after - 1}_1.distcp", 9) == data_of(20, after - 1, 1, 9)
    for one in (other, third):
        one.close()


def test_the_predecessors_namespace_is_left_as_it_is(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    blobs = {rank: {step: foreign(b"%d %d" % (rank, step)) for step in (100, 200, 300)} for rank in (0, 1, 2)}
    daemon.memory.namespaces["run"] = StoredNamespace(num_ranks=3, steps_retained=3, blobs=blobs)
    for step in range(10, 400, 50):
        save(tier, at(FIRST, step), 2, 100)
        tier.drop(at(FIRST, step - 100))
    assert list(daemon.namespaces) == ["run", "run__2"]
    assert daemon.namespaces["run"].steps == {rank: [100, 200, 300] for rank in (0, 1, 2)}
    assert all(blobs[r][s].data == b"%d %d" % (r, s) for r in (0, 1, 2) for s in (100, 200, 300))
    assert list_checkpoints(tier) == [at(FIRST, 310), at(FIRST, 360)]
    assert daemon.dropped == []
    touched = [r for r in daemon.requests if r.method != "GET" and "/run/" in r.path]
    assert touched == []


def test_a_large_namespace_that_somebody_else_uses_is_left_alone(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Its room is not ours: the service would drop what is lowest, and that is theirs."""
    theirs = StoredNamespace(num_ranks=9, steps_retained=50, blobs={0: {7: foreign()}})
    daemon.memory.namespaces["run"] = theirs
    save(tier, at(FIRST, 10), 2, 100)
    assert theirs.steps == {0: [7]}
    assert daemon.namespaces["run__2"].steps == {0: [WIRE + 10], 1: [WIRE + 10]}


def test_a_run_whose_name_looks_like_a_namespace_of_ours_is_another(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Neither sees the other's, and neither takes the other's room, or writes over it."""
    other = bare(daemon.url, "run__2")
    record = AttemptRecord(namespace="run__2", attempt=FIRST, parent=None, chosen=False)
    other.put_if_absent(layout.attempt_key(FIRST), attempt_record_to_json(record))
    for rank in range(3):
        other.put_share(share(at(FIRST, 10), rank, 3, 100, namespace="run__2"))
    assert other.confirm(at(FIRST, 10))
    save(tier, at(FIRST, 10), 1, 200)
    assert tier.confirm(at(FIRST, 10))
    save(tier, at(FIRST, 20), 4, 200)
    assert list(daemon.namespaces) == ["run__2", "run", "run__3"]
    assert daemon.namespaces["run__2"].steps == {**{rank: [WIRE + 10] for rank in range(4)}, 4: [WIRE]}
    assert list_checkpoints(tier) == [at(FIRST, 10), at(FIRST, 20)]
    assert list_checkpoints(other) == [at(FIRST, 10)]
    assert read_attempts(tier)[0] == {}
    assert whole(other, at(FIRST, 10))
    other.close()


def test_whoever_is_faster_makes_the_namespace(daemon: StandInDaemon) -> None:
    tiers = [bare(daemon.url) for _ in range(3)]
    daemon.restart(DaemonFault(kind="status", method="POST", path=r"/namespaces/run\?", status=409, times=1))
    with pytest.raises(TierUnavailableError, match="was made and is not there"):
        tiers[0].put_share(share(at(FIRST, 10), 0, 3, 100))
    for rank, tier in enumerate(tiers):
        tier.put_share(share(at(FIRST, 10), rank, 3, 100))
    assert whole(tiers[0], at(FIRST, 10))
    for tier in tiers:
        tier.close()


def test_a_service_that_gives_less_than_was_asked_for_is_refused(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    text = '{"num_ranks": 2, "steps_to_retain_per_rank": 3}'
    daemon.restart(
        DaemonFault(kind="status", method="GET", path="/namespaces/run$", first=3, status=200, text=text),
    )
    with pytest.raises(TierRefusedError, match="2 slots of 3"):
        tier.put_share(share(at(FIRST, 10), 0, 1, 100))
    assert daemon.namespaces == {}  # else each save would leave one more


def test_a_service_that_was_started_again_gets_its_namespaces_again(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    daemon.namespaces.clear()
    with pytest.raises(TierUnavailableError):
        tier.put_share(share(at(FIRST, 20), 0, 2, 100))
    save(tier, at(FIRST, 20), 2, 100)
    assert list_checkpoints(tier) == [at(FIRST, 20)]


def test_more_checkpoints_kept_later_find_room(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    other = bare(daemon.url, keep=Latest(10))
    save(other, at(SECOND, 20), 2, 100)
    assert daemon.namespaces["run__2"].steps_retained == 13
    assert list_checkpoints(other) == [at(FIRST, 10), at(SECOND, 20)]
    other.close()


def test_an_ordinal_that_does_not_fit_is_refused(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    far = Attempt(ordinal=900_000, utc_secs=1, nonce="00000000")
    with pytest.raises(TierRefusedError, match="beyond what the service can count"):
        tier.put_share(share(at(far, 1), 0, 1, 10))
    assert not any(found.steps for found in daemon.namespaces.values())


# ---- names


def test_a_namespace_that_was_deleted_hides_none_behind_it(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    theirs = StoredNamespace(num_ranks=3, steps_retained=3, blobs={0: {7: foreign()}})
    daemon.memory.namespaces["run"] = theirs
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    save(tier, at(FIRST, 10), 2, 100)
    del daemon.namespaces["run"]
    other = bare(daemon.url)
    assert list_checkpoints(other) == [at(FIRST, 10)]
    assert whole(other, at(FIRST, 10))
    assert set(read_attempts(other)[0]) == {FIRST}
    save(other, at(FIRST, 20), 5, 100)  # the first name that is free is taken
    assert {name: found.num_ranks for name, found in daemon.namespaces.items()} == {"run__2": 4, "run": 7}
    assert list_checkpoints(other) == [at(FIRST, 10), at(FIRST, 20)]
    other.close()


@pytest.mark.parametrize(("name", "seen"), [("run__4", True), ("run__5", False)])
def test_how_many_names_may_be_missing_in_a_row(
    daemon: StandInDaemon, tier: HyperPodTier, name: str, seen: bool
) -> None:
    save(tier, at(FIRST, 10), 1, 100)
    daemon.namespaces[name] = daemon.namespaces.pop("run")
    other = bare(daemon.url)
    assert (list_checkpoints(other) == [at(FIRST, 10)]) is seen
    other.close()


def test_once_no_name_is_left_leftovers_of_older_attempts_make_room(
    small: StandInDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each attempt has a namespace of its own; what is whole and what tells of a choice stays."""
    monkeypatch.setattr(hyperpod_chain, "_MOST_MEMBERS", 7)
    tier = bare(small.url)
    save(tier, at(nth(1), 5), 1, 100)
    tier.close()
    for ordinal in range(2, 13):
        tier = bare(small.url)
        if ordinal == 2:
            record = attempt_record(nth(2), at(nth(1), 5), chosen=True)
            tier.put_if_absent(layout.attempt_key(nth(2)), record)
        tier.put_share(share(at(nth(ordinal), 5), 0, 2, 100))  # rank 1 never comes
        tier.close()
    assert len(small.namespaces) == 7
    tier = bare(small.url)
    save(tier, at(nth(13), 6), 2, 100)
    found = list_checkpoints(tier)
    assert found[0] == at(nth(1), 5)
    assert found[-1] == at(nth(13), 6)
    assert whole(tier, found[0])
    assert whole(tier, found[-1])
    assert read_attempts(tier)[0][nth(2)].chosen
    assert small.dropped == []
    tier.close()


@pytest.mark.parametrize("left", ["a manifest alone", "a manifest and a share", "a damaged one", "all"])
def test_a_manifest_that_was_left_behind_is_a_leftover_and_one_that_is_true_is_not(
    small: StandInDaemon, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(hyperpod_chain, "_MOST_MEMBERS", 1)
    tier = bare(small.url)
    save(tier, at(nth(1), 5), 2, 100)
    assert tier.confirm(at(nth(1), 5))
    blobs = small.namespaces["run"].blobs
    for rank in {"a manifest alone": (0, 1), "a manifest and a share": (1,), "a damaged one": (0,), "all": ()}[left]:
        del blobs[rank][5]
    if left == "a damaged one":
        small.flip("run", 2, 5, 8 * 60)
    other = bare(small.url)
    if left == "all":
        with pytest.raises(TierRefusedError, match="none of which takes"):
            other.put_share(share(at(nth(2), 6), 0, 2, 100))
    else:
        save(other, at(nth(2), 6), 2, 100)
        assert list_checkpoints(other) == [at(nth(2), 6)]
    for one in (tier, other):
        one.close()


def test_where_nothing_is_left_over_no_name_is_left_either(small: StandInDaemon) -> None:
    for number in range(64):
        name = "run" if number == 0 else f"run__{number + 1}"
        small.memory.namespaces[name] = StoredNamespace(num_ranks=9, steps_retained=9, blobs={0: {7: foreign()}})
    tier = bare(small.url)
    with pytest.raises(TierRefusedError, match="64 namespaces already"):
        tier.put_share(share(at(FIRST, 10), 0, 2, 100))
    assert all(stored.steps == {0: [7]} for stored in small.namespaces.values())
    tier.close()


def test_a_trial_whose_answer_comes_in_pieces_is_right_all_the_same(
    daemon: StandInDaemon, tier: HyperPodTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Body.receive
    monkeypatch.setattr(Body, "receive", lambda body, _limit: real(body, 1))
    tier.put_share(share(at(FIRST, 10), 0, 1, 100))
    assert daemon.namespaces["run"].steps == {0: [WIRE + 10]}


def test_once_a_namespace_is_known_one_more_name_is_asked_for(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """It is the first free one, which is the one that others would take: with or without one deleted before it."""
    save(tier, at(FIRST, 10), 1, 100)
    save(tier, at(FIRST, 20), 4, 100)
    del daemon.namespaces["run"]
    other = bare(daemon.url)
    assert list_checkpoints(other) == [at(FIRST, 20)]
    daemon.restart()
    assert list_checkpoints(other) == [at(FIRST, 20)]
    asked = [request.path.rsplit("/", 1)[-1] for request in daemon.requests if "/namespaces/" in request.path]
    assert sorted(asked) == ["run", "run__2", "run__3"]
    third = bare(daemon.url)
    save(third, at(FIRST, 30), 1, 100)
    save(third, at(FIRST, 40), 9, 100)
    assert list(daemon.namespaces) == ["run__2", "run"]
    assert list_checkpoints(other) == [at(FIRST, 20), at(FIRST, 30), at(FIRST, 40)]
    for one in (other, third):
        one.close()
