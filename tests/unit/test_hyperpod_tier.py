"""The HyperPod tier read and written: every byte comes back, what is damaged is found, what is there is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from sm_tiered import layout
from sm_tiered.errors import (
    CorruptPartError,
    KeyExistsError,
    KeyNotFoundError,
    TierRefusedError,
)
from sm_tiered.inventory import list_checkpoints, read_holding, read_records
from sm_tiered.manifest import record_from_json
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.retrying_shares import RetryingShareTier
from sm_tiered.tiers.shares import ShareTier
from tests.unit.hyperpod_sharing import (
    FIRST,
    MIB,
    at,
    attempt_record,
    data_of,
    manifest_of,
    read,
    save,
    settings,
    share,
)

SIZES = (9 * MIB + 7, 0, 100, 8 * MIB)


def test_open_tier_gives_a_share_tier_that_repeats(daemon: StandInDaemon) -> None:
    tier = open_tier(settings(daemon.url), "run")
    assert isinstance(tier, RetryingShareTier)
    assert isinstance(tier, ShareTier)
    assert isinstance(tier, Tier)
    assert tier.name == "cluster"
    tier.close()


def test_shares_of_all_ranks_come_back_through_another_tier(tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    records = save(tier, checkpoint, 3, *SIZES)
    assert list_checkpoints(other) == [checkpoint]
    held = read_holding(other, checkpoint, durable=True)
    assert (held.problem, dict(held.records)) == (None, records)
    for rank in range(3):
        for number, size in enumerate(SIZES):
            whole = data_of(10, rank, number, size)
            name = layout.part_name(rank, number)
            assert read(other, checkpoint, name, size) == whole
            for offset, length in ((0, min(1, size)), (size // 2, size // 3), (size, 0)):
                assert read(other, checkpoint, name, length, offset) == whole[offset : offset + length]


def test_the_manifest_is_the_one_that_follows_from_the_records(tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    key = layout.in_dir(checkpoint, layout.MANIFEST)
    records: dict[int, bytes] = {}
    for rank in (1, 0, 2):
        for one in (tier, other):
            with pytest.raises(KeyNotFoundError):
                one.get(key)
        made = share(checkpoint, rank, 3, 100)
        tier.put_share(made)
        records[rank] = made.record
    assert tier.get(key).data == other.get(key).data == manifest_of(records)


def test_listings_tell_keys_and_sizes(tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    records = save(tier, checkpoint, 2, 100, 0)
    directory = layout.checkpoint_dir(checkpoint)
    expected = {
        layout.attempt_key(FIRST): len(attempt_record(FIRST)),
        f"{directory}/__0_0.distcp": 100,
        f"{directory}/__0_1.distcp": 0,
        f"{directory}/__1_0.distcp": 100,
        f"{directory}/__1_1.distcp": 0,
        f"{directory}/manifest.json": len(manifest_of(records)),
        f"{directory}/record-00000.json": len(records[0]),
        f"{directory}/record-00001.json": len(records[1]),
    }
    for one in (tier, other):
        assert {entry.key: entry.size for entry in one.list("")} == expected
        assert [entry.key for entry in one.list("")] == sorted(expected)
        assert [e.key for e in one.list(f"{directory}/record-")] == [k for k in sorted(expected) if "record" in k]
        assert [entry.key for entry in one.list("attempts/")] == [layout.attempt_key(FIRST)]
        assert one.list_dirs("") == ["attempts", directory]
        assert one.list_dirs(f"{directory}/") == []
        assert one.list("pins/") == one.list("events/") == one.list("step_0000000011") == []


def test_parts_that_another_program_named_are_found(tier: HyperPodTier, other: HyperPodTier) -> None:
    """Their names do not tell whose they are."""
    from dataclasses import replace

    from sm_tiered.manifest import record_to_json

    checkpoint = at(FIRST, 3)
    tier.put_share(share(checkpoint, 0, 2, 10))
    plain = share(checkpoint, 1, 2, 500)
    part, chunks = plain.parts[0]
    named = replace(part, name="rank_00001/loader.bin")
    record = record_to_json(replace(record_from_json(plain.record), parts=(named,)))
    tier.put_share(replace(plain, record=record, parts=((named, chunks),)))
    assert read(other, checkpoint, "rank_00001/loader.bin", 500) == data_of(3, 1, 0, 500)
    with pytest.raises(KeyNotFoundError):
        read(other, checkpoint, "rank_00000/loader.bin", 1)


@pytest.mark.parametrize(
    "key", ["", "nothing/here", "manifest.json", "step_0000000009-a000001-1-00000000/x", "attempts/x.json"]
)
def test_what_is_not_there_is_said_to_be_absent(tier: HyperPodTier, key: str) -> None:
    save(tier, at(FIRST, 10), 1, 100)
    with pytest.raises(KeyNotFoundError):
        tier.get(key)
    with pytest.raises(KeyNotFoundError):
        tier.read_into(key, 0, memoryview(bytearray(1)))


def test_get_refuses_more_than_max_bytes(tier: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 1, 100)
    key = layout.in_dir(checkpoint, "__0_0.distcp")
    assert tier.get(key, max_bytes=100).data == data_of(10, 0, 0, 100)
    for name in ("__0_0.distcp", "record-00000.json", "manifest.json"):
        with pytest.raises(CorruptPartError):
            tier.get(layout.in_dir(checkpoint, name), max_bytes=99)


# ---- writing


@pytest.mark.parametrize("spoil", ["first", "second"])
def test_bytes_that_differ_from_their_digest_store_nothing(
    daemon: StandInDaemon, tier: HyperPodTier, spoil: str
) -> None:
    """The second pass is the one that sends: what was hashed first may have changed since."""
    from dataclasses import replace

    good = share(at(FIRST, 10), 0, 1, 9 * MIB)
    part, chunks = good.parts[0]
    asked = 0

    def turning() -> Iterator[memoryview]:
        nonlocal asked
        asked += 1
        bad = asked == (1 if spoil == "first" else 2)
        for number, piece in enumerate(chunks()):
            if bad and number == 2:
                piece[0] ^= 1
            yield piece

    with pytest.raises(CorruptPartError, match="__0_0.distcp: chunk"):
        tier.put_share(replace(good, parts=((part, turning),)))
    assert asked == (1 if spoil == "first" else 2)
    assert not any(stored.steps for stored in daemon.namespaces.values())
    assert list_checkpoints(tier) == []


def test_an_error_of_the_source_is_raised_as_it_is(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    """Some errors of ours are OSErrors, which a client of HTTP might take for the connection's own."""
    from dataclasses import replace

    good = share(at(FIRST, 10), 0, 1, 9 * MIB)
    part, chunks = good.parts[0]
    asked = 0

    def vanishing() -> Iterator[memoryview]:
        nonlocal asked
        asked += 1
        for number, piece in enumerate(chunks()):
            if asked == 2 and number == 1:
                raise KeyNotFoundError("recycled", key="x")
            yield piece

    with pytest.raises(KeyNotFoundError, match="recycled"):
        tier.put_share(replace(good, parts=((part, vanishing),)))
    assert not any(stored.steps for stored in daemon.namespaces.values())


