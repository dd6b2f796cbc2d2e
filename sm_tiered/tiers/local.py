"""The local tier: a directory that all ranks share (FSx, NFS; one node's disk on one node). Durable."""

from __future__ import annotations

import re
import time
from pathlib import Path

from sm_tiered.errors import ConfigError, KeyExistsError, KeyNotFoundError, TierError, TierRefusedError
from sm_tiered.settings import LocalSettings
from sm_tiered.tiers.files import DirectoryTier

__all__ = ["LocalTier"]

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_POLL_SECS = 0.05


class LocalTier(DirectoryTier):
    """A durable tier below ``path/namespace``; every write is synced unless the settings say otherwise."""

    def __init__(self, settings: LocalSettings, namespace: str) -> None:
        super().__init__(name=settings.name, base=settings.path, namespace=namespace, fsync=settings.fsync)
        self.settings = settings

    def write_probe(self, token: str) -> None:
        """Leave something that every rank must then `read_probe`: or the directory is not one and the same.

        Raises:
            TierError: the directory can't be made or written; it is named, for the first write of a job tells of it.
        """
        key = _probe_key(token)
        try:
            self.put(key, token.encode())
        except (KeyExistsError, KeyNotFoundError) as error:
            raise self._unusable(TierRefusedError, "it is a link, or no directory") from error
        except TierError as error:
            raise self._unusable(type(error), error.message.removeprefix(f"{key}: "), error.hint) from error

    def _unusable(self, kind: type[TierError], reason: str, hint: str | None = None) -> TierError:
        place = self.root if Path(self.settings.path).is_dir() else self.settings.path
        other = f"Check that it can be made and written, or set tiers.{self.name}.path to another directory."
        return kind(f"{place} can't be written: {reason}", hint=hint or other, tier=self.name)

    def read_probe(self, token: str, *, timeout_secs: float = 5.0) -> bool:
        """Return whether what `write_probe` left is visible here, with patience for a network's caches."""
        end = time.monotonic() + timeout_secs
        while True:
            try:
                return self.get(_probe_key(token)).data == token.encode()
            except KeyNotFoundError:
                if time.monotonic() >= end:
                    return False
                # Reading the directory makes an NFS client forget that there was no such file.
                self.list_dirs("")
                time.sleep(_POLL_SECS)

    def clear_probe(self, token: str) -> None:
        """Take away what `write_probe` left."""
        self.delete([_probe_key(token)])


def _probe_key(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise ConfigError(f"probe token {token!r} is not made of 1 to 64 of A-Z a-z 0-9 _ -")
    return f".probe-{token}"
