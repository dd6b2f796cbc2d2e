"""A HyperPod service that counts no large steps: each attempt has a namespace of its own there."""

from __future__ import annotations

import pytest

from sm_tiered import layout
from sm_tiered.inventory import list_checkpoints, read_attempts, read_holding, read_manifest
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon, StoredNamespace
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_chain import Chain
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace
from tests.unit.hyperpod_sharing import (
    FIRST,
    KEPT,
    SECOND,
    THIRD,
    at,
    attempt_record,
    bare,
    data_of,
    foreign,
    read,
    save,
    settings,
    whole,
)


def test_where_large_steps_are_refused_an_attempt_has_a_namespace_of_its_own(
    small: StandInDaemon, tier: HyperPodTier
) -> None:
    for attempt, step in ((FIRST, 100), (FIRST, 200), (SECOND, 150), (THIRD, 120)):
        one = bare(small.url)
        if step != 200:
            one.put_if_absent(layout.attempt_key(attempt), attempt_record(attempt))
        save(one, at(attempt, step), 2, 100, 5)
        one.close()
    assert {name: found.steps for name, found in small.namespaces.items()} == {
        "run": {0: [100, 200], 1: [100, 200], 3: [0]},
        "run__2": {0: [150], 1: [150], 3: [0]},
        "run__3": {0: [120], 1: [120], 3: [0]},
    }
    assert list_checkpoints(tier) == [at(FIRST, 100), at(FIRST, 200), at(SECOND, 150), at(THIRD, 120)]
    assert all(whole(tier, checkpoint) for checkpoint in list_checkpoints(tier))
    assert set(read_attempts(tier)[0]) == {FIRST, SECOND, THIRD}
    assert read(tier, at(SECOND, 150), "__1_1.distcp", 5) == data_of(150, 1, 1, 5)


def test_an_empty_namespace_is_taken_again(small: StandInDaemon, tier: HyperPodTier) -> None:
    for attempt in (FIRST, SECOND):
        save(tier, at(attempt, 0), 2, 100)
    tier.drop(at(FIRST, 0))
    save(tier, at(THIRD, 0), 2, 100)
    assert list(small.namespaces) == ["run", "run__2"]
    assert list_checkpoints(tier) == [at(SECOND, 0), at(THIRD, 0)]


def test_a_manifest_holds_no_namespace_of_its_own(small: StandInDaemon, tier: HyperPodTier) -> None:
    for attempt in (FIRST, SECOND):
        save(tier, at(attempt, 7), 2, 100)
        assert tier.confirm(at(attempt, 7))
    assert {name: found.steps[2] for name, found in small.namespaces.items()} == {"run": [7], "run__2": [7]}
    other = bare(small.url)
    assert list_checkpoints(other) == [at(FIRST, 7), at(SECOND, 7)]
    assert read_manifest(other, at(SECOND, 7)) is not None
    other.drop(at(FIRST, 7))
    save(other, at(THIRD, 7), 2, 100)
    assert list(small.namespaces) == ["run", "run__2"]
    assert list_checkpoints(other) == [at(SECOND, 7), at(THIRD, 7)]
    other.close()


def test_the_predecessors_steps_are_left_alone_there_too(small: StandInDaemon, tier: HyperPodTier) -> None:
    theirs = StoredNamespace(num_ranks=9, steps_retained=50, blobs={0: {100: foreign()}, 1: {100: foreign()}})
    small.memory.namespaces["run"] = theirs
    save(tier, at(FIRST, 100), 2, 100)
    assert theirs.steps == {0: [100], 1: [100]}
    assert bytes(theirs.blobs[0][100].data).startswith(b"\x80\x04")
    assert list_checkpoints(tier) == [at(FIRST, 100)]


@pytest.mark.parametrize("rank", [0, 1])
def test_damage_is_found_there_too(small: StandInDaemon, tier: HyperPodTier, rank: int) -> None:
    save(tier, at(FIRST, 100), 2, 100)
    small.flip("run", rank, 100, 8 * 60)
    other = bare(small.url)
    (found,) = list_checkpoints(other)
    assert found.step == 100
    held = read_holding(other, found, durable=True)
    assert (held.problem is not None, held.damaged) == (True, True)
    other.close()


def test_a_service_that_folds_large_steps_is_found_out(daemon: StandInDaemon) -> None:
    """It takes them, and gives them back, and they stand at other steps."""
    daemon.restart(
        DaemonFault(kind="status", method="GET", path=r"/latest\?", status=200, text="[1410065408]", times=1_000),
    )
    member = Namespace(name="run", ranks=3, kept=KEPT)
    daemon.memory.namespaces["run"] = StoredNamespace(num_ranks=3, steps_retained=KEPT)
    service = HyperPodService(settings(daemon.url))
    chain = Chain(service, "run", kept=KEPT, holders=lambda _member, _wire: set())
    assert chain.counts_large(member, 0) is False
    assert daemon.namespaces["run"].steps == {}
    service.close()
