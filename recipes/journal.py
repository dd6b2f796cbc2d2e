"""What a rank tells the supervisor: one JSON object a line, readable at any time and after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["Journal", "Reader"]


class Journal:
    """A new file that one rank writes to; its first line says which process that is."""

    def __init__(self, path: Path) -> None:
        # Unbuffered: the kernel has each line at once, and keeps it when the process is killed.
        self._file = path.open("xb", buffering=0)
        self.write(pid=os.getpid())

    def write(self, **facts: object) -> None:
        """Add one line."""
        self._file.write(json.dumps(facts).encode() + b"\n")


class Reader:
    """Follows a journal that is being written."""

    def __init__(self, path: Path) -> None:
        self.lines: list[dict[str, Any]] = []
        self._path, self._offset = path, 0

    def look(self) -> list[dict[str, Any]]:
        """Add what is new to `lines`, and return it."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        new = [json.loads(line) for line in whole.splitlines()]
        self.lines += new
        return new
