"""What the tests with Accelerate and transformers share: ranks are forked from a server that has loaded them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import preload

SLOW_TO_LOAD = (
    *("accelerate", "torchdata.stateful_dataloader", "sm_tiered_accelerate.attached"),
    *("transformers.trainer", "transformers.models.llama.modeling_llama"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Loading them takes seconds: once, where any of these tests is to be run."""
    if any(Path(__file__).parent in item.path.parents for item in items):
        preload(*SLOW_TO_LOAD)
