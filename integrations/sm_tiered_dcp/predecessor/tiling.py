"""Whether chunks lie side by side: no element of a tensor is in two of them.

Any tiling that cuts from side to side again and again, as every way of sharding does, is told apart in a time that
grows with the number of chunks; what can't be cut so is compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

__all__ = ["Box", "are_apart"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a chunk begins, and its sizes, in elements."""

_MOST_SORTED, _BESIDES = 64, 1_000_000
"""So much work a chunk takes at the most, and how much all may take besides."""


def are_apart(boxes: Sequence[Box]) -> bool:
    """Return whether no two of *boxes*, all of as many dimensions, hold the same element.

    Raises:
        ValueError: they are cut up in a way that would take very long to look through.
    """
    groups = [[box for box in boxes if math.prod(box[1])]]
    left = _MOST_SORTED * len(boxes) + _BESIDES
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        parts, work = _cut(group)
        left -= work if len(parts) > 1 else work + len(group) ** 2
        if left < 0:
            raise ValueError(f"{len(boxes)} chunks that are cut up in too many ways")
        if len(parts) > 1:
            groups += parts
        elif any(_overlap(one, other) for at, one in enumerate(group) for other in group[:at]):
            return False
    return True


def _cut(group: list[Box]) -> tuple[list[list[Box]], int]:
    """Cut *group* along the first dimension in which that can be done; also return how much was sorted."""
    dims = len(group[0][0])
    for dim in range(dims):
        parts = list(_side_by_side(group, dim))
        if len(parts) > 1:
            return parts, len(group) * (dim + 1)
    return [group], len(group) * dims


def _side_by_side(group: list[Box], dim: int) -> Iterator[list[Box]]:
    """Yield those of *group* that reach over each other in *dim*, as one part each."""
    part: list[Box] = []
    reached = 0
    for offsets, sizes in sorted(group, key=lambda box: box[0][dim]):
        if part and offsets[dim] >= reached:
            yield part
            part = []
        part.append((offsets, sizes))
        reached = max(reached, offsets[dim] + sizes[dim])
    yield part


def _overlap(one: Box, other: Box) -> bool:
    return all(max(a, b) < min(a + n, b + m) for a, n, b, m in zip(one[0], one[1], other[0], other[1], strict=True))
