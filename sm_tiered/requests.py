"""Asking a running job for a save: a file that appears, on any rank's node, where the job looks at each step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sm_tiered import layout
from sm_tiered.errors import TierRefusedError
from sm_tiered.policies import OnRequest, members_of
from sm_tiered.settings import LocalSettings, MemorySettings, Settings

__all__ = ["Requests", "ask_for_save", "request_files"]

_Seen = tuple[int, int]


class Requests:
    """One rank's eye on the files that ask for a save."""

    def __init__(self, files: Iterable[Path] = ()) -> None:
        self._files = tuple(files)
        self._taken: dict[Path, _Seen] = {}

    def noticed(self) -> bool:
        """Return whether a request is there that no save has answered. One `stat` a file."""
        return any(seen is not None and seen != self._taken.get(file) for file, seen in self._look())

    def take(self) -> None:
        """Say that a save that begins now answers all that is there."""
        for file, seen in self._look():
            if seen is None:
                continue
            self._taken[file] = seen  # also what can't be removed is answered once
            with suppress(OSError):
                file.unlink()

    def _look(self) -> list[tuple[Path, _Seen | None]]:
        return [(file, _seen(file)) for file in self._files]


def request_files(settings: Settings) -> tuple[Path, ...]:
    """Return the files that the policies of *settings* wait for; none where no policy waits for a request.

    Where a policy names no file it is `layout.REQUEST` in the namespace's directory in the memory tier, or else in the
    first directory tier.
    """
    wanted = [
        policy
        for tier in settings.tiers
        if tier.save is not None
        for policy in members_of(tier.save)
        if isinstance(policy, OnRequest)
    ]
    named = [Path(policy.file) for policy in wanted if policy.file is not None]
    shared = [default for policy in wanted if policy.file is None and (default := _default(settings)) is not None]
    return tuple(dict.fromkeys([*named, *shared]))


def ask_for_save(file: Path) -> bool:
    """Make the request *file*; return False where one is there already.

    Raises:
        TierRefusedError: its directory is missing or can't be written.
    """
    text = json.dumps({"asked_at": time.time(), "pid": os.getpid()})
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(file, flags, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise TierRefusedError(
            f"no save can be asked for at {str(file)!r}: {error.strerror}",
            hint="Run this on a node of the job, as the job's user, after the job has begun.",
        ) from error
    with os.fdopen(descriptor, "w") as opened:
        opened.write(text)
    return True


def _default(settings: Settings) -> Path | None:
    for tier in settings.tiers:
        if isinstance(tier, (MemorySettings, LocalSettings)):
            return Path(tier.path) / settings.namespace / layout.REQUEST
    return None


def _seen(file: Path) -> _Seen | None:
    try:
        found = os.stat(file, follow_symlinks=False)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
