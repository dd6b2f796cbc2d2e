"""Records of attempts on the HyperPod tier: told at once where that can be, and a choice is never forgotten."""

from __future__ import annotations

import pytest

from sm_tiered import layout, lineage
from sm_tiered.errors import KeyExistsError, TierRefusedError, TierUnavailableError
from sm_tiered.inventory import list_attempts, list_checkpoints, read_attempts, read_holding
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.testing.daemon import SMALL_STEPS, DaemonFault, StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from tests.unit.hyperpod_sharing import FIRST, KEPT, SECOND, THIRD, WIRE, at, attempt_record, bare, save


def nth(ordinal: int) -> Attempt:
    return Attempt(ordinal=ordinal, utc_secs=1_700_000_000 + ordinal, nonce=f"{ordinal:08x}")


def best(tier: HyperPodTier) -> CheckpointId:
    return lineage.candidates(list_checkpoints(tier), *read_attempts(tier))[0]


def test_the_record_of_an_attempt_waits_for_the_first_share(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """Before, there is no namespace, and nobody knows how many ranks it must take."""
    key, data = layout.attempt_key(FIRST), attempt_record(FIRST)
    tier.put_if_absent(key, data)
    assert daemon.namespaces == {}
    assert tier.get(key).data == data
    assert list_attempts(tier) == [FIRST]
    save(tier, at(FIRST, 10), 2, 100)
    assert other.get(key).data == data
    assert read_attempts(other)[0][FIRST].attempt == FIRST


def test_where_there_is_a_namespace_an_attempt_is_told_at_once(tier: HyperPodTier, other: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    parent = at(FIRST, 10)
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, parent, chosen=True))
    assert read_attempts(other)[0][SECOND].parent == parent
    with pytest.raises(KeyExistsError):
        other.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND))
    with pytest.raises(KeyExistsError):
        tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND))


def test_an_attempts_record_also_stands_in_each_share(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    other.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 10), chosen=True))
    save(tier, at(SECOND, 5), 2, 100)  # another process than the one that wrote the record
    del daemon.namespaces["run"].blobs[3][2 * WIRE]
    third = bare(daemon.url)
    assert read_attempts(third)[0][SECOND].chosen
    third.close()


def test_a_damaged_attempt_record_is_told_unless_a_share_has_it(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND))
    daemon.flip("run", 3, 2 * WIRE, 8 * 30)
    good, damaged = read_attempts(other)
    assert SECOND not in good
    assert [attempt.ordinal for attempt in damaged] == [2]
    save(tier, at(SECOND, 5), 2, 100)
    assert read_attempts(other)[0][SECOND].attempt == SECOND
    assert read_attempts(other)[1] == set()


def test_an_attempt_is_forgotten_where_no_share_tells_of_it(tier: HyperPodTier, other: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    for attempt in (SECOND, THIRD):
        tier.put_if_absent(layout.attempt_key(attempt), attempt_record(attempt))
    assert list_attempts(other) == [SECOND, THIRD]
    tier.delete([layout.attempt_key(SECOND), layout.attempt_key(FIRST)])
    assert list_attempts(tier) == list_attempts(other) == [THIRD]
    save(tier, at(THIRD, 10), 2, 100)
    with pytest.raises(TierRefusedError):
        tier.delete([layout.attempt_key(THIRD), layout.in_dir(at(FIRST, 10), "manifest.json")])
    assert list_attempts(other) == [THIRD]


def test_of_two_attempts_of_one_ordinal_both_are_told(tier: HyperPodTier, other: HyperPodTier) -> None:
    """Two launches at the same time: each has its own name."""
    from dataclasses import replace

    twin = replace(SECOND, nonce="99999999")
    save(tier, at(FIRST, 1), 1, 10)
    tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND))
    other.put_if_absent(layout.attempt_key(twin), attempt_record(twin))
    save(tier, at(SECOND, 5), 1, 100)
    save(other, at(twin, 6), 1, 100)
    assert list_attempts(tier) == [SECOND, twin]
    assert list_checkpoints(tier) == [at(FIRST, 1), at(SECOND, 5), at(twin, 6)]
    assert read_holding(tier, at(SECOND, 5), durable=True).problem is None
    assert read_holding(tier, at(twin, 6), durable=True).problem is None


@pytest.mark.parametrize("attempt", [SECOND, THIRD])
def test_the_record_of_another_attempt_is_refused(tier: HyperPodTier, attempt: object) -> None:
    with pytest.raises(TierRefusedError, match="another attempt"):
        tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(attempt))  # type: ignore[arg-type]


# ---- a choice


