"""Pickles that run code, wherever a checkpoint or its surroundings could hold one: none is ever run by a default load.

Whoever forges one is taken to be thorough: records and manifests carry the right digests of the forged bytes.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed import checkpoint as dcp

from sm_tiered import checksum
from sm_tiered.errors import MismatchError, NothingRestorableError, RecipeError, RestoreError, UnsafeValueError
from sm_tiered.manifest import compose_manifest, manifest_to_json, record_from_json, record_to_json
from sm_tiered.recipe import Recipe
from sm_tiered.records import ItemTable
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader
from tests.distributed.dcp_jobs import ROOT, recipe, step_dir

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*TorchScript archive"),
]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> Any:
        return open, (str(self.sentinel), "w")


class Harmless:
    """Needs a pickle, and runs nothing of note."""

    def __init__(self, number: int) -> None:
        self.number = number


def state(value: float = 0.0) -> dict[str, Any]:
    return {"w": torch.full((300,), value), "values": {"epoch": value, "name": "run"}}


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def as_pickle(bomb: Bomb) -> bytes:
    return pickle.dumps(bomb)


def as_zip(bomb: Bomb) -> bytes:
    return saved(bomb)


def as_zip_deep(bomb: Bomb) -> bytes:
    return saved({"epoch": [1, (2, {"x": bomb})]})


def as_legacy(bomb: Bomb) -> bytes:
    stream = io.BytesIO()
    torch.save(bomb, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def as_script(bomb: Bomb) -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), stream)
    return stream.getvalue()


def as_tensor_with_a_state(bomb: Bomb) -> bytes:
    tensor = torch.ones(2)
    tensor.extra = bomb  # type: ignore[attr-defined]
    return saved(tensor)


def as_marked_array(bomb: Bomb) -> bytes:
    return saved({"__sm_tiered__": "array", "dtype": "|O", "shape": [1], "data": torch.zeros(8, dtype=torch.uint8)})


FORMS = (as_pickle, as_zip, as_zip_deep, as_legacy, as_script, as_tensor_with_a_state, as_marked_array)


def forge(directory: Path, fqn: str, data: bytes) -> None:
    """Put *data* in the place of the stored value or tensor *fqn*, with all digests made anew."""
    path = directory / "record-00000.json"
    record = record_from_json(path.read_bytes())
    (old,) = (item for item in record.items if item.fqn == fqn)
    part = bytearray((directory / old.part).read_bytes())
    offset = len(part)
    part += data
    item = replace(old, offset=offset, length=len(data), payload=offset if old.payload is not None else None)
    fixed = replace(
        record,
        parts=tuple(
            replace(p, size=len(part), chunks=checksum.digest_chunks(memoryview(part))) if p.name == old.part else p
            for p in record.parts
        ),
        tables=(ItemTable(items=tuple(item if i.fqn == fqn else i for i in record.items)),),
    )
    (directory / old.part).write_bytes(part)
    path.write_bytes(record_to_json(fixed))
    if (directory / "manifest.json").exists():
        manifest = compose_manifest({0: path.read_bytes()})
        (directory / "manifest.json").write_bytes(manifest_to_json(manifest))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    path = tmp_path / "was run"
    pickle.loads(as_pickle(Bomb(path))).close()
    assert path.exists(), "the bomb is none"
    path.unlink()
    return path


def one_save(which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, state(1.0)).wait("disk")


def load_by_dcp(which: dict[str, Any]) -> BaseException | None:
    target = state()
    reader = TieredStorageReader(which)
    try:
        dcp.load(target, storage_reader=reader)
    except BaseException as error:
        return error
    finally:
        reader.close()
    return None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("near", [True, False], ids=["memory", "disk"])
def test_a_pickle_in_the_place_of_a_value_is_refused_and_never_run(
    form: Callable[[Bomb], bytes], near: bool, tmp_path: Path, memory_dir: Path, sentinel: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    one_save(which)
    data = form(Bomb(sentinel))
    forge(step_dir(tmp_path / "disk", 1), "values.epoch", data)
    if near:
        forge(step_dir(memory_dir, 1), "values.epoch", data)
    else:
        shutil.rmtree(step_dir(memory_dir, 1))
    target = state()
    with TieredCheckpointer.from_recipe(which) as checkpointer, pytest.raises(RestoreError) as caught:
        checkpointer.restore(target)
    assert "values.epoch" in str(caught.value)
    assert target["values"] == {"epoch": 0.0, "name": "run"}
    error = load_by_dcp(which)
    assert error is not None
    assert "values.epoch" in str(error)
    assert not sentinel.exists()


def test_a_pickle_in_the_place_of_a_tensor_is_numbers(tmp_path: Path, memory_dir: Path, sentinel: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    one_save(which)
    data = as_zip(Bomb(sentinel)).ljust(1200, b"\0")
    for root in (memory_dir, tmp_path / "disk"):
        forge(step_dir(root, 1), "w", data)
    target = state()
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(target) == 1
    assert target["w"].view(torch.uint8).numpy().tobytes() == data[:1200]
    assert load_by_dcp(which) is None
    assert not sentinel.exists()


@pytest.mark.parametrize("name", [".metadata", "index.json"])
def test_files_for_other_readers_are_never_read_by_ours(
    name: str, tmp_path: Path, memory_dir: Path, sentinel: Path
) -> None:
    which = recipe(tmp_path, memory_dir)
    one_save(which)
    for root in (memory_dir, tmp_path / "disk"):
        (step_dir(root, 1) / name).write_bytes(as_pickle(Bomb(sentinel)))
    for _ in range(2):
        target = state()
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            assert checkpointer.restore(target) == 1
        assert target["values"]["epoch"] == 1.0
        assert load_by_dcp(which) is None
        shutil.rmtree(memory_dir / which["namespace"], ignore_errors=True)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["record-00000.json", "manifest.json", "attempts"])
def test_what_we_read_is_never_unpickled(name: str, tmp_path: Path, memory_dir: Path, sentinel: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    one_save(which)
    for root in (memory_dir, tmp_path / "disk"):
        for path in (root / which["namespace"]).glob("attempts/*.json" if name == "attempts" else f"step_*/{name}"):
            path.write_bytes(as_pickle(Bomb(sentinel)))
    if name == "manifest.json":
        shutil.rmtree(step_dir(memory_dir, 1))
    target = state()
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        if name == "attempts":
            assert checkpointer.restore(target) == 1
        else:
            with pytest.raises(NothingRestorableError) as caught:
                checkpointer.restore(target)
            assert "damaged" in str(caught.value) or "not a" in str(caught.value)
            assert target["values"]["epoch"] == 0.0
        if name != "attempts":
            assert checkpointer.latest() is None
    if name != "attempts":
        assert "none can be restored" in str(load_by_dcp(which))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(which, sort_keys=False))
    for command in ("ls", "verify"):
        done = subprocess.run(
            [sys.executable, "-m", "sm_tiered.cli.app", command, str(tmp_path / "recipe.yaml")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        assert "disk" in done.stdout + done.stderr
        assert (done.returncode == 0) == (name == "attempts" or command == "ls"), done.stderr
    assert not sentinel.exists()


def test_what_lies_in_the_queue_is_never_unpickled(tmp_path: Path, memory_dir: Path, sentinel: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    one_save(which)
    checkpoint = step_dir(memory_dir, 1).name
    queue = memory_dir / which["namespace"] / ".queue"
    bad = as_pickle(Bomb(sentinel))
    for name in (f"promote-{checkpoint}-00000-disk.json", f"commit-{checkpoint}-00000-disk.json"):
        (queue / name).write_bytes(bad)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(state()) == 1
        checkpointer.save(2, state(2.0)).wait("disk")
        # A result that nobody can read is none.
        (queue / f"result-{step_dir(memory_dir, 2).name}-disk.json").write_bytes(bad)
        checkpointer.save(3, state(3.0)).wait("disk")
    assert not sentinel.exists()


def test_a_recipe_is_never_unpickled(tmp_path: Path, sentinel: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(as_pickle(Bomb(sentinel)))
    with pytest.raises(RecipeError):
        TieredCheckpointer.from_recipe(path)
    text = f"version: 1\nnamespace: !!python/object/apply:builtins.open ['{sentinel}', w]\ntiers: {{}}\n"
    path.write_text(text)
    with pytest.raises(RecipeError, match="tag"):
        TieredCheckpointer.from_recipe(path)
    with pytest.raises(RecipeError):
        Recipe.from_json(as_pickle(Bomb(sentinel)))
    assert not sentinel.exists()


def test_a_pickle_is_stored_and_loaded_only_where_the_recipe_allows_it(
    tmp_path: Path, memory_dir: Path, sentinel: Path
) -> None:
    strict, trusting = recipe(tmp_path, memory_dir), recipe(tmp_path, memory_dir, allow_pickle=True)
    held = {**state(1.0), "object": {"deep": [Harmless(7)]}}
    with TieredCheckpointer.from_recipe(strict) as checkpointer:
        with pytest.raises(UnsafeValueError, match=r"object\.deep\[0\]: .*Harmless.*allow_pickle: true"):
            checkpointer.save(1, held)
        assert checkpointer.latest() is None
    with TieredCheckpointer.from_recipe(trusting) as checkpointer:
        checkpointer.save(1, held).wait("disk")
        target = {**state(), "object": {"deep": [None]}}
        assert checkpointer.restore(target) == 1
        assert target["object"]["deep"][0].number == 7
    target = {**state(), "object": {"deep": [None]}}
    needed = r"object\.deep: holds what only a pickle can load.*allow_pickle: true"
    with TieredCheckpointer.from_recipe(strict) as checkpointer, pytest.raises(MismatchError, match=needed):
        checkpointer.restore(target)
    assert target["object"] == {"deep": [None]}
    assert not sentinel.exists()
