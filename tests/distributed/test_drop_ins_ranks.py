"""``dcp.save``, ``dcp.async_save`` and ``dcp.load`` through the tiers, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from tests.distributed.dcp_jobs import async_save, bits, recipe, run, step_dir

WORLD = 2


def _state(value: float = -1.0) -> dict[str, Any]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    whole = torch.arange(21.0).view(7, 3)
    return {
        "shards": distribute_tensor(whole + value, mesh, [Shard(0)]),
        "copies": distribute_tensor(whole - value, mesh, [Replicate()]),
        "plain": torch.full((1000,), value),
        "nested": {"list": [torch.tensor(value), {"lr": value}]},
        "epoch": int(value),
    }


def _spoil(state: dict[str, Any]) -> None:
    nan = float("nan")
    for tensor in (state["shards"].to_local(), state["copies"].to_local(), state["plain"], state["nested"]["list"][0]):
        tensor.fill_(nan)
    state["nested"]["list"][1]["lr"] = nan
    state["epoch"] = -99


def _load(which: dict[str, Any], step: int | None = None) -> tuple[int | None, dict[str, Any]]:
    import torch.distributed.checkpoint as dcp

    state = _state()
    reader = TieredStorageReader(which, step=step)
    dcp.load(state, storage_reader=reader)
    reader.close()
    return reader.step, state


def _refused(call: Any) -> str:
    try:
        value = call()
    except BaseException as error:  # DCP's own derives from it
        return f"{type(error).__name__}: {error}"
    pytest.fail(f"nothing was raised; returned {value!r}")


def _round_trips(rank: int, which: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    keeper = TieredCheckpointer.from_recipe(which)
    writer = TieredStorageWriter(which, step=1)
    dcp.save(_state(1.0), storage_writer=writer)
    assert writer.handle is not None
    writer.handle.wait("disk")
    step, state = _load(which)
    assert (step, bits(state)) == (1, bits(_state(1.0)))

    futures: list[Any] = []
    for step in (2, 3):
        writer = TieredStorageWriter(which, step=step)
        state = _state(float(step))
        futures.append(async_save(state, writer))
        _spoil(state)
        futures[-1].result()
    for step in (3, 2):
        found, state = _load(which, step)
        assert (found, bits(state)) == (step, bits(_state(float(step))))
    assert writer.handle is not None
    writer.handle.wait("memory")

    text = _refused(lambda: dcp.async_save(_state(8.0), storage_writer=TieredStorageWriter(which, step=8)))
    assert text.startswith("ConfigError: dcp.async_save was called without our process group"), text
    assert "process_group=writer.process_group" in text

    writer = TieredStorageWriter(which, step=9)
    by_process = AsyncCheckpointerType.PROCESS
    text = _refused(lambda: async_save(_state(9.0), writer, async_checkpointer_type=by_process).result())
    assert "can't be sent to another process" in text, text
    assert "AsyncCheckpointerType.THREAD" in text
    keeper.close()


def test_a_state_round_trips_and_what_can_not_work_is_refused_on_all_ranks(tmp_path: Path, memory_dir: Path) -> None:
    run(WORLD, _round_trips, recipe(tmp_path, memory_dir, memory={"keep": {"latest": 4}}))


def _save_two(rank: int, which: dict[str, Any]) -> None:
    import torch.distributed.checkpoint as dcp

    with TieredCheckpointer.from_recipe(which):
        for step in (1, 2):
            writer = TieredStorageWriter(which, step=step)
            dcp.save(_state(float(step)), storage_writer=writer)
            assert writer.handle is not None
            writer.handle.wait("disk")


def _expect(rank: int, which: dict[str, Any], step: int) -> None:
    found, state = _load(which)
    assert (found, bits(state)) == (step, bits(_state(float(step))))


def test_damage_on_one_rank_takes_all_to_the_same_copy_and_then_to_the_same_older_step(
    tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    run(WORLD, _save_two, which)

    def damage(root: Path, name: str) -> None:
        path = step_dir(root, 2) / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damage(memory_dir, "__1_0.distcp")
    run(WORLD, _expect, which, 2)
    damage(tmp_path / "disk", "__1_0.distcp")
    run(WORLD, _expect, which, 1)
