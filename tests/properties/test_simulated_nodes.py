"""What happens to jobs on many nodes over time: slow nodes, lost nodes, wrong clocks, readers that stay.

Ranks are threads, nodes are directories, and drainers take their turns when a test says so, by its clock.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from sm_tiered import drainer, layout
from sm_tiered.errors import SaveError, SaveSkippedError
from sm_tiered.inventory import list_checkpoints, read_manifest
from sm_tiered.locks import FileLock
from sm_tiered.tiers.base import Tier
from tests.properties.simulated import BOTH, MEMORY, committed, content, part, restored_step, save
from tests.properties.thread_ranks import NAMESPACE, Cluster, running

# ---- the drain


@pytest.mark.parametrize("slowest", [3, 6])
def test_32_nodes_of_uneven_speed_commit_at_the_pace_of_the_slowest(
    make_cluster: Callable[..., Cluster], slowest: int
) -> None:
    """Each node promoting what it finds due itself would commit next to nothing: hardly ever the same step twice."""
    cluster, saves = make_cluster(nodes=32, durable_keep={"latest": 100}), 24
    busy = [0] * 32
    with running(cluster.launch(range(32))) as job:
        for step in range(saves):
            save(job, step)
            for node in range(32):
                uploads = any(not entry.sent for entry in cluster.waiting(node))
                busy[node] = busy[node] + 1 if uploads else 0
                if not uploads or busy[node] > node % slowest:
                    cluster.drainer(node).turn()
            cluster.skew_secs += 10.0
    assert len(committed(cluster)) >= saves // (slowest + 2)


def test_while_the_drain_is_busy_saves_are_marked_and_the_newest_after_it_is_promoted(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        first, second, third = save(job, 1), save(job, 2), save(job, 3)
        for handle in (*second, *third):
            assert isinstance(handle.exception("durable"), SaveSkippedError)
        cluster.drain([0, 1])
        for handle in first:
            handle.wait("durable", timeout=0)
        save(job, 4, MEMORY)
        cluster.drain([0, 1])
        assert committed(cluster) == [1, 4]
        save(job, 5, MEMORY)
        cluster.drain([0, 1])
        assert committed(cluster) == [1, 4], "what was marked is promoted once"
    (file,) = (cluster.memory(0) / layout.EVENTS).glob("rank-00000-*.jsonl")
    told = file.read_text()
    assert told.count("DurableSkipped") + told.count("durable_skipped") == 2


def test_one_slow_node_holds_up_the_choice_on_all(make_cluster: Callable[..., Cluster]) -> None:
    """Node 0 has committed and is free; node 1 has not even looked: neither begins another step."""
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        first = save(job, 1)
        cluster.drain([1], rounds=1)
        cluster.drain([0])
        assert [handle.done("durable") for handle in first] == [True, False]
        save(job, 2)
        assert [entry.checkpoint.step for entry in cluster.waiting(0)] == []
        assert [entry.checkpoint.step for entry in cluster.waiting(1)] == [1]


def test_an_urgent_save_is_queued_behind_what_is_in_flight(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1)
        last = save(job, 2, urgent=True)
        assert [entry.checkpoint.step for entry in cluster.waiting(0)] == [1, 2]
        cluster.drain([0, 1])
        for handle in last:
            handle.wait("durable", timeout=0)
    assert committed(cluster) == [1, 2]


def test_a_promotion_that_failed_on_one_node_ends_for_all_and_the_next_save_is_promoted(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        first = save(job, 1)
        with part(cluster, 0, 1, 0).open("r+b") as file:
            file.write(b"\xff")
        cluster.drain([0])
        assert first[0].done("durable")
        assert not first[1].done("durable")
        second = save(job, 2)
        for handle in first:
            assert isinstance(handle.exception("durable"), SaveError) or "XXH3" in str(handle.exception("durable"))
        cluster.drain([0, 1])
        for handle in second:
            handle.wait("durable", timeout=0)
    assert committed(cluster) == [2]
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 2


def test_a_promotion_that_was_not_whole_in_time_ends_for_all(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        first = save(job, 1)
        cluster.drain([1])
        cluster.drain([1], rounds=2, pause_secs=4000.0)
        save(job, 2)
        assert all(handle.exception("durable") is not None for handle in first)
        cluster.drain([0, 1])
    assert committed(cluster) == [2]


def drainers(cluster: Cluster, count: int) -> list[int]:
    """Let *count* processes drain node 0 at once until there is nothing left; return how they ended."""
    gate, start = os.pipe()
    children: list[int] = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(start)
                os.read(gate, 1)
                drainer._IDLE_SECS, drainer._ASKED_SECS = 0.0, 0.05
                status = drainer.main([str(cluster.memory(0).parent), NAMESPACE])
            finally:
                os._exit(status)
        children.append(child)
    os.close(start)
    ended = [os.waitpid(child, 0)[1] for child in children]
    os.close(gate)
    return ended


def test_of_drainers_that_start_at_once_one_works(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(nodes=1)
    with running(cluster.launch([0])) as job:
        save(job, 1)
    assert drainers(cluster, 4) == [0] * 4
    assert committed(cluster) == [1]
    (file,) = (cluster.memory(0) / layout.EVENTS).glob("drainer-*.jsonl")
    told = file.read_text().lower()
    assert told.count("promote") == 1, told


def test_a_drainer_that_finds_another_at_work_leaves_it_to_that_one(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(nodes=1)
    with running(cluster.launch([0])) as job:
        save(job, 1)
    with FileLock(cluster.memory(0) / layout.LOCKS / drainer.DRAINER_LOCK) as other:
        assert other.acquire()
        assert drainers(cluster, 2) == [0, 0]
        assert committed(cluster) == []
    assert drainers(cluster, 1) == [0]
    assert committed(cluster) == [1]


# ---- nodes that go


def test_another_node_commits_when_the_coordinator_s_is_lost_after_its_upload(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1)
        cluster.drain([0])
    cluster.lose(0)
    cluster.drainer(1).turn()
    cluster.skew_secs += 15.0
    cluster.drainer(1).turn()
    assert committed(cluster) == [], "the node of rank 0 is given time"
    cluster.skew_secs += 10.0
    cluster.drainer(1).turn()
    assert committed(cluster) == [1]


def test_a_later_launch_commits_what_lost_nodes_had_uploaded_whole(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1)
        cluster.drainer(0).turn()
        cluster.drainer(1).turn()
    cluster.lose(0)
    cluster.lose(1)
    assert committed(cluster) == []
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1
    assert committed(cluster) == [1]


def test_a_slow_rank_that_dies_while_others_go_on_takes_nothing_acknowledged_with_it(
    make_cluster: Callable[..., Cluster],
) -> None:
    """The others may recycle only what is below the watermark, however many saves of their own they have written."""
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
        slow, skipped = job.engines[1], 0
        slow.saver._worker.submit = lambda job: None
        with patch("sm_tiered.saving._SETTLE_SECS", 0.01):
            for step in range(2, 12):
                handles = job.each(
                    lambda engine, step=step: engine.save(step, content(step, engine.group.rank), MEMORY)
                )
                job.settle([0])
                done = {handle.done("memory") for handle in handles}
                kinds = {type(handle.exception("memory")) for handle in handles}
                assert done == {kinds == {SaveSkippedError}}, "acknowledged without the record of a rank"
                skipped += kinds == {SaveSkippedError}
                assert kinds <= {SaveSkippedError, type(None)}
                assert len(kinds) == 1
        assert skipped >= 6, "saves go on without a generation to go to"
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1


@pytest.mark.parametrize("restores", [True, False])
def test_launches_that_die_before_their_first_save_is_whole_take_nothing_with_them(
    make_cluster: Callable[..., Cluster], restores: bool
) -> None:
    cluster = make_cluster()
    with running(cluster.launch([0, 1])) as job:
        save(job, 1, MEMORY)
    for _ in range(5):
        with running(cluster.launch([0, 1])) as job:
            if restores:
                assert restored_step(job) == 1
            job.engines[1].saver._worker.submit = lambda job: None
            job.each(lambda engine: engine.save(2, content(2, engine.group.rank), MEMORY))
            job.settle([0])
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1


@pytest.mark.parametrize("tier", BOTH)
def test_a_roll_back_counts_even_when_the_job_dies_before_its_first_save(
    make_cluster: Callable[..., Cluster], tier: str
) -> None:
    cluster = make_cluster(keep=3, durable_keep={"latest": 3})
    with running(cluster.launch([0, 1])) as job:
        for step in (1, 2, 3):
            save(job, step)
            cluster.drain([0, 1])
    if tier == "durable":
        cluster.lose(0)
        cluster.lose(1)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job, 2) == 2
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 2
        save(job, 3)
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 3
        assert restored_step(job, 1) == 1
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 1


# ---- clocks


class WrongClock:
    """The module `time`, with a wall clock that is *secs* ahead."""

    def __init__(self, secs: float) -> None:
        self._secs = secs
        self.asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)

    def time(self) -> float:
        self.asked += 1
        return time.time() + self._secs


@contextmanager
def wrong_clock(secs: float) -> Iterator[None]:
    """Let every rank of jobs that are launched now go by a clock that is *secs* ahead.

    `line` dates attempts, `saving` dates checkpoints. One that never asks has its clock elsewhere now: then it fails,
    for the test would be about nothing.
    """
    clocks = {module: WrongClock(secs) for module in ("line", "saving")}
    with ExitStack() as stack:
        for module, clock in clocks.items():
            stack.enter_context(patch(f"sm_tiered.{module}.time", clock))
        yield
    assert all(clock.asked for clock in clocks.values()), f"nobody asks for the time in {clocks}"


def saved_at(tier: Tier) -> dict[int, float]:
    """Return when each committed step was saved, as its manifest tells."""
    found = [read_manifest(tier, checkpoint) for checkpoint in list_checkpoints(tier)]
    return {manifest.checkpoint.step: manifest.saved_at for manifest in found if manifest is not None}


@pytest.mark.parametrize("secs", [-300.0, 300.0])
def test_a_new_rank_0_with_a_clock_five_minutes_wrong_changes_neither_order_nor_what_is_kept(
    make_cluster: Callable[..., Cluster], secs: float
) -> None:
    cluster = make_cluster(durable_keep={"newer_than_secs": 600.0})
    with running(cluster.launch([0, 1])) as job:
        for step in (1, 2):
            save(job, step)
            cluster.drain([0, 1])
    cluster.lose(0)
    cluster.lose(1)
    with wrong_clock(secs), running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 2
        for step in (3, 4):
            save(job, step)
            cluster.drain([0, 1])
    assert committed(cluster) == [1, 2, 3, 4]
    with running(cluster.launch([0, 1])) as job:
        assert restored_step(job) == 4
        tier = job.engines[0].store.tiers.durable["durable"]
        attempts = sorted({found.attempt for found in list_checkpoints(tier)})
        assert [attempt.ordinal for attempt in attempts] == [1, 2]
        assert attempts[1].utc_secs - attempts[0].utc_secs == pytest.approx(secs, abs=60.0)
        dates = saved_at(tier)
        assert dates[3] - dates[2] == pytest.approx(secs, abs=60.0)


def test_with_a_clock_that_went_back_the_newest_is_not_taken_for_an_old_one(
    make_cluster: Callable[..., Cluster],
) -> None:
    cluster = make_cluster(durable_keep={"newer_than_secs": 60.0})
    with running(cluster.launch([0])) as job:
        save(job, 1)
        cluster.drain([0])
    with wrong_clock(-300.0), running(cluster.launch([0])) as job:
        restored_step(job)
        for step in (2, 3):
            save(job, step)
            cluster.drain([0])
    assert committed(cluster) == [1, 2, 3]


# ---- readers


def test_what_a_reader_has_open_never_changes_while_saves_go_on(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(nodes=1)
    with running(cluster.launch([0])) as job, ExitStack() as stack:
        memory = job.engines[0].store.tiers.memory
        assert memory is not None
        save(job, 1, MEMORY)
        stock = stack.enter_context(part(cluster, 0, 1, 0).open("rb"))
        save(job, 2, MEMORY)
        with part(cluster, 0, 2, 0).open("rb") as file:
            mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        save(job, 3, MEMORY)
        third = part(cluster, 0, 3, 0)
        ours = stack.enter_context(memory.open_part(f"{third.parent.name}/{third.name}"))
        for step in range(4, 16):
            # Each holds a file that is not to be had; the budget of files is for one such reader.
            job.each(lambda engine, step=step: engine.save(step, content(step, 0), MEMORY))
            job.settle()
            stock.seek(0)
            assert stock.read() == content(1, 0)
            assert mapped[:] == content(2, 0)
            buffer = bytearray(ours.size)
            ours.pread_into(0, memoryview(buffer))
            assert bytes(buffer) == content(3, 0)


def test_one_reader_does_not_hold_up_saves(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(nodes=1)
    with running(cluster.launch([0])) as job:
        save(job, 1, MEMORY)
        with part(cluster, 0, 1, 0).open("rb") as reader:
            for step in range(2, 12):
                save(job, step, MEMORY)
            assert reader.read() == content(1, 0)


def test_a_user_s_hard_link_keeps_its_bytes(make_cluster: Callable[..., Cluster], memory_dir: Path) -> None:
    cluster = make_cluster(nodes=1)
    mine = memory_dir / "mine"
    with running(cluster.launch([0])) as job:
        save(job, 1, MEMORY)
        os.link(part(cluster, 0, 1, 0), mine)
        for step in range(2, 12):
            save(job, step, MEMORY)
    assert mine.read_bytes() == content(1, 0)
    assert mine.stat().st_nlink == 1
