"""What an import wrote and takes back, what it never deletes, and what it finds damaged where it wrote it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError, MismatchError, SaveError
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.tiers.base import Tier
from sm_tiered.verify import State, verify_checkpoint
from sm_tiered_dcp.predecessor import import_step
from tests.integrations.predecessor_imports import SHARD, Between, cut, damage, gone, loaded, named, taken
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


# ---- what is taken back, and what never is


def test_what_is_damaged_is_taken_back_and_strangers_files_stay(base: Path, target: Tier) -> None:
    damage(base / SHARD)
    directory_name = layout.checkpoint_dir(named(base, target))
    target.put(f"{directory_name}/notes.txt", b"mine")
    with pytest.raises(CorruptPartError, match="is damaged"):
        taken(base, target)
    assert [entry.key for entry in target.list("step_")] == [f"{directory_name}/notes.txt"]


def test_what_another_import_commits_meanwhile_is_not_taken_back(base: Path, target: Tier, tmp_path: Path) -> None:
    """Both begin; the other one commits just before this one, which found damage on its way, gives up."""

    class Damaging(type(source(base))):
        def shard(self, step: Any, rank: int, *, end: int) -> Any:
            if rank == 1:
                taken(base, target)
                raise CorruptPartError("damaged on its way")
            return super().shard(step, rank, end=end)

    place = Damaging([directory(base, NAMESPACE, "predecessor")], source(base).title)
    with pytest.raises(CorruptPartError, match="damaged on its way"):
        import_step(place, place.listed()[0], target, namespace="ours")
    (checkpoint,) = list_checkpoints(target)
    assert verify_checkpoint(target, checkpoint, durable=True).state is State.WHOLE
    assert loaded(imported(tmp_path / "out/ours", 10))["note"] == "step 10"


def test_nobody_commits_what_is_being_taken_back(base: Path, target: Tier) -> None:
    damage(base / SHARD)
    seen: list[bool] = []
    checkpoint = named(base, target)

    def look() -> None:
        manifest = read_manifest(target, checkpoint)
        seen.append(manifest is not None and manifest.tombstone)

    class Watched(Between):
        def delete(self, keys: Any) -> None:
            look()
            target.delete(keys)

    with pytest.raises(CorruptPartError):
        taken(base, Watched(target))
    assert seen
    assert all(seen), "a tombstone stands for as long as something is deleted"
    assert target.list("step_") == []


def test_a_record_of_a_newer_release_is_not_deleted_and_no_damage_of_theirs(base: Path, target: Tier) -> None:
    cut(base, target)
    key = layout.in_dir(named(base, target), layout.record_name(0))
    target.put(key, b'{"format": 99}')
    before = [entry.key for entry in target.list("step_")]
    with pytest.raises(SaveError, match="what stands there can't be read"):
        taken(base, target)
    assert [entry.key for entry in target.list("step_")] == before


def test_a_place_that_fails_while_it_is_taken_back_does_not_hide_why(base: Path, target: Tier) -> None:
    damage(base / SHARD)
    with pytest.raises(CorruptPartError, match="is damaged"):
        taken(base, Between(target, "put_if_absent", layout.MANIFEST, gone))


def test_a_value_that_needs_a_pickle_keeps_what_was_written_for_another_try(tmp_path: Path, target: Tier) -> None:
    import fractions

    made({"a": torch.ones(3)}, {"half": fractions.Fraction(1, 2)}).put(tmp_path / "base", 10)
    with pytest.raises(MismatchError, match="half"):
        taken(tmp_path / "base", target)
    counted = Between(target)
    assert taken(tmp_path / "base", counted, allow_pickle=True).pickled == ("half",)
    assert not any(key.endswith("__0_0.distcp") for key in counted.written)
    assert taken(tmp_path / "base", target).pickled == ("half",), "told also where it is there already"


# ---- what was written is damaged there


def flip_part(target: Tier, root: Path) -> None:
    (checkpoint,) = list_checkpoints(target)
    damage(root / "out/ours" / layout.checkpoint_dir(checkpoint) / "__0_0.distcp")


def test_nothing_is_committed_that_is_not_what_was_written(base: Path, target: Tier, tmp_path: Path) -> None:
    def spoil() -> None:
        flip_part(target, tmp_path)

    with pytest.raises(SaveError, match=r"read back, it is not what was written: __0_0.distcp has XXH3") as caught:
        taken(base, Between(target, "put_if_absent", "record-00001.json", spoil))
    assert not isinstance(caught.value, CorruptPartError), "no older step would help"
    assert target.list("step_") == []
    assert not taken(base, target).already, "and another try is free to"


def test_what_was_left_damaged_is_found_before_it_is_committed(base: Path, target: Tier, tmp_path: Path) -> None:
    cut(base, target)
    flip_part(target, tmp_path)
    with pytest.raises(SaveError, match="read back, it is not what was written"):
        taken(base, target)
    assert not taken(base, target).already


def test_what_is_there_already_is_read_before_that_is_said(base: Path, target: Tier, tmp_path: Path) -> None:
    found = taken(base, target)
    flip_part(target, tmp_path)
    with pytest.raises(SaveError, match="read back, it is not what was written") as caught:
        taken(base, target)
    assert f"Delete {layout.checkpoint_dir(found.checkpoint)} there" in (caught.value.hint or "")


def test_what_loses_a_part_just_before_the_commit_is_restored_by_nobody(
    base: Path, target: Tier, tmp_path: Path
) -> None:
    def lose() -> None:
        (imported(tmp_path / "out/ours", 10) / "__0_0.distcp").unlink()

    with pytest.raises(SaveError, match="__0_0.distcp is missing"):
        taken(base, Between(target, "put_if_absent", layout.MANIFEST, lose))
    (checkpoint,) = list_checkpoints(target)
    manifest = read_manifest(target, checkpoint)
    assert manifest is not None
    assert manifest.tombstone