def launch(daemon: StandInDaemon, ordinal: int, parent: CheckpointId | None = None, *, chosen: bool = False) -> None:
    """A job begins, continues from what is best unless it is told otherwise, and is killed before it saves."""
    tier = bare(daemon.url)
    record = attempt_record(nth(ordinal), parent or best(tier), chosen=chosen)
    tier.put_if_absent(layout.attempt_key(nth(ordinal)), record)
    tier.close()


@pytest.mark.parametrize("max_step", [2**63 - 1, SMALL_STEPS])
def test_a_choice_outlives_any_number_of_launches(daemon: StandInDaemon, tier: HyperPodTier, max_step: int) -> None:
    daemon.memory.max_step = max_step
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for step in (300, 400, 500):
        save(tier, at(FIRST, step), 2, 100)
    launch(daemon, 2, at(FIRST, 300), chosen=True)
    for ordinal in range(3, 4 + 2 * KEPT):
        launch(daemon, ordinal)
        other = bare(daemon.url)
        assert best(other) == at(FIRST, 300)
        assert read_attempts(other)[0][nth(2)].chosen
        other.close()
    assert daemon.dropped == []


def test_of_many_choices_those_give_way_that_a_later_one_made_void(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for step in (100, 300, 400, 500):
        save(tier, at(FIRST, step), 2, 100)
    launch(daemon, 2, at(FIRST, 400), chosen=True)
    save(tier, at(nth(2), 450), 2, 100)
    for ordinal in range(3, 9):
        launch(daemon, ordinal, at(nth(2), 450), chosen=True)
    assert best(tier) == at(nth(2), 450)
    kept = read_attempts(tier)[0]
    assert {attempt.ordinal for attempt in kept} >= {2, 8}
    assert len(daemon.namespaces["run"].steps[3]) == KEPT
    assert daemon.dropped == []


def test_a_late_record_without_a_choice_displaces_no_newer_one(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 1, 100)
    for ordinal in range(10, 10 + KEPT):
        launch(daemon, ordinal, at(FIRST, 10), chosen=True)
    before = daemon.namespaces["run"].steps[2]
    launch(daemon, 5)
    assert daemon.namespaces["run"].steps[2] == before
    assert daemon.dropped == []


def test_trials_left_behind_give_way_to_a_record_first(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 10), 1, 100)
    launch(daemon, 2, at(FIRST, 10), chosen=True)
    last = daemon.namespaces["run"].blobs[2]
    for number in range(KEPT - 1):
        last[900_000 * WIRE + number] = last[2 * WIRE]
    launch(daemon, 3)
    assert sorted(last) == [2 * WIRE, 3 * WIRE]
    assert daemon.dropped == []


def test_a_choice_is_told_before_the_first_share_where_attempts_have_namespaces_of_their_own(
    small: StandInDaemon, tier: HyperPodTier
) -> None:
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for step in (300, 400, 500):
        save(tier, at(FIRST, step), 2, 100)
    launch(small, 2, at(FIRST, 300), chosen=True)
    assert {name: found.steps for name, found in small.namespaces.items()}["run__2"] == {3: [0]}
    other = bare(small.url)
    assert best(other) == at(FIRST, 300)
    save(other, at(nth(2), 310), 2, 100)  # in the namespace that was made for it
    save(other, at(nth(3), 320), 2, 100)
    assert list(small.namespaces) == ["run", "run__2", "run__3"]
    assert small.namespaces["run__2"].steps == {0: [310], 1: [310], 3: [0]}
    other.close()


def test_the_namespace_of_a_choice_is_not_taken_by_another_attempt(small: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 300), 2, 100)
    save(tier, at(FIRST, 500), 2, 100)
    launch(small, 2, at(FIRST, 300), chosen=True)
    other = bare(small.url)
    other.put_if_absent(layout.attempt_key(THIRD), attempt_record(THIRD, at(FIRST, 300)))
    save(other, at(THIRD, 310), 2, 100)
    other.drop(at(THIRD, 310))
    assert best(other) == at(FIRST, 300)
    other.delete([layout.attempt_key(nth(2))])
    assert best(other) == at(FIRST, 500)
    other.close()


def test_a_choice_that_can_not_be_told_is_no_success(small: StandInDaemon, tier: HyperPodTier) -> None:
    """Who opens an attempt says so then."""
    save(tier, at(FIRST, 300), 2, 100)
    small.restart(DaemonFault(kind="status", method="POST", path=r"/namespaces/", status=503))
    with pytest.raises(TierUnavailableError):
        tier.put_if_absent(layout.attempt_key(SECOND), attempt_record(SECOND, at(FIRST, 300), chosen=True))
    small.restart()
    save(tier, at(SECOND, 310), 2, 100)  # it comes with the first share all the same
    other = bare(small.url)
    assert read_attempts(other)[0][SECOND].chosen
    other.close()
