"""How rows of the table are made: how much is done, and a duration beside a copy of as many bytes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import room
from table import Goal, Row
from timing import MIB

__all__ = ["FEW", "MANY", "Scale", "goal", "in_memory", "joined", "mib", "ms", "ratio", "timed"]

FEW, MANY = 400, 4800
"""Tensors in a state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done."""

    size: int
    """Bytes of the state."""
    runs: int
    rival_runs: int

    @property
    def state(self) -> str:
        return f"{self.size / 1024**3:.2g} GiB"


def in_memory(function: str, /, *, world: int = 1, **settings: Any) -> Any:
    """Call in a room that has a directory on tmpfs."""
    with room.directory() as path:
        return room.call(function, world=world, path=path, **settings)


def joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Put what *runs* measured together."""
    names = [name for name, value in runs[0].items() if isinstance(value, list)]
    return {name: [value for run in runs for value in run[name]] for name in names}


def timed(
    figure: str,
    found: dict[str, Any],
    name: str,
    must: tuple[float, float] | None = None,
    stretch: tuple[float, float] | None = None,
) -> Row:
    """A duration; goals are (times the copy, plus milliseconds)."""
    copied, value = (1000 * statistics.median(found[key]) for key in ("copy", name))

    def bound(asked: tuple[float, float] | None) -> Goal | None:
        if asked is None:
            return None
        times, plus = asked
        return goal(times * copied + plus, f"≤ {times:g}×" + (f" + {plus:g} ms" if plus else ""))

    return Row(
        figure=figure,
        value=ms(value / 1000),
        measured=value,
        ratio=value / copied,
        must=bound(must),
        stretch=bound(stretch),
        samples={key: found[key] for key in ("copy", name)},
    )


def goal(bound: float, text: str) -> Goal:
    """A bound that is written *text*."""
    return Goal(text=text, bound=bound)


def ms(secs: float) -> str:
    """Write a duration."""
    return f"{1000 * secs:.1f} ms"


def ratio(figure: str, theirs: float, ours: float, must: float) -> Row:
    """How many times as much *theirs* is; more is better."""
    found = theirs / ours
    return Row(figure=figure, value=f"{found:.1f}", measured=found, must=goal(must, f"≥ {must:g}"), at_least=True)


def mib(figure: str, size: int, must: int | None = None) -> Row:
    """Memory of *size* bytes; *must*: the most, in MiB."""
    asked, found = None if must is None else goal(must, f"≤ {must} MiB"), size / MIB
    return Row(figure=figure, value=f"{found:.0f} MiB", measured=found, must=asked)
