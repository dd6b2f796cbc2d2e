"""Saves, restores and looks at a simulated cluster, in the words of the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sm_tiered import layout
from sm_tiered.handle import SaveHandle
from tests.properties.thread_ranks import Cluster, Job

__all__ = ["BOTH", "MEMORY", "committed", "content", "flip", "part", "restored_step", "save"]

BOTH = ("memory", "durable")
MEMORY = ("memory",)


def content(step: int, rank: int) -> bytes:
    """Return what *rank* saves as *step*: no two are alike."""
    return f"{step}/{rank}/".encode() * 200


def save(job: Job, step: int, tiers: Sequence[str] = BOTH, *, urgent: bool = False) -> list[SaveHandle]:
    """Save *step* on all ranks and see it safe in memory."""
    handles = job.each(lambda engine: engine.save(step, content(step, engine.group.rank), tiers, urgent=urgent))
    job.settle()
    for handle in handles:
        handle.wait("memory", timeout=5.0)
    return handles


def restored_step(job: Job, step: int | None = None) -> int | None:
    """Restore on all ranks, see that each was given its own bytes, and return the step."""
    found = job.each(lambda engine: engine.restore(step))
    if found[0] is None:
        assert found == [None] * job.world
        return None
    assert found == [(found[0][0], content(found[0][0], rank)) for rank in range(job.world)]
    return found[0][0]


def committed(cluster: Cluster) -> list[int]:
    """Return the steps that the durable tier holds."""
    found = cluster.durable.glob(f"step_*/{layout.MANIFEST}")
    return sorted(int(path.parent.name[5:15]) for path in found if b'"kind":"manifest"' in path.read_bytes())


def part(cluster: Cluster, node: int, step: int, rank: int) -> Path:
    """Return where *node* has the part of *rank* of *step* in memory."""
    (found,) = cluster.memory(node).glob(f"step_{step:010d}-*/{layout.part_name(rank, 0)}")
    return found


def flip(path: Path) -> None:
    """Change one bit in the middle of a file, in place."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(data)
