"""What ``sm-tiered diff`` prints, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sm_tiered.cli.diff import Found, Warned
from sm_tiered.cli.output import rate, size, table, text
from sm_tiered.stored_tensors import StoredTensor
from sm_tiered.tensor_diff import Difference

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["blocks", "document"]

_SHOWN = 20


def blocks(found: Found, warned: Sequence[Warned], *, every: bool) -> list[RenderableType]:
    """Return what to print; not *every* line of a long table."""
    most = None if every else _SHOWN
    told: list[RenderableType] = [_sides(found), text("")]
    told += _difference_table(found, most)
    told += _unlike_table(found, most)
    for side, names in zip("AB", found.only, strict=True):
        told += _listed(f"only in {side}", names, most)
    told += _listed("values that differ", [name for name, same in found.values.items() if not same], most)
    for each in warned:
        names = ", ".join(each.names[:3]) + (" …" if len(each.names) > 3 else "")
        told.append(text(f"warning: {each.message}" + (f" ({names})" if names else ""), "bold yellow"))
    return [*told, _verdict(found)]


def _sides(found: Found) -> RenderableType:
    rows = table("", "tier", "step", "ranks", "tensors", "attempt", right=("step", "ranks", "tensors"))
    for name, chosen, stored in (("A", found.a, found.left), ("B", found.b, found.right)):
        rows.add_row(
            text(name, "bold"),
            text(chosen.settings.name),
            text(chosen.checkpoint.step),
            text(chosen.records[0].world),
            text(len(stored.tensors)),
            text(chosen.checkpoint.attempt),
        )
    return rows


def _difference_table(found: Found, most: int | None) -> list[RenderableType]:
    names = found.different
    if not names:
        return []
    right = ("differ", "max |a-b|", "rel. L2", "NaN", "Inf")
    rows = table("differ", "max |a-b|", "rel. L2", "NaN", "Inf", f"tensor ({len(names)})", right=right)
    for name in names[:most]:
        each = found.compared[name]
        rows.add_row(
            text(_share(each)),
            text(f"{each.max_abs:.3g}"),
            text(f"{each.relative:.3g}"),
            text(_counts(each.nans), "red" if any(each.nans) else "dim"),
            text(_counts(each.infinities), "red" if any(each.infinities) else "dim"),
            text(name),
        )
    return [rows, *_more(names, most), text("")]


def _share(each: Difference) -> str:
    if each.different == each.elements:
        return "all"
    share = each.different / each.elements
    return f"{share:.1%}" if share >= 0.001 else str(each.different)


def _counts(pair: tuple[int, int]) -> str:
    return f"{pair[0]}, {pair[1]}" if any(pair) else "0"


def _unlike_table(found: Found, most: int | None) -> list[RenderableType]:
    if not found.unlike:
        return []
    rows = table("A", "B", f"tensor of another dtype or shape ({len(found.unlike)})")
    for name in found.unlike[:most]:
        rows.add_row(text(_kind(found.left.tensors[name])), text(_kind(found.right.tensors[name])), text(name))
    return [rows, *_more(found.unlike, most), text("")]


def _kind(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {' × '.join(map(str, tensor.shape)) or 'scalar'}"


def _listed(what: str, names: Sequence[str], most: int | None) -> list[RenderableType]:
    if not names:
        return []
    return [text(f"{what} ({len(names)})", "dim"), text(", ".join(names[:most])), *_more(names, most), text("")]


def _more(names: Sequence[str], most: int | None) -> list[RenderableType]:
    count = 0 if most is None else len(names) - most
    return [text(f"… and {count} more: --all shows them", "dim")] if count > 0 else []


def _verdict(found: Found) -> RenderableType:
    speed = rate(found.bytes_read, found.secs)
    read = f"{size(found.bytes_read)} read and verified" + (f" ({speed})" if speed else "")
    if found.skipped_bytes:
        read += f", {size(found.skipped_bytes)} equal by their digests"
    if found.same:
        return text(f"the same: {len(found.compared)} tensors, {len(found.values)} values; {read}", "green")
    different, alike = len(found.different), sum(each.same for each in found.compared.values())
    facts = [f"{different} tensors differ, {alike} are identical"]
    facts += [f"{len(found.unlike)} are of another dtype or shape"] if found.unlike else []
    lone = sum(map(len, found.only))
    facts += [f"{lone} {'is' if lone == 1 else 'are'} only on one side"] if lone else []
    values = sum(not same for same in found.values.values())
    facts += [f"{values} values differ"] if values else []
    return text(f"{', '.join(facts)}; {read}", "cyan")


def document(found: Found, warned: Sequence[Warned]) -> dict[str, object]:
    """Return the JSON document."""
    return {
        "version": 1,
        "a": found.a.as_json(),
        "b": found.b.as_json(),
        "same": found.same,
        "identical": [name for name, each in found.compared.items() if each.same],
        "different": [_entry(name, found.left.tensors[name], found.compared[name]) for name in found.different],
        "unlike": [
            {"fqn": name, "a": _kind_json(found.left.tensors[name]), "b": _kind_json(found.right.tensors[name])}
            for name in found.unlike
        ],
        "only_a": found.only[0],
        "only_b": found.only[1],
        "values": {
            "identical": [name for name, same in found.values.items() if same],
            "different": [name for name, same in found.values.items() if not same],
        },
        "warnings": [{"kind": each.kind, "message": each.message, "names": list(each.names)} for each in warned],
        "bytes_read": found.bytes_read,
        "bytes_skipped": found.skipped_bytes,
        "secs": round(found.secs, 3),
    }


def _kind_json(tensor: StoredTensor) -> dict[str, object]:
    return {"dtype": tensor.dtype, "shape": list(tensor.shape)}


def _entry(name: str, tensor: StoredTensor, each: Difference) -> dict[str, object]:
    return {
        "fqn": name,
        **_kind_json(tensor),
        "elements": each.elements,
        "different": each.different,
        "max_abs": _finite(each.max_abs),
        "relative_l2": _finite(each.relative),
        "nan": {"a": each.nans[0], "b": each.nans[1]},
        "inf": {"a": each.infinities[0], "b": each.infinities[1]},
        "shards": each.shards,
    }


def _finite(value: float) -> float | None:
    """JSON has no infinity: the norm of a is 0, or the sum is more than a float64 can hold."""
    return value if math.isfinite(value) else None
