"""The drainer's work on a tier of shares: what it sends, when it gives up, and whose turn it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sm_tiered import layout, retention
from sm_tiered.commit import Compose
from sm_tiered.drain import Drain, Target
from sm_tiered.errors import KeyNotFoundError
from sm_tiered.event_log import Events
from sm_tiered.inventory import read_records
from sm_tiered.manifest import record_to_json
from sm_tiered.policies.keep import Latest
from sm_tiered.queue import Entry, Queue
from sm_tiered.records import CheckpointId, Record
from sm_tiered.settings import MemorySettings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.testing.daemon_faults import DaemonFault
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, cluster_tier, write_attempt, write_checkpoint
from tests.waiting import wait_until


class Node:
    """One node's memory and drainer, and the cluster that it drains to."""

    def __init__(self, memory: MemoryTier, cluster: Tier, *, keep: int) -> None:
        self.memory, self.cluster, self._keep = memory, cluster, keep
        self.queue = Queue(memory)
        self.pruned: list[CheckpointId] = []
        events = Events(namespace=NAMESPACE, rank=None, path=None)
        self.drain = Drain(
            memory, self.queue, target=self._target, compose=_nobody, events=events, entries=self.queue.entries
        )

    def _target(self, _entry: Entry) -> Target:
        return Target(tier=self.cluster, prune=self._prune)

    def _prune(self, asking: CheckpointId) -> list[CheckpointId]:
        chosen = retention.plan(self.cluster, Latest(n=self._keep), attempt=asking.attempt, in_flight_secs=60.0)
        gone = retention.apply(self.cluster, NAMESPACE, chosen)
        self.pruned += gone
        return gone

    def save(self, step: int, *, ordinal: int = 1, patient: bool = False, world: int = 2) -> CheckpointId:
        """Write a checkpoint to memory, and hand all ranks' to the drainer."""
        which = checkpoint(step, ordinal)
        write_checkpoint(self.memory, which, durable=False, world=world)
        for rank in range(world):
            self.queue.put(
                Entry(
                    checkpoint=which,
                    rank=rank,
                    tier="cluster",
                    world=world,
                    recipe="0" * 32,
                    finisher="",
                    deadline_at=time.time() + 60.0,
                    patient=patient,
                )
            )
        return which

    def has_sent(self) -> bool:
        """Take a turn; return whether nothing is left to send."""
        self.drain.turn()
        return all(entry.sent for entry in self.queue.entries())

    def is_committed(self, which: CheckpointId) -> bool:
        """Whether the cluster shows its manifest."""
        try:
            self.cluster.get(layout.in_dir(which, layout.MANIFEST))
        except KeyNotFoundError:
            return False
        return True


def _nobody(_finisher: str) -> Compose:
    pytest.fail("files for other readers were made, and nothing could keep them")


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as served:
        yield served


@pytest.fixture
def node(memory_dir: Path, daemon: StandInDaemon) -> Iterator[Node]:
    cluster = cluster_tier(daemon.url, keep=1)
    yield Node(_memory(memory_dir), cluster, keep=1)
    cluster.close()


def _memory(path: Path) -> MemoryTier:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=1), path=str(path), budget_bytes=None, allow_disk=True
    )
    return MemoryTier(settings, NAMESPACE)


def test_what_is_sent_is_committed_without_anything_more(node: Node) -> None:
    which = node.save(1)
    assert node.drain.turn() is None or not node.queue.entries()
    result = node.queue.result(which, "cluster")
    assert result is not None
    assert result.error is None
    assert node.is_committed(which)


def test_what_nobody_wants_any_more_goes_after_each_commit(node: Node, daemon: StandInDaemon) -> None:
    for step in (1, 2, 3):
        node.save(step)
        node.drain.turn()
    assert node.pruned == [checkpoint(1), checkpoint(2)]
    assert not daemon.dropped


