"""The tiers behind ``dcp.save``, ``dcp.async_save`` and ``dcp.load``, in one process without torch.distributed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import checkpoint as dcp

from sm_tiered.errors import ConfigError, PolicyError
from sm_tiered.recipe import Recipe
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from sm_tiered_dcp.engine import _engines
from tests.distributed.dcp_jobs import ROOT, async_save, recipe, step_dir

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]


def state(value: float = -1.0) -> dict[str, Any]:
    return {
        "w": torch.full((100, 3), value),
        "nested": {"list": [torch.arange(4) + int(value), 1]},
        "epoch": int(value),
    }


def save(which: Any, value: float, **options: Any) -> TieredStorageWriter:
    writer = TieredStorageWriter(which, **options)
    dcp.save(state(value), storage_writer=writer)
    writer.close()
    return writer


def load(which: Any, step: int | None = None, **options: Any) -> tuple[float, int | None]:
    """Return what was loaded and the step that it was said to be."""
    target = state()
    reader = TieredStorageReader(which, step=step)
    try:
        dcp.load(target, storage_reader=reader, **options)
    finally:
        reader.close()
    value = target["w"][0, 0].item()
    assert target["w"].eq(value).all()
    assert target["nested"]["list"][0].equal(torch.arange(4) + int(value))
    assert target["epoch"] == value
    return value, reader.step


def fails(call: Callable[[], object]) -> str:
    """Return the text of what DCP raises; it derives from BaseException."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        call()
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit, AssertionError))
    return str(caught.value)


@pytest.mark.parametrize("form", ["path", "text path", "mapping", "Recipe"])
def test_a_recipe_is_given_as_a_path_or_as_what_it_holds(form: str, tmp_path: Path, memory_dir: Path) -> None:
    values = recipe(tmp_path, memory_dir)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    which: Any = {"path": path, "text path": str(path), "mapping": values, "Recipe": Recipe.load(path)}[form]
    writer = save(which, 3.0, step=3)
    assert writer.handle is not None
    assert writer.handle.done("memory")
    assert load(which) == (3.0, 3)


@pytest.mark.parametrize("after", [11, 20])
def test_a_process_that_loads_an_older_step_goes_on_from_there(after: int, tmp_path: Path, memory_dir: Path) -> None:
    """Also at a step that was saved before: what is saved now is another state."""
    which = recipe(tmp_path, memory_dir)
    keeper = TieredStorageWriter(which, step=0)
    for step in (10, 20):
        save(which, float(step), step=step)
    assert load(which, step=10) == (10.0, 10)
    save(which, 99.0, step=after)
    assert load(which) == (99.0, after)
    keeper.close()
    assert load(which) == (99.0, after)


def test_a_look_at_an_older_step_changes_nothing_for_a_training_that_goes_on(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    keeper = TieredStorageWriter(which, step=0)
    attempts = set[str]()
    for step in (10, 20, 30):
        save(which, float(step), step=step)
        assert load(which, step=10) == (10.0, 10)
        attempts |= {path.name.partition("-")[2] for path in memory_dir.glob("run-1/step_*")}
    keeper.close()
    assert len(attempts) == 1
    assert load(which) == (30.0, 30)


def test_the_newest_is_loaded_unless_a_step_is_named(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"keep": {"latest": 3}})
    with TieredCheckpointer.from_recipe(which):  # one engine for all
        for step in (1, 2, 3):
            save(which, float(step), step=step)
        assert load(which) == (3.0, 3)
        assert load(which, step=1) == (1.0, 1)
        text = fails(lambda: load(which, step=7))
        for word in ("step 7 is on no tier", "memory: [", "Leave step out"):
            assert word in text


