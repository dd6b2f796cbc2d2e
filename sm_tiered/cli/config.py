"""``sm-tiered config``: what a recipe comes to, as YAML, and where each value comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, cast

from sm_tiered.cli.common import EXIT_OK, read_recipe
from sm_tiered.cli.output import clean, print_json, render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from sm_tiered.recipe import Recipe
    from sm_tiered.recipe_origins import Value

__all__ = ["run"]

_HIDDEN = "(hidden: looks like a secret)"
_WIDEST_COMMENTED = 0.6
"""Share of the window: lines that are longer do not push the comments of all others to the right."""


def run(recipe: str, *, as_json: bool) -> int:
    """Print what *recipe* comes to; return the exit status."""
    from sm_tiered.recipe_origins import explained

    found = read_recipe(recipe)
    values = explained(found)
    if as_json:
        print_json(_document(found, values))
    else:
        render(_Listing(found, values))
    return EXIT_OK


# ---- for people


class _Listing:
    """The recipe as YAML, each value with its origin as a comment."""

    def __init__(self, recipe: Recipe, values: Iterable[Value]) -> None:
        self._recipe, self._values = recipe, tuple(values)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        width = options.max_width
        rows = list(_rows(self._values, width))
        column = max(len(line) for line, _ in rows if len(line) <= width * _WIDEST_COMMENTED) + 2
        for line, comment in rows:
            at = max(column, len(line) + 2)
            fits = "\n" not in line and at + len(comment) <= width
            if comment and not fits:
                indent = " " * (len(line) - len(line.lstrip()))
                yield Text(f"{indent}{comment}", style="dim", no_wrap=True, overflow="ignore")
            shown = Text(line, no_wrap=True, overflow="ignore")
            if comment and fits:
                shown.append(" " * (at - len(line)))
                shown.append(comment, style="dim")
            yield shown
        for warning in self._recipe.warnings():
            for line in textwrap.wrap(f"# warning: {clean(warning)}", width, subsequent_indent="#   "):
                yield Text(line, style="yellow", no_wrap=True, overflow="ignore")


def _rows(values: Iterable[Value], width: int) -> Iterator[tuple[str, str]]:
    """Lines of YAML, each with the comment that belongs to it."""
    open_sections: tuple[str | int, ...] = ()
    for value in values:
        *sections, key = value.path
        shared = sum(1 for _ in _common(open_sections, sections))
        for depth, section in enumerate(sections[shared:], shared):
            yield f"{'  ' * depth}{section}:", ""
        open_sections = tuple(sections)
        yield _line(f"{'  ' * len(sections)}{key}: ", value, width), f"# {clean(_origin(value))}"


def _common(one: Iterable[object], other: Iterable[object]) -> Iterator[object]:
    for left, right in zip(one, other, strict=False):
        if left != right:
            return
        yield left


def _line(start: str, value: Value, width: int) -> str:
    from sm_tiered.recipe_yaml import on_one_line

    shown = on_one_line(_HIDDEN if value.hidden else value.value)
    if len(start) + len(shown) <= width or not isinstance(value.value, (dict, list)):
        return start + shown
    # YAML reads a line break inside `{ }` as a blank; one behind a colon would be hard to read for people.
    wrapped = textwrap.fill(
        shown.replace(": ", ":\0"),
        width,
        initial_indent=start,
        subsequent_indent=" " * (len(start) - len(start.lstrip()) + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped.replace(":\0", ": ")


def _origin(value: Value) -> str:
    if value.place is None:
        return "default"
    where = value.place.source + ("" if value.place.line is None else f":{value.place.line}")
    names = (f"default of ${{{one.name}}}" if one.default else f"${{{one.name}}}" for one in value.filled)
    return ", ".join([where, *dict.fromkeys(names)])


# ---- for programs


def _document(recipe: Recipe, values: Iterable[Value]) -> dict[str, object]:
    entries = tuple(values)
    return {
        "version": 1,
        "files": list(recipe.document.files),
        "recipe": _nested(entries),
        "values": [_entry(value) for value in entries],
        "warnings": recipe.warnings(),
    }


def _nested(values: Iterable[Value]) -> dict[str, object]:
    found: dict[str, object] = {}
    for value in values:
        inner = found
        for key in value.path[:-1]:
            inner = cast("dict[str, object]", inner.setdefault(str(key), {}))
        inner[str(value.path[-1])] = None if value.hidden else value.value
    return found


def _entry(value: Value) -> Mapping[str, object]:
    from sm_tiered.recipe_yaml import name_of

    return {
        "path": name_of(value.path),
        "value": value.value,
        "hidden": value.hidden,
        "from": _from(value),
        "filled": [{"name": one.name, "default": one.default} for one in value.filled],
    }


def _from(value: Value) -> dict[str, object]:
    place = value.place
    if place is None:
        return {"kind": "default"}
    if place.line is not None:
        return {"kind": "file", "file": place.source, "line": place.line}
    kind, _, name = place.source.partition(" ")
    return {"kind": "option" if kind == "--set" else "environment", "name": name}
