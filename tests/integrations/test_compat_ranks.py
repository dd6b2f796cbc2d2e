"""The compat writer and reader with two ranks: no collective of a save meets the training's, and all do alike."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sm_tiered.settings import S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from tests.distributed import dcp_jobs
from tests.distributed.dcp_jobs import NAMESPACE


def environment(memory: Path, log: Path, **more: str) -> dict[str, str]:
    disk = {} if str(memory).startswith("/dev/shm") else {"SM_TIERED__TIERS__MEMORY__ALLOW_DISK": "true"}
    limits = {"SM_TIERED__GROUP_TIMEOUT_SECS": "40", "SM_TIERED__DRAIN_TIMEOUT_SECS": "40"}
    return {"CHECKPOINT_MEMORY": str(memory), "AWS_REGION": "us-east-1", "TMPDIR": str(log), **limits, **disk, **more}


def config(log: str, base: str = "", **given: Any) -> Any:
    from sm_tiered_dcp.compat import SageMakerCheckpointConfig, logs

    logs.DIRECTORY = log
    return SageMakerCheckpointConfig(
        **{"namespace": NAMESPACE, "world_size": torch.distributed.get_world_size(), "s3_tier_base_path": base, **given}
    )


def save(which: Any, state: Any, step: int) -> Any:
    """Return what the future says; no thread of DCP's is left when async_save returns."""
    from torch.distributed import checkpoint as dcp

    from sm_tiered_dcp.compat import SageMakerTieredStorageWriter

    writer = SageMakerTieredStorageWriter(which, step=step)
    future: Any = dcp.async_save(state, storage_writer=writer)
    names = [thread.name for thread in threading.enumerate()]
    assert not any(name.startswith("AsyncCheckpointExecutor") for name in names), names
    return future.exception()


def load(which: Any, state: Any) -> int | None:
    from torch.distributed import checkpoint as dcp

    from sm_tiered_dcp.compat import SageMakerTieredStorageReader

    reader = SageMakerTieredStorageReader(which)
    dcp.load(state, storage_reader=reader)
    return reader.step


def trains(rank: int, log: str, steps: int) -> Any:
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 64), bucket_cap_mb=1)
    optimizer = torch.optim.AdamW(model.parameters())
    which = config(log)
    torch.manual_seed(rank)
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
        assert save(which, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, step) is None
    fresh = DistributedDataParallel(torch.nn.Linear(64, 64))
    other = torch.optim.AdamW(fresh.parameters())
    target = {"model": fresh.state_dict(), "optimizer": other.state_dict()}
    assert load(which, target) == steps - 1
    other.load_state_dict(target["optimizer"])
    assert dcp_jobs.bits(fresh.state_dict()) == dcp_jobs.bits(model.state_dict())
    assert dcp_jobs.bits(other.state_dict()["state"]) == dcp_jobs.bits(optimizer.state_dict()["state"])
    return dcp_jobs.bits(model.state_dict())


def test_a_ddp_job_that_saves_at_every_step_never_meets_a_collective_of_the_save(
    tmp_path: Path, memory_dir: Path
) -> None:
    first, second = dcp_jobs.run(2, trains, str(tmp_path / "log"), 25, env=environment(memory_dir, tmp_path))
    assert first == second


def counts_wrong(rank: int, log: str) -> list[tuple[str, str]]:
    from sm_tiered_dcp.compat import SageMakerTieredStorageReader, SageMakerTieredStorageWriter

    found = [dcp_jobs.raised(lambda: config(log, world_size=1))]
    which = config(log)
    which.__dict__["world_size"] = 3  # a process group that came later
    found.append(dcp_jobs.raised(lambda: SageMakerTieredStorageWriter(which, step=1)))
    found.append(dcp_jobs.raised(lambda: SageMakerTieredStorageReader(which)))
    return found


def test_a_world_size_that_is_not_the_process_groups_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    for found in dcp_jobs.run(2, counts_wrong, str(tmp_path / "log"), env=environment(memory_dir, tmp_path)):
        assert [kind for kind, _ in found] == ["ConfigError"] * 3
        assert "world_size=1 but the process group has 2 ranks. Count processes, not data-parallel" in found[0][1]
        assert all("world_size=3 but the process group has 2 ranks" in text for _, text in found[1:])


