"""Trainings with Accelerate that are killed and resumed: equal to the last bit to one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate.training import losses, train
from tests.distributed.dcp_jobs import recipe, run, s3_tier, start

STEPS = 12


@pytest.mark.parametrize(
    ("world", "tier", "cuts"),
    [
        (0, "disk", (7, 9)),
        (2, "s3", (7, 9)),
        pytest.param(0, "s3", (5, 8), marks=pytest.mark.long),
        pytest.param(2, "disk", (5, 10), marks=pytest.mark.long),
        pytest.param(2, "s3", (6, 11), marks=pytest.mark.long),
    ],
)
def test_killed_twice_it_ends_as_if_it_had_not_been(
    tmp_path: Path, memory_dir: Path, make_s3_settings: Any, world: int, tier: str, cuts: tuple[int, int]
) -> None:
    alone = recipe(tmp_path, memory_dir / "uncut", disk=None)
    uncut = run(world, train, world, alone, str(tmp_path / "uncut"), STEPS)
    near, far = {"save": {"every_n_steps": 2}}, {"save": {"every_n_steps": 4}}
    durable: dict[str, Any] = {"disk": far}
    if tier == "s3":
        durable = {"disk": None, "tiers": {"s3": {**s3_tier(make_s3_settings()), **far}}}
    which, out = recipe(tmp_path, memory_dir / "cut", memory=near, **durable), tmp_path / "cut"
    began: list[Any] = []
    for cut_at, lost in ((cuts[0], False), (cuts[1], True), (None, False)):
        ends = start(world, train, world, which, str(out), STEPS, cut_at, lost).wait()
        assert [end.status for end in ends] == [0 if cut_at is None else -signal.SIGKILL] * max(1, world), ends
        if lost:
            os.rename(memory_dir / "cut", memory_dir / "lost")
        began = [end.value[0] for end in ends if end.value is not None]
    assert began == [(8, tier)] * max(1, world)
    for rank in range(max(1, world)):
        assert losses(Path(f"{out}.{rank}")) == losses(tmp_path / f"uncut.{rank}")
        assert ends[rank].value[1] == uncut[rank][1]
