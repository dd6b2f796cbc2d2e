"""Who hears a SIGTERM: the policies while they wait for it, and whoever listened before, always."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from sm_tiered.preemption import Preemption
from tests.unit.children import in_child


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def _tell() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_noticed_until_it_is_removed() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    preemption = Preemption()
    preemption.install()
    assert not preemption.noticed
    _tell()
    assert preemption.noticed
    preemption.remove()
    _tell()
    assert len(heard) == 2


def test_whoever_puts_it_back_after_it_was_removed_does_not_keep_the_signal_from_the_process() -> None:
    preemption = Preemption()
    preemption.install()
    ours = signal.signal(signal.SIGTERM, lambda number, frame: None)
    preemption.remove()
    signal.signal(signal.SIGTERM, ours)
    assert in_child(_tell) == -signal.SIGTERM
    assert not preemption.noticed


def test_a_handler_that_calls_on_to_it_after_it_was_removed_keeps_the_signal() -> None:
    preemption, heard = Preemption(), list[int]()
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    preemption.install()
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda number, frame: (heard.append(0), ours(number, frame)))
    preemption.remove()
    _tell()
    assert heard == [0, signal.SIGTERM]
    assert not preemption.noticed
