"""Metrics: what each event is for the instruments, what an SDK gets of it, and that nobody is hurt without one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opentelemetry.metrics as api
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from sm_tiered import metrics
from sm_tiered.event_log import Events
from sm_tiered.events import (
    CandidateRefused,
    Committed,
    CopyRefused,
    DrainerStarted,
    Event,
    Progress,
    PromoteFailed,
    Restored,
    SaveAcknowledged,
    SaveDurable,
    SaveFailed,
    SaveSkipped,
    SaveStaged,
    SaveStreamed,
    TierUnreachable,
)
from sm_tiered.metrics import Recorder
from sm_tiered.metrics_table import INSTRUMENTS, markdown, measurements

ROOT = Path(__file__).parents[2]
Points = dict[str, dict[tuple[tuple[str, Any], ...], Any]]

STAGED = SaveStaged(step=7, tiers=("memory", "s3"), blocked_secs=0.25, bytes=4096)
RESTORED = Restored(step=7, attempt="a", tier="s3", secs=1.5, bytes=4096)
EACH_RANK: list[tuple[Event, list[tuple[str, float, str | None]]]] = [
    (STAGED, [("save.blocked.duration", 0.25, None), ("save.size", 4096, None)]),
    (SaveAcknowledged(step=7, secs=0.5), [("save.acknowledged.duration", 0.5, None)]),
    (SaveFailed(step=7, tier="s3", error="x"), [("save.failed", 1, "s3")]),
    (SaveStreamed(step=7, tier="s3", reason="x", secs=2.0), [("save.streamed.duration", 2.0, "s3")]),
    (RESTORED, [("restore.duration", 1.5, "s3"), ("restore.size", 4096, "s3")]),
    (CopyRefused(step=7, reason="x"), [("restore.fallback", 1, None)]),
    (TierUnreachable(tier="s3", error="x"), [("tier.unreachable", 1, "s3")]),
]
RANK_0: list[tuple[Event, list[tuple[str, float, str | None]]]] = [
    (STAGED, [("training.step", 7, None)]),
    (Progress(step=9), [("training.step", 9, None)]),
    (SaveAcknowledged(step=7, secs=0.5), [("checkpoint.step", 7, "memory")]),
    (SaveSkipped(step=7, reason="x", tier="s3"), [("save.skipped", 1, "s3")]),
    (SaveSkipped(step=7, reason="x"), [("save.skipped", 1, None)]),
    (
        SaveDurable(step=7, tier="s3", secs=3.0, lag_steps=20),
        [("checkpoint.step", 7, "s3"), ("drain.duration", 3.0, "s3"), ("drain.lag", 20, "s3")],
    ),
    (CandidateRefused(step=7, attempt="a", reason="x"), [("restore.refused", 1, None)]),
]
DRAINER: list[tuple[Event, list[tuple[str, float, str | None]]]] = [
    (
        Committed(step=7, tier="s3", secs=4.0, bytes=8192),
        [("commit.duration", 4.0, "s3"), ("commit.size", 8192, "s3")],
    ),
    (PromoteFailed(step=7, tier="s3", error="x"), [("commit.failed", 1, "s3")]),
]


def found(event: Event, rank: int | None) -> list[tuple[str, float, str | None]]:
    told = measurements(event, rank=rank)
    return sorted((one.instrument.name.removeprefix("sm_tiered."), one.value, one.tier) for one in told)


def expected(event: Event, *tables: list[tuple[Event, list[tuple[str, float, str | None]]]]) -> list[Any]:
    return sorted(row for table in tables for other, rows in table if other == event for row in rows)


@pytest.mark.parametrize("event", [event for event, _ in EACH_RANK + RANK_0], ids=repr)
def test_ranks_measure_what_is_theirs_and_rank_0_what_all_know(event: Event) -> None:
    assert found(event, 3) == expected(event, EACH_RANK)
    assert found(event, 0) == expected(event, EACH_RANK, RANK_0)
    assert found(event, None) == []


@pytest.mark.parametrize(("event", "rows"), DRAINER, ids=repr)
def test_the_drainer_measures_what_only_it_knows(event: Event, rows: list[Any]) -> None:
    assert found(event, None) == sorted(rows)
    assert found(event, 0) == []


def test_every_row_of_the_table_is_fed() -> None:
    fed = {name for table in (EACH_RANK, RANK_0, DRAINER) for _, rows in table for name, _, _ in rows}
    assert fed == {row.name.removeprefix("sm_tiered.") for row in INSTRUMENTS}


def test_a_value_that_is_no_number_is_left_out() -> None:
    assert found(SaveAcknowledged(step=7, secs=float("nan")), 1) == []
    assert found(SaveAcknowledged(step=7, secs="soon"), 1) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("row", INSTRUMENTS, ids=lambda row: row.name)
def test_rows_follow_the_conventions(row: Any) -> None:
    assert re.fullmatch(r"sm_tiered(\.[a-z][a-z_]*)+", row.name)
    assert row.unit == "s" if row.name.endswith("duration") else row.unit in ("By", "{step}") or row.kind == "counter"
    assert row.kind != "counter" or re.fullmatch(r"\{[a-z]+\}", row.unit)
    assert not any(other.name.startswith(f"{row.name}.") for other in INSTRUMENTS), "a name that is a namespace too"
    # One series for each rank and tier at most: a step, an attempt or a reason would make a new one for each save.
    assert set(row.attributes) <= {"sm_tiered.namespace", "sm_tiered.rank", "sm_tiered.tier"}
    for source in row.sources:
        fields = {entry.name for entry in dataclasses.fields(source.event)}
        assert source.value is None or source.value in fields
        assert not row.tiers or source.tier or "tier" in fields


def test_the_readme_has_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    between = re.search(r"<!-- metrics -->\n+(.*?)\n*<!-- /metrics -->", text, re.DOTALL)
    assert between is not None, "no table between <!-- metrics --> and <!-- /metrics -->"
    assert between[1] + "\n" == markdown()


# ---- what an SDK gets


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """What this process's provider, of the test's own, has collected."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    yield reader
    provider.shutdown()


