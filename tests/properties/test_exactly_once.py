"""Processes that race for one key of a directory tier: one wins, the others know it, and nothing is ever half there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import layout, retention
from sm_tiered.checksum import digest_chunks
from sm_tiered.commit import Outcome, try_commit
from sm_tiered.errors import KeyExistsError
from sm_tiered.group import Group
from sm_tiered.inventory import read_manifest
from sm_tiered.manifest import compose_manifest, manifest_to_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, CheckpointId, Part, Record
from sm_tiered.settings import LocalSettings
from sm_tiered.testing.ranks import run_ranks
from sm_tiered.tiers.local import LocalTier

ATTEMPT = Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="00000001")
WORLD = 3
ROUNDS = 20


@pytest.fixture
def make_tier(tmp_path: Path) -> Callable[[], LocalTier]:
    """Open the one directory anew, as every process does."""
    settings = LocalSettings(name="disk", save=None, keep=Latest(n=1), path=str(tmp_path), fsync=False)
    return lambda: LocalTier(settings, "run")


def race(world: int, turn: Callable[[int, int], object]) -> list[list[Any]]:
    """Let *world* processes call ``turn(rank, round)``, each round at once; return what each gave, by round."""

    def work(group: Group) -> list[object]:
        given: list[object] = []
        for number in range(ROUNDS):
            group.gather(None)
            given.append(turn(group.rank, number))
        return given

    results = run_ranks(world, work)
    assert [result.status for result in results] == [0] * world
    return [list(column) for column in zip(*(result.value for result in results), strict=True)]


def upload(tier: LocalTier, checkpoint: CheckpointId) -> dict[int, bytes]:
    """Bring parts and records of all ranks to *tier*, and return the records."""
    records: dict[int, bytes] = {}
    for rank in range(WORLD):
        data = f"{checkpoint} {rank}".encode()
        part = Part(name=layout.part_name(rank, 0), size=len(data), chunks=digest_chunks(memoryview(data)))
        tier.put(layout.in_dir(checkpoint, part.name), data)
        record = Record(
            namespace="run", checkpoint=checkpoint, rank=rank, world=WORLD, saved_at=float(rank), parts=(part,)
        )
        records[rank] = record_to_json(record)
        tier.put(layout.in_dir(checkpoint, layout.record_name(rank)), records[rank])
    return records


def compose(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
    """The files for other readers: the same bytes from the same records."""
    return {layout.INDEX: b"".join(data for _, data in sorted(records.items()))}


def at(step: int) -> CheckpointId:
    """Return the checkpoint of *step*."""
    return CheckpointId(attempt=ATTEMPT, step=step)


@pytest.mark.parametrize("world", [2, 5])
def test_of_processes_that_put_if_absent_exactly_one_is_first(make_tier: Callable[[], LocalTier], world: int) -> None:
    def turn(rank: int, number: int) -> bool:
        try:
            make_tier().put_if_absent(f"key-{number}", bytes([rank]) * 5000)
        except KeyExistsError:
            return False
        return True

    for number, won in enumerate(race(world, turn)):
        assert won.count(True) == 1
        assert make_tier().get(f"key-{number}").data == bytes([won.index(True)]) * 5000


@pytest.mark.parametrize("world", [2, 5])
def test_of_processes_that_replace_one_version_exactly_one_does(make_tier: Callable[[], LocalTier], world: int) -> None:
    versions: list[str] = []
    for number in range(ROUNDS):
        make_tier().put(f"key-{number}", b"old")
        versions.append(make_tier().get(f"key-{number}").version)

    def turn(rank: int, number: int) -> bool:
        try:
            make_tier().replace(f"key-{number}", f"new {rank}".encode(), version=versions[number])
        except KeyExistsError:
            return False
        return True

    for number, won in enumerate(race(world, turn)):
        assert won.count(True) == 1
        assert make_tier().get(f"key-{number}").data == f"new {won.index(True)}".encode()


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_all_who_commit_at_once_succeed_and_one_manifest_stands_there(
    make_tier: Callable[[], LocalTier], world: int
) -> None:
    records = [upload(make_tier(), at(step)) for step in range(ROUNDS)]

    def turn(rank: int, number: int) -> str:
        return try_commit(make_tier(), at(number), world=WORLD, compose=compose).value

    for number, outcomes in enumerate(race(world, turn)):
        assert set(outcomes) == {Outcome.COMMITTED.value}
        standing = make_tier().get(layout.in_dir(at(number), layout.MANIFEST)).data
        assert standing == manifest_to_json(compose_manifest(records[number]))
        listed = make_tier().list(f"{layout.checkpoint_dir(at(number))}/")
        assert len(listed) == 2 * WORLD + 2, "nothing half-written is left"


def test_the_last_of_many_records_lets_whoever_sees_it_commit(make_tier: Callable[[], LocalTier]) -> None:
    """Every process brings one record and tries at once: whatever the order, the checkpoint ends committed."""
    records = [upload(make_tier(), at(step)) for step in range(ROUNDS)]
    for step in range(ROUNDS):
        make_tier().delete(layout.in_dir(at(step), layout.record_name(rank)) for rank in range(WORLD))

    def turn(rank: int, number: int) -> str:
        make_tier().put(layout.in_dir(at(number), layout.record_name(rank)), records[number][rank])
        return try_commit(make_tier(), at(number), world=WORLD, compose=compose).value

    for number, outcomes in enumerate(race(WORLD, turn)):
        assert Outcome.COMMITTED.value in outcomes
        assert read_manifest(make_tier(), at(number)) is not None


def test_between_commit_and_deletion_nothing_is_promised_that_is_not_there(
    make_tier: Callable[[], LocalTier],
) -> None:
    for step in range(ROUNDS):
        upload(make_tier(), at(step))

    def turn(rank: int, number: int) -> str:
        if rank > 0:
            return try_commit(make_tier(), at(number), world=WORLD, compose=compose).value
        gone = retention.apply(make_tier(), "run", retention.Plan(delete=(at(number),)))
        return "deleted" if gone else "kept"

    for number, (retained, *outcomes) in enumerate(race(3, turn)):
        manifest = read_manifest(make_tier(), at(number))
        assert manifest is not None
        names = {entry.key.rsplit("/", 1)[1] for entry in make_tier().list(f"{layout.checkpoint_dir(at(number))}/")}
        assert manifest.tombstone == (retained == "deleted")
        if manifest.tombstone:
            assert names <= {layout.MANIFEST, layout.INDEX}
        else:
            assert set(outcomes) == {Outcome.COMMITTED.value}
            assert len(names) == 2 * WORLD + 2