def test_what_lost_a_share_does_not_count_among_what_is_kept(memory_dir: Path, daemon: StandInDaemon) -> None:
    """Two are kept. The second one loses a share after it was seen whole: the first one stays then."""
    cluster = cluster_tier(daemon.url, keep=2)
    node = Node(_memory(memory_dir), cluster, keep=2)
    for step in (1, 2):
        node.save(step)
        node.drain.turn()
    lost = layout.MAX_STEP + 2
    del daemon.namespaces[NAMESPACE].blobs[1][lost]
    third = node.save(3)
    node.drain.turn()
    assert node.is_committed(third)
    assert node.pruned == []
    assert node.is_committed(checkpoint(1))
    cluster.close()


def test_a_share_that_goes_before_the_commit_makes_it_wait(node: Node, daemon: StandInDaemon) -> None:
    """Rank 1's was seen, as by any look for the others' records, and is lost before rank 0's comes."""
    which = node.save(1, world=3)
    first, *others = node.queue.entries()
    node.queue.remove(first)
    node.drain.turn()
    assert set(read_records(node.cluster, which)) == {1, 2}
    del daemon.namespaces[NAMESPACE].blobs[1][layout.MAX_STEP + 1]
    for entry in others:
        node.queue.remove(entry)
    node.queue.put(first)
    wait_until(node.has_sent, "rank 0's is not sent")
    assert node.queue.result(which, "cluster") is None
    assert node.queue.entries()


def test_only_what_the_newest_attempt_went_on_from_stays(node: Node) -> None:
    """There is room for a fixed number: what an older attempt went on from does not stay for ever."""
    for ordinal, step in ((1, 1), (2, 2), (3, 3), (4, 4)):
        parent = checkpoint(step - 1, ordinal - 1) if ordinal > 1 else None
        write_attempt(node.cluster, ordinal, parent)
        node.save(step, ordinal=ordinal)
        node.drain.turn()
    assert node.pruned == [checkpoint(1, 1), checkpoint(2, 2)]
    assert node.is_committed(checkpoint(3, 3))


def test_a_full_service_is_pruned_before_it_drops_what_is_lowest(node: Node, daemon: StandInDaemon) -> None:
    """The keep policy wants one; four that were never pruned fill all that the namespace has room for."""
    write_attempt(node.cluster, 1)
    for step in (1, 2, 3, 4):
        write_checkpoint(node.cluster, checkpoint(step), durable=True)
    which = node.save(5)
    node.drain.turn()
    assert node.is_committed(which)
    assert node.pruned == [checkpoint(1), checkpoint(2), checkpoint(3), checkpoint(4)]
    assert not daemon.dropped


def test_a_service_that_does_not_answer_ends_a_save_at_once_and_not_the_next(node: Node, daemon: StandInDaemon) -> None:
    daemon.restart(DaemonFault(kind="status", method="POST", path="/checkpoints/", status=503))
    lost = node.save(1)
    node.drain.turn()
    told = node.queue.result(lost, "cluster")
    assert told is not None
    assert told.error is not None
    assert "503" in str(told.error)
    daemon.restart()
    which = node.save(2)
    node.drain.turn()
    assert node.is_committed(which)
    assert not node.is_committed(lost)


def test_a_tier_that_waits_for_its_service_keeps_the_save(node: Node, daemon: StandInDaemon) -> None:
    daemon.restart(DaemonFault(kind="status", method="POST", path="/checkpoints/", status=503))
    which = node.save(1, patient=True)
    node.drain.turn()
    assert node.queue.result(which, "cluster") is None
    assert node.queue.entries()


def test_a_rank_that_failed_takes_its_word_back_with_its_share(node: Node) -> None:
    which = node.save(1)
    failed = Record(namespace=NAMESPACE, checkpoint=which, rank=1, world=2, saved_at=1.0, failed="no reason")
    key = layout.in_dir(which, layout.record_name(1))
    node.cluster.put_if_absent(key, record_to_json(failed))
    node.drain.turn()
    assert node.is_committed(which)


def test_of_one_checkpoint_the_nearest_tier_comes_first(node: Node) -> None:
    for place, tier in ((2, "a_bucket"), (1, "z_cluster")):
        node.queue.put(
            Entry(
                checkpoint=checkpoint(1),
                rank=0,
                tier=tier,
                world=1,
                recipe="0" * 32,
                finisher="",
                deadline_at=2e9,
                place=place,
            )
        )
    assert [entry.tier for entry in node.queue.entries()] == ["z_cluster", "a_bucket"]
