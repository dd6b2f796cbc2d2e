"""`attach`: what a script sees of it, and what stock Accelerate reads of what it saved."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import DistributedType, ProjectConfiguration
from safetensors.torch import load_file
from torch import nn

from sm_tiered.errors import (
    CheckpointNotFoundError,
    ConfigError,
    MismatchError,
    NothingRestorableError,
    RestoreIncompleteError,
    SaveError,
    TierFullError,
)
from sm_tiered_accelerate import attach, stock
from sm_tiered_accelerate.capture import catching
from tests.accelerate.training import Training, accelerator_for
from tests.distributed.dcp_jobs import ROOT, recipe, s3_tier, step_dir, steps


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    """Memory at every step."""
    return recipe(tmp_path, memory_dir, disk=None)


@pytest.fixture
def both(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    """Memory at every step, the disk every second."""
    return recipe(tmp_path, memory_dir, disk={"save": {"every_n_steps": 2}})


def advance(training: Training, count: int = 1) -> None:
    """Train *count* steps."""
    for _, stepped in training.batches():
        count -= stepped
        if count == 0:
            return


def fresh(width: int = 16, **options: Any) -> Training:
    return Training(accelerator_for(**options), width)


def moved(training: Training) -> Training:
    """The same training, with other weights."""
    for parameter in training.model.parameters():
        nn.init.constant_(parameter, random.random())
    return training


def test_a_script_that_stays_as_it_is(which: dict[str, Any]) -> None:
    training = fresh()
    with attach(training.accelerator, which):
        advance(training, 2)
        where = training.accelerator.save_state()
        assert where.is_dir()
        expected = training.weights()
    training = moved(fresh())
    with attach(training.accelerator, which) as tiered:
        training.accelerator.load_state()
        assert training.weights() == expected
        assert training.accelerator.save_iteration == 1, "Accelerate itself begins at 0 again"
        assert training.accelerator.step == 4
        assert tiered.restored is not None
        training.accelerator.save_state()
        tiered.wait()
        assert tiered.latest() == 1
        training.accelerator.load_state()
        assert tiered.restored.step == 1


def test_nothing_saved_is_none_or_an_error_of_its_own(which: dict[str, Any]) -> None:
    training = fresh()
    with attach(training.accelerator, which) as tiered:
        assert tiered.restore() is None
        assert tiered.restored is None
        with pytest.raises(CheckpointNotFoundError, match="nothing was ever saved in namespace 'run-1'"):
            training.accelerator.load_state()


def test_policies_decide_where_a_step_goes(both: dict[str, Any], tmp_path: Path, memory_dir: Path) -> None:
    training = fresh()
    with attach(training.accelerator, both) as tiered:
        for step in range(1, 5):
            handle = tiered.maybe_save(step)
            assert handle is not None
            assert set(handle.tiers) == ({"memory", "disk"} if step % 2 == 0 else {"memory"})
            tiered.wait()
    assert list(steps(tmp_path / "disk")) == [2, 4]


@pytest.mark.parametrize("safe", [True, False])
def test_stock_accelerate_reads_each_tier(both: dict[str, Any], tmp_path: Path, memory_dir: Path, safe: bool) -> None:
    training = fresh()
    stock = tmp_path / "stock"
    with attach(training.accelerator, both) as tiered:
        advance(training, 2)
        training.accelerator.save_state(safe_serialization=safe)
        tiered.wait()
        expected = training.weights()
    training.accelerator.save_state(str(stock), safe_serialization=safe)
    for root in (memory_dir, tmp_path / "disk"):
        directory = step_dir(root, 0)
        for name in os.listdir(stock):
            assert (directory / name).exists(), name
        if safe:
            assert (directory / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
        other = moved(fresh())
        other.accelerator.load_state(str(directory))
        assert other.weights() == expected


def test_detach_gives_the_accelerator_back(which: dict[str, Any], tmp_path: Path) -> None:
    training = fresh()
    patched = (training.accelerator, training.loader, training.loader.base_dataloader)
    before = [set(vars(one)) for one in patched]
    tiered = attach(training.accelerator, which)
    assert [set(vars(one)) for one in patched] != before
    tiered.detach()
    tiered.detach()
    assert [set(vars(one)) for one in patched] == before
    training.accelerator.save_state(str(tmp_path / "stock"))
    assert (tmp_path / "stock" / "model.safetensors").exists()
    attach(training.accelerator, which).detach()


def test_a_path_gets_a_copy_that_stock_accelerate_reads(which: dict[str, Any], tmp_path: Path) -> None:
    training = fresh()
    with attach(training.accelerator, which) as tiered:
        advance(training)
        for step in range(4):
            assert training.accelerator.save_state(str(tmp_path / f"copy-{step}")) == tmp_path / f"copy-{step}"
        expected = training.weights()
        tiered.wait()
        links = {path.stat().st_nlink for path in (tmp_path / "copy-3").iterdir()}
        assert links == {1}
    for step in range(4):
        training = moved(fresh())
        training.accelerator.load_state(str(tmp_path / f"copy-{step}"))
        assert training.weights() == expected
    assert not [path for path in (tmp_path / "copy-3").iterdir() if path.name.startswith(".")]


def test_a_copy_without_a_memory_tier_is_accelerates_own(tmp_path: Path) -> None:
    which = recipe(tmp_path, None)
    training = fresh()
    with attach(training.accelerator, which) as tiered:
        training.accelerator.save_state(str(tmp_path / "copy"))
        assert (tmp_path / "copy" / "model.safetensors").exists()
        tiered.wait()
        expected = training.weights()
    training = moved(fresh())
    with attach(training.accelerator, which) as tiered:
        assert tiered.restore() == 0
        assert training.weights() == expected


def test_a_copy_is_of_what_is_there_now_and_is_waited_for(which: dict[str, Any], tmp_path: Path) -> None:
    training = fresh()
    out = str(tmp_path / "copy")
    with attach(training.accelerator, which) as tiered:
        for value in (1.0, 2.0, 3.0):
            nn.init.constant_(training.model[0].bias, value)
            if value > 1:
                tiered.maybe_save(5)
            training.accelerator.save_state(out)
            training.accelerator.load_state(out)
            assert set(training.model[0].bias.tolist()) == {value}, "an older copy, or half of one"


ENDS_WITHOUT_A_WORD = """
import sys, torch
from accelerate import Accelerator
from sm_tiered_accelerate import attach
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(2000, 2000))
attach(accelerator, {which!r})
accelerator.save_state({out!r})
"""


def test_a_script_that_ends_without_a_word_has_its_copy(which: dict[str, Any], tmp_path: Path) -> None:
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    program = ENDS_WITHOUT_A_WORD.format(which=which, out=str(tmp_path / "copy"))
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=60)
    assert load_file(tmp_path / "copy" / "model.safetensors")["weight"].shape == (2000, 2000)
    assert (tmp_path / "copy" / "random_states_0.pkl").exists()


@pytest.mark.parametrize("on_error", ["warn", "raise"])
def test_a_copy_that_fails_is_told(
    which: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model.safetensors").mkdir()
    training = fresh()
    tiered = attach(training.accelerator, {**which, "on_error": on_error})
    try:
        training.accelerator.save_state(str(tmp_path / "copy"))
        if on_error == "raise":
            with pytest.raises(SaveError, match=r"the copy in .*copy was not made"):
                tiered.wait()
        else:
            tiered.wait()
            assert "was not made" in caplog.text
    finally:
        tiered.detach()


def test_automatic_names_delete_nothing(which: dict[str, Any], tmp_path: Path) -> None:
    project = ProjectConfiguration(project_dir=str(tmp_path / "project"), automatic_checkpoint_naming=True)
    training = fresh(project_config=project)
    with attach(training.accelerator, which) as tiered:
        for step in range(3):
            training.accelerator.save_state()
            tiered.wait()
            assert tiered.latest() == step
        assert training.accelerator.save_iteration == 3
        training.accelerator.load_state()
    assert not (tmp_path / "project" / "checkpoints").exists()


def test_bad_input_of_attach(which: dict[str, Any]) -> None:
    project = ProjectConfiguration(total_limit=2)
    with pytest.raises(ConfigError, match=r"total_limit=2.*keep policies.*Leave total_limit out"):
        attach(accelerator_for(project_config=project), which)
    accelerator = accelerator_for()
    with attach(accelerator, which) as tiered:
        with pytest.raises(ConfigError, match=r"attached already.*detach\(\)"):
            attach(accelerator, which)
        for call in (tiered.restore, lambda: tiered.maybe_save(1), accelerator.save_state, accelerator.load_state):
            with pytest.raises(ConfigError, match=r"has prepared nothing.*accelerator\.prepare"):
                call()


@pytest.mark.parametrize(
    ("output_dir", "match"),
    [
        ("{disk}/run-1/x", r"lies in tier 'disk', at .*Leave output_dir out"),
        ("{memory}", r"lies in tier 'memory'"),
        ("s3://bucket/x", r"'s3://bucket/x' is in no tier of the recipe, which has no S3 tier"),
        (7, r"output_dir must be a path, got int 7"),
    ],
)
def test_bad_output_dirs(both: dict[str, Any], tmp_path: Path, memory_dir: Path, output_dir: Any, match: str) -> None:
    if isinstance(output_dir, str):
        output_dir = output_dir.format(disk=tmp_path / "disk", memory=memory_dir)
    training = fresh()
    with attach(training.accelerator, both) as tiered:
        with pytest.raises(ConfigError, match=match):
            training.accelerator.save_state(output_dir)
        assert tiered.latest() is None
        assert not Path("s3:").exists()


def refused(training: Training, which: dict[str, Any]) -> str:
    """What a restore says; it must leave all as it was."""
    before = training.weights()
    with attach(training.accelerator, which) as tiered, pytest.raises(MismatchError) as found:
        tiered.restore()
    assert training.weights() == before
    return str(found.value)


def test_another_setup_is_refused_before_anything_is_touched(which: dict[str, Any]) -> None:
    training = fresh()
    with attach(training.accelerator, which) as tiered:
        tiered.save(1)
    assert "0.weight has shape [16, 4] in the checkpoint, [8, 4] here" in refused(moved(fresh(width=8)), which)
    other = moved(fresh())
    other.accelerator.register_for_checkpointing(training.average)
    assert "1 objects registered for checkpointing, this Accelerator 2" in refused(other, which)
    other = moved(fresh())
    other.model.add_module("more", nn.Linear(1, 1))
    assert "the checkpoint lacks more.bias, more.weight" in refused(other, which)


def test_the_files_of_another_program_are_refused(which: dict[str, Any]) -> None:
    from sm_tiered_dcp.files import BytesFile, FileSet
    from sm_tiered_dcp.tiered_files import TieredFiles

    with TieredFiles.from_recipe(which) as files:
        files.save(1, lambda step: FileSet(own={"x": BytesFile(b"x")}))
    assert "has no file 'sm_tiered_accelerate.json'" in refused(moved(fresh()), which)


def test_damage_is_found_and_never_loaded(both: dict[str, Any], tmp_path: Path, memory_dir: Path) -> None:
    training = fresh()
    with attach(training.accelerator, both) as tiered:
        tiered.save(1).wait("disk")
        expected = training.weights()
    for root in (memory_dir, tmp_path / "disk"):
        training = moved(fresh())
        before = training.weights()
        path = step_dir(root, 1) / "optimizer.bin"
        data = bytearray(path.read_bytes())
        data[-30] ^= 4
        path.write_bytes(data)
        with attach(training.accelerator, both) as tiered:
            if root == memory_dir:
                assert tiered.restore() == 1
                assert tiered.restored is not None
                assert "disk" in tiered.restored.tier
                assert training.weights() == expected
            else:
                with pytest.raises(NothingRestorableError, match=r"optimizer\.bin"):
                    tiered.restore()
                assert training.weights() == before


class Unreadable:
    """A custom object whose state does not load."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise ValueError("not today")