def test_a_record_that_tells_of_a_failure_is_a_share_without_parts(tier: HyperPodTier, other: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    tier.put_share(share(checkpoint, 0, 2, 100))
    failed = share(checkpoint, 1, 2, failed="no room").record
    key = layout.in_dir(checkpoint, layout.record_name(1))
    tier.put_if_absent(key, failed)
    with pytest.raises(KeyExistsError):
        tier.put_if_absent(key, failed)
    assert other.get(key).data == failed
    held = read_holding(other, checkpoint, durable=True)
    assert (held.problem, held.damaged) == ("no manifest", False)
    assert set(read_records(other, checkpoint)) == {0, 1}


def test_a_record_of_a_failure_does_not_take_a_shares_place(tier: HyperPodTier) -> None:
    checkpoint = at(FIRST, 10)
    save(tier, checkpoint, 1, 100)
    key = layout.in_dir(checkpoint, layout.record_name(0))
    with pytest.raises(KeyExistsError):
        tier.put_if_absent(key, share(checkpoint, 0, 1, failed="late").record)
    assert read(tier, checkpoint, "__0_0.distcp", 100) == data_of(10, 0, 0, 100)


@pytest.mark.parametrize(
    "call",
    [
        lambda tier, key: tier.put(key, b"x"),
        lambda tier, key: tier.put_if_absent(key, b"x"),
        lambda tier, key: tier.replace(key, b"x", version="v"),
        lambda tier, key: tier.put_part(key, lambda: iter(()), 0),
        lambda tier, key: tier.delete([key]),
    ],
)
@pytest.mark.parametrize("key", ["k", "pins/x.json", layout.in_dir(at(FIRST, 10), "manifest.json")])
def test_everything_else_is_refused(
    daemon: StandInDaemon, tier: HyperPodTier, call: Callable[[HyperPodTier, str], None], key: str
) -> None:
    with pytest.raises(TierRefusedError, match="can't"):
        call(tier, key)
    assert daemon.namespaces == {}
    tier.delete([])


def test_a_record_with_parts_is_refused_by_itself(tier: HyperPodTier) -> None:
    record = share(at(FIRST, 10), 0, 1, 100).record
    with pytest.raises(TierRefusedError, match="put_share"):
        tier.put_if_absent(layout.in_dir(at(FIRST, 10), layout.record_name(0)), record)
