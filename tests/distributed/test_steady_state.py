"""What a save costs once training runs: one all-reduce on a group of our own, no plan, nothing that piles up."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sm_tiered import layout
from sm_tiered.queue import RESULTS_KEPT
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from tests.distributed.dcp_jobs import async_save, bits, recipe, run

WORLD = 2


def _state(
    rank: int, value: float, rows: int = 6, dtype: str = "float32", second: str = "float32", **more: Any
) -> dict[str, Any]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(rows * 4.0).view(rows, 4) + value
    w, v = (distribute_tensor(whole.to(getattr(torch, name)), mesh, [Shard(0)]) for name in (dtype, second))
    return {"w": w, "v": v, "values": {"step": value, "log": []}, **more}


def _collectives(group: Any) -> int:
    return group._get_sequence_number_for_group()


@contextmanager
def _counted(module: Any, name: str) -> Iterator[list[int]]:
    """Count the calls of a function."""
    original, calls = getattr(module, name), [0]

    def counting(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return original(*arguments, **options)

    setattr(module, name, counting)
    try:
        yield calls
    finally:
        setattr(module, name, original)


def _structures(rank: int, which: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import GroupMember

    from sm_tiered_dcp import state_saver

    trainers: Any = GroupMember.WORLD
    before = _collectives(trainers)
    dist.all_reduce(torch.ones(1))
    assert _collectives(trainers) == before + 1, "collectives are not counted"

    checkpointer = TieredCheckpointer.from_recipe(which)
    assert checkpointer._engine is not None
    ours: Any = checkpointer._engine.group
    before = _collectives(trainers)

    def plans(step: int, state: dict[str, Any]) -> int:
        """Save, restore into a state of the same structure, compare; return whether it was planned anew."""
        with _counted(state_saver, "plan_tensors") as calls:
            begun = _collectives(ours._group)
            handle = checkpointer.save(step, state, ["memory"])
            ended = _collectives(ours._group)
        assert (ended - begun == 1) == (calls[0] == 0), "a save without a plan takes one all-reduce"
        handle.wait("memory")
        saved = bits(state)
        for name in set(state) - {"values"}:
            state[name].detach().fill_(-1)
        state["values"] = {}
        assert checkpointer.restore(state) == step
        assert bits(state) == saved
        return calls[0]

    lone: dict[str, Any] = {"lone": torch.zeros(3)} if rank == 1 else {}
    rounds: list[tuple[int, dict[str, Any]]] = [
        (0, _state(rank, 1.0)),
        (0, _state(rank, 2.0)),
        (0, {**_state(rank, 3.0), "values": {"step": 3, "log": list(range(50)), "deep": {"er": [1, {"x": 2}]}}}),
        (0, {**_state(rank, 4.0), "values": {"text": "x" * 10000}}),
        (1, _state(rank, 5.0, rows=9)),
        (1, _state(rank, 6.0, rows=9, dtype="bfloat16")),
        (1, _state(rank, 7.0, rows=9, dtype="bfloat16", extra=torch.ones(2, 2))),
        (1, _state(rank, 8.0, rows=9, dtype="bfloat16")),
        (1, _state(rank, 9.0, rows=9, dtype="bfloat16", **lone)),
        (0, _state(rank, 10.0, rows=9, dtype="bfloat16", **lone)),
        (1, _state(rank, 11.0)),
        (0, _state(rank, 12.0)),
        (1, _state(rank, 13.0, second="float64")),
    ]
    checkpointer.save(0, _state(rank, 0.0))  # opens the attempt
    before = _collectives(trainers)
    for step, (planned, state) in enumerate(rounds, start=1):
        if step in (9, 10, 11):
            # A name that only one rank has, and only that rank could restore.
            with _counted(state_saver, "plan_tensors") as calls:
                checkpointer.save(step, state, ["memory"]).wait("memory")
            assert calls[0] == planned, step
        else:
            assert plans(step, state) == planned, step
    assert _collectives(trainers) == before
    checkpointer.close()


def test_a_plan_is_kept_until_the_structure_changes_on_any_rank(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _structures, recipe(tmp_path, memory_dir))


def _footprint(memory: Path) -> dict[str, int]:
    """Threads, descriptors, sockets and mappings of this process; bytes and files on tmpfs, logs of events apart."""
    links: list[str] = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that lists
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    files = [path for path in memory.rglob("*") if path.is_file() and path.parent.name != "events"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    kinds = Counter("step" if path.parent.name.startswith("step_") else path.parent.name for path in files)
    return {
        "threads": len(os.listdir("/proc/self/task")),
        "fds": len(links),
        "sockets": sum(link.startswith("socket:") for link in links),
        "mapped files": sum(str(memory) in line for line in maps),
        "steps": len({path.parent for path in files if path.parent.name.startswith("step_")}),
        # How many promotions went through, and so how many results are told, is for the disk to say.
        "bytes": sum(path.stat().st_blocks * 512 for path in files if path.parent.name != layout.QUEUE),
        **{f"files: {kind}": count for kind, count in kinds.items()},
    }


def _many(rank: int, which: dict[str, Any], first: int, last: int) -> list[Any]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.distributed_c10d import GroupMember

    memory, found = Path(which["tiers"]["memory"]["path"]), list[dict[str, int]]()
    state = _state(rank, 0.0)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in range(1, last + 1):
            state["values"]["log"].append(step)
            before = _collectives(GroupMember.WORLD)
            if step % 10 == 7:
                writer = TieredStorageWriter(which, step=step)
                async_save(state, writer).result()
                handle: Any = writer.handle
                writer.close()
            else:
                handle = checkpointer.save(step, state)
            assert _collectives(GroupMember.WORLD) == before
            handle.wait("memory")
            if step % 10 == 9:
                reader = TieredStorageReader(which)
                dcp.load(_state(rank, 1.0), storage_reader=reader)
                reader.close()
            if step in (first, last):
                checkpointer.wait(30)
                dist.barrier()
                found.append(_footprint(memory))
                dist.barrier()
    return found


@pytest.mark.timeout(150)
def test_saves_leave_threads_descriptors_sockets_and_shared_memory_as_they_were(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    for after_20, after_200 in run(WORLD, _many, which, 20, 200):
        assert after_20["mapped files"] > 0
        assert after_20["bytes"] > 0
        facts = (after_20, after_200)
        for name in ("threads", "fds", "sockets", "mapped files"):
            assert after_200[name] <= after_20[name], (name, *facts)
        # Two are kept, two more files of a rank are in turn, and ranks may be one apart.
        assert 2 <= after_200["steps"] <= 6, facts
        told = "results, the recipe, the log, how far the drainer is"
        assert after_200["files: .queue"] <= RESULTS_KEPT + 3, (told, *facts)
        others = sum(n for name, n in after_200.items() if name.startswith("files: ") and layout.QUEUE not in name)
        assert others <= 64, facts
        assert after_200["bytes"] <= after_20["bytes"] + 40 * 4096, facts
