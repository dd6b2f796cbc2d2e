"""Verifying one checkpoint on one tier."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sm_tiered import layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import ConfigError, KeyNotFoundError, TierUnavailableError
from sm_tiered.manifest import manifest_to_json
from sm_tiered.records import CheckpointId, Manifest
from sm_tiered.tiers.base import Blob, Tier
from sm_tiered.tiers.files import DirectoryTier
from sm_tiered.tiers.local import LocalTier
from sm_tiered.verify import Report, State, verify_checkpoint
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    file_of,
    flip,
    local_tier,
    memory_tier,
    write_checkpoint,
)

STEP = checkpoint(20)
OTHER = checkpoint(40)


@pytest.fixture
def durable(tmp_path: Path) -> LocalTier:
    """A durable tier with two committed checkpoints."""
    tier = local_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=True, metrics={"loss": 1.5})
    write_checkpoint(tier, OTHER, durable=True)
    return tier


@pytest.fixture
def memory(tmp_path: Path) -> DirectoryTier:
    """The files of a memory tier with one complete checkpoint."""
    tier = memory_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=False)
    return tier


def told(report: Report) -> list[tuple[int | None, str | None, int | None]]:
    """Where each problem is."""
    return [(problem.rank, problem.part, problem.chunk) for problem in report.problems]


def test_a_committed_checkpoint_is_whole(durable: LocalTier) -> None:
    report = verify_checkpoint(durable, STEP, durable=True)
    assert (report.state, report.problems, report.parts, report.chunks) == (State.WHOLE, (), 2, 2)
    assert report.bytes_read == 2 * 4096


def test_a_checkpoint_in_memory_is_whole_with_its_replicas(memory: DirectoryTier) -> None:
    report = verify_checkpoint(memory, STEP, durable=False)
    assert (report.state, report.parts, report.bytes_read) == (State.WHOLE, 4, 2 * 4096 + 2 * 100)


@pytest.mark.parametrize("at", [0, 1, 2047, 4095])
@pytest.mark.parametrize("kind", ["durable", "memory"])
def test_every_flipped_bit_is_found(tmp_path: Path, kind: str, at: int) -> None:
    tier = local_tier(tmp_path) if kind == "durable" else memory_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=kind == "durable")
    flip(file_of(tmp_path, STEP, "__1_0.distcp"), at)
    report = verify_checkpoint(tier, STEP, durable=kind == "durable")
    assert report.state is State.DAMAGED
    assert told(report) == [(1, "__1_0.distcp", 0)]
    assert "recorded" in report.problems[0].what


def test_the_damaged_chunk_is_named(tmp_path: Path) -> None:
    tier = local_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=True, world=1, size=2 * CHUNK_BYTES + 5)
    flip(file_of(tmp_path, STEP, "__0_0.distcp"), 2 * CHUNK_BYTES + 4)
    report = verify_checkpoint(tier, STEP, durable=True)
    assert told(report) == [(0, "__0_0.distcp", 2)]
    assert report.chunks == 3


def _truncate(tmp_path: Path) -> None:
    path = file_of(tmp_path, STEP, "__0_0.distcp")
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(tmp_path: Path) -> None:
    path = file_of(tmp_path, STEP, "__0_0.distcp")
    path.write_bytes(path.read_bytes() + b"\0")


def _remove(tmp_path: Path) -> None:
    file_of(tmp_path, STEP, "__0_0.distcp").unlink()


def _swap_ranks(tmp_path: Path) -> None:
    first, second = (file_of(tmp_path, STEP, f"__{rank}_0.distcp") for rank in (0, 1))
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


def _stale_part(tmp_path: Path) -> None:
    shutil.copy(file_of(tmp_path, OTHER, "__0_0.distcp"), file_of(tmp_path, STEP, "__0_0.distcp"))


@pytest.mark.parametrize(
    ("damage", "where", "words"),
    [
        (_truncate, [(0, "__0_0.distcp", None)], "4095 bytes, recorded 4096"),
        (_lengthen, [(0, "__0_0.distcp", None)], "4097 bytes, recorded 4096"),
        (_remove, [(0, "__0_0.distcp", None)], "missing"),
        (_swap_ranks, [(0, "__0_0.distcp", 0), (1, "__1_0.distcp", 0)], "recorded"),
        (_stale_part, [(0, "__0_0.distcp", 0)], "recorded"),
    ],
)
def test_parts_that_are_not_what_was_saved_are_found(
    durable: LocalTier, tmp_path: Path, damage: Callable[[Path], None], where: list[object], words: str
) -> None:
    damage(tmp_path)
    report = verify_checkpoint(durable, STEP, durable=True)
    assert told(report) == where
    assert words in report.problems[0].what
    assert verify_checkpoint(durable, OTHER, durable=True).state is State.WHOLE


@pytest.mark.parametrize("name", ["record-00001.json", "manifest.json"])
def test_a_stale_record_or_manifest_is_found(durable: LocalTier, tmp_path: Path, name: str) -> None:
    shutil.copy(file_of(tmp_path, OTHER, name), file_of(tmp_path, STEP, name))
    report = verify_checkpoint(durable, STEP, durable=True)
    assert report.state is State.DAMAGED
    assert report.problems[0].part == name


@pytest.mark.parametrize("name", ["record-00000.json", "manifest.json", "index.json"])
def test_torn_json_is_found(durable: LocalTier, tmp_path: Path, name: str) -> None:
    path = file_of(tmp_path, STEP, name)
    path.write_bytes(path.read_bytes()[:-20])
    report = verify_checkpoint(durable, STEP, durable=True)
    assert [problem.part for problem in report.problems] == [name]


@pytest.mark.parametrize("name", [layout.INDEX, layout.METADATA, "record-00001.json"])
def test_a_missing_file_of_a_committed_checkpoint_is_a_problem(durable: LocalTier, tmp_path: Path, name: str) -> None:
    file_of(tmp_path, STEP, name).unlink()
    report = verify_checkpoint(durable, STEP, durable=True)
    assert [(problem.part, problem.what) for problem in report.problems] == [(name, "is missing")]


def test_an_index_of_another_checkpoint_is_found(durable: LocalTier, tmp_path: Path) -> None:
    shutil.copy(file_of(tmp_path, OTHER, layout.INDEX), file_of(tmp_path, STEP, layout.INDEX))
    assert [p.part for p in verify_checkpoint(durable, STEP, durable=True).problems] == [layout.INDEX]


def test_metadata_is_never_read(durable: LocalTier, tmp_path: Path) -> None:
    file_of(tmp_path, STEP, layout.METADATA).write_bytes(b"cos\nsystem\n(S'exit 7'\ntR.")
    keys: list[str] = []
    get = durable.get

    def spy(key: str, *, max_bytes: int = 0) -> Blob:
        keys.append(key)
        return get(key, max_bytes=max_bytes)

    durable.get = spy
    assert verify_checkpoint(durable, STEP, durable=True).state is State.WHOLE
    assert keys
    assert not [key for key in keys if key.endswith(layout.METADATA)]


@pytest.mark.parametrize(
    "change", [{"world": 1, "records": None}, {"saved_at": 1.0}, {"metrics": {"loss": 0.1}}, {"parts": {"x": 1}}]
)
def test_a_manifest_must_be_what_its_records_make(
    durable: LocalTier, tmp_path: Path, change: dict[str, object]
) -> None:
    from dataclasses import replace

    from sm_tiered.inventory import read_manifest

    manifest = read_manifest(durable, STEP)
    assert manifest is not None
    if "records" in change:
        change = {**change, "records": {0: manifest.records[0]}}
    changed: Manifest = replace(manifest, **change)
    durable.put(layout.in_dir(STEP, layout.MANIFEST), manifest_to_json(changed))
    report = verify_checkpoint(durable, STEP, durable=True)
    assert layout.MANIFEST in {problem.part for problem in report.problems}


def test_without_a_manifest_it_is_no_checkpoint_and_no_damage(durable: LocalTier, tmp_path: Path) -> None:
    file_of(tmp_path, STEP, layout.MANIFEST).unlink()
    report = verify_checkpoint(durable, STEP, durable=True)
    assert (report.state, report.problems, report.bytes_read) == (State.UNCOMMITTED, (), 0)


def test_a_tombstone_is_no_damage(durable: LocalTier) -> None:
    grave = Manifest(namespace=NAMESPACE, checkpoint=STEP, world=2, saved_at=0.0, tombstone=True)
    durable.put(layout.in_dir(STEP, layout.MANIFEST), manifest_to_json(grave))
    assert verify_checkpoint(durable, STEP, durable=True).state is State.DELETED


def test_in_memory_what_is_on_this_node_is_verified(tmp_path: Path) -> None:
    tier = memory_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=False, world=4, skip_ranks=frozenset({2, 3}))
    report = verify_checkpoint(tier, STEP, durable=False)
    assert (report.state, report.parts) == (State.PARTIAL, 4)
    assert report.note == "no record of ranks 2, 3 here"
    flip(file_of(tmp_path, STEP, "__1_0.distcp"), 7)
    assert verify_checkpoint(tier, STEP, durable=False).state is State.DAMAGED


def test_one_part_name_in_two_records_is_found(memory: DirectoryTier, tmp_path: Path) -> None:
    from dataclasses import replace

    from sm_tiered.manifest import record_from_json, record_to_json

    key = layout.in_dir(STEP, layout.record_name(1))
    first = record_from_json(memory.get(layout.in_dir(STEP, layout.record_name(0))).data)
    memory.put(key, record_to_json(replace(record_from_json(memory.get(key).data), parts=first.parts, tables=())))
    report = verify_checkpoint(memory, STEP, durable=False)
    assert "records of ranks 0 and 1" in report.problems[0].what


class _Watched:
    """A tier that does something before a part is read."""

    def __init__(self, inner: Tier, before: Callable[[str, int], None]) -> None:
        self.inner, self.before, self.reads = inner, before, 0
        self.log: list[tuple[str, int, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        self.log.append((key, offset, len(buffer)))
        self.before(key, self.reads)
        self.inner.read_into(key, offset, buffer)


def _watched(inner: Tier, before: Callable[[str, int], None]) -> tuple[Tier, _Watched]:
    made = _Watched(inner, before)
    return made, made  # type: ignore[return-value]


@pytest.mark.parametrize("vanishes", ["the record first", "the whole directory"])
def test_a_checkpoint_recycled_while_it_is_read_is_not_damaged(
    memory: DirectoryTier, tmp_path: Path, vanishes: str
) -> None:
    def recycle(key: str, reads: int) -> None:
        if reads == 2:
            if vanishes == "the record first":
                file_of(tmp_path, STEP, "record-00000.json").unlink()
                file_of(tmp_path, STEP, "__0_0.distcp").unlink()
                file_of(tmp_path, STEP, "replica-0.bin").unlink()
            else:
                shutil.rmtree(file_of(tmp_path, STEP, "x").parent)

    tier, _ = _watched(memory, recycle)
    report = verify_checkpoint(tier, STEP, durable=False)
    assert report.problems == ()
    assert report.state is (State.PARTIAL if vanishes == "the record first" else State.DELETED)


def test_a_checkpoint_deleted_while_it_is_read_is_not_damaged(durable: LocalTier, tmp_path: Path) -> None:
    def delete(key: str, reads: int) -> None:
        grave = Manifest(namespace=NAMESPACE, checkpoint=STEP, world=2, saved_at=0.0, tombstone=True)
        durable.put(layout.in_dir(STEP, layout.MANIFEST), manifest_to_json(grave))
        durable.delete([key])

    tier, _ = _watched(durable, delete)
    report = verify_checkpoint(tier, STEP, durable=True)
    assert (report.state, report.problems) == (State.DELETED, ())


def test_what_never_holds_still_is_changing(memory: DirectoryTier, tmp_path: Path) -> None:
    record = file_of(tmp_path, STEP, "record-00000.json")
    part = file_of(tmp_path, STEP, "__0_0.distcp")
    text = record.read_text(encoding="utf-8")

    def rewrite(key: str, reads: int) -> None:
        flip(part, reads)
        record.write_text(text + " " * reads, encoding="utf-8")

    tier, _ = _watched(memory, rewrite)
    report = verify_checkpoint(tier, STEP, durable=False)
    assert (report.state, report.problems) == (State.CHANGING, ())


def test_a_chunk_that_is_right_the_second_time_is_no_problem(durable: LocalTier, tmp_path: Path) -> None:
    path = file_of(tmp_path, STEP, "__0_0.distcp")

    def blip(key: str, reads: int) -> None:
        if reads in (1, 2):
            flip(path, 9)

    tier, watched = _watched(durable, blip)
    report = verify_checkpoint(tier, STEP, durable=True)
    assert (report.state, report.rereads, report.problems) == (State.WHOLE, 1, ())
    assert watched.reads == 3


def test_a_tier_that_does_not_answer_is_no_damage(durable: LocalTier) -> None:
    def fail(key: str, reads: int) -> None:
        raise TierUnavailableError("no answer", tier="local")

    tier, _ = _watched(durable, fail)
    with pytest.raises(TierUnavailableError):
        verify_checkpoint(tier, STEP, durable=True)


def test_a_sector_that_cannot_be_read_is_damage(durable: LocalTier) -> None:
    def fail(key: str, reads: int) -> None:
        if "__1_0" in key:
            raise TierUnavailableError("__1_0.distcp: Input/output error", tier="local") from OSError(5, "EIO")

    tier, _ = _watched(durable, fail)
    assert told(verify_checkpoint(tier, STEP, durable=True)) == [(1, "__1_0.distcp", 0)]


def test_a_part_gone_between_listing_and_reading_is_a_problem_while_the_commit_stands(durable: LocalTier) -> None:
    def fail(key: str, reads: int) -> None:
        if "__0_0" in key:
            raise KeyNotFoundError(f"nothing stands under {key!r}", tier="local")

    tier, _ = _watched(durable, fail)
    assert told(verify_checkpoint(tier, STEP, durable=True)) == [(0, "__0_0.distcp", 0)]


def test_a_share_is_the_same_for_the_same_seed_and_needs_one_chunk_of_memory(tmp_path: Path) -> None:
    tier = local_tier(tmp_path)
    write_checkpoint(tier, STEP, durable=True, world=2, size=3 * CHUNK_BYTES)
    logs: list[list[tuple[str, int, int]]] = []
    for seed in (7, 7, 8, 9, 10):
        watched, facts = _watched(tier, lambda key, reads: None)
        report = verify_checkpoint(watched, STEP, durable=True, share=0.5, seed=seed)
        assert (report.chunks, report.bytes_read) == (3, 3 * CHUNK_BYTES)
        assert {length for _, _, length in facts.log} == {CHUNK_BYTES}
        logs.append(facts.log)
    assert logs[0] == logs[1]
    assert len({tuple(log) for log in logs}) > 1
    assert verify_checkpoint(tier, STEP, durable=True, share=0.001).chunks == 1


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(durable: LocalTier, share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        verify_checkpoint(durable, STEP, durable=True, share=share)


def test_progress_ends_at_the_total(durable: LocalTier) -> None:
    seen: list[tuple[int, int]] = []
    verify_checkpoint(durable, STEP, durable=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 8192), (4096, 8192), (8192, 8192)]


def test_a_checkpoint_that_is_not_there_is_no_damage(durable: LocalTier, memory: DirectoryTier) -> None:
    nowhere = CheckpointId(attempt=STEP.attempt, step=999)
    assert verify_checkpoint(durable, nowhere, durable=True).state is State.UNCOMMITTED
    assert verify_checkpoint(memory, nowhere, durable=False).state is State.DELETED
