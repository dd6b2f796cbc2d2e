"""Bad input that only several ranks can give: all of them raise, with the same facts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer, TieredStorageWriter
from tests.distributed.dcp_jobs import bits, raised, recipe, run, start, steps, tell

WORLD = 3


def _state(rank: int, value: float = 1.0) -> dict[str, Any]:
    import torch

    return {"w": torch.full((5,), value), "epoch": value}


def _other_recipes(rank: int, which: dict[str, Any], folder: str) -> None:
    import torch.distributed as dist

    other_disk = {**which["tiers"], "disk": {**which["tiers"]["disk"], "path": f"{folder}/other"}}
    only_memory = {"memory": which["tiers"]["memory"]}
    for field, changes in {
        "namespace": {"namespace": "run-2"},
        "tiers": {"tiers": other_disk},
        "tiers ": {"tiers": only_memory},
        "on_error": {"on_error": "raise"},
        "unreachable": {"unreachable": "use_memory"},
    }.items():
        mine = {**which, **(changes if rank == 1 else {})}
        kind, text = raised(lambda mine=mine: TieredCheckpointer.from_recipe(mine))
        assert kind == "ConfigError", (field, kind, text)
        assert f"rank 1 has another recipe than rank 0: {field.strip()} differ" in text
        assert "Give every rank the same recipe" in text
        dist.barrier()
    with TieredCheckpointer.from_recipe(which) as checkpointer:  # the groups are in step
        checkpointer.save(1, _state(rank)).wait("memory")


def test_ranks_with_different_recipes_all_hear_which_and_where(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _other_recipes, recipe(tmp_path, memory_dir), str(tmp_path))


def _one_can_not_open(rank: int, which: dict[str, Any], folder: str) -> None:
    """The recipes are alike, the places they name are not: rank 2 may not use its own."""
    import os

    path = f"{folder}/node-{rank}"
    os.mkdir(path, 0o777 if rank == 2 else 0o700)
    if rank == 2:
        os.chmod(path, 0o777)
    mine = {**which, "tiers": {**which["tiers"], "memory": {**which["tiers"]["memory"], "path": path}}}
    kind, text = raised(lambda: TieredCheckpointer.from_recipe(mine))
    assert kind == "TierRefusedError", (kind, text)
    for word in ("node-2", "mode 0777", "others can get in"):
        assert word in text, text
    os.chmod(path, 0o700)
    with TieredCheckpointer.from_recipe(mine) as checkpointer:
        checkpointer.save(1, _state(rank)).wait("disk")


def test_a_rank_that_can_not_open_its_memory_stops_all(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _one_can_not_open, recipe(tmp_path, memory_dir), str(memory_dir))


def _one_can_not_be_filled(rank: int, which: dict[str, Any]) -> None:
    """Rank 1's shard of a DTensor, then its copy of a plain tensor, is one number in many places."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))

    def state(value: float, expanded: str | None = None) -> dict[str, Any]:
        found = {name: torch.full((4,), value) for name in ("a", "shards", "w")}
        if expanded is not None and rank == 1:
            found[expanded] = torch.tensor(value).expand(4)
        return {**found, "shards": DTensor.from_local(found["shards"], mesh, [Shard(0)]), "epoch": value}

    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0, "shards")).wait("memory")
        for name in ("shards", "w"):
            target = state(0.0, name)
            kind, text = raised(lambda target=target: checkpointer.restore(target))
            assert kind == "MismatchError", (kind, text)
            for word in (f"{name}: its numbers share places", "can't be filled", "rank 1"):
                assert word in text, text
            assert bits(target) == bits(state(0.0)), "a refused state is left alone on all ranks"
        target = state(0.0)
        assert checkpointer.restore(target) == 1
        assert bits(target) == bits(state(1.0))


def test_a_tensor_that_one_rank_can_not_fill_is_refused_on_all(tmp_path: Path, memory_dir: Path) -> None:
    run(2, _one_can_not_be_filled, recipe(tmp_path, memory_dir, disk=None))


def _destroyed(rank: int, which: dict[str, Any]) -> None:
    import torch.distributed as dist

    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(1, _state(rank)).wait("disk")
    dist.destroy_process_group()
    checkpointer.save(2, _state(rank)).wait("memory")  # our groups are our own …
    import torch

    larger = {**_state(rank), "more": torch.ones(3)}
    for call in (lambda: checkpointer.save(3, larger), lambda: checkpointer.restore(_state(rank))):
        kind, text = raised(call)  # … but torch no longer knows them
        assert kind == "RankFailedError", (kind, text)
        assert "The process group was destroyed: close what uses it first" in text
    checkpointer.close()


def test_what_comes_after_the_end_of_the_process_group_works_or_is_an_error_of_ours(
    tmp_path: Path, memory_dir: Path
) -> None:
    run(2, _destroyed, recipe(tmp_path, memory_dir))


def _holds(rank: int, which: dict[str, Any]) -> None:
    from tests.distributed.dcp_jobs import pause

    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, _state(rank)).wait("memory")
        tell("open")
        pause()
        checkpointer.save(2, _state(rank)).wait("memory")


def _comes_second(rank: int, which: dict[str, Any]) -> tuple[str, str, list[int]]:
    from sm_tiered.errors import NamespaceInUseError

    with pytest.raises(NamespaceInUseError) as caught:
        TieredStorageWriter(which, step=1)
    return str(caught.value), type(caught.value).__name__, list(caught.value.pids)


def test_a_second_job_hears_whose_namespace_it_is(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None, in_use_wait_secs=0.2)
    first = start(2, _holds, which)
    for rank in range(2):
        assert first.heard(rank) == "open"
    for text, _, pids in run(2, _comes_second, which):
        assert sorted(pids) == sorted(first.pid(rank) for rank in range(2))
        for word in ("'run-1' is in use", str(first.pid(0)), "a namespace of its own"):
            assert word in text
    first.go()
    assert [end.trace for end in first.wait()] == [None, None]
    assert set(steps(memory_dir)) == {1, 2}


def _vanished(rank: int, which: dict[str, Any]) -> None:
    import torch.distributed as dist

    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(1, _state(rank)).wait("disk")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(which["tiers"]["memory"]["path"])
    dist.barrier()
    handle = checkpointer.save(2, _state(rank, 2.0))
    handle.wait("disk")
    state = _state(rank, -1.0)
    assert checkpointer.restore(state) == 2
    assert state["epoch"] == 2.0
    checkpointer.close()


def test_memory_that_somebody_deletes_does_not_stop_a_durable_save(tmp_path: Path, memory_dir: Path) -> None:
    run(2, _vanished, recipe(tmp_path, memory_dir / "gone"))
