"""Metrics of a real job: two ranks with an SDK each, and a drainer that gets one from its environment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sm_tiered_dcp import TieredCheckpointer
from tests.distributed.dcp_jobs import recipe, run
from tests.waiting import wait_until

# What a `sitecustomize` on the path does to every Python process: how the drainer, too, comes to an SDK.
SITECUSTOMIZE = """
import json, os, sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
if "sm_tiered.drainer" in sys.orig_argv:
    out = open(os.environ["DRAINERS_METRICS"], "w")
    exporter = ConsoleMetricExporter(out=out, formatter=lambda data: data.to_json(indent=None) + "\\n")
    metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(exporter, export_interval_millis=200)]))
"""


def _points(data: Any) -> dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Attributes and point of every metric, from the SDK's JSON."""
    return {
        metric["name"]: [(point["attributes"], point) for point in metric["data"]["data_points"]]
        for resource in data["resource_metrics"]
        for scope in resource["scope_metrics"]
        if scope["scope"]["name"] == "sm_tiered"
        for metric in scope["metrics"]
    }


def _train(rank: int, which: dict[str, Any], path: str | None) -> Any:
    """Save three times, restore, and return what the rank's SDK has collected."""
    import torch
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    if path is not None:
        sys.path.insert(0, path)
        os.environ["DRAINERS_METRICS"] = os.path.join(path, "drainer.jsonl")
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    state = {"w": torch.zeros(5000), "per_rank": {"rank": rank}}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (10, 20, 30):
            handle = checkpointer.save(step, state, tiers=["memory", "disk"])
            if step == 20:
                handle.wait("disk")
        checkpointer.restore(state)
    data = reader.get_metrics_data()
    assert data is not None
    return json.loads(data.to_json())


@pytest.mark.xdist_group("ranks")
def test_ranks_and_drainer_tell_an_sdk_what_happened(tmp_path: Path, memory_dir: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    which = recipe(tmp_path, memory_dir)
    first, second = map(_points, run(2, _train, which, str(tmp_path)))
    for rank, points in enumerate((first, second)):
        [(attributes, blocked)] = points["sm_tiered.save.blocked.duration"]
        assert attributes == {"sm_tiered.namespace": "run-1", "sm_tiered.rank": rank}
        assert blocked["count"] == 3
        assert 0 < blocked["sum"] < 30
        [(_, size)] = points["sm_tiered.save.size"]
        assert size["min"] >= (20_000 if rank == 0 else 0)
        assert "sm_tiered.restore.duration" in points
    newest = {attributes["sm_tiered.tier"]: point["value"] for attributes, point in first["sm_tiered.checkpoint.step"]}
    assert newest == {"memory": 30, "disk": 30}
    [(attributes, drained)] = first["sm_tiered.drain.duration"]
    assert attributes == {"sm_tiered.namespace": "run-1", "sm_tiered.tier": "disk"}
    assert drained["count"] == 3
    assert not {name for name in second if name.startswith(("sm_tiered.drain.", "sm_tiered.checkpoint."))}
    assert not {name for name in (*first, *second) if name.startswith("sm_tiered.commit.")}, "the drainer's, twice"

    told = tmp_path / "drainer.jsonl"

    def commits() -> list[Any]:
        lines = told.read_text().splitlines() if told.exists() else []
        return [found for line in lines for found in _points(json.loads(line)).get("sm_tiered.commit.duration", [])]

    wait_until(lambda: any(point["count"] == 3 for _, point in commits()), "the drainer has not told of its commits")
    assert {tuple(sorted(attributes)) for attributes, _ in commits()} == {("sm_tiered.namespace", "sm_tiered.tier")}


@pytest.mark.xdist_group("ranks")
def test_a_drainer_without_an_sdk_leaves_its_rows_out_and_the_ranks_tell_of_durable_steps(
    tmp_path: Path, memory_dir: Path
) -> None:
    [points] = map(_points, run(0, _train, recipe(tmp_path, memory_dir), None))
    assert not {name for name in points if name.startswith("sm_tiered.commit.")}
    assert {attributes["sm_tiered.tier"] for attributes, _ in points["sm_tiered.drain.lag"]} == {"disk"}
