"""The trainer tells, once, of each save that a durable tier has: when it came, and how far behind it was."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sm_tiered.errors import SaveError
from sm_tiered.events import Event, SaveDurable, SaveFailed, SaveSkipped
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered.ledger import Ledger
from sm_tiered.settings import Settings


class Told(list[Event]):
    """What was told, in the place of a `Store`'s events."""

    def emit(self, event: Event) -> None:
        self.append(event)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def ledger(told: Told) -> Ledger:
    tiers = SimpleNamespace(durable={"s3": None, "disk": None})
    store = SimpleNamespace(settings=Settings(namespace="run", tiers=()), tiers=tiers, events=told)
    return Ledger(cast(Any, store))


def saved(ledger: Ledger, step: int, *tiers: str) -> tuple[SaveHandle, dict[str, TierState]]:
    handle, states = SaveHandle(step=step, nudge=lambda: None), {tier: TierState() for tier in tiers}
    for tier, state in states.items():
        ledger.track(handle, tier, state)
    return handle, states


def test_a_save_is_told_of_when_it_is_durable_with_its_lag_behind_the_newest(ledger: Ledger, told: Told) -> None:
    handle, first = saved(ledger, 10, "memory", "s3", "disk")
    saved(ledger, 25, "memory")
    first["memory"].settle(None)
    assert ledger.deliver() is None
    assert told == []
    handle.begun_at = time.monotonic() - 60
    first["s3"].settle(None)
    ledger.deliver()
    ledger.deliver()
    [event] = told
    assert isinstance(event, SaveDurable)
    assert (event.step, event.tier, event.lag_steps) == (10, "s3", 15)
    assert 60 <= event.secs < 70
    first["disk"].settle(None)
    ledger.deliver()
    assert [found.tier for found in told if isinstance(found, SaveDurable)] == ["s3", "disk"]


def test_after_a_roll_back_the_lag_is_never_below_zero(ledger: Ledger, told: Told) -> None:
    _, states = saved(ledger, 100, "s3")
    saved(ledger, 40, "memory")
    states["s3"].settle(None)
    ledger.deliver()
    assert [found.lag_steps for found in told if isinstance(found, SaveDurable)] == [0]


def test_a_save_that_failed_or_was_left_out_is_not_told_of_as_durable(ledger: Ledger, told: Told) -> None:
    handle, states = saved(ledger, 10, "s3")
    states["s3"].settle(SaveError("no"))
    ledger.skip(handle, "the drain is busy", ["disk"])
    ledger.deliver()
    skipped, failed = told
    assert isinstance(skipped, SaveSkipped)
    assert (skipped.tier, skipped.reason) == ("disk", "disk: the drain is busy")
    assert isinstance(failed, SaveFailed)
    assert failed.tier == "s3"