def test_one_reader_chooses_anew_at_each_load(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    reader = TieredStorageReader(which)
    for step in (1, 2):
        save(which, float(step), step=step)
        target = state()
        dcp.load(target, storage_reader=reader)
        assert (reader.step, target["epoch"]) == (step, step)
    dcp.load(target, storage_reader=reader, checkpoint_id="step_1")
    assert (reader.step, target["epoch"]) == (1, 1)
    reader.close()


def test_dcps_checkpoint_id_can_name_the_step_and_one_writer_can_save_many(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"keep": {"latest": 9}})
    writer = TieredStorageWriter(which)
    for step, name in enumerate(("1", "step_2", "runs/a/step-3", "runs/step_0000000004/", Path("x/5")), start=1):
        dcp.save(state(float(step)), storage_writer=writer, checkpoint_id=name)
        assert writer.handle is not None
        assert writer.handle.step == step
    writer.close()
    for step, name in ((2, "2"), (5, "step_5")):
        assert load(which, checkpoint_id=name) == (step, step)
    assert load(which, step=4, checkpoint_id="step_4") == (4.0, 4)


@pytest.mark.parametrize(
    ("step", "name", "words"),
    [
        (5, "step_6", ("'step_6'", "step=5", "differ", "Pass one of them")),
        (None, "best", ("'best'", "names no step", "Pass step=")),
        (None, "step_6b", ("'step_6b'", "names no step")),
        (None, "step_99999999999", ("names no step",)),
        (None, "s3://bucket/latest/", ("names no step",)),
        (None, None, ("no step was given", "step=step")),
    ],
)
def test_a_checkpoint_id_that_names_no_step_or_another_one_is_refused(
    step: int | None, name: str | None, words: tuple[str, ...], tmp_path: Path, memory_dir: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    before = sorted(path for path in memory_dir.rglob("step_*"))
    writer = TieredStorageWriter(which, step=step)
    text = fails(lambda: dcp.save(state(), storage_writer=writer, checkpoint_id=name))
    for word in words:
        assert word in text
    writer.close()
    if name is not None:
        text = fails(lambda: load(which, step, checkpoint_id=name))
        for word in words:
            assert word in text
        assert not TieredStorageWriter.validate_checkpoint_id(name) or step is not None
        assert not TieredStorageReader.validate_checkpoint_id(name) or step is not None
    assert sorted(path for path in memory_dir.rglob("step_*")) == before


def test_an_async_save_needs_the_step_before_its_checkpoint_id_is_told(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    writer = TieredStorageWriter(which)
    dcp.save(state(1.0), storage_writer=writer, checkpoint_id="step_1")
    for name in ("step_2", None):
        text = fails(lambda name=name: async_save(state(2.0), writer, checkpoint_id=name))
        assert "before it tells its checkpoint_id" in text
        assert "Pass step= to the writer" in text
    writer.close()
    assert load(which) == (1.0, 1)
    writer = TieredStorageWriter(which, step=2)
    async_save(state(2.0), writer, checkpoint_id="step_2").result()
    writer.close()
    assert load(which) == (2.0, 2)


def test_before_anything_was_saved_a_load_says_so(tmp_path: Path, memory_dir: Path) -> None:
    text = fails(lambda: load(recipe(tmp_path, memory_dir)))
    assert "nothing was ever saved in namespace 'run-1'" in text
    assert "TieredCheckpointer.restore() returns None" in text
    assert text.count("nothing was ever saved") == 1, "asked once"


def damage(path: Path) -> None:
    """Flip one bit of the payload."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_part_in_memory_is_taken_from_the_durable_copy_of_the_same_step(
    tmp_path: Path, memory_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    which = recipe(tmp_path, memory_dir)
    caplog.set_level("WARNING", logger="sm_tiered")
    with TieredCheckpointer.from_recipe(which):
        for step in (1, 2):
            writer = save(which, float(step), step=step)
            assert writer.handle is not None
            writer.handle.wait("disk")
        for name in ("__0_0.distcp", "__0_1.distcp"):
            damage(step_dir(memory_dir, 2) / name)
        assert load(which) == (2.0, 2)
        assert "step 2: not from the nearest copy, part __0_0.distcp: memory: chunk 0 has XXH3-128" in caplog.text
        caplog.clear()
        damage(step_dir(tmp_path / "disk", 2) / "__0_0.distcp")
        assert load(which) == (1.0, 1)
        assert "step 2 of a000001" in caplog.text
        assert caplog.text.count("has XXH3-128") == 2, "once for each tier"
        text = fails(lambda: load(which, step=2))
        for word in ("none can be restored", "__0_0.distcp", "memory:", "disk:", "recorded"):
            assert word in text


def test_what_the_checkpointer_saved_dcp_loads_and_the_reverse(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("memory")
        assert load(which) == (1.0, 1)
        save(which, 2.0, step=2)
        target = state()
        assert checkpointer.restore(target) == 2
        assert target["epoch"] == 2


def test_a_writer_names_its_tiers_and_metrics(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk={"keep": {"best": {"metric": "loss", "mode": "min"}}})
    with TieredCheckpointer.from_recipe(which):
        writer = save(which, 1.0, step=1, tiers=("memory",))
        assert writer.handle is not None
        assert writer.handle.tiers == ("memory",)
        writer = save(which, 2.0, step=2, tiers=("disk",), metrics={"loss": 0.5})
        assert writer.handle is not None
        writer.handle.wait("disk")
        manifest = step_dir(tmp_path / "disk", 2) / "manifest.json"
        assert '"metrics":{"loss":0.5}' in manifest.read_text()
        assert not list((tmp_path / "disk").glob("*/step_0000000001-*"))
        writer = TieredStorageWriter(which, step=3, tiers=("dsik",))
        assert "no tier 'dsik'" in fails(lambda: dcp.save(state(), storage_writer=writer))
        writer.close()


def test_a_writer_can_not_be_sent_to_another_process(tmp_path: Path, memory_dir: Path) -> None:
    import pickle

    writer = TieredStorageWriter(recipe(tmp_path, memory_dir), step=1)
    with pytest.raises(ConfigError, match=r"can't be sent to another process.*AsyncCheckpointerType\.THREAD"):
        pickle.dumps(writer)
    writer.close()


SCRIPT = """
import sys, torch
import torch.distributed.checkpoint as dcp
from sm_tiered_dcp import TieredCheckpointer, TieredStorageWriter
which, way = sys.argv[1:]
if way == "dcp.save":
    dcp.save({"w": torch.arange(9.0)}, storage_writer=TieredStorageWriter(which, step=5))
else:
    checkpointer = TieredCheckpointer.from_recipe(which)
    checkpointer.save(5, {"w": torch.arange(9.0)})
"""


@pytest.mark.parametrize("way", ["dcp.save", pytest.param("save", marks=pytest.mark.long)])
def test_a_script_that_just_ends_after_its_save_has_saved_everywhere(
    way: str, tmp_path: Path, memory_dir: Path
) -> None:
    values = recipe(tmp_path, memory_dir)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "integrations"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "recipe.yaml"), way],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    end = time.monotonic() + 30
    while not list((tmp_path / "disk").glob("*/step_*/manifest.json")) and time.monotonic() < end:
        time.sleep(0.05)
    assert list((tmp_path / "disk").glob("*/step_0000000005-*/manifest.json")), "the drainer was never told"
    target = {"w": torch.zeros(9)}
    with TieredCheckpointer.from_recipe(values) as checkpointer:
        assert checkpointer.restore(target) == 5
    assert target["w"].equal(torch.arange(9.0))


def test_writers_and_readers_let_go_once_and_say_so_afterwards(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which) as keeper:
        writer, reader = TieredStorageWriter(which, step=1), TieredStorageReader(which)
        for _ in range(3):
            writer.close()
            reader.close()
        assert "this TieredStorageWriter is closed" in fails(lambda: dcp.save(state(), storage_writer=writer))
        assert "this TieredStorageReader is closed" in fails(lambda: dcp.load(state(), storage_reader=reader))
        keeper.save(2, state(2.0)).wait("memory")


def test_a_writer_that_can_not_be_made_holds_nothing(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk={"keep": {"best": {"metric": "loss", "mode": "min"}}})
    with pytest.raises(ConfigError, match="step -1 is out of range"):
        TieredStorageWriter(which, step=-1)
    with pytest.raises(PolicyError, match="metric 'loss' must be a number, got str 'low'"):
        TieredStorageWriter(which, step=1, metrics={"loss": "low"})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"step must be an int, got float 1\.5"):
        TieredStorageReader(which, step=1.5)  # type: ignore[arg-type]
    assert not _engines
