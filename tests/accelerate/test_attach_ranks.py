"""`attach` on two ranks: each rank's own files, hooks, and what FSDP writes itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from torch import nn

from sm_tiered.errors import MismatchError, TieredError
from sm_tiered_accelerate import attach
from tests.accelerate.training import Average, Training, accelerator_for, join
from tests.distributed.dcp_jobs import bits, raised, recipe, run, step_dir


def test_each_rank_has_a_loader_of_its_own(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None)
    saved = run(2, uneven, which)
    directory = step_dir(memory_dir, 1)
    found = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.bin"))
    assert found == [
        "dl_state_dict.bin",
        "optimizer.bin",
        "rank_00001/dl_state_dict.bin",
        "rank_00001/sm_tiered_loaders.bin",
        "scheduler.bin",
        "sm_tiered_loaders.bin",
    ]
    own = [directory / "dl_state_dict.bin", directory / "rank_00001" / "dl_state_dict.bin"]
    assert [torch.load(path, weights_only=True)["_num_yielded"] for path in own] == saved == [1, 2]
    assert run(2, other_loaders, which) == saved


def uneven(rank: int, which: dict[str, Any]) -> int:
    """Save with loaders that stand after another number of batches on each rank."""
    join(rank, 2)
    training = Training(accelerator_for())
    with attach(training.accelerator, which) as tiered:
        batches = iter(training.loader)
        for _ in range(rank + 1):
            next(batches)
        tiered.save(1).wait("memory")
        return training.loader.state_dict()["_num_yielded"]


def other_loaders(rank: int, which: dict[str, Any]) -> int:
    """Return after how many batches this rank's loader goes on."""
    join(rank, 2)
    training = Training(accelerator_for())
    with attach(training.accelerator, which) as tiered:
        assert tiered.restore() == 1
        return training.loader.base_dataloader.state_dict()["_num_yielded"]


def on_two_nodes(rank: int, whiches: list[dict[str, Any]], restores: bool) -> Any:
    join(rank, 2)
    training = Training(accelerator_for())
    with attach(training.accelerator, whiches[rank]) as tiered:
        batches = training.batches()
        if restores:
            assert tiered.restore() == 1
        else:
            for _ in range(2):
                next(batches)
            tiered.save(1).wait("memory")
        return [training.weights(), *(next(batches) for _ in range(3))]


def test_two_nodes_restore_from_their_memory_alone(tmp_path: Path, memory_dir: Path) -> None:
    whiches = [recipe(tmp_path, memory_dir / str(node), disk=None) for node in range(2)]
    saved = run(2, on_two_nodes, whiches, False)
    assert run(2, on_two_nodes, whiches, True) == saved


def one_fails(rank: int, which: dict[str, Any]) -> tuple[str, str]:
    join(rank, 2)
    training = Training(accelerator_for())
    with attach(training.accelerator, which) as tiered:
        if rank == 1:
            training.accelerator.register_for_checkpointing(Average())
        tiered.save(1).wait("memory")
        found = raised(tiered.restore)
        tiered.save(2).wait("memory")
    return found


def test_what_one_rank_refuses_all_raise(tmp_path: Path, memory_dir: Path) -> None:
    ends = run(2, one_fails, recipe(tmp_path, memory_dir, disk=None))
    for kind, text in ends:
        assert kind == MismatchError.__name__
        assert "registered for checkpointing" in text


def one_copy_fails(rank: int, which: dict[str, Any], out: str) -> list[str]:
    """Rank 1's copy can't be made; nobody may be left waiting for it."""
    join(rank, 2)
    training = Training(accelerator_for())
    tiered = attach(training.accelerator, which)
    found: list[str] = []
    try:
        target = Path(out) / str(rank)
        if rank == 1:
            target.parent.mkdir(parents=True)
            target.write_text("a file where a directory should be")
        training.accelerator.save_state(str(target))
        for step in (1, 2):
            try:
                tiered.save(step).wait("memory")
                found.append("saved")
            except TieredError as error:
                found.append(type(error).__name__)
    finally:
        tiered.detach()
    return found


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_copy_that_fails_on_one_rank_holds_up_no_other(tmp_path: Path, memory_dir: Path, on_error: str) -> None:
    which = {**recipe(tmp_path, memory_dir, disk=None), "on_error": on_error}
    ends = run(2, one_copy_fails, which, str(tmp_path / "out"))
    told = [["RankFailedError", "saved"], ["SaveError", "saved"]]
    assert ends == (told if on_error == "raise" else [["saved", "saved"]] * 2)


def sharded(rank: int, which: dict[str, Any], state: str, trained: int) -> Any:
    """Accelerate shards nothing on CPUs: what it would have prepared is made by hand, all that saves is its own."""
    from torch.distributed.fsdp import fully_shard

    join(rank, 2)
    accelerator: Any = accelerator_for()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=state)
    accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(trained)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 1))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator._models, accelerator._optimizers = [model], [optimizer]
    for _ in range(trained):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    with attach(accelerator, which) as tiered:
        if trained > 1:
            tiered.save(trained).wait("disk")
        else:
            assert tiered.restore() == 3
    return bits([model.state_dict(), optimizer.state_dict()["state"]])


@pytest.mark.parametrize("state", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
@pytest.mark.parametrize("wiped", [False, True])
def test_what_fsdp_writes_goes_through_the_tiers(tmp_path: Path, memory_dir: Path, state: str, wiped: bool) -> None:
    which = recipe(tmp_path, memory_dir)
    saved = run(2, sharded, which, state, 3)
    for root in (memory_dir, tmp_path / "disk"):
        names = {str(path.relative_to(step_dir(root, 3))) for path in step_dir(root, 3).rglob("*") if path.is_file()}
        if state == "SHARDED_STATE_DICT":
            for folder in ("pytorch_model_fsdp_0", "optimizer_0"):
                assert {f"{folder}/{name}" for name in (".metadata", "__0_0.distcp", "__1_0.distcp")} <= names
        else:
            assert {"pytorch_model_fsdp.bin", "optimizer.bin"} <= names
    if wiped:
        os.rename(memory_dir / "run-1", memory_dir / "lost")
    assert run(2, sharded, which, state, 1) == saved
