"""Forked children, for what may end a process or must not be seen by the tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable


def in_child(action: Callable[[], object]) -> int:
    """Run *action* in a forked child and return how that ended: 0, 1 for an exception, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
