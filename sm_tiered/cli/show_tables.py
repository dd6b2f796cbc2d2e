"""The tables of ``sm-tiered show``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sm_tiered.cli.common import kind_of
from sm_tiered.cli.contents import Shown, parts_of, state_of, tensors_of, values_of
from sm_tiered.cli.output import age, metrics_text, size, table, text, utc

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["blocks"]

_SHOWN = 20


def blocks(shown: Sequence[Shown], now: float, every: bool) -> list[RenderableType]:
    from rich.rule import Rule

    blocks: list[RenderableType] = []
    for one in shown:
        if blocks:
            blocks += [text(""), Rule(style="dim"), text("")]
        blocks += [_facts(one, now), text(""), _copies(one), *(text(line, "red") for line in one.damage)]
        blocks += _part_table(one, every)
        same = next((other for other in shown[: shown.index(one)] if _holds_same(one, other)), None)
        if same is not None:
            blocks += [text(""), text(f"the same tensors and values as step {same.checkpoint.step}", "dim")]
        else:
            blocks += _tensor_table(one, every) + _value_list(one, every)
    return blocks


def _holds_same(one: Shown, other: Shown) -> bool:
    """Whether two checkpoints hold tensors and values of the same names and shapes."""
    return (tensors_of(one), values_of(one)) == (tensors_of(other), values_of(other))


def _facts(one: Shown, now: float) -> RenderableType:
    from rich.table import Table

    first = one.records[0] if one.records else None
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    rows = [("step", str(one.checkpoint.step)), ("attempt", str(one.checkpoint.attempt)), ("parent", _parent(one))]
    if first is not None:
        rows += [
            ("saved", f"{utc(first.saved_at)} ({age(now - first.saved_at)} ago)"),
            ("ranks", str(first.world)),
            ("metrics", metrics_text(first.metrics, 20) or "none"),
            ("watermark", str(first.watermark) if first.watermark else "none"),
        ]
    for name, value in rows:
        grid.add_row(name, text(value, "bold" if name == "step" else ""))
    return grid


def _parent(one: Shown) -> str:
    if one.attempt is None:
        return "unknown: the attempt's record is missing"
    if one.attempt.parent is None:
        return "none: it began afresh"
    fork = ", a step that was chosen: what came after it is left behind" if one.attempt.chosen else ""
    return f"{one.attempt.parent}{fork}"


def _copies(one: Shown) -> RenderableType:
    rows = table("tier", "kind", "size", "files", "pinned", "state", right=("size", "files"))
    for copy in one.copies:
        style = "green" if copy.holding.problem is None else "yellow"
        rows.add_row(
            text(copy.tier.settings.name, "bold"),
            text(kind_of(copy.tier.settings)),
            text(size(copy.view.bytes)),
            text(copy.view.files),
            text("yes" if copy.view.pinned else "no"),
            text(state_of(copy), style),
        )
    return rows


def _part_table(one: Shown, every: bool) -> list[RenderableType]:
    parts = parts_of(one)
    if not parts:
        return []
    shown = parts if every else parts[:_SHOWN]
    rows = table("part", "rank", "size", "chunks", "digests", right=("rank", "size", "chunks"))
    for rank, part in shown:
        digests = " ".join(f"{digest[:8]}…" for digest in part.chunks[:3]) + (" …" if len(part.chunks) > 3 else "")
        rows.add_row(
            text(part.name),
            text(rank),
            text(size(part.size)),
            text(len(part.chunks)),
            text(digests + (" (replica)" if part.replica else "")),
        )
    return [text(""), rows, *_more(len(parts) - len(shown), "parts")]


def _tensor_table(one: Shown, every: bool) -> list[RenderableType]:
    tensors = tensors_of(one)
    if not tensors:
        return []
    shown = tensors if every else tensors[:_SHOWN]
    rows = table(
        "dtype", "size", "shape", f"tensor ({len(tensors)}, {size(sum(t.bytes for t in tensors))})", right=("size",)
    )
    for tensor in shown:
        shape = " × ".join(map(str, tensor.shape)) or "scalar"
        rows.add_row(text(tensor.dtype), text(size(tensor.bytes)), text(shape), text(tensor.fqn))
    return [text(""), rows, *_more(len(tensors) - len(shown), "tensors")]


def _value_list(one: Shown, every: bool) -> list[RenderableType]:
    names = values_of(one)
    if not names:
        return []
    shown = names if every else names[:_SHOWN]
    heading = text(f"Python values ({len(names)})", "dim")
    return [text(""), heading, text(", ".join(map(str, shown))), *_more(len(names) - len(shown), "values")]


def _more(count: int, what: str) -> list[RenderableType]:
    return [text(f"… and {count} {what} more: --all shows them", "dim")] if count > 0 else []
