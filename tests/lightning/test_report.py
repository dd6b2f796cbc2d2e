"""What is told of saves, and which is the best: small pieces, without a training."""

from __future__ import annotations

from typing import Any

from sm_tiered.errors import RankFailedError
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered_lightning.paths import BestModel, Paths
from sm_tiered_lightning.report import Report


class Trainer:
    """As much of a Trainer as a report looks at."""

    is_global_zero = True
    loggers: tuple[()] = ()


def test_where_nobody_is_left_to_ask_a_report_waits(monkeypatch: Any) -> None:
    asked: list[str] = []

    def look() -> tuple[bool, None]:
        asked.append("durable")
        raise RankFailedError("rank 1 does not answer")

    handle = SaveHandle(step=4, nudge=lambda: None)
    handle.add("memory", TierState(look), 1.0)
    handle.add("durable", TierState(look), 1.0)
    trainer: Any = Trainer()
    monkeypatch.setattr(Report, "_log", lambda *_: None)
    report = Report(trainer, None, "memory")
    report.saved(handle)
    report.look(5)
    report.waiting()
    assert len(asked) >= 3, "an error of one rank's look would end that rank alone"


def test_a_save_that_comes_to_one_more_tier_is_the_same_save(monkeypatch: Any) -> None:
    told: list[dict[str, float]] = []
    trainer: Any = Trainer()
    monkeypatch.setattr(Report, "_log", lambda _, found: told.append(dict(found)))
    report = Report(trainer, None, "memory")
    handle, durable = SaveHandle(step=4, nudge=lambda: None), TierState()
    handle.add("memory", TierState(), 1.0)
    report.saved(handle)
    handle.add("durable", durable, 1.0)
    report.saved(handle)
    report.saved(handle)
    assert [set(found) for found in told] == [
        {"sm_tiered/blocked_secs", "sm_tiered/saved_bytes", "sm_tiered/memory_step"}
    ]
    durable.settle(None)
    report.look(5)
    assert told[1:] == [{"sm_tiered/durable_step": 4, "sm_tiered/drain_lag_steps": 1}]


def test_going_back_forgets_a_best_that_came_later() -> None:
    paths = Paths(best=BestModel(tier="disk", metric="loss", sign=-1.0))

    def save(step: int, loss: float) -> None:
        paths.begin(f"tiered://step/{step}", {"loss": loss})
        paths.saved(["disk"])

    save(1, 0.5)
    kept = paths.state_dict()
    save(2, 0.1)
    assert paths.best.path == "tiered://step/2"
    paths.load_state_dict(kept)
    assert (paths.best.path, paths.best.score) == ("tiered://step/1", 0.5)
