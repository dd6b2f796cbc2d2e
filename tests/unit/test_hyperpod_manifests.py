"""The manifest as a blob of its own on the HyperPod service: when it is written, believed, and deleted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sm_tiered import checksum, layout
from sm_tiered.errors import FormatError, KeyNotFoundError
from sm_tiered.inventory import list_checkpoints, read_attempts, read_manifest
from sm_tiered.records import Attempt
from sm_tiered.sealed_json import dump, sealed
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon, StoredNamespace
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_manifests import MANIFEST_MAGIC, parse_commit, parse_commit_head, read_blob
from sm_tiered.tiers.hyperpod_shares import FIRST_BYTES, header_length
from tests.unit.hyperpod_requests import about, asked
from tests.unit.hyperpod_sharing import (
    FIRST,
    SECOND,
    WIRE,
    at,
    attempt_record,
    bare,
    foreign,
    manifest_of,
    save,
    share,
    whole,
)

HERE = at(FIRST, 10)
PLACE = WIRE + 10
MANIFEST = layout.in_dir(HERE, layout.MANIFEST)
TWIN = Attempt(ordinal=1, utc_secs=9, nonce="99999999")
"""Another launch at the same time: its shares stand at the same steps."""


def committed(tier: HyperPodTier, world: int, *sizes: int) -> dict[int, bytes]:
    records = save(tier, HERE, world, *sizes)
    assert tier.confirm(HERE)
    return records


def blobs(daemon: StandInDaemon, slot: int, namespace: str = "run") -> list[int]:
    stored = daemon.namespaces.get(namespace)
    return [] if stored is None else stored.steps.get(slot, [])


# ---- written


def test_it_is_written_behind_the_ranks_once_all_were_seen(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    for rank in (2, 0, 1):
        assert tier.confirm(HERE) is False
        assert blobs(daemon, 3) == []
        tier.put_share(share(HERE, rank, 3, 100))
    assert blobs(daemon, 3) == []
    assert tier.confirm(HERE)
    assert blobs(daemon, 3) == [PLACE]
    stored = bytes(daemon.namespaces["run"].blobs[3][PLACE].data)
    assert stored.startswith(MANIFEST_MAGIC)
    commit = read_blob(stored)
    records = {rank: share(HERE, rank, 3, 100).record for rank in range(3)}
    assert (commit.data, commit.head.attempt) == (manifest_of(records), attempt_record(FIRST).decode())
    assert commit.head.records == tuple(map(len, records.values()))


def test_it_is_written_once(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    committed(tier, 2, 100)
    daemon.restart()
    for one in (tier, other, other):
        assert one.confirm(HERE)
    assert about(daemon, "POST") == []


def test_others_read_it_and_no_share(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    records = committed(tier, 3, 100)
    other.looks("")
    daemon.restart()
    assert other.get(MANIFEST).data == manifest_of(records)
    assert asked(daemon) == [f"GET 3/{PLACE}"]


def test_a_listing_is_the_same_with_and_without_it(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    tier.put_if_absent(layout.attempt_key(FIRST), attempt_record(FIRST))
    save(tier, HERE, 3, 100, 0, 7)
    before = {entry.key: entry.size for entry in tier.list("")}
    newest = max(entry.modified_at for entry in tier.list("step_"))
    assert tier.confirm(HERE)
    daemon.restart()
    found = other.list("")
    assert {entry.key: entry.size for entry in found} == before
    assert {entry.modified_at for entry in found if entry.key.startswith("step_")} == {newest}
    assert about(daemon, "GET", 3) == [f"GET 3/{PLACE}", f"GET 3/{WIRE}"]  # the second: where an attempt is told of
    assert [text for text in about(daemon, "GET") if text.endswith(str(PLACE))] == [f"GET 3/{PLACE}"]


def test_it_tells_of_the_attempt(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 1), 1, 10)
    record = attempt_record(SECOND, at(FIRST, 1), chosen=True)
    tier.put_if_absent(layout.attempt_key(SECOND), record)
    save(tier, at(SECOND, 5), 1, 100)
    assert tier.confirm(at(SECOND, 5))
    del daemon.namespaces["run"].blobs[2][2 * WIRE]
    del daemon.namespaces["run"].blobs[0][2 * WIRE + 5]
    third = bare(daemon.url)
    assert read_attempts(third)[0][SECOND].chosen
    third.close()


# ---- no place


def test_a_namespace_without_a_slot_to_spare_goes_on_without(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """As releases before made them."""
    daemon.memory.namespaces["run"] = StoredNamespace(num_ranks=4, steps_retained=5)
    records = committed(tier, 3, 100)
    assert other.confirm(HERE)
    assert daemon.namespaces["run"].steps == {rank: [PLACE] for rank in range(3)}
    assert other.get(MANIFEST).data == manifest_of(records)
    assert list_checkpoints(other) == [HERE]
    other.drop(HERE)
    assert daemon.namespaces["run"].steps == {}
    committed(tier, 2, 100)
    assert blobs(daemon, 2) == [PLACE]


@pytest.mark.parametrize("status", [400, 413, 501])
def test_one_that_is_not_taken_is_said_once_and_fails_no_commit(
    daemon: StandInDaemon, tier: HyperPodTier, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    daemon.restart(DaemonFault(kind="status", method="POST", path=rf"/2/{PLACE}$", status=status))
    save(tier, HERE, 2, 100)
    for _ in range(3):
        assert tier.confirm(HERE)
    assert read_manifest(tier, HERE) is not None
    assert len([record for record in caplog.records if "takes no manifest" in record.getMessage()]) == 1


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_where_its_slot_alone_does_not_answer_the_shares_count_all_the_same(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, method: str
) -> None:
    """A slot may be on a node that is down."""
    daemon.restart(DaemonFault(kind="status", method=method, path=rf"/2/{PLACE}$", status=503, times=10**6))
    save(tier, HERE, 2, 100)
    assert tier.confirm(HERE)
    for _ in range(2):
        assert list_checkpoints(other) == [HERE]
        assert read_manifest(other, HERE) is not None
    tier.put_share(share(HERE, 1, 2, 200))
    del daemon.namespaces["run"].blobs[1][PLACE]
    assert tier.confirm(HERE) is False
    daemon.restart()
    tier.put_share(share(HERE, 1, 2, 100))
    assert tier.confirm(HERE)
    assert blobs(daemon, 2) == [PLACE]


def test_each_thing_that_its_slot_does_not_answer_is_said_once(
    daemon: StandInDaemon, tier: HyperPodTier, caplog: pytest.LogCaptureFixture
) -> None:
    daemon.restart(DaemonFault(kind="status", method="GET", path=rf"/2/{PLACE}$", status=503, times=10**6))
    save(tier, HERE, 2, 100)
    for _ in range(2):
        assert tier.confirm(HERE)
    del daemon.namespaces["run"].blobs[1][PLACE]
    for _ in range(2):
        assert tier.confirm(HERE) is False
    told = [record.getMessage() for record in caplog.records]
    kinds = ("can't be told", "takes no manifest", "a share that is missing")
    assert len(told) == len(kinds)
    assert all(kind in text for kind, text in zip(kinds, told, strict=True)), told


def test_another_programs_blob_there_is_left_alone(small: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, HERE, 2, 100)
    small.namespaces["run"].blobs[2] = {10: foreign()}
    assert tier.confirm(HERE)
    assert bytes(small.namespaces["run"].blobs[2][10].data) == bytes(foreign().data)


def test_another_runs_share_there_is_left_alone(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    save(tier, at(FIRST, 1), 2, 100)
    alien = bare(daemon.url, "alien")
    alien.put_share(share(HERE, 2, 3, 100, namespace="alien"))
    daemon.namespaces["run"].blobs[2] = {PLACE: daemon.namespaces["alien"].blobs[2][PLACE]}
    before = bytes(daemon.namespaces["run"].blobs[2][PLACE].data)
    committed(tier, 2, 100)
    assert bytes(daemon.namespaces["run"].blobs[2][PLACE].data) == before
    alien.close()


# ---- damaged, or another's


@pytest.mark.parametrize("where", ["length", "header", "manifest", "cut", "longer"])
def test_a_damaged_one_is_none_and_written_again(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, where: str
) -> None:
    records = committed(tier, 2, 100)
    stored = daemon.namespaces["run"].blobs[2][PLACE]
    intact = bytes(stored.data)
    end = FIRST_BYTES + header_length(intact[:FIRST_BYTES])
    if where in ("cut", "longer"):
        stored.data[:] = intact[:-3] if where == "cut" else intact + b"x"
        stored.size = len(stored.data)
    else:
        bit = {"length": 8 * FIRST_BYTES - 4, "header": 8 * FIRST_BYTES + 99, "manifest": 8 * end + 99}[where]
        daemon.flip("run", 2, PLACE, bit)
    assert list_checkpoints(other) == [HERE]
    assert other.get(MANIFEST).data == manifest_of(records)
    assert whole(other, HERE)
    assert other.confirm(HERE)
    assert bytes(daemon.namespaces["run"].blobs[2][PLACE].data) == intact


def test_a_damaged_one_without_shares_is_no_checkpoint(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    committed(tier, 2, 100)
    daemon.flip("run", 2, PLACE, 8 * FIRST_BYTES + 99)
    for rank in (0, 1):
        daemon.namespaces["run"].blobs[rank].clear()
    assert list_checkpoints(other) == []


def test_one_from_another_slot_or_step_is_damaged(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    committed(tier, 2, 100)
    save(tier, at(FIRST, 20), 2, 100)
    stored = daemon.namespaces["run"].blobs
    stored[2][WIRE + 20] = stored[2][PLACE]
    assert list_checkpoints(other) == [HERE, at(FIRST, 20)]
    assert read_manifest(other, at(FIRST, 20)) is not None
    assert other.confirm(at(FIRST, 20))
    stored[1][PLACE] = stored[2][PLACE]
    assert other.confirm(HERE) is False


def test_that_of_a_twin_is_none_of_ours(daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier) -> None:
    """The first one's shares stood there, whole; the other's take their place one by one."""
    committed(tier, 2, 100)
    other.put_share(share(at(TWIN, 10), 1, 2, 100))
    assert blobs(daemon, 2) == []
    for one in (tier, other):
        with pytest.raises(KeyNotFoundError):
            one.get(MANIFEST)
    other.put_share(share(at(TWIN, 10), 0, 2, 100))
    assert other.confirm(at(TWIN, 10))
    third = bare(daemon.url)
    assert list_checkpoints(third) == [at(TWIN, 10)]
    assert read_manifest(third, HERE) is None
    assert third.confirm(HERE) is False
    assert blobs(daemon, 2) == [PLACE], "it is not this checkpoint's to delete"
    third.drop(HERE)
    assert daemon.namespaces["run"].steps == {rank: [PLACE] for rank in range(3)}
    third.close()


@pytest.mark.parametrize(
    "change",
    [{"checkpoint": "x"}, {"rank": -1}, {"records": [-1]}, {"manifest": {"size": 2**40, "digest": 32 * "0"}}],
)
def test_a_strange_header_is_damage(tier: HyperPodTier, daemon: StandInDaemon, change: dict[str, object]) -> None:
    committed(tier, 1, 100)
    stored = bytes(daemon.namespaces["run"].blobs[1][PLACE].data)
    fields = json.loads(stored[FIRST_BYTES : FIRST_BYTES + header_length(stored[:FIRST_BYTES])])
    del fields["xxh3_128"]
    parse_commit_head(sealed(dump(fields)))
    with pytest.raises(FormatError):
        parse_commit_head(sealed(dump({**fields, **change})))


def test_a_header_and_a_manifest_that_do_not_belong_together_are_damage(
    daemon: StandInDaemon, tier: HyperPodTier
) -> None:
    found: list[tuple[bytes, bytes]] = []
    for step, world, size in ((10, 2, 100), (10, 2, 200), (20, 2, 100), (10, 1, 100)):
        save(tier, at(FIRST, step), world, size)
        assert tier.confirm(at(FIRST, step))
        stored = bytes(daemon.namespaces["run"].blobs[2][WIRE + step].data)
        end = FIRST_BYTES + header_length(stored[:FIRST_BYTES])
        found.append((stored[FIRST_BYTES:end], stored[end:]))
        tier.drop(at(FIRST, step))
    head, data = parse_commit_head(found[0][0]), found[0][1]
    assert parse_commit(head, data).data == data
    with pytest.raises(FormatError, match="differs from its digest"):
        parse_commit(head, found[1][1])
    for _, other in found[2:]:
        with pytest.raises(FormatError, match=r"is that of|tells of"):
            parse_commit(replace(head, digest=checksum.digest(other)), other)


def test_shares_in_two_namespaces_have_no_manifest(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    """Whoever drops it by its manifest would miss some."""
    save(tier, HERE, 2, 100)
    daemon.memory.namespaces["run__2"] = StoredNamespace(num_ranks=4, steps_retained=5)
    daemon.namespaces["run__2"].blobs[1] = daemon.namespaces["run"].blobs.pop(1)
    assert other.confirm(HERE)
    assert [blobs(daemon, 2, name) for name in ("run", "run__2")] == [[], []]
    other.drop(HERE)
    assert not any(stored.steps for stored in daemon.namespaces.values())
