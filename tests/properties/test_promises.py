"""The promises of the engine, one by one, on simulated nodes: each test fails when its promise is broken."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from typing import cast
from unittest.mock import patch

import pytest

from sm_tiered import layout
from sm_tiered.errors import ConfigError, NothingRestorableError, TierUnavailableError
from sm_tiered.inventory import read_manifest
from sm_tiered.records import CheckpointId
from sm_tiered.settings import LocalSettings
from sm_tiered.testing.plain import PlainEngine
from sm_tiered.tiers.local import LocalTier
from tests.properties.simulated import BOTH, MEMORY, committed, content, flip, part, restored_step, save
from tests.properties.thread_ranks import Cluster, Job, Lost, ThreadGroup, running

Make = Callable[..., Cluster]


def durable_part(cluster: Cluster, step: int, rank: int) -> str:
    """Return the key of the part of *rank* of *step* on the durable tier."""
    (found,) = cluster.durable.glob(f"step_{step:010d}-*/{layout.part_name(rank, 0)}")
    return str(found.relative_to(cluster.durable))


def run(cluster: Cluster, *steps: int) -> None:
    """Save *steps* in memory and on the durable tier, and die."""
    with running(cluster.launch([0, 1])) as job:
        for step in steps:
            save(job, step)
            cluster.drain([0, 1])


def answers(cluster: Cluster) -> int | None:
    """Launch again and return the step that is restored."""
    with running(cluster.launch([0, 1])) as job:
        return restored_step(job)


# ---- silent damage


def test_a_flipped_bit_in_memory_is_found_and_the_durable_copy_is_used(make_cluster: Make) -> None:
    cluster = make_cluster()
    run(cluster, 1, 2)
    flip(part(cluster, 1, 2, 1))
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 2
        restored = job.engines[1].store.restored
        assert restored is not None
        assert restored.tier == "memory+durable"


def test_a_flipped_bit_on_the_durable_tier_is_found_and_the_step_before_is_used(make_cluster: Make) -> None:
    cluster = make_cluster()
    run(cluster, 1, 2)
    cluster.lose(0)
    cluster.lose(1)
    flip(cluster.durable / durable_part(cluster, 2, 1))
    assert answers(cluster) == 1


def test_what_was_damaged_in_memory_is_not_promoted(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        handles = save(job, 1)
        flip(part(cluster, 0, 1, 0))
        cluster.drain([0, 1])
        assert handles[0].exception("durable") is not None
    assert committed(cluster) == []


def test_the_files_of_one_step_are_not_taken_for_those_of_another(make_cluster: Make) -> None:
    cluster = make_cluster(keep=2)
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        save(job, 2, MEMORY)
    for node in (0, 1):
        old, new = part(cluster, node, 1, node).parent, part(cluster, node, 2, node).parent
        shutil.copytree(old, new, dirs_exist_ok=True)
    assert answers(cluster) == 1


# ---- visible means complete


def test_a_record_never_stands_where_its_part_does_not(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1)

    def die(*given: object) -> None:
        raise Lost

    with patch.object(LocalTier, "put_part", die), pytest.raises(Lost):
        cluster.drainer(0).turn()
    assert not list(cluster.durable.glob("step_*/record-*"))
    cluster.drain([0, 1], fresh=True)
    assert committed(cluster) == [1]


def test_a_checkpoint_without_the_record_of_one_rank_is_none(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        job.engines[1].saver._worker.submit = lambda job: None
        handles = job.each(lambda engine: engine.save(2, content(2, engine.group.rank), MEMORY))
        job.settle([0])
        assert not handles[0].done("memory"), "acknowledged, and rank 1 has written nothing"
    assert answers(cluster) == 1


def test_what_is_deleted_is_a_tombstone_first(make_cluster: Make) -> None:
    cluster = make_cluster(durable_keep={"latest": 1})
    run(cluster, 1, 2)
    tier = LocalTier(cluster.settings(0).durable[0], cluster.durable.name)  # type: ignore[arg-type]
    gone = [read_manifest(tier, found) for found in map(layout.parse_checkpoint_dir, tier.list_dirs("")) if found]
    assert [(found.checkpoint.step, found.tombstone) for found in gone if found] == [(1, True), (2, False)]


# ---- the state at the moment of the call


def test_what_is_saved_is_the_state_when_save_returned(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        gate = threading.Event()
        for engine in job.engines:
            engine.saver._worker.submit(lambda: cast("None", gate.wait(10)))
        states = [bytearray(content(1, rank)) for rank in range(2)]
        job.each(lambda engine: engine.save(1, cast("bytes", states[engine.group.rank]), MEMORY))
        for state in states:
            state[:] = bytes(len(state))
        gate.set()
        job.settle()
    assert answers(cluster) == 1


# ---- all ranks alike, and the three answers kept apart


def test_when_one_rank_can_t_have_its_part_all_take_the_step_before(make_cluster: Make) -> None:
    cluster = make_cluster(keep=2)
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        save(job, 2, MEMORY)
    part(cluster, 0, 2, 0).unlink()
    assert answers(cluster) == 1


def test_step_0_can_be_chosen(make_cluster: Make) -> None:
    cluster = make_cluster()
    run(cluster, 0, 1)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job, 0) == 0
    assert answers(cluster) == 0


def test_where_nothing_was_ever_saved_the_answer_is_none(make_cluster: Make) -> None:
    assert answers(make_cluster()) is None


@pytest.mark.parametrize("lost", [0, 1])
def test_what_is_gone_is_not_taken_for_what_never_was(make_cluster: Make, lost: int) -> None:
    """The records that are left carry a watermark: there was a whole checkpoint once."""
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        save(job, 2, MEMORY)
    cluster.lose(lost)
    with pytest.raises(NothingRestorableError, match="missing"):
        answers(cluster)


def test_what_an_attempt_began_from_is_not_taken_for_what_never_was(make_cluster: Make) -> None:
    cluster = make_cluster()
    run(cluster, 1)
    assert answers(cluster) == 1
    shutil.rmtree(cluster.durable)
    for node in (0, 1):
        for path in cluster.memory(node).glob("step_*"):
            shutil.rmtree(path)
    with pytest.raises(NothingRestorableError):
        answers(cluster)


def test_a_watermark_on_the_durable_tier_counts_without_a_commit(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        save(job, 2)
        cluster.drain([0])
    cluster.lose(0)
    cluster.lose(1)
    with pytest.raises(NothingRestorableError):
        answers(cluster)


@pytest.mark.parametrize("operation", ["list", "list_dirs", "get"])
def test_a_tier_that_does_not_answer_is_not_an_empty_one(make_cluster: Make, operation: str) -> None:
    cluster = make_cluster()
    run(cluster, 1, 2)
    cluster.lose(1)

    def silent(*given: object, **named: object) -> None:
        raise TierUnavailableError("it does not answer", tier="durable")

    job = cluster.launch([0, 1])
    with running(job), patch.object(LocalTier, operation, silent), pytest.raises(TierUnavailableError):
        job.each(lambda engine: engine.restore())
    assert answers(cluster) == 2


def test_a_swapped_node_has_none_of_the_parts_it_needs(make_cluster: Make) -> None:
    cluster = make_cluster()
    run(cluster, 1)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1
        save(job, 2, MEMORY)
    with running(cluster.launch([1, 0])) as job:
        assert restored_step(job) == 1
        restored = job.engines[0].store.restored
        assert restored is not None
        assert "not on this node" in " ".join(restored.reasons)


# ---- one directory for all


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_local_tier_that_is_another_directory_on_one_rank_is_refused_by_all(make_cluster: Make, odd: int) -> None:
    """The path is the same, what is mounted there is not."""
    cluster, here = make_cluster(nodes=3), threading.local()
    refused: dict[int, ConfigError] = {}

    def mounted(settings: LocalSettings, namespace: str) -> LocalTier:
        path = f"{settings.path}-elsewhere" if here.rank == odd else settings.path
        return LocalTier(replace(settings, path=path), namespace)

    def opened(rank: int, node: int, group: ThreadGroup) -> PlainEngine:
        here.rank = rank
        try:
            return Cluster.open(cluster, rank, node, group)
        except ConfigError as error:
            refused[rank] = error
            raise

    impatient = partialmethod(LocalTier.read_probe, timeout_secs=0.1)
    with (
        patch("sm_tiered.store.open_tier", mounted),
        patch.object(LocalTier, "read_probe", impatient),
        patch.object(cluster, "open", opened),
        pytest.raises(ConfigError, match="not visible here"),
    ):
        cluster.launch([0, 1, 2])
    assert sorted(refused) == [0, 1, 2]
    assert {(error.message, error.tier) for error in refused.values()} == {(refused[0].message, "durable")}
    assert all("one directory that all ranks share" in (error.hint or "") for error in refused.values())
    blind = [1, 2] if odd == 0 else [odd]
    assert all(error.rank == blind[0] for rank, error in refused.items() if rank not in blind)
    with running(cluster.launch([0, 1, 2])) as job:
        save(job, 1)


# ---- lineage


def test_a_chosen_step_is_the_newest_from_then_on(make_cluster: Make) -> None:
    cluster = make_cluster(keep=3, durable_keep={"latest": 9})
    run(cluster, 1, 2, 3)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job, 1) == 1
    assert answers(cluster) == 1


def test_the_step_that_a_job_began_from_stays_when_retention_would_take_it(make_cluster: Make) -> None:
    cluster = make_cluster(durable_keep={"latest": 1})
    run(cluster, 1)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1
        for step in (2, 3, 4):
            save(job, step)
            cluster.drain([0, 1])
    assert committed(cluster) == [1, 4]


def test_a_step_is_written_once_in_an_attempt(make_cluster: Make) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        first = save(job, 1, MEMORY)
        again = job.each(lambda engine: engine.save(1, content(7, engine.group.rank), BOTH))
        assert again == first
        job.settle()
        cluster.drain([0, 1])
        for handle in first:
            handle.wait("durable", timeout=0)
    assert answers(cluster) == 1


def test_attempts_are_numbered_by_what_is_seen_on_any_tier(make_cluster: Make) -> None:
    cluster = make_cluster()

    def attempt(job: Job) -> int:
        assert job.engines[0].store.line.current is not None
        return job.engines[0].store.line.current.ordinal

    run(cluster, 1)
    cluster.lose(0)
    cluster.lose(1)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1
        assert attempt(job) == 2
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1
        assert attempt(job) == 3
        assert isinstance(job.engines[0].store.line.next_checkpoint(5), CheckpointId)
