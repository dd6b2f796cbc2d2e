"""What the engine needs of a group of ranks. Core knows no process groups: an integration brings one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sm_tiered.errors import TieredError, error_from_json, error_to_json, typed

__all__ = ["Group", "SoloGroup", "all_or_none"]


class Group(Protocol):
    """The ranks of one job. `max` and `gather` are collective, `add` is not."""

    @property
    def rank(self) -> int:
        """This process, ``0 <= rank < world``."""
        ...

    @property
    def world(self) -> int:
        """How many ranks there are."""
        ...

    def max(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum over all ranks of equally long lists of 64-bit integers."""
        ...

    def gather(self, value: object) -> list[Any]:
        """Return the JSON-like *value* of every rank, in rank order."""
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to a counter that the whole job shares and return its new value; with 0, read it. Any thread may."""
        ...

    def drop(self, key: str) -> None:
        """Forget a counter. Any thread may."""
        ...

    def close(self) -> None:
        """Free what the group holds. Not collective."""
        ...


class SoloGroup:
    """A job of one rank."""

    rank = 0
    world = 1

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}

    def max(self, values: Sequence[int]) -> list[int]:
        """Return *values*."""
        return list(values)

    def gather(self, value: object) -> list[Any]:
        """Return *value*, alone."""
        return [value]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter of this process."""
        self._counters[key] = self._counters.get(key, 0) + amount
        return self._counters[key]

    def drop(self, key: str) -> None:
        """Forget a counter."""
        self._counters.pop(key, None)

    def close(self) -> None:
        """Nothing is held."""


def all_or_none(group: Group, action: Callable[[], None]) -> None:
    """Run *action* on every rank of *group*; if it fails on one, raise on all. Collective."""
    failure: TieredError | None = None
    try:
        action()
    except Exception as error:  # whatever it is: a rank that left alone would let the others wait
        failure = typed(error)
    votes = group.gather(error_to_json(failure) if failure else None)
    if failure is not None:
        raise failure
    for rank, vote in enumerate(votes):
        if vote is not None:
            error = error_from_json(vote)
            error.rank = rank if error.rank is None else error.rank
            raise error
