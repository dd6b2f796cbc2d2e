"""The table: figures beside what they must be, and a word on each."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["Goal", "Row", "show"]

_STYLES = {"stretch": "bold green", "must": "green", "missed": "bold red", "": ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A bound, in the unit of the figure, and how it is written."""

    text: str
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    figure: str
    value: str
    """For people, with its unit."""
    measured: float
    """In the unit of the goals."""
    ratio: float | None = None
    """To `copy_` of as many bytes, or to what the figure says."""
    must: Goal | None = None
    stretch: Goal | None = None
    at_least: bool = False
    """Whether more is better."""
    samples: dict[str, Any] = field(default_factory=dict[str, Any])
    """All that was measured; seconds."""

    @property
    def verdict(self) -> str:
        """``stretch``, ``must`` or ``missed``; empty where nothing is asked."""
        if self.must is None:
            return ""
        if self.stretch is not None and self._reaches(self.stretch):
            return "stretch"
        return "must" if self._reaches(self.must) else "missed"

    def _reaches(self, goal: Goal) -> bool:
        return self.measured >= goal.bound if self.at_least else self.measured <= goal.bound

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON has it."""
        return {**asdict(self), "verdict": self.verdict}


def show(rows: list[Row], title: str) -> None:
    """Print *rows*."""
    table = Table(title=title, title_justify="left")
    for name in ("figure", "value", "× copy_", "must", "stretch", "verdict"):
        table.add_column(name, justify="left" if name in ("figure", "verdict") else "right")
    for row in rows:
        table.add_row(
            row.figure,
            row.value,
            "" if row.ratio is None else f"{row.ratio:.2f}",
            row.must.text if row.must else "",
            row.stretch.text if row.stretch else "",
            f"[{_STYLES[row.verdict]}]{row.verdict}" if row.verdict else "",
        )
    Console(width=150 if not Console().is_terminal else None).print(table)
