"""What commands print: text from outside made harmless, sizes and ages for people, one JSON document for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from io import StringIO
from typing import TYPE_CHECKING

from sm_tiered.errors import TieredError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = [
    "OutputClosedError",
    "age",
    "clean",
    "marker",
    "metrics_text",
    "note_error",
    "note_left_out",
    "print_json",
    "rate",
    "render",
    "size",
    "table",
    "text",
    "utc",
]

_MIN_COLUMNS, _NO_WINDOW_COLUMNS = 60, 160
_TELLING_BYTES = 1024 * 1024


class OutputClosedError(Exception):
    """Whoever read standard output has gone."""


def clean(value: object) -> str:
    """Return *value* as one line in which control characters, terminal escapes and the like are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(value))


def text(value: object, style: str = "") -> Text:
    """Return *value*, made harmless, for a table or a line."""
    from rich.text import Text

    return Text(clean(value), style=style)


def size(value: int | None) -> str:
    """Return so many bytes for people, in powers of 1024."""
    if value is None:
        return "?"
    if value < 1024:
        return f"{value} B"
    amount, units = value / 1024, ["PiB", "TiB", "GiB", "MiB", "KiB"]
    while amount >= 999.95 and len(units) > 1:
        amount /= 1024
        units.pop()
    return f"{amount:.1f} {units[-1]}"


def rate(done: int, secs: float) -> str:
    """Return a throughput; empty when too little was done to tell."""
    return f"{size(int(done / secs))}/s" if done >= _TELLING_BYTES and secs > 0 else ""


def age(secs: float | None) -> str:
    """Return how long ago something was, in at most two units."""
    if secs is None:
        return "?"
    if secs < -60:
        return f"in {age(-secs)}"
    whole = max(0, int(secs))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h" if hours and days < 10 else f"{days} d"
    if hours:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{minutes} min" if minutes else f"{whole} s"


def utc(secs: float | None) -> str:
    """Return seconds since the epoch as date and time."""
    try:
        found = datetime.fromtimestamp(secs or 0.0, tz=timezone.utc)
    except (OverflowError, ValueError, OSError):
        return "?"
    return "?" if secs is None else found.strftime("%Y-%m-%d %H:%M:%S UTC")


def metrics_text(metrics: Mapping[str, float], limit: int = 4) -> str:
    """Return metrics for people, the first ones by name."""
    shown = [f"{name} {value:.4g}" for name, value in sorted(metrics.items())]
    return ", ".join(shown[:limit]) + (f", {len(shown) - limit} more" if len(shown) > limit else "")


def marker() -> str:
    """Return the sign for what restore would take, in what standard output can show."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower()
    return "▶" if encoding.startswith("utf") else ">"


def table(*headers: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table: no frame, the named columns to the right, the last one takes what is left."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for header in headers:
        last = header == headers[-1]
        made.add_column(
            header,
            justify="right" if header in right else "left",
            no_wrap=not last,
            overflow="fold" if last else "ellipsis",
        )
    return made


def render(*blocks: RenderableType) -> None:
    """Print *blocks* to standard output."""
    from rich.console import Group

    rendered = StringIO()
    _console(rendered).print(Group(*blocks))
    # Trailing blanks would only wrap in narrow windows and show up in diffs.
    _write("".join(f"{line.rstrip()}\n" for line in rendered.getvalue().splitlines()))


def print_json(document: object) -> None:
    """Print one JSON document, ASCII only, to standard output."""
    _write(json.dumps(document, indent=2, ensure_ascii=True, allow_nan=False) + "\n")


def note_error(error: TieredError) -> None:
    """Say on standard error what failed and what to do."""
    where = ", ".join(f"{name} {value}" for name, value in error.facts().items())
    lines = [f"Error: {clean(error.message)}" + (f" ({clean(where)})" if where else "")]
    if error.hint:
        lines.append(f"  {clean(error.hint)}")
    sys.stderr.write("\n".join(lines) + "\n")
    sys.stderr.flush()


def note_left_out(name: str, error: TieredError) -> None:
    """Say on standard error that the tier *name* did not answer, and that what follows is without it."""
    sys.stderr.write(f"{clean(name)} did not answer and is left out: {clean(error.message)}\n")
    sys.stderr.flush()


def _console(file: StringIO) -> Console:
    """Return a console that writes to *file* what would suit standard output."""
    from rich.console import Console

    real = Console()
    # Nobody's window: there lines need not break at 80.
    wide = not real.is_terminal and "COLUMNS" not in os.environ
    return Console(
        file=file,
        width=_NO_WINDOW_COLUMNS if wide else max(real.width, _MIN_COLUMNS),
        force_terminal=real.is_terminal,
        color_system="auto" if real.color_system else None,
        no_color=real.no_color,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )


def _write(output: str) -> None:
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        sys.stdout.write(output.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        raise OutputClosedError from None
    except OSError as error:
        _discard_output()
        raise TieredError(f"standard output can't be written: {error.strerror}") from error


def _discard_output() -> None:
    """What is still buffered would be tried again at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
