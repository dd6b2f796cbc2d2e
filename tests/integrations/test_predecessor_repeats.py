"""Imports that are cut, repeated or late; what stood there before, and what became of it meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered import layout
from sm_tiered.errors import KeyExistsError, TierUnavailableError
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.manifest import manifest_from_json, manifest_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.recipe import Recipe
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.schedule import Schedule
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.base import Tier
from sm_tiered.verify import State, verify_checkpoint
from sm_tiered_dcp import TieredCheckpointer
from sm_tiered_dcp.predecessor import import_step
from sm_tiered_dcp.predecessor.origins import open_daemon
from tests.integrations.predecessor_imports import SHARD, Between, again, cut, filled_again, loaded, named, taken
from tests.integrations.predecessor_made import NAMESPACE, directory, imported, made, source, two_ranks
from tests.integrations.test_predecessor_cli import filled

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

ENDS = dict(enumerate(len(data) for data in two_ranks(10).shards))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    two_ranks(10).put(tmp_path / "base", 10)
    return tmp_path / "base"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Tier]:
    tier = directory(tmp_path / "out", "ours")
    yield tier
    tier.close()


def test_an_import_that_was_cut_is_gone_on_with(base: Path, target: Tier, tmp_path: Path) -> None:
    cut(base, target)
    (checkpoint,) = list_checkpoints(target)
    assert read_manifest(target, checkpoint) is None, "nothing is visible"
    counted = Between(target)
    found = taken(base, counted)
    assert (found.already, found.checkpoint) == (False, checkpoint)
    assert not any(key.endswith("__0_0.distcp") for key in counted.written), "what rank 0 had written was found"
    assert loaded(imported(tmp_path / "out/ours", 10))["note"] == "step 10"
    counted = Between(target)
    assert taken(base, counted).already
    assert counted.written == []


def test_two_saves_of_a_step_are_never_mixed(base: Path, target: Tier) -> None:
    """The predecessor saves the step again after an import was cut: nothing of the first save is taken."""
    cut(base, target)
    again(10, 77).put(base, 10)
    found = taken(base, target)
    values = loaded(base.parent / "out/ours" / layout.checkpoint_dir(found.checkpoint))
    assert (values["a"][0, 0].item(), values["b"][0].item(), values["note"]) == (77.0, 77, "step 77")


def test_a_save_of_fewer_ranks_can_be_imported_after_one_of_more_was_cut(base: Path, target: Tier) -> None:
    cut(base, target)
    (base / SHARD).unlink()
    made({"a": torch.full((40, 3), 5.0), "epoch": 1}).put(base, 10)
    found = taken(base, target)
    assert found.world == 1
    assert verify_checkpoint(target, found.checkpoint, durable=True).state is State.WHOLE


def test_another_save_of_that_step_is_not_there_already(base: Path, target: Tier, tmp_path: Path) -> None:
    first = taken(base, target)
    again(10, 77).put(tmp_path / "base2", 10)
    with pytest.raises(KeyExistsError, match="another save of that step, imported before, is committed there"):
        taken(tmp_path / "base2", target)
    with pytest.raises(KeyExistsError, match="another save of that step"):
        named(tmp_path / "base2", target)
    assert list_checkpoints(target) == [first.checkpoint]
    assert loaded(imported(tmp_path / "out/ours", 10))["note"] == "step 10"


def test_imports_are_in_the_order_of_their_steps_and_below_all_of_ours(tmp_path: Path, target: Tier) -> None:
    steps = [0, 9, 10, 20, 30, 99, 100, 2_000_000_007, 10**10 - 1]
    for step in steps:
        two_ranks(step % 1000).put(tmp_path / "base", step)
    place = source(tmp_path / "base")
    for listed in place.listed():
        import_step(place, listed, target, namespace="ours")
    assert [checkpoint.step for checkpoint in list_checkpoints(target)] == steps
    ours = Attempt(ordinal=1, utc_secs=1_700_000_000, nonce="00000000")
    assert all(checkpoint.attempt < ours for checkpoint in list_checkpoints(target))
    assert all(checkpoint.attempt.is_imported for checkpoint in list_checkpoints(target))
    assert not ours.is_imported


# ---- what changes meanwhile


@pytest.mark.parametrize("name", [SHARD, f"{NAMESPACE}/rank_0/step_10/metadata.metadata"])
def test_what_is_written_to_while_it_is_read_is_refused(name: str, base: Path, target: Tier) -> None:
    def touch() -> None:
        facts = (base / name).stat()
        os.utime(base / name, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))

    with pytest.raises(TierUnavailableError, match="it was written to while it was read"):
        taken(base, Between(target, "put_if_absent", "record-00001.json", touch))
    assert target.list("step_") == []
    assert not taken(base, target).already


def test_what_is_deleted_before_the_commit_is_told_so(base: Path, target: Tier) -> None:
    checkpoint = named(base, target)

    def bury() -> None:
        grave = manifest_to_json(
            replace(_manifest(checkpoint), tombstone=True),
        )
        target.put_if_absent(layout.in_dir(checkpoint, layout.MANIFEST), grave)

    with pytest.raises(KeyExistsError, match="it was deleted there"):
        taken(base, Between(target, "put_if_absent", "record-00001.json", bury))


def _manifest(checkpoint: CheckpointId) -> Any:
    from sm_tiered.records import Manifest

    return Manifest(namespace="ours", checkpoint=checkpoint, world=1, saved_at=0.0)


def test_what_was_deleted_stays_deleted(base: Path, target: Tier) -> None:
    found = taken(base, target)
    key = layout.in_dir(found.checkpoint, layout.MANIFEST)
    blob = target.get(key)
    grave = replace(manifest_from_json(blob.data), tombstone=True, parts={}, records={}, metrics={})
    target.replace(key, manifest_to_json(grave), version=blob.version)
    with pytest.raises(KeyExistsError, match="it was deleted there"):
        taken(base, target)


def test_a_shard_that_changes_in_the_service_while_it_is_read_is_refused(target: Tier) -> None:
    with StandInDaemon() as daemon:
        settings = HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url)
        filled(daemon, 10)
        place = open_daemon(settings, NAMESPACE)
        listed = place.listed()[0]
        before = place.identity(listed, ENDS)
        assert place.identity(listed, ENDS) == before
        changing: Any = Between(target, "put_if_absent", "record-00001.json", lambda: filled_again(daemon, 10))
        with pytest.raises(TierUnavailableError, match="it was written to while it was read"):
            import_step(place, listed, changing, namespace="ours")
        assert target.list("step_") == []
        assert place.identity(listed, ENDS) != before
        place.close()


def test_a_shard_without_a_checksum_is_known_by_its_bytes() -> None:
    with StandInDaemon() as daemon:
        filled(daemon, 10)
        for blobs in daemon.namespaces[NAMESPACE].blobs.values():
            for step, blob in blobs.items():
                blobs[step] = replace(blob, meta="")
        settings = HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url)
        place = open_daemon(settings, NAMESPACE)
        listed = place.listed()[0]
        before = place.identity(listed, ENDS)
        daemon.flip(NAMESPACE, 1, 10, 800)
        assert place.identity(listed, ENDS) != before
        assert place.identity(listed, {0: ENDS[0]}) != before
        place.close()


def test_a_run_did_not_begin_when_what_it_imports_was_numbered(
    base: Path, target: Tier, tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Save policies ask how long a run lasts: an import's seconds are a number, not a time."""
    seen: list[float | None] = []
    monkeypatch.setattr(Schedule, "started_from", lambda _, step, history: seen.append(history.began_at))
    taken(base, target)
    tiers = {
        "memory": {"kind": "memory", "path": str(memory_dir), "allow_disk": True},
        "local": {"kind": "local", "path": str(tmp_path / "out"), "fsync": False},
    }
    recipe = Recipe.parse({"version": 1, "namespace": "ours", "tiers": tiers})
    with TieredCheckpointer.from_recipe(recipe) as checkpointer:
        state = {"a": torch.zeros(40, 3), "b": torch.zeros(6, dtype=torch.int64), "epoch": 0, "note": ""}
        assert checkpointer.restore(state) == 10
    assert seen == [None]