def test_what_accelerate_cannot_load_is_told_as_a_state_not_to_be_used(which: dict[str, Any]) -> None:
    for restores in (False, True):
        training = fresh()
        training.accelerator.register_for_checkpointing(Unreadable())
        with attach(training.accelerator, which) as tiered:
            if restores:
                with pytest.raises(RestoreIncompleteError, match="not today"):
                    tiered.restore()
            else:
                tiered.save(1)


def test_a_save_that_fails_leaves_nothing_and_the_next_is_well(
    both: dict[str, Any], memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = fresh()
    with attach(training.accelerator, both) as tiered:
        with monkeypatch.context() as patch:
            patch.setattr(training.average, "state_dict", lambda: 1 / 0, raising=False)
            with pytest.raises(ZeroDivisionError):
                tiered.save(1)
        assert not list(memory_dir.glob("run-1/.staging/*"))
        tiered.save(2).wait("disk")
        assert tiered.latest() == 2


def test_trackers_see_what_is_there(both: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    training = fresh()
    told: list[tuple[dict[str, float], int | None]] = []
    monkeypatch.setattr(training.accelerator, "log", lambda found, step=None: told.append((found, step)))
    with attach(training.accelerator, both) as tiered:
        assert tiered.maybe_save(1) is not None
        tiered.maybe_save(2)
        tiered.wait()
    assert [sorted(found) for found, _ in told] == [
        ["sm_tiered/blocked_secs", "sm_tiered/memory_step", "sm_tiered/saved_bytes"],
        ["sm_tiered/blocked_secs", "sm_tiered/memory_step", "sm_tiered/saved_bytes"],
        ["sm_tiered/drain_lag_steps", "sm_tiered/durable_step"],
    ]
    assert told[2] == ({"sm_tiered/durable_step": 2.0, "sm_tiered/drain_lag_steps": 0.0}, 2)


def test_a_state_over_memorys_budget_is_refused_at_the_first_save(which: dict[str, Any]) -> None:
    which["tiers"]["memory"]["budget"] = "1MiB"
    training = fresh(width=1 << 16)
    with attach(training.accelerator, which) as tiered, pytest.raises(ConfigError, match="budget"):
        tiered.save(1)


def test_a_full_memory_tier_is_told_at_the_first_save(tmp_path: Path, make_tmpfs: Callable[[str, int], Path]) -> None:
    training = fresh(width=1 << 18)
    which = recipe(tmp_path, make_tmpfs("full", 4), memory={"allow_disk": True})
    with attach(training.accelerator, which) as tiered:
        with pytest.raises(TierFullError, match="memory"):
            tiered.save(1)
        assert tiered.latest() is None


def test_where_nothing_can_be_caught_all_goes_through_files(
    which: dict[str, Any], memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = fresh()
    with attach(training.accelerator, which) as tiered, monkeypatch.context() as patch:
        patch.setattr(stock, "catching", lambda directory, kind: catching(directory, DistributedType.XLA))
        tiered.save(1)
        expected = training.weights()
        assert load_file(step_dir(memory_dir, 1) / "model.safetensors").keys() == {*training.model.state_dict()}
    training = moved(fresh())
    with attach(training.accelerator, which) as tiered:
        assert tiered.restore() == 1
        assert training.weights() == expected


def test_a_uri_names_the_checkpoint_that_is_loaded(tmp_path: Path, memory_dir: Path, make_s3_settings: Any) -> None:
    s3 = make_s3_settings()
    which = recipe(tmp_path, memory_dir, disk=None, tiers={"s3": s3_tier(s3)})
    training = fresh()
    uri = f"s3://{s3.bucket}/{s3.prefix}"
    with attach(training.accelerator, which) as tiered:
        training.accelerator.save_state(f"{uri}/whatever")
        advance(training)
        training.accelerator.save_state(uri)
        tiered.wait()
        assert not Path("s3:").exists()
        name = step_dir(memory_dir, 0).name
        for named, step in ((uri, 1), (f"{uri}/run-1", 1), (f"{uri}/run-1/{name}", 0)):
            training.accelerator.load_state(named)
            assert tiered.restored is not None
            assert tiered.restored.step == step
        for wrong in (f"{uri}/other/{name}", f"{uri}/run-1/step_7", "s3://another/run-1"):
            with pytest.raises(ConfigError, match="names no checkpoint|is in no tier"):
                training.accelerator.load_state(wrong)
        other = name[:-1] + ("0" if name[-1] != "0" else "1")
        with pytest.raises(MismatchError, match="the present timeline's step 0 is of attempt"):
            training.accelerator.load_state(f"{uri}/run-1/{other}")


def test_the_end_of_a_training_is_saved(both: dict[str, Any], tmp_path: Path) -> None:
    both["tiers"]["disk"]["save"] = "on_end"
    training = fresh()
    with attach(training.accelerator, both) as tiered:
        for step in (1, 2, 3):
            tiered.maybe_save(step)
    assert list(steps(tmp_path / "disk")) == [3]


def failing(training: Training, which: dict[str, Any]) -> None:
    with attach(training.accelerator, which) as tiered:
        tiered.save(1)
        raise ZeroDivisionError


def test_what_the_training_raises_counts(which: dict[str, Any]) -> None:
    training = fresh()
    with pytest.raises(ZeroDivisionError):
        failing(training, which)
    assert "save_state" not in vars(training.accelerator)
    with attach(training.accelerator, which) as tiered:
        assert tiered.restore() == 1