def fails_once(rank: int, log: str) -> list[str | None]:
    which = config(log)
    found: list[str | None] = []
    for step in range(3):
        value: Any = (lambda: 0) if step == 1 and rank == 1 else 7
        failure = save(which, {"w": torch.full((4,), float(step)), "value": value}, step)
        found.append(str(failure) if failure is not None else None)
    target = {"w": torch.zeros(4), "value": 0}
    assert load(which, target) == 2
    assert target["w"].eq(2.0).all()
    return found


def test_a_rank_that_can_not_save_ends_no_training_and_all_futures_tell_of_it(tmp_path: Path, memory_dir: Path) -> None:
    for found in dcp_jobs.run(2, fails_once, str(tmp_path / "log"), env=environment(memory_dir, tmp_path)):
        first, second, third = found
        assert (first, third) == (None, None)
        assert second is not None
        assert "value: function can't be stored" in second


def told(call: Callable[[], object]) -> str:
    """Return what *call* raises; DCP's own error is no Exception."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    return str(caught.value)


def differ(rank: int, log: str) -> list[str]:
    from torch.distributed import checkpoint as dcp

    from sm_tiered_dcp.compat import SageMakerTieredStorageReader, SageMakerTieredStorageWriter, session

    which = config(log)
    found = [str(save(which, {"w": torch.full((4,), 1.0)}, 1))]
    writer = SageMakerTieredStorageWriter(which, step=2)
    which.save_to_s3 = rank == 1  # and there is no S3
    future: Any = dcp.async_save({"w": torch.full((4,), 2.0)}, storage_writer=writer)
    found.append(str(future.exception()))
    found.append(told(lambda: dcp.save({"w": torch.full((4,), 2.0)}, storage_writer=writer)))
    which.save_to_s3 = False
    if rank == 1:
        found.append(told(lambda: SageMakerTieredStorageReader(which, step="1")))  # type: ignore[arg-type]
    else:
        SageMakerTieredStorageReader(which, step=1)
    found.append(told(lambda: SageMakerTieredStorageWriter(which, step=3)))
    assert load(which, {"w": torch.zeros(4)}) == 1
    found.append(str(save(which, {"w": torch.full((4,), 3.0)}, 3)))
    held = session._sessions.popitem()[1]
    group = held.engine.group
    held.close()
    writer.close()  # long after its engine: nobody's groups are closed but ours
    group.close()
    value = torch.ones(1)
    torch.distributed.all_reduce(value)
    assert value.item() == 2
    assert load(which, {"w": torch.zeros(4)}) == 3
    return found


def test_what_one_rank_alone_is_told_wrongly_is_told_to_all_and_holds_up_none(tmp_path: Path, memory_dir: Path) -> None:
    found = dcp_jobs.run(2, differ, str(tmp_path / "log"), env=environment(memory_dir, tmp_path))
    del found[1][3]
    for saved, later, sync, refused, again in found:
        assert (saved, again) == ("None", "None")
        assert "there was no s3_tier_base_path when this writer was made" in later
        assert "there was no s3_tier_base_path when this writer was made" in sync
        assert "step must be an int, got str '1'" in refused
        assert "repeat the load" in refused


def is_sharded(rank: int, log: str) -> list[str]:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from sm_tiered_dcp.compat import SageMakerTieredStorageReader

    which, mesh = config(log), init_device_mesh("cpu", (2,))
    moment = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    groups = [{"params": [0]}]
    assert save(which, {"optimizer": {"state": {0: {"m": moment}}, "param_groups": groups}}, 1) is None
    target = {"optimizer": {"state": {}, "param_groups": groups}}
    reader = SageMakerTieredStorageReader(which)
    return [told(lambda: dcp.load(target, storage_reader=reader))]


def test_a_fresh_optimizer_for_which_shards_are_stored_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    for (text,) in dcp_jobs.run(2, is_sharded, str(tmp_path / "log"), env=environment(memory_dir, tmp_path)):
        assert "optimizer: the state is empty, and optimizer.state.0.m is stored in shards" in text


def uses_a_process(rank: int, log: str) -> str:
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    from sm_tiered_dcp.compat import SageMakerTieredStorageWriter

    which = config(log)
    writer = SageMakerTieredStorageWriter(which, step=1)
    kind = AsyncCheckpointerType.PROCESS
    future: Any = dcp.async_save({"w": torch.ones(4)}, storage_writer=writer, async_checkpointer_type=kind)
    return str(future.exception())


@pytest.mark.long
def test_dcps_own_process_is_refused_by_the_future(tmp_path: Path, memory_dir: Path) -> None:
    for text in dcp_jobs.run(1, uses_a_process, str(tmp_path / "log"), env=environment(memory_dir, tmp_path)):
        assert "AsyncCheckpointerType.THREAD" in text


def saves_to_s3(rank: int, log: str, base: str) -> list[tuple[str, ...]]:
    from torch.distributed import checkpoint as dcp

    from sm_tiered_dcp.compat import SageMakerTieredStorageWriter, session

    which = config(log, base)
    found: list[tuple[str, ...]] = []
    for step in range(2):
        which.save_to_s3 = step == 1 and rank == 1
        writer = SageMakerTieredStorageWriter(which, step=step)
        state = {"w": torch.full((4,), float(step))}
        if step:
            dcp.save(state, storage_writer=writer)
        else:
            dcp.async_save(state, storage_writer=writer)
        assert writer.handle is not None
        found.append(writer.handle.tiers)
    for each in session._sessions.values():
        each.finish()
    return found


def test_all_ranks_save_to_s3_when_one_is_told_to_and_the_memory_may_be_lost(
    tmp_path: Path, memory_dir: Path, s3_settings: S3Settings
) -> None:
    env = environment(memory_dir, tmp_path, AWS_ENDPOINT_URL=s3_settings.endpoint_url or "")
    base = f"s3://{s3_settings.bucket}/{s3_settings.prefix}"
    for found in dcp_jobs.run(2, saves_to_s3, str(tmp_path / "log"), base, env=env):
        assert found == [("memory",), ("memory", "s3")]
    shutil.rmtree(memory_dir / NAMESPACE)
    assert dcp_jobs.run(2, resumes, str(tmp_path / "log"), base, env=env) == [(1, 1.0)] * 2


def resumes(rank: int, log: str, base: str) -> tuple[int | None, float]:
    target = {"w": torch.zeros(4)}
    return load(config(log, base), target), target["w"][0].item()


def saves_to_the_cluster(rank: int, log: str) -> list[tuple[str, ...]]:
    from sm_tiered_dcp.compat import SageMakerTieredStorageWriter, session

    which = config(log)
    found: list[tuple[str, ...]] = []
    for step in range(4):
        assert save(which, {"w": torch.full((4,), float(step))}, step) is None
    (held,) = session._sessions.values()
    writer = SageMakerTieredStorageWriter(which, step=9)
    for handle in [handle for handle, tier in held.turns._open if tier == "cluster"]:
        handle.wait("cluster")
    from torch.distributed import checkpoint as dcp

    dcp.save({"w": torch.full((4,), 9.0)}, storage_writer=writer)
    assert writer.handle is not None
    found.append(writer.handle.tiers)
    writer.handle.wait("cluster")
    return found


def test_the_clusters_memory_is_saved_to_with_every_save_and_survives_the_node(
    tmp_path: Path, memory_dir: Path
) -> None:
    with StandInDaemon() as daemon:
        env = environment(memory_dir, tmp_path, SM_TIERED_HYPERPOD_URL=daemon.url)
        for found in dcp_jobs.run(2, saves_to_the_cluster, str(tmp_path / "log"), env=env):
            assert found == [("memory", "cluster")]
        shutil.rmtree(memory_dir / NAMESPACE)
        assert dcp_jobs.run(2, resumes, str(tmp_path / "log"), "", env=env) == [(9, 9.0)] * 2


def goes_on_without(rank: int, log: str, base: str) -> int:
    which = config(log, base)
    for step in range(6):
        assert save(which, {"w": torch.full((4,), float(step))}, step) is None
    return 6


def test_a_service_that_is_not_there_holds_up_nobody(tmp_path: Path, memory_dir: Path) -> None:
    env = environment(memory_dir, tmp_path, SM_TIERED_HYPERPOD_URL="http://127.0.0.1:9")
    assert dcp_jobs.run(2, goes_on_without, str(tmp_path / "log"), "", env=env) == [6, 6]


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks_loads_what_two_saved(world: int, tmp_path: Path, memory_dir: Path) -> None:
    env = environment(memory_dir, tmp_path)
    dcp_jobs.run(2, goes_on_without, str(tmp_path / "log"), "", env=env)
    assert dcp_jobs.run(world, resumes, str(tmp_path / "log"), "", env=env) == [(5, 5.0)] * world
