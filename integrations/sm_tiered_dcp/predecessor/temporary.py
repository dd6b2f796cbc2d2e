"""Temporary files, and what is said where they can't be had: which directory has no room, and for how much."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

from sm_tiered.errors import TieredError, TierFullError, TierRefusedError

__all__ = ["no_room", "using_temporary"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HINT = "Set TMPDIR to a directory with so much room."


def no_room(what: str, size: int | None) -> TierFullError:
    """Return the error that tells that *what*, of *size* bytes (None: not known), does not fit there."""
    return TierFullError(f"{_place()} has no room for {what}, {_told(size)}", hint=_HINT)


@contextmanager
def using_temporary(what: str, size: int | None) -> Generator[None, None, None]:
    """Turn what the operating system says of temporary files inside into an error that names them.

    Raises:
        TierFullError: there is no room for *what*, of *size* bytes.
        TierRefusedError: they can't be used at all.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, TieredError):
            raise
        if error.errno in _FULL:
            raise no_room(what, size) from error
        raise TierRefusedError(f"{_place()} can't take {what}, {_told(size)}: {error}", hint=_HINT) from error


def _place() -> str:
    try:
        return f"TMPDIR ({tempfile.gettempdir()})"
    except OSError:
        return f"TMPDIR ({os.environ.get('TMPDIR', '/tmp')})"  # noqa: S108 - only told


def _told(size: int | None) -> str:
    return "whose size is not known" if size is None else f"{size} bytes"