def collected(reader: InMemoryMetricReader) -> Points:
    """Every point by the metric's name and the attributes."""
    data = reader.get_metrics_data()
    points: Points = {}
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            assert (scope.scope.name, scope.scope.version) == ("sm_tiered", "0.1.0")
            for metric in scope.metrics:
                points[metric.name] = {
                    tuple(sorted((point.attributes or {}).items())): point for point in metric.data.data_points
                }
    return points


def test_an_sdk_gets_every_instrument_with_unit_meaning_and_attributes(reader: InMemoryMetricReader) -> None:
    recorder = Recorder()
    for event, _ in EACH_RANK + RANK_0:
        for rank in (0, 5):
            recorder.record(event, namespace="run", rank=rank)
    for event, _ in DRAINER:
        recorder.record(event, namespace="run", rank=None)
    data = reader.get_metrics_data()
    assert data is not None
    made = {metric.name: metric for metric in data.resource_metrics[0].scope_metrics[0].metrics}
    assert set(made) == {row.name for row in INSTRUMENTS}
    kinds = {"histogram": "Histogram", "counter": "Sum", "gauge": "Gauge"}
    for row in INSTRUMENTS:
        metric = made[row.name]
        assert (metric.unit, metric.description) == (row.unit, row.meaning)
        assert type(metric.data).__name__ == kinds[row.kind]
        points: Any = metric.data.data_points
        for point in points:
            attributes = dict(point.attributes)
            assert attributes.pop("sm_tiered.namespace") == "run"
            assert attributes.keys() <= set(row.attributes)
            assert attributes.get("sm_tiered.rank", 0) in (0, 5)
            assert attributes.get("sm_tiered.tier", "s3") in ("s3", "memory")
        ranks = {point.attributes.get("sm_tiered.rank") for point in points}
        assert ranks == ({0, 5} if row.by == "each rank" else {None})


def test_values_add_up_and_seconds_have_buckets_of_their_own(reader: InMemoryMetricReader) -> None:
    recorder = Recorder()
    for secs in (0.02, 0.2, 0.2):
        recorder.record(SaveStaged(step=1, tiers=(), blocked_secs=secs, bytes=2**30), namespace="run", rank=1)
    for _ in range(3):
        recorder.record(SaveSkipped(step=1, reason="x", tier="s3"), namespace="run", rank=0)
    points = collected(reader)
    [blocked] = points["sm_tiered.save.blocked.duration"].values()
    assert (blocked.count, blocked.sum, blocked.max) == (3, pytest.approx(0.42), 0.2)
    assert [count for count in blocked.bucket_counts if count] == [1, 2]
    [size] = points["sm_tiered.save.size"].values()
    assert size.explicit_bounds[0] == 2**20
    [skipped] = points["sm_tiered.save.skipped"].values()
    assert skipped.value == 3


def test_gauges_tell_the_newest(reader: InMemoryMetricReader) -> None:
    recorder = Recorder()
    for step in (10, 20):
        recorder.record(SaveAcknowledged(step=step, secs=0.1), namespace="run", rank=0)
    recorder.record(SaveDurable(step=10, tier="s3", secs=1.0, lag_steps=10), namespace="run", rank=0)
    newest = {
        dict(key)["sm_tiered.tier"]: point.value
        for key, point in collected(reader)["sm_tiered.checkpoint.step"].items()
    }
    assert newest == {"memory": 20, "s3": 10}


