"""Trainings with the Hugging Face Trainer that are killed and resumed: equal to the last bit to one that was not."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sm_tiered.settings import S3Settings
from tests.accelerate.training import losses
from tests.distributed.dcp_jobs import Ended, recipe, s3_tier, start


def train(rank: int, world: int, which: Any, root: Path, cut_at: int | None, evaluated: str) -> Any:
    """See `hf_job.train`; transformers is loaded in ranks only."""
    from tests.accelerate import hf_job

    return hf_job.train(rank, world, which, str(root), cut_at, eval_strategy=evaluated, eval_steps=3)


@pytest.mark.parametrize(
    ("world", "tier", "evaluated"),
    [
        (0, "disk", "epoch"),
        (2, "disk", "epoch"),
        pytest.param(0, "disk", "no", marks=pytest.mark.long),
        pytest.param(2, "disk", "steps", marks=pytest.mark.long),
        pytest.param(0, "s3", "epoch", marks=pytest.mark.long),
        pytest.param(2, "s3", "no", marks=pytest.mark.long),
    ],
)
def test_killed_twice_it_ends_as_if_it_had_not_been(
    tmp_path: Path,
    memory_dir: Path,
    request: pytest.FixtureRequest,
    world: int,
    tier: str,
    evaluated: str,
) -> None:
    settings: S3Settings | None = request.getfixturevalue("s3_settings") if tier == "s3" else None

    def launch(name: str, cut_at: int | None = None) -> list[Ended]:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        near, far = {"save": {"every_n_steps": 2}}, {"save": {"every_n_steps": 4}}
        durable: dict[str, Any] = {"disk": far}
        if settings is not None:
            durable = {"disk": None, "tiers": {"s3": {**s3_tier(settings), **far}}}
        which = recipe(root, memory_dir / name, memory=near, namespace=f"run-{name}", **durable)
        # Evaluating draws from the random state that training goes on with.
        ends = start(world, train, world, which, root, cut_at, evaluated).wait()
        assert [end.status for end in ends] == [0 if cut_at is None else -signal.SIGKILL] * max(1, world), ends
        return ends

    uncut = launch("uncut")
    for cut_at in (7, 9):  # right behind the end of an epoch; then two steps on
        launch("cut", cut_at)
    os.rename(memory_dir / "cut", memory_dir / "lost")
    ends = launch("cut")
    for rank, end in enumerate(ends):
        found, weights = end.value
        assert found == "checkpoint-8"
        assert losses(tmp_path / f"cut/losses.{rank}") == losses(tmp_path / f"uncut/losses.{rank}")
        assert weights == uncut[rank].value[1]
    began = Path(tmp_path / "cut" / "losses.began").read_text().split()
    assert began == ["None", "checkpoint-6", "checkpoint-8"]
