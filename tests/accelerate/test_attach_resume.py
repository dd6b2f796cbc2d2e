"""Trainings with Accelerate that are killed and resumed: equal to the last bit to one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.accelerate.training import train
from tests.distributed.dcp_jobs import recipe, run, start

STEPS = 12


def losses(out: Path, rank: int) -> dict[int, list[str]]:
    """The losses of each step, as they were computed last."""
    found: dict[int, list[str]] = {}
    previous = -1
    for line in Path(f"{out}.{rank}").read_text().splitlines():
        step, loss = line.split()
        if int(step) < previous:
            found = {one: values for one, values in found.items() if one < int(step)}
        if int(step) != previous:
            found[int(step)] = []
        found[int(step)].append(loss)
        previous = int(step)
    return found


@pytest.mark.parametrize("world", [0, 2])
def test_killed_twice_it_ends_as_if_it_had_not_been(tmp_path: Path, memory_dir: Path, world: int) -> None:
    alone = recipe(tmp_path, memory_dir / "uncut", disk=None)
    uncut = run(world, train, world, alone, str(tmp_path / "uncut"), STEPS)
    saves = {"memory": {"save": {"every_n_steps": 2}}, "disk": {"save": {"every_n_steps": 4}}}
    which, out = recipe(tmp_path, memory_dir / "cut", **saves), tmp_path / "cut"
    began: list[Any] = []
    for cut_at, lost in ((7, False), (9, True), (None, False)):
        ends = start(world, train, world, which, str(out), STEPS, cut_at, lost).wait()
        assert [end.status for end in ends] == [0 if cut_at is None else -signal.SIGKILL] * max(1, world), ends
        if lost:
            os.rename(memory_dir / "cut", memory_dir / "lost")
        began = [end.value[0] for end in ends if end.value is not None]
    assert began == [(8, "disk")] * max(1, world)
    for rank in range(max(1, world)):
        assert losses(out, rank) == losses(tmp_path / "uncut", rank)
        assert ends[rank].value[1] == uncut[rank][1]
