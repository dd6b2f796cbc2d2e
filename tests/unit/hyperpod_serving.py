"""A stand-in for the HyperPod service in a process of its own, so that its memory and sockets are not counted."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def daemon_in_child() -> Iterator[str]:
    """Give its address."""
    command = [sys.executable, "-m", "sm_tiered.testing.daemon", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        found = re.search(r"http://\S+?:\d+", child.stdout.readline())
        assert found, "the stand-in did not start"
        try:
            yield found[0]
        finally:
            child.terminate()
            child.wait(10)
