"""The fields of events, read strictly: what they hold comes from files that anybody may have written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

from sm_tiered import layout
from sm_tiered.errors import FormatError
from sm_tiered.events import plain

__all__ = ["Facts"]

_MAX_SECS = 1e9
_MAX_BYTES = 2**62
_MAX_TIERS = 32


class Facts:
    """The fields of one event.

    Each method raises FormatError when the field is not there or is of another kind than it should be.
    """

    def __init__(self, fields: Mapping[str, object]) -> None:
        self._fields = fields

    def step(self, name: str = "step") -> int:
        """Return a step."""
        found = self._fields.get(name)
        if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < layout.MAX_STEP:
            raise FormatError(f"{name} is no step")
        return found

    def step_or_none(self, name: str = "step") -> int | None:
        """Return a step, or None where there is none."""
        return None if self._fields.get(name) is None else self.step(name)

    def secs(self, name: str) -> float:
        """Return a duration in seconds."""
        found = self._fields.get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            raise FormatError(f"{name} is no duration")
        if not math.isfinite(found) or not 0 <= found <= _MAX_SECS:
            raise FormatError(f"{name} is out of range")
        return float(found)

    def bytes(self) -> int | None:
        """Return ``bytes``, or None where it is no size."""
        found = self._fields.get("bytes")
        return None if isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < _MAX_BYTES else found

    def flag(self, name: str) -> bool:
        """Return whether *name* is set."""
        return self._fields.get(name) is True

    def text(self, name: str) -> str:
        """Return text, cut and with control characters escaped."""
        found = self._fields.get(name)
        if not isinstance(found, str):
            raise FormatError(f"{name} is no text")
        return str(plain(found))

    def tier(self) -> str:
        """Return the name of a tier, or several joined with ``+``."""
        found = self.text("tier")
        if not 0 < len(found) <= 200:
            raise FormatError("tier is no name")
        return found

    def tiers(self) -> tuple[str, ...]:
        """Return names of tiers."""
        found = self._fields.get("tiers")
        names = cast("list[object]", found) if isinstance(found, list) else []
        return tuple(str(plain(name)) for name in names[:_MAX_TIERS] if isinstance(name, str) and name)
