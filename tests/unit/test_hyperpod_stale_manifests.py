"""Manifests on the HyperPod service that are true no longer: who finds that out, and what goes before what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sm_tiered import layout
from sm_tiered.inventory import list_attempts, list_checkpoints, read_manifest
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_manifests import read_blob
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES
from tests.unit.hyperpod_requests import about, asked
from tests.unit.hyperpod_sharing import FIRST, WIRE, at, bare, save, share

HERE = at(FIRST, 10)
PLACE = WIRE + 10


def committed(tier: HyperPodTier, world: int, *sizes: int) -> dict[int, bytes]:
    records = save(tier, HERE, world, *sizes)
    assert tier.confirm(HERE)
    return records


def blobs(daemon: StandInDaemon, slot: int) -> list[int]:
    return daemon.namespaces["run"].steps.get(slot, [])


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_it_goes_where_a_share_is_found_missing(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, rank: int
) -> None:
    committed(tier, 3, 100)
    del daemon.namespaces["run"].blobs[rank][PLACE]
    assert read_manifest(other, HERE) is not None, "it says what was so once"
    assert other.confirm(HERE) is False
    assert blobs(daemon, 3) == []
    third = bare(daemon.url)
    for one in (other, third):
        assert read_manifest(one, HERE) is None
    third.close()


def test_it_goes_first_and_then_the_shares(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    committed(tier, 3, 100)
    list_checkpoints(other)
    daemon.restart()
    other.drop(HERE)
    first, second, *rest = about(daemon, "DELETE")
    assert (first, second) == (f"DELETE 3/{PLACE}", f"DELETE 0/{PLACE}")
    assert sorted(rest) == [f"DELETE {rank}/{PLACE}" for rank in (1, 2)]
    assert sorted(about(daemon, "GET")) == [f"GET {rank}/{PLACE}" for rank in (0, 1, 2, 3)]
    assert daemon.namespaces["run"].steps == {}


def test_a_drop_takes_a_damaged_one_along(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    committed(tier, 2, 100)
    daemon.flip("run", 2, PLACE, 8 * FIRST_BYTES + 99)
    tier.drop(HERE)
    assert daemon.namespaces["run"].steps == {}


@pytest.mark.parametrize("same", [True, False])
def test_a_share_that_is_put_again_makes_another_manifest_untrue(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, same: bool
) -> None:
    committed(tier, 2, 100)
    daemon.restart()
    other.put_share(share(HERE, 1, 2, 100 if same else 200))
    wanted = [f"POST 1/{PLACE}"] if same else [f"DELETE 2/{PLACE}", f"POST 1/{PLACE}"]
    assert [text for text in asked(daemon) if text.startswith(("POST", "DELETE"))] == wanted
    assert blobs(daemon, 2) == ([PLACE] if same else [])


def test_a_rank_that_failed_after_its_share_was_lost_makes_it_untrue(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    committed(tier, 2, 100)
    del daemon.namespaces["run"].blobs[1][PLACE]
    other.put_if_absent(layout.in_dir(HERE, layout.record_name(1)), share(HERE, 1, 2, failed="no room").record)
    assert blobs(daemon, 2) == []
    assert read_manifest(tier, HERE) is None


def test_other_records_are_told_by_another_manifest(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """One that came back all the same, as where two commit at once."""
    committed(tier, 2, 100)
    stale = daemon.namespaces["run"].blobs[2][PLACE]
    tier.put_share(share(HERE, 1, 2, 200))
    daemon.namespaces["run"].blobs[2][PLACE] = replace(stale)
    assert other.confirm(HERE)
    assert read_blob(bytes(daemon.namespaces["run"].blobs[2][PLACE].data)).manifest.parts["__1_0.distcp"] == 200


def test_without_any_share_it_goes_with_the_first_who_asks(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    committed(tier, 2, 100)
    for rank in (0, 1):
        daemon.namespaces["run"].blobs[rank].clear()
    assert list_checkpoints(other) == [HERE]
    assert list_attempts(other) == []
    assert other.confirm(HERE) is False
    assert list_checkpoints(other) == []
