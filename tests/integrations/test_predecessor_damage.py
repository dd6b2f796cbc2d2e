"""Checkpoints of the predecessor's that are cut, damaged or unfinished."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sm_tiered.errors import (
    CheckpointNotFoundError,
    CorruptPartError,
)
from sm_tiered.inventory import list_checkpoints
from sm_tiered.tiers.base import Tier
from sm_tiered.verify import State, verify_checkpoint
from sm_tiered_dcp.predecessor import import_step, look_at
from tests.integrations.predecessor_made import NAMESPACE, directory, imported, made, source, two_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    two_ranks(10).put(tmp_path / "base", 10)
    return tmp_path / "base"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Tier]:
    tier = directory(tmp_path / "out", "ours")
    yield tier
    tier.close()


def taken(base: Path, target: Any, **options: Any) -> Any:
    place = source(base)
    return import_step(place, place.listed()[0], target, namespace="ours", **options)


def loaded(path: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = {"a": torch.zeros(40, 3), "b": torch.zeros(6, dtype=torch.int64), "epoch": 0, "note": ""}
    where = imported(path / "out" / "ours", step)
    dcp.load(found, storage_reader=dcp.FileSystemReader(where), no_dist=True)
    return found


def test_what_two_ranks_saved_is_one_checkpoint_of_ours(base: Path, target: Tier, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = taken(base, target, progress=lambda done, total: told.append((done, total)))
    assert (found.world, found.tensors, found.values, found.already) == (2, 2, 2, False)
    assert told[-1][0] == told[-1][1] == sum(size for _, size in sizes(base) if size) - metadata_bytes(base)
    report = verify_checkpoint(target, found.checkpoint, durable=True)
    assert (report.state, report.parts) == (State.WHOLE, 4)
    values = loaded(tmp_path, 10)
    assert torch.equal(values["a"], torch.full((40, 3), 10.0))
    assert values["b"].tolist() == list(range(10, 16))
    assert (values["epoch"], values["note"]) == (1, "step 10")


def sizes(base: Path) -> list[tuple[str, int]]:
    return [(str(path), path.stat().st_size) for path in base.rglob("*") if path.is_file()]


def metadata_bytes(base: Path) -> int:
    return (base / NAMESPACE / "rank_0/step_10/metadata.metadata").stat().st_size


def test_both_layouts_are_found_and_strange_names_are_not(base: Path, target: Tier) -> None:
    two_ranks(20).put(base, 20, by_step=True)
    two_ranks(10).put(base, 10, by_step=True)
    for name in ("rank_0/step_-5/checkpoint.pt", "rank_0/step_007/checkpoint.pt", "rank_x/step_5/checkpoint.pt"):
        path = base / NAMESPACE / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    for name in (f"step_{10**10}/rank_0/checkpoint.pt", "step_5/rank_100000/checkpoint.pt", "step_5/rank_0/other.pt"):
        path = base / NAMESPACE / name
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
    place = source(base)
    listed = [(found.step, found.name, found.finished) for found in place.listed()]
    assert listed == [(20, "step_20 (by step)", True), (10, "step_10", True), (10, "step_10 (by step)", True)]
    assert [look_at(place, found, target, namespace="ours").world for found in place.listed()] == [2, 2, 2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", [0, 30, 700, -1, -23, -60])
def test_a_flipped_bit_in_a_shard_is_found(rank: int, where: int, base: Path, target: Tier, tmp_path: Path) -> None:
    path = base / NAMESPACE / f"rank_{rank}/step_10/checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)
    _found_or_harmless(base, target, tmp_path)


def _found_or_harmless(base: Path, target: Tier, tmp_path: Path) -> bool:
    """A bit of a name or of padding inside a stream carries nothing; any other must be found."""
    try:
        taken(base, target)
    except CorruptPartError:
        assert list_checkpoints(target) == [], "nothing of it stays"
        return True
    values = loaded(tmp_path, 10)
    assert torch.equal(values["a"], torch.full((40, 3), 10.0))
    assert values["b"].tolist() == list(range(10, 16))
    assert (values["epoch"], values["note"]) == (1, "step 10")
    target.delete([entry.key for entry in target.list("")])
    return False


@pytest.mark.long
def test_every_flipped_byte_of_both_shards_is_found_or_harmless(base: Path, target: Tier, tmp_path: Path) -> None:
    found = 0
    for rank in (0, 1):
        path = base / NAMESPACE / f"rank_{rank}/step_10/checkpoint.pt"
        good = path.read_bytes()
        for where in range(0, len(good), 3):
            data = bytearray(good)
            data[where] ^= 1 << where % 8
            path.write_bytes(data)
            found += _found_or_harmless(base, target, tmp_path)
        path.write_bytes(good)
    assert found > 500


@pytest.mark.parametrize("left", [0, 100, -1])
def test_a_cut_shard_is_named(left: int, base: Path, target: Tier) -> None:
    path = base / NAMESPACE / "rank_1/step_10/checkpoint.pt"
    whole = path.stat().st_size
    os.truncate(path, left % whole)
    with pytest.raises(
        CorruptPartError, match=rf"rank 1 has {left % whole} bytes, the metadata says {whole}"
    ) as caught:
        taken(base, target)
    assert (caught.value.step, caught.value.rank) == (10, 1)
    assert list_checkpoints(target) == []


def test_a_missing_shard_and_missing_metadata_are_named(base: Path, target: Tier) -> None:
    (base / NAMESPACE / "rank_1/step_10/checkpoint.pt").unlink()
    with pytest.raises(CorruptPartError, match="step_10: the shard of rank 1 is missing"):
        taken(base, target)
    (base / NAMESPACE / "rank_0/step_10/metadata.metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match="step_10: its metadata is missing: the save never ended"):
        taken(base, target)


def test_completeness_is_what_the_metadata_says_not_which_directories_there_are(base: Path, target: Tier) -> None:
    """Of a job that had been of three ranks before, a third directory is left."""
    stale = base / NAMESPACE / "rank_2/step_5/checkpoint.pt"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"x")
    assert taken(base, target).world == 2


def test_views_are_stored_at_their_own_size(tmp_path: Path, target: Tier) -> None:
    rows = torch.randn(20, 1000)
    made({"row": rows[3], "inside": {"t": (rows[4],)}}).put(tmp_path / "base", 10)
    assert sum(size for _, size in sizes(tmp_path / "base")) > 2 * rows.nbytes
    assert taken(tmp_path / "base", target).bytes < rows.nbytes / 4


def test_a_stream_without_checksums_is_taken(tmp_path: Path, target: Tier) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        two_ranks(10).put(tmp_path / "base", 10)
    finally:
        set_crc32_options(True)
    assert taken(tmp_path / "base", target).world == 2


def test_a_shard_that_is_newer_than_the_metadata_is_doubted(base: Path) -> None:
    from sm_tiered_dcp.predecessor import doubt_about

    assert doubt_about(source(base).listed()[0]) is None
    path = base / NAMESPACE / "rank_1/step_10/checkpoint.pt"
    later = path.stat().st_mtime + 100
    os.utime(path, (later, later))
    assert "the shard of rank 1 was written after the metadata" in (doubt_about(source(base).listed()[0]) or "")
