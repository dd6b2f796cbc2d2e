"""What the tests with Lightning share: no warnings of its own or torch's, and a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.dcp_jobs import recipe
from tests.scripts import preload

LIGHTNING = ("lightning.pytorch", "torchdata.stateful_dataloader", "sm_tiered_lightning.callback")
"""What takes seconds to load."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lightning warns of its own imports, of small loaders, of what torch deprecates."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            preload(*LIGHTNING)  # for the ranks that launches would have
            for kind in ("UserWarning", "DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"), append=False)


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    """Memory every second step, the disk every fourth."""
    return recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 2}}, disk={"save": {"every_n_steps": 4}})


@pytest.fixture
def each_step(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    """Memory at every step, the disk never."""
    return recipe(tmp_path, memory_dir, memory={"save": {"every_n_steps": 1}}, disk={"save": None})
