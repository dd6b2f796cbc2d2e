"""Damage on the HyperPod service: every flipped, cut, swapped or stale share is found, and never hides the others."""

from __future__ import annotations

import json
import struct

import pytest

from sm_tiered import layout
from sm_tiered.errors import (
    CorruptPartError,
    FormatError,
    KeyNotFoundError,
)
from sm_tiered.inventory import list_attempts, list_checkpoints, read_holding, read_records
from sm_tiered.records import CheckpointId
from sm_tiered.sealed_json import dump, sealed
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES, SHARE_MAGIC, header_length
from tests.unit.hyperpod_sharing import (
    FIRST,
    MIB,
    SECOND,
    WIRE,
    at,
    bare,
    data_of,
    read,
    save,
    share,
)

SIZES = (9 * MIB + 7, 0, 100, 8 * MIB)


def blob_of(daemon: StandInDaemon, rank: int, step: int) -> bytearray:
    return daemon.namespaces["run"].blobs[rank][WIRE + step].data


def is_damaged(tier: HyperPodTier, checkpoint: CheckpointId) -> bool:
    held = read_holding(tier, checkpoint, durable=True)
    return held.problem is not None and held.damaged


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", ["magic", "length", "header", "record"])
def test_a_flipped_bit_outside_the_parts_is_damage(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, where: str, rank: int
) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 2, 100)
    begin = FIRST_BYTES + header_length(bytes(blob_of(daemon, rank, 10)[:FIRST_BYTES]))
    bit = {"magic": 3, "length": 8 * FIRST_BYTES - 4, "header": 8 * FIRST_BYTES + 99, "record": 8 * begin + 99}[where]
    daemon.flip("run", rank, WIRE + 10, bit)
    assert list_checkpoints(other) == [checkpoint]
    assert is_damaged(other, checkpoint)
    assert layout.in_dir(checkpoint, "manifest.json") in [entry.key for entry in other.list("")]
    with pytest.raises((CorruptPartError, FormatError)):
        read_records(other, checkpoint)


def test_a_flipped_bit_inside_a_part_reaches_the_reader_who_has_the_digests(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    from sm_tiered.part_reading import open_verified

    checkpoint = at(FIRST, 10)
    made = share(checkpoint, 0, 1, 9 * MIB)
    tier.put_share(made)
    blob = blob_of(daemon, 0, 10)
    daemon.flip("run", 0, WIRE + 10, 8 * (len(blob) - 5))
    with open_verified(other, checkpoint, made.parts[0][0]) as chunks, pytest.raises(CorruptPartError, match="chunk 1"):
        list(chunks())


@pytest.mark.parametrize("left", [0, 5, FIRST_BYTES, 200, -1])
def test_a_share_that_was_cut_is_damage(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, left: int
) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 2, 100)
    stored = daemon.namespaces["run"].blobs[1][WIRE + 10]
    stored.data = stored.data[:left]
    stored.size = len(stored.data)
    assert is_damaged(other, checkpoint)


def test_a_share_with_more_behind_it_is_damage(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 2, 100)
    stored = daemon.namespaces["run"].blobs[1][WIRE + 10]
    stored.data += b"x"
    stored.size += 1
    assert is_damaged(other, checkpoint)


def test_swapped_and_stale_shares_are_damage(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    for step in (10, 20):
        save(tier, at(FIRST, step), 2, 100)
    blobs = daemon.namespaces["run"].blobs
    blobs[1][WIRE + 20] = blobs[1][WIRE + 10]
    blobs[0][WIRE + 10] = blobs[1][WIRE + 10]
    assert is_damaged(other, at(FIRST, 20))
    assert is_damaged(other, at(FIRST, 10))
    assert list_checkpoints(other) == [at(FIRST, 10), at(FIRST, 20)]


def test_where_nothing_better_is_known_damage_still_has_a_name(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """That nothing was ever saved would be another answer."""
    save(tier, at(SECOND, 10), 2, 100)
    for rank in (0, 1):
        daemon.flip("run", rank, 2 * WIRE + 10, 8 * FIRST_BYTES + 50)
    (found,) = list_checkpoints(other)
    assert (found.attempt.ordinal, found.attempt.utc_secs, found.step) == (2, 0, 10)
    assert is_damaged(other, found)
    other.drop(found)
    assert list_checkpoints(other) == []


def test_damage_on_the_way_is_asked_for_once_more(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 2, 100)
    daemon.restart(DaemonFault(kind="flip", method="GET", path=r"/1/10000000010$", at=8 * FIRST_BYTES + 9, times=1))
    assert read_holding(other, at(FIRST, 10), durable=True).problem is None
    assert len(daemon.fired) == 1


def test_a_share_that_is_replaced_behind_a_reader_is_found(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    save(tier, at(FIRST, 10), 1, 100, 300)
    assert read(other, at(FIRST, 10), "__0_0.distcp", 100) == data_of(10, 0, 0, 100)
    tier.put_share(share(at(FIRST, 10), 0, 1, 100, 400))
    with pytest.raises(CorruptPartError):
        read(other, at(FIRST, 10), "__0_0.distcp", 100)
    assert read(other, at(FIRST, 10), "__0_1.distcp", 400) == data_of(10, 0, 1, 400)


def test_a_manifest_that_was_seen_is_gone_with_rank_0_of_it(tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 2, 100)
    assert read_holding(other, checkpoint, durable=True).problem is None
    tier.drop(checkpoint)
    assert read_holding(other, checkpoint, durable=True).problem == "no manifest"
    with pytest.raises(KeyNotFoundError):
        read(other, checkpoint, "__1_0.distcp", 100)
    assert other.list_dirs("") == []


def test_retention_goes_on_beside_what_is_damaged(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    from sm_tiered.policies.keep import Latest
    from sm_tiered.retention import Kept, apply, plan

    for step in (10, 20, 30):
        save(tier, at(FIRST, step), 2, 100)
    daemon.flip("run", 1, WIRE + 20, 8 * FIRST_BYTES + 50)
    one = bare(daemon.url)
    chosen = plan(one, Latest(1), attempt=FIRST, in_flight_secs=100.0)
    assert chosen.kept[at(FIRST, 20)] == {Kept.UNREADABLE}
    assert apply(one, "run", chosen) == [at(FIRST, 10)]
    assert list_checkpoints(one) == [at(FIRST, 20), at(FIRST, 30)]
    one.close()


def test_a_header_that_holds_no_text_is_damage_and_nothing_worse(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """Sealed all the same: another program may have written it."""
    save(tier, at(FIRST, 10), 1, 100)
    stored = daemon.namespaces["run"].blobs[0][WIRE + 10]
    length = header_length(bytes(stored.data[:FIRST_BYTES]))
    header = bytes(stored.data[FIRST_BYTES : FIRST_BYTES + length])
    fields = json.loads(header)
    del fields["xxh3_128"]
    spoiled = sealed(dump({**fields, "attempt": "\ud800"}))
    stored.data[:] = SHARE_MAGIC + struct.pack(">Q", len(spoiled)) + spoiled + stored.data[FIRST_BYTES + length :]
    stored.size = len(stored.data)
    assert list_attempts(other) == []
    (found,) = list_checkpoints(other)
    assert is_damaged(other, found)
