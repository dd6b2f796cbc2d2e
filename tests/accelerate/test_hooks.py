"""The hooks: weights through the tiers, the rest where Accelerate puts it, and a load that fits them together."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.errors import CheckpointNotFoundError, ConfigError, MismatchError
from sm_tiered_accelerate import TieredHooks
from tests.accelerate.training import Training, accelerator_for, join
from tests.distributed.dcp_jobs import recipe, run, steps


def hooked(which: dict[str, Any]) -> tuple[Training, TieredHooks]:
    training = Training(accelerator_for())
    tiered = TieredHooks(training.accelerator, which)
    training.accelerator.register_save_state_pre_hook(tiered.save_hook)
    training.accelerator.register_load_state_pre_hook(tiered.load_hook)
    return training, tiered


def advance(training: Training) -> None:
    batches = training.batches()
    for _ in range(2):
        next(batches)


def save_and_load(rank: int, world: int, which: dict[str, Any], out: str) -> None:
    """Three saves, then back to the second and three more; loaded again by another launch, in any order."""
    join(rank, world)
    expected: dict[str, Any] = {}
    for launch in range(2):
        training, tiered = hooked(which)
        if launch:
            training.accelerator.load_state(f"{out}/0-1")
        for save in range(3):
            advance(training)
            with pytest.warns(UserWarning, match="only the weights go through the tiers") if save == 0 else nothing():
                training.accelerator.save_state(f"{out}/{launch}-{save}")
            expected[f"{launch}-{save}"] = training.weights()
        training.accelerator.wait_for_everyone()
        tiered.wait()
        tiered.close()
    for name in ("1-2", "0-1", "1-0"):
        training, tiered = hooked(which)
        training.accelerator.load_state(f"{out}/{name}")
        assert training.weights() == expected[name], name
        tiered.close()


def nothing() -> Any:
    context: Any = warnings.catch_warnings()
    return context


@pytest.mark.parametrize("world", [0, 2])
def test_a_directory_and_its_weights_belong_together(tmp_path: Path, memory_dir: Path, world: int) -> None:
    which = recipe(tmp_path, memory_dir, disk=None, memory={"keep": {"latest": 8}})
    run(world, save_and_load, world, which, str(tmp_path / "out"))
    directory = tmp_path / "out" / "0-1"
    assert not (directory / "model.safetensors").exists(), "Accelerate wrote the weights as well"
    assert (directory / "optimizer.bin").exists()
    assert sorted(steps(memory_dir)) == [0, 1, 2, 3, 4, 5], "a step stands for two directories"


def test_what_does_not_fit_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None)
    stock = Training(accelerator_for())
    stock.accelerator.save_state(str(tmp_path / "stock"))
    training, tiered = hooked(which)
    with pytest.raises(MismatchError, match=r"stock has no sm_tiered_weights\.json"):
        training.accelerator.load_state(str(tmp_path / "stock"))
    (tmp_path / "stock" / "sm_tiered_weights.json").write_text('{"step": 7}')
    with pytest.raises(CheckpointNotFoundError, match="step 7 is on no tier"):
        training.accelerator.load_state(str(tmp_path / "stock"))
    tiered.close()


def test_where_hooks_see_no_weights_they_are_refused() -> None:
    from accelerate.utils import DistributedType

    accelerator: Any = accelerator_for()
    accelerator.state._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    with pytest.raises(ConfigError, match=r"hooks see no weights where distributed_type is DEEPSPEED.*attach"):
        TieredHooks(accelerator, {})
    accelerator_for()
