"""Calls with a deadline: in a thread where there can be one, and never left to run for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from sm_tiered import deadline


def test_a_call_that_overruns_is_not_waited_for() -> None:
    over = threading.Event()
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within"):
        deadline.run(lambda: over.wait(30), 0.05)
    over.set()
    assert time.monotonic() - begun < 10


def test_where_no_thread_can_be_started_the_call_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that is going starts no thread: Python 3.12 says so, from the first atexit handler on."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    before = set(deadline._running)  # what an earlier test left to its end
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert deadline.run(lambda: 7, 1.0) == 7
    with pytest.raises(KeyError):
        deadline.run(lambda: {}["x"], 1.0)
    assert set(deadline._running) <= before


def test_a_call_at_exit_is_made() -> None:
    code = "import atexit; from sm_tiered import deadline; atexit.register(lambda: print(deadline.run(lambda: 7, 5)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "7\n"
