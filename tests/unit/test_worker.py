"""The worker's polls: each at its own pace, and all once more at the end."""

from __future__ import annotations

import threading
import time

import pytest

from sm_tiered.worker import Worker


def worker() -> tuple[Worker, list[Exception]]:
    errors: list[Exception] = []
    return Worker("sm_tiered-test", on_error=errors.append), errors


class Look:
    """What a poll calls; it is over at the *number*-th look."""

    def __init__(self, number: int) -> None:
        self.looks, self.number = 0, number
        self.first, self.over = threading.Event(), threading.Event()

    def __call__(self) -> bool:
        self.looks += 1
        self.first.set()
        if self.looks >= self.number:
            self.over.set()
        return self.over.is_set()


@pytest.mark.parametrize("patient", [True, False])
def test_a_poll_that_is_paused_has_one_more_look_when_the_worker_is_closed(patient: bool) -> None:
    one, errors = worker()
    look = Look(2)
    one.submit(lambda: one.poll(look, to_the_end=True, pause_secs=(3600.0, 3600.0)))
    assert look.first.wait(10)
    begun = time.monotonic()
    one.close(patient=patient)
    assert time.monotonic() - begun < 10
    assert look.looks == 2
    assert not errors


def test_closing_waits_for_what_shall_go_on_to_the_end_only_where_there_is_patience() -> None:
    patient, _ = worker()
    look = Look(5)
    patient.submit(lambda: patient.poll(look, to_the_end=True))
    patient.close()
    assert look.over.is_set()

    hasty, _ = worker()
    never = Look(1_000_000)
    hasty.submit(lambda: hasty.poll(never, to_the_end=True))
    begun = time.monotonic()
    hasty.close(patient=False)
    assert time.monotonic() - begun < 10
    assert not never.over.is_set()


def test_one_poll_s_pauses_hold_up_no_other() -> None:
    one, errors = worker()
    slow, quick = Look(2), Look(20)
    one.submit(lambda: one.poll(slow, pause_secs=(3600.0, 3600.0)))
    one.submit(lambda: one.poll(quick))
    assert quick.over.wait(20)
    assert slow.looks == 1
    one.close()
    assert not errors
