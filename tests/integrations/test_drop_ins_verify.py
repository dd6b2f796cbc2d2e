"""``dcp.load`` counts no checkpoint of which it has not verified every part, those included that memory does not have.

Where the arena has no room such a part is read straight into the state: it must not be found only then to be damaged.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import NothingRestorableError
from sm_tiered.store import Store
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader
from tests.distributed.dcp_jobs import bits, recipe, step_dir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

TENSORS, VALUES = "__0_0.distcp", "__0_1.distcp"
PLACES = {"a": (TENSORS, 0.001), "first chunk": (TENSORS, 0.5), "last chunk": (TENSORS, 0.999), "value": (VALUES, 0.5)}
"""A part, and how far inside it. The tensors take two chunks, and the small one, which DCP reads first, the first."""


def state(value: float = -1.0) -> dict[str, Any]:
    big = torch.full((CHUNK_BYTES // 4 + 70_000,), value)
    return {"a": torch.full((20_000,), value), "big": big, "epoch": int(value), "names": [str(value)]}


@contextmanager
def damaged(roots: list[Path], step: int, name: str, where: float) -> Iterator[None]:
    """Flip one bit in each copy meanwhile."""
    paths = [step_dir(root, step) / name for root in roots]
    kept = [path.read_bytes() for path in paths]
    for path, data in zip(paths, kept, strict=True):
        at = int(len(data) * where)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
    try:
        yield
    finally:
        for path, data in zip(paths, kept, strict=True):
            path.write_bytes(data)


def load(which: dict[str, Any], step: int | None, target: dict[str, Any]) -> int | None:
    """Fill *target* and return the step."""
    with closing(TieredStorageReader(which, step=step)) as reader:
        dcp.load(target, storage_reader=reader)
        return reader.step


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
@pytest.mark.parametrize("memory", ["none", "lost", "damaged"])
def test_damage_in_what_only_the_durable_tier_has_takes_the_load_to_the_step_before(
    memory: str, room: bool, tmp_path: Path, memory_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = recipe(tmp_path, None if memory == "none" else memory_dir)
    roots = [tmp_path / "disk", *([memory_dir] if memory == "damaged" else [])]
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(float(step))).wait("disk")
    if memory == "lost":
        for step in (1, 2):
            shutil.rmtree(step_dir(memory_dir, step))
    if not room:
        monkeypatch.setattr(Store, "room", lambda store, size: None)
    with TieredCheckpointer.from_recipe(which):
        for name, where in PLACES.values():
            with ExitStack() as stack:
                stack.enter_context(damaged(roots, 2, name, where))
                target = state()
                assert load(which, None, target) == 1
                assert bits(target) == bits(state(1.0))
                target = state()
                with pytest.raises(CheckpointException, match=r"none can be restored: step 2 of .*XXH3-128"):
                    load(which, 2, target)
                with closing(TieredStorageReader(which, step=2)) as reader, pytest.raises(NothingRestorableError):
                    reader.read_metadata()  # before DCP makes another of it
                stack.enter_context(damaged(roots, 1, *PLACES["last chunk"]))
                with pytest.raises(CheckpointException, match=r"none can be restored: step 2 of .*step 1 of "):
                    load(which, None, target)
                assert bits(target) == bits(state())
        target = state()
        assert load(which, None, target) == 2
        assert bits(target) == bits(state(2.0))
