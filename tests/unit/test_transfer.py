"""Checkpoints brought from tier to tier: verified, whole or not at all, gone on with, and bound to their namespace."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import checksum, commit, graves, layout
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, KeyExistsError
from sm_tiered.inventory import read_attempts, read_holding, read_manifest, read_records
from sm_tiered.manifest import manifest_to_json, record_from_json, record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.records import CheckpointId, Part, Record
from sm_tiered.settings import LocalSettings, MemorySettings, S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.file_list import FileList
from sm_tiered.tiers.local import LocalTier
from sm_tiered.tiers.memory import MemoryTier
from sm_tiered.transfer import Copied, clear_failed, copy_checkpoint
from sm_tiered.verify import State, verify_checkpoint
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    attempt,
    checkpoint,
    file_of,
    flip,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
)

AT = checkpoint(40)
MIB = 1024 * 1024


@pytest.fixture
def source(tmp_path: Path) -> LocalTier:
    made = local_tier(tmp_path / "a")
    write_attempt(made, 1, checkpoint(20), chosen=True)
    write_checkpoint(made, AT, durable=True, metrics={"loss": 0.5}, saved_at=7.0)
    return made


@pytest.fixture
def target(tmp_path: Path) -> LocalTier:
    return local_tier(tmp_path / "b", "disk")


def elsewhere(path: Path, namespace: str) -> LocalTier:
    return LocalTier(LocalSettings(name="disk", save=None, keep=Latest(1), path=str(path), fsync=False), namespace)


def files(tier: Tier, which: CheckpointId = AT) -> dict[str, bytes]:
    return {entry.key: tier.get(entry.key).data for entry in tier.list(f"{layout.checkpoint_dir(which)}/")}


def brought(source: Tier, target: Tier, *, namespace: str = NAMESPACE, **facts: Any) -> Copied:
    return copy_checkpoint(source, target, AT, durable=True, namespace=namespace, **facts)


def whole(tier: Tier, *, durable: bool = True) -> bool:
    return verify_checkpoint(tier, AT, durable=durable).state is State.WHOLE


class Watched(LocalTier):
    """A local tier on which something happens before chosen calls."""

    def __init__(
        self, tier: LocalTier, *, read: Callable[[str, int], None] | None = None, put_part: Any = None
    ) -> None:
        super().__init__(tier.settings, tier.namespace)
        self.on_read, self.on_put_part, self.sent = read, put_part, list[str]()

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        super().read_into(key, offset, buffer)
        if self.on_read is not None:
            self.on_read(key, offset)

    def put_part(self, key: str, chunks: Callable[[], Iterator[memoryview]], size: int) -> None:
        if self.on_put_part is not None:
            self.on_put_part(key)
        super().put_part(key, chunks, size)
        self.sent.append(key.rpartition("/")[2])


# ---- whole


def test_every_file_is_the_same_on_the_other_tier(
    source: LocalTier, s3_settings: S3Settings, target: LocalTier
) -> None:
    """From a directory to S3, and from S3 to another directory."""
    bucket = open_tier(s3_settings, NAMESPACE)
    for begin, end in ((source, bucket), (bucket, target)):
        assert brought(begin, end) == Copied(bytes=8192)
        assert files(end) == files(source)
        assert read_attempts(end) == read_attempts(source)
        assert whole(end)
        assert brought(begin, end) == Copied(found=8192, already=True)


def test_in_another_namespace_only_what_names_it_is_sealed_anew(source: LocalTier, tmp_path: Path) -> None:
    target = elsewhere(tmp_path / "b", "run-2")
    brought(source, target, namespace="run-2")
    manifest, before = read_manifest(target, AT), read_manifest(source, AT)
    assert manifest is not None
    assert before is not None
    records = {rank: record_from_json(data) for rank, data in read_records(target, AT).items()}
    for rank, data in read_records(source, AT).items():
        assert records[rank] == replace(record_from_json(data), namespace="run-2")
    assert manifest == replace(before, namespace="run-2", records=manifest.records)
    assert manifest.records != before.records
    good, _ = read_attempts(target)
    assert [(r.namespace, r.parent, r.chosen) for r in good.values()] == [("run-2", checkpoint(20), True)]
    assert {k: v for k, v in files(target).items() if k.endswith(".distcp")} == {
        k: v for k, v in files(source).items() if k.endswith(".distcp")
    }
    assert whole(target)
    back = elsewhere(tmp_path / "c", NAMESPACE)
    brought(target, back)
    assert files(back) == files(source)


def test_the_index_names_the_namespace_that_it_is_in(source: LocalTier, tmp_path: Path) -> None:
    index = {"kind": "index", "namespace": NAMESPACE, "step": 40, "attempt": str(AT.attempt), "values": {"é": [1]}}
    source.put(layout.in_dir(AT, layout.INDEX), json.dumps(index).encode())
    target = elsewhere(tmp_path / "b", "run-2")
    brought(source, target, namespace="run-2")
    assert json.loads(target.get(layout.in_dir(AT, layout.INDEX)).data) == {**index, "namespace": "run-2"}


def test_parts_of_many_chunks_are_told_as_they_go(target: LocalTier, tmp_path: Path) -> None:
    source = local_tier(tmp_path / "a")
    write_checkpoint(source, AT, durable=True, world=2, size=42 * MIB + 5)
    told: list[tuple[int, int]] = []
    brought(source, target, progress=lambda done, total: told.append((done, total)))
    total = 2 * (42 * MIB + 5)
    assert told == sorted(told)
    assert (told[0], told[-1]) == ((0, total), (total, total))
    assert len({done for done, _ in told}) == 1 + 2 * 6
    assert whole(target)


def test_other_programs_files_go_with_the_lists_that_tell_whose_they_are(target: LocalTier, tmp_path: Path) -> None:
    source = local_tier(tmp_path / "a")
    data = b"weights"
    part = Part(name="model/weights.bin", size=7, chunks=checksum.digest_chunks(memoryview(data)))
    source.put(layout.in_dir(AT, part.name), data)
    source.put(layout.in_dir(AT, layout.file_list_name(0)), FileList(fresh=(part.name,)).to_json())
    record = Record(namespace=NAMESPACE, checkpoint=AT, rank=0, world=1, saved_at=0.0, parts=(part,))
    source.put(layout.in_dir(AT, layout.record_name(0)), record_to_json(record))
    commit.try_commit(source, AT, world=1, compose=lambda _: {})
    brought(source, target)
    assert files(target) == files(source)
    assert layout.in_dir(AT, layout.file_list_name(0)) in files(target)


def test_from_memory_it_comes_with_the_files_for_other_readers(target: LocalTier, tmp_path: Path) -> None:
    source = memory_tier(tmp_path / "m")
    write_checkpoint(source, AT, durable=False)
    made = {layout.INDEX: json.dumps({"step": 40, "attempt": str(AT.attempt)}).encode(), layout.METADATA: b"m"}
    copy_checkpoint(source, target, AT, durable=False, namespace=NAMESPACE, compose=lambda records: made)
    assert whole(target)
    assert not any(name.endswith(".bin") for name in files(target)), "a replica stays in memory"


# ---- never damaged, never half


def test_a_flipped_bit_is_found_on_the_way_and_nothing_shows(
    source: LocalTier, target: LocalTier, tmp_path: Path
) -> None:
    flip(file_of(tmp_path / "a", AT, "__1_0.distcp"), 77)
    with pytest.raises(CorruptPartError, match="chunk 0 has XXH3-128") as error:
        brought(source, target)
    assert error.value.tier == "local"
    assert read_manifest(target, AT) is None
    assert layout.in_dir(AT, "__1_0.distcp") not in files(target)


def test_a_chunk_that_was_read_wrong_once_is_read_again(source: LocalTier, target: LocalTier) -> None:
    class Shaky(LocalTier):
        wrong = 0

        def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
            super().read_into(key, offset, buffer)
            if not self.wrong:
                self.wrong += 1
                buffer[3] ^= 1

    shaky = Shaky(source.settings, NAMESPACE)
    assert brought(shaky, target) == Copied(bytes=8192)
    assert shaky.wrong
    assert whole(target)


@pytest.mark.parametrize("name", ["__1_0.distcp", "record-00001.json"])
def test_what_is_missing_of_a_committed_one_is_damage(
    source: LocalTier, target: LocalTier, tmp_path: Path, name: str
) -> None:
    file_of(tmp_path / "a", AT, name).unlink()
    with pytest.raises(CorruptPartError):
        brought(source, target)
    assert read_manifest(target, AT) is None


def test_what_retention_takes_away_meanwhile_is_no_damage(source: LocalTier, target: LocalTier) -> None:
    def gone(key: str, offset: int) -> None:
        grave = graves.entomb(source, NAMESPACE, AT)
        if grave is not None:
            graves.delete_files(source, grave.tombstone)

    with pytest.raises(CheckpointNotFoundError, match="given up while"):
        brought(Watched(source, read=gone), target)
    assert read_manifest(target, AT) is None


def test_what_a_job_recycles_meanwhile_is_no_damage(target: LocalTier, memory_dir: Path) -> None:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(1), path=str(memory_dir), budget_bytes=None, allow_disk=True
    )
    memory = MemoryTier(settings, NAMESPACE)
    write_checkpoint(memory, AT, durable=False)

    def recycle(key: str) -> None:
        memory.delete([layout.in_dir(AT, "__1_0.distcp")])

    with pytest.raises(CheckpointNotFoundError, match="recycled"):
        copy_checkpoint(memory, Watched(target, put_part=recycle), AT, durable=False, namespace=NAMESPACE)
    assert read_manifest(target, AT) is None


def test_what_is_not_committed_is_not_copied(target: LocalTier, tmp_path: Path) -> None:
    source = local_tier(tmp_path / "a")
    write_checkpoint(source, AT, durable=True, commit=False)
    with pytest.raises(CheckpointNotFoundError, match="no manifest"):
        brought(source, target)
    assert files(target) == {}


# ---- gone on with


def interrupted(source: LocalTier, target: LocalTier) -> Watched:
    """Ctrl-C at the second part."""

    def second(key: str) -> None:
        if key.endswith("__1_0.distcp"):
            raise KeyboardInterrupt

    watched = Watched(target, put_part=second)
    with pytest.raises(KeyboardInterrupt):
        brought(source, watched)
    assert read_manifest(target, AT) is None
    watched.on_put_part, watched.sent = None, []
    return watched


def test_what_was_interrupted_shows_nothing_and_is_gone_on_with(source: LocalTier, target: LocalTier) -> None:
    watched = interrupted(source, target)
    assert brought(source, watched) == Copied(bytes=4096, found=4096)
    assert watched.sent == ["__1_0.distcp"]
    assert files(target) == files(source)


def test_a_part_without_its_record_is_read_back_before_it_is_taken(source: LocalTier, target: LocalTier) -> None:
    watched = interrupted(source, target)
    target.delete([layout.in_dir(AT, layout.record_name(0))])
    assert brought(source, watched) == Copied(bytes=4096, found=4096)
    other = interrupted(source, elsewhere(target.root.parent / "c", NAMESPACE))
    other.delete([layout.in_dir(AT, layout.record_name(0))])
    flip(other.root / layout.in_dir(AT, "__0_0.distcp"), 9)
    assert brought(source, other) == Copied(bytes=8192)
    assert whole(other)


def test_a_part_that_is_missing_of_what_is_committed_comes_back(source: LocalTier, target: LocalTier) -> None:
    brought(source, target)
    target.delete([layout.in_dir(AT, "__0_0.distcp")])
    assert brought(source, target) == Copied(bytes=4096, found=4096)
    assert whole(target)


def test_word_that_a_rank_failed_gives_way_to_its_share(source: LocalTier, target: LocalTier) -> None:
    failed = Record(namespace=NAMESPACE, checkpoint=AT, rank=1, world=2, saved_at=0.0, failed="no space")
    key = layout.in_dir(AT, layout.record_name(1))
    target.put(key, record_to_json(failed))
    brought(source, target)
    assert whole(target)
    clear_failed(target, AT, [0, 1])
    assert whole(target), "only word of a failure is taken away"
    target.put(key, record_to_json(failed))
    clear_failed(target, AT, [0])
    assert key in files(target)
    clear_failed(target, AT, [1])
    assert key not in files(target)


# ---- nothing is written over


def test_something_else_under_the_name_stays_as_it_is(source: LocalTier, target: LocalTier) -> None:
    write_checkpoint(target, AT, durable=True, saved_at=8.0)
    before = files(target)
    with pytest.raises(KeyExistsError, match="another checkpoint"):
        brought(source, target)
    manifest = read_manifest(target, AT)
    assert manifest is not None
    target.delete([layout.in_dir(AT, layout.MANIFEST)])
    with pytest.raises(KeyExistsError, match="another record of rank 0"):
        brought(source, target)
    target.put(layout.in_dir(AT, layout.MANIFEST), manifest_to_json(manifest))
    assert files(target) == before


def test_a_tombstone_is_told_of(source: LocalTier, target: LocalTier) -> None:
    brought(source, target)
    grave = graves.entomb(target, NAMESPACE, AT)
    assert grave is not None
    graves.delete_files(target, grave.tombstone)
    with pytest.raises(KeyExistsError, match="was deleted there"):
        brought(source, target)
    assert len(files(target)) == 1


def test_an_attempt_record_that_can_t_be_read_stays_behind(source: LocalTier, target: LocalTier) -> None:
    source.put(layout.attempt_key(attempt(1)), b"{")
    brought(source, target)
    assert read_attempts(target) == ({}, set())
    assert read_holding(target, AT, durable=True).problem is None
