"""Events as OpenTelemetry metrics, by the table in `sm_tiered.metrics_table`.

Nothing is recorded, and OpenTelemetry is not even loaded, unless this process has a meter provider of an SDK: the
application's own, or the one that ``OTEL_PYTHON_METER_PROVIDER`` names. Recording never raises.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from sm_tiered import __version__
from sm_tiered.events import Event, plain
from sm_tiered.metrics_table import FED, INSTRUMENTS, NAMESPACE, RANK, TIER, Measurement, measurements

__all__ = ["Recorder", "record"]

_API = "opentelemetry.metrics"
_PROVIDER_VARIABLE = "OTEL_PYTHON_METER_PROVIDER"
_SCOPE = "sm_tiered"
_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_BYTES = tuple(float(2**power) for power in range(20, 42, 2))
_STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_BOUNDARIES = {"s": _SECS, "By": _BYTES, "{step}": _STEPS}
"""The SDK's own are made for milliseconds."""

_logger = logging.getLogger("sm_tiered")

_Write = Callable[[float, dict[str, Any]], None]


class Recorder:
    """The instruments of one process, made anew when its meter provider changes. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[object, dict[str, _Write] | None] = (None, None)
        """The provider, and how to write to its instruments; None: it keeps nothing."""
        self._given_up = False

    def record(self, event: Event, *, namespace: str, rank: int | None) -> None:
        """Record what *event* is for the instruments, if anybody keeps metrics in this process. Never raises."""
        if type(event) not in FED or self._given_up:
            return
        api = sys.modules.get(_API)
        if api is None and _PROVIDER_VARIABLE not in os.environ:
            return
        try:
            writes = self._writes(api or importlib.import_module(_API))
            if writes is None:
                return
            for found in measurements(event, rank=rank):
                writes[found.instrument.name](found.value, _attributes(found, namespace, rank))
        except Exception as error:  # noqa: BLE001 - a provider may be anybody's, and none may stop a training
            self._given_up = True
            _logger.warning("metrics are no longer recorded: %s", plain(error))

    def _writes(self, api: Any) -> dict[str, _Write] | None:
        get: Callable[[], object] | None = getattr(api, "get_meter_provider", None)
        if get is None:  # another thread has not finished to import it
            return None
        provider = get()
        if self._made[0] is not provider:
            with self._lock:
                if self._made[0] is not provider:
                    # The API's own providers stand for an SDK that is not there, or not yet.
                    silent = type(provider).__module__.split(".")[:2] == _API.split(".")
                    self._made = (provider, None if silent else _instruments(provider))
        return self._made[1]


def _attributes(found: Measurement, namespace: str, rank: int | None) -> dict[str, Any]:
    values = {NAMESPACE: namespace, RANK: rank, TIER: found.tier}
    return {name: values[name] for name in found.instrument.attributes if values[name] is not None}


def _instruments(provider: Any) -> dict[str, _Write]:
    """Make the instruments of the table; return by name what a value goes to."""
    meter = provider.get_meter(_SCOPE, __version__)
    made: dict[str, _Write] = {}
    for row in INSTRUMENTS:
        if row.kind == "counter":
            made[row.name] = meter.create_counter(row.name, row.unit, row.meaning).add
        elif row.kind == "gauge":
            made[row.name] = meter.create_gauge(row.name, row.unit, row.meaning).set
        else:
            boundaries = _BOUNDARIES[row.unit]
            histogram = meter.create_histogram(
                row.name, row.unit, row.meaning, explicit_bucket_boundaries_advisory=boundaries
            )
            made[row.name] = histogram.record
    return made


_recorder = Recorder()


def record(event: Event, *, namespace: str, rank: int | None) -> None:
    """Record *event* with this process's meter provider; see `Recorder.record`."""
    _recorder.record(event, namespace=namespace, rank=rank)