def test_telling_an_event_records_it(reader: InMemoryMetricReader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_recorder", Recorder())
    told = Events(namespace="run", rank=2)
    told.emit(STAGED)
    told.emit(DrainerStarted(pid=1))
    points = collected(reader)
    assert set(points) == {"sm_tiered.save.blocked.duration", "sm_tiered.save.size"}
    assert list(points["sm_tiered.save.size"]) == [(("sm_tiered.namespace", "run"), ("sm_tiered.rank", 2))]


# ---- without an SDK


def test_an_sdk_that_comes_late_gets_what_comes_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, readers = Recorder(), [InMemoryMetricReader() for _ in range(2)]
    providers: list[Any] = [api.NoOpMeterProvider(), *(MeterProvider([reader]) for reader in readers)]
    current = iter(providers)
    for count in (1, 2, 3):
        provider = next(current)
        monkeypatch.setattr(api, "get_meter_provider", lambda provider=provider: provider)
        for _ in range(count):
            recorder.record(CopyRefused(step=1, reason="x"), namespace="run", rank=0)
    told = [collected(reader)["sm_tiered.restore.fallback"] for reader in readers]
    assert [point.value for points in told for point in points.values()] == [2, 3]
    for provider in providers[1:]:
        provider.shutdown()


def test_without_an_sdk_nothing_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = api.NoOpMeterProvider()
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(provider, "get_meter", None)
    recorder = Recorder()
    recorder.record(STAGED, namespace="run", rank=0)
    assert not recorder._given_up


def test_a_provider_that_fails_is_given_up_once_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    class Failing:
        def get_meter(self, *_: object) -> object:
            asked.append(1)
            raise RuntimeError("no exporter\x1b[2J")

    provider = Failing()
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    monkeypatch.setattr(metrics, "_recorder", Recorder())
    told = Events(namespace="run", rank=0)
    for _ in range(3):
        told.emit(STAGED)
    assert asked == [1]
    warned = [message for message in caplog.messages if "metrics" in message]
    assert warned == [r"metrics are no longer recorded: RuntimeError: no exporter\x1b[2J"]


def test_an_import_that_another_thread_has_not_finished_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with monkeypatch.context() as half:
        half.setitem(sys.modules, "opentelemetry.metrics", type(sys)("opentelemetry.metrics"))
        recorder.record(STAGED, namespace="run", rank=0)
    assert not recorder._given_up


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


EMIT = """
import logging, sys
from sm_tiered.event_log import Events
from sm_tiered.events import SaveStaged
logging.basicConfig(level="WARNING")
for step in range(3):
    Events(namespace="run", rank=0).emit(SaveStaged(step=step, tiers=(), blocked_secs=0.1, bytes=1))
"""
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "opentelemetry":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_a_process_that_does_not_use_opentelemetry_never_loads_it() -> None:
    told = run_python(f"{EMIT}\nprint([name for name in sys.modules if name.startswith('opentelemetry')])")
    assert told.strip() == "[]"


def test_without_the_package_events_are_told_all_the_same() -> None:
    assert run_python(BLOCKED + EMIT) == ""


def test_a_provider_that_is_wanted_without_the_package_is_said_once() -> None:
    told = run_python(BLOCKED + EMIT, OTEL_PYTHON_METER_PROVIDER="sdk_meter_provider").splitlines()
    assert len(told) == 1
    assert "metrics are no longer recorded" in told[0]
    assert "No module named 'opentelemetry" in told[0]


def test_a_provider_that_the_environment_names_is_loaded() -> None:
    look = "\nfrom opentelemetry import metrics\nprint(type(metrics.get_meter_provider()).__module__)"
    check = "\nfrom sm_tiered import metrics as ours\nassert ours._recorder._made[1], 'no instruments'"
    told = run_python(EMIT + check + look, OTEL_PYTHON_METER_PROVIDER="sdk_meter_provider")
    assert told.startswith("opentelemetry.sdk.metrics")


def test_recording_costs_little(reader: InMemoryMetricReader) -> None:
    del reader  # an SDK listens
    recorder, times = Recorder(), 2000
    begun = time.perf_counter()
    for step in range(times):
        recorder.record(SaveStaged(step=step, tiers=(), blocked_secs=0.1, bytes=1), namespace="run", rank=0)
    assert (time.perf_counter() - begun) / times < 0.002
