"""The finisher that an integration names: it makes the files for other readers, here or in a short-lived child.

Core has no torch, so it can't write torch's metadata; and what a child allocates goes with it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sm_tiered import layout
from sm_tiered.commit import Compose
from sm_tiered.errors import SaveError
from sm_tiered.manifest import record_from_json
from sm_tiered.records import Record

__all__ = ["Finisher", "finisher"]

_TIMEOUT_SECS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finisher:
    """How an integration makes the files for other readers (`.metadata`, `index.json`) from all records."""

    module: str = ""
    """Run where the integration is not loaded, as ``python -m <module> DIR``; empty: none are made."""
    make: Callable[[Sequence[Record]], Mapping[str, bytes]] | None = None
    """The same in this process, by name."""

    def compose(self, records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        """Make them here, from the record files by rank."""
        if self.make is None:
            return {}
        return self.make([record_from_json(data) for _, data in sorted(records.items())])


def finisher(module: str) -> Compose:
    """Return a `Compose` that runs ``python -m <module> DIR`` over a directory of record files.

    The child leaves the files it makes in DIR; an empty *module* makes none.
    """

    def compose(records: Mapping[int, bytes]) -> Mapping[str, bytes]:
        if not module:
            return {}
        with tempfile.TemporaryDirectory(prefix="sm_tiered-") as directory:
            return _run(module, Path(directory), records)

    return compose


def _run(module: str, directory: Path, records: Mapping[int, bytes]) -> Mapping[str, bytes]:
    given = {layout.record_name(rank): data for rank, data in records.items()}
    for name, data in given.items():
        (directory / name).write_bytes(data)
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, str(directory)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SaveError(f"the finisher {module} took longer than {_TIMEOUT_SECS:.0f} s") from error
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip()[-500:]
        raise SaveError(f"the finisher {module} ended with {done.returncode}: {text!r}")
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name not in given}
