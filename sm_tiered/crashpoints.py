"""Named places where a test ends the process as a power cut would. Off, and free, unless the environment names one.

``SM_TIERED_CRASH_AT=publish.before_rename`` kills at that point, ``…:3`` the third time that it is reached.
"""

from __future__ import annotations

import os
import signal

from sm_tiered.errors import ConfigError

__all__ = ["POINTS", "VARIABLE", "arm", "crashpoint"]

VARIABLE = "SM_TIERED_CRASH_AT"

POINTS = (
    "stage.before_copy",
    "stage.after_copy",
    "publish.before_rename",
    "publish.after_rename",
    "record.before_write",
    "record.after_write",
    "ack.before",
    "recycle.after_unpublish",
    "recycle.after_rename",
    "enqueue.before",
    "enqueue.after",
    "promote.before_part",
    "promote.after_part",
    "promote.after_record",
    "commit.before_metadata",
    "commit.before_manifest",
    "commit.after_manifest",
    "retention.after_tombstone",
    "retention.after_delete",
    "restore.before_vote",
    "restore.after_vote",
    "attempt.before_record",
    "attempt.after_record",
)
"""Every point there is."""

_armed = False
_name, _left = "", 0


def arm(spec: str | None) -> None:
    """Choose where this process dies: ``name`` or ``name:k`` for the k-th time; None or empty: nowhere.

    Raises:
        ConfigError: there is no such point.
    """
    global _armed, _name, _left
    name, _, count = (spec or "").partition(":")
    if name and (name not in POINTS or (count and not (count.isascii() and count.isdigit() and int(count) > 0))):
        raise ConfigError(
            f"{VARIABLE} is {spec!r}", hint=f"Use one of {', '.join(POINTS)}, or such a name with ':k', k >= 1."
        )
    _armed, _name, _left = bool(name), name, int(count or 1)


def crashpoint(name: str) -> None:
    """Do nothing, or SIGKILL this process when *name* is where it shall die."""
    if _armed:
        _reached(name)


def _reached(name: str) -> None:
    global _left
    if name not in POINTS:
        raise ConfigError(f"crash point {name!r} is not registered")
    if name == _name:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get(VARIABLE))
