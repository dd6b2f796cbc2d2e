"""A simulated cluster for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.properties.thread_ranks import Cluster


@pytest.fixture
def make_cluster(memory_dir: Path) -> Iterator[Callable[..., Cluster]]:
    """Make the one cluster of a test, with its clock."""
    with ExitStack() as stack:

        def make(**given: object) -> Cluster:
            cluster = Cluster(memory_dir, **given)  # type: ignore[arg-type]
            stack.enter_context(cluster.clock())
            return cluster

        yield make
