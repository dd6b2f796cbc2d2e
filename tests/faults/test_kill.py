"""``kill -9`` of all ranks at any moment after an acknowledgement: new processes go on from there, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import threading
from itertools import count
from pathlib import Path

import pytest

from sm_tiered.group import Group
from sm_tiered.testing.plain import PlainEngine
from tests.faults.core_jobs import History, Job, agreed, judged_restore, noted_save, script, state

SIZE = 1_500_000


def kill_all_again_and_again(job: Job, kills: int, seed: int) -> None:
    """Let the ranks save without a pause, and kill them all within some ms of their first acknowledgement."""
    chance, history = random.Random(seed), History(job.root / "history")
    for run in range(kills):
        within_secs = chance.random() * 0.03

        def work(group: Group, run: int = run, within_secs: float = within_secs) -> None:
            engine, pids = job.open(group), group.gather(os.getpid())
            first = judged_restore(engine, history) + 1
            noted_save(engine, history, run, first)
            if group.rank == 0:
                threading.Timer(within_secs, lambda: [os.kill(pid, signal.SIGKILL) for pid in reversed(pids)]).start()
            for step in count(first + 1):
                noted_save(engine, history, run, step)

        statuses = [result.status for result in job.run(work)]
        assert statuses == [signal.SIGKILL] * job.world, f"seed {seed}: {statuses}"
    agreed(job.run(lambda group: script(history, kills)(job.open(group))))


@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_after_the_acknowledgement_loses_nothing(memory_dir: Path, world: int) -> None:
    kill_all_again_and_again(Job(memory_dir, world=world), 10, seed=world)


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_kill_right_after_the_acknowledgement_loses_nothing(memory_dir: Path, nodes: int) -> None:
    """Also where each rank has a memory of its own, as on two nodes."""
    job = Job(memory_dir, world=2, nodes=nodes)

    def killed_at_once(engine: PlainEngine) -> None:
        engine.save(1, state(0, 1, engine.group.rank, SIZE), tiers=["memory"]).wait("memory")
        os.kill(os.getpid(), signal.SIGKILL)

    def restored(engine: PlainEngine) -> list[object]:
        found = engine.restore()
        assert found == (1, state(0, 1, engine.group.rank, SIZE))
        assert engine.store.restored is not None
        return [engine.store.restored.tier, list(engine.store.restored.reasons)]

    assert {result.status for result in job.run(lambda group: killed_at_once(job.open(group)))} == {signal.SIGKILL}
    assert job.work(restored) == [["memory", []]] * 2


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "nodes"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_hundreds_of_kills_after_the_acknowledgement_lose_nothing(memory_dir: Path, world: int, nodes: int) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    kill_all_again_and_again(Job(memory_dir, world=world, nodes=nodes), 100, seed)
