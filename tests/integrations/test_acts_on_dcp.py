"""Tensors that the command line moved: restored from where they are now, by us and by stock DCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from sm_tiered import layout
from sm_tiered_dcp import TieredCheckpointer
from tests.unit.acting import call, document

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(autouse=True)
def quick_drainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end soon."""
    monkeypatch.setenv("SM_TIERED_DRAINER_IDLE_SECS", "0.1")


def recipe(root: Path, memory: Path, namespace: str, local: str = "local") -> Path:
    path = root / f"{namespace}-{local}.yaml"
    path.write_text(
        f"version: 1\nnamespace: {namespace}\ntiers:\n"
        f"  memory: {{kind: memory, path: {memory}, allow_disk: true, keep: {{latest: 2}}}}\n"
        f"  local: {{kind: local, path: {root / local}, fsync: false, keep: {{latest: 2}}}}\n",
        encoding="utf-8",
    )
    return path


def state(value: float) -> dict[str, Any]:
    return {"weights": torch.full((4, 3), float(value)), "progress": {"losses": [value, value / 2]}}


def test_what_was_promoted_and_copied_is_restored_in_the_other_run(tmp_path: Path, memory_dir: Path) -> None:
    first = recipe(tmp_path, memory_dir, "run-1")
    with TieredCheckpointer.from_recipe(first) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), tiers=["memory"]).wait("memory")
    directory = next((memory_dir / "run-1").glob("step_*1-*"))
    for name in (layout.INDEX, layout.METADATA):
        (directory / name).unlink(missing_ok=True)  # as in a job that was killed: the drainer has them made
    promoted = document(call("promote", first, "--step", 1, "--json"))
    assert (promoted["by"], promoted["ok"]) == ("drainer", True)
    assert call("verify", first, "--tier", "local").exit_code == 0

    second = recipe(tmp_path, tmp_path / "other-memory", "run-2", "other")
    arguments = ["--from", "local", "--to", "local", "--to-recipe", second]
    copied = document(call("copy", first, "--step", 1, *arguments, "--json"))
    assert copied["checkpoints"][0]["ok"]
    assert call("verify", second).exit_code == 0
    with TieredCheckpointer.from_recipe(second) as checkpointer:
        loaded = state(0.0)
        assert checkpointer.restore(loaded) == 1
        assert torch.equal(loaded["weights"], state(1)["weights"])
        assert loaded["progress"] == state(1)["progress"]
        checkpointer.save(3, state(3), tiers=["local"]).wait("local")

    stock = {"weights": torch.zeros(4, 3)}
    dcp.load(stock, storage_reader=FileSystemReader(next((tmp_path / "other" / "run-2").glob("step_*1-*"))))
    assert torch.equal(stock["weights"], state(1)["weights"])


def test_from_memory_a_copy_makes_the_files_for_other_readers_itself(tmp_path: Path, memory_dir: Path) -> None:
    first = recipe(tmp_path, memory_dir, "run-1")
    with TieredCheckpointer.from_recipe(first) as checkpointer:
        checkpointer.save(1, state(1), tiers=["memory"]).wait("memory")
    directory = next((memory_dir / "run-1").glob("step_*"))
    for name in (layout.INDEX, layout.METADATA):
        (directory / name).unlink(missing_ok=True)
    result = call("copy", first, "--step", 1, "--from", "memory", "--to", "local", "--namespace", "run-2")
    assert result.exit_code == 0
    second = recipe(tmp_path, tmp_path / "other-memory", "run-2")
    assert call("verify", second, "--tier", "local").exit_code == 0
    with TieredCheckpointer.from_recipe(second) as checkpointer:
        loaded = state(0.0)
        assert checkpointer.restore(loaded) == 1
        assert torch.equal(loaded["weights"], state(1)["weights"])
