"""What pydantic finds wrong with a recipe, in a recipe's words: where, what is allowed, what was likely meant."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

from pydantic_core import ErrorDetails

from sm_tiered.errors import RecipeError, TieredError
from sm_tiered.recipe_fields import closest, shown
from sm_tiered.recipe_yaml import ABSENT, Document, Path, Place

__all__ = ["translated"]

_KINDS = ("memory", "local", "s3", "hyperpod")

_KIND_OF = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
}
_MISSING = {
    "version": "Write version: 1.",
    "namespace": "Name the run, e.g. namespace: llama-7b-run3.",
    "tiers": "Name at least one: tiers: {memory: {kind: memory}}.",
    "uri": "Write uri: s3://bucket/prefix.",
    "path": "Name a directory that all ranks share.",
    "metric": "best needs metric: the name that is given with a save, e.g. val_loss.",
    "mode": "best needs mode: min or max.",
}


def translated(errors: list[ErrorDetails], document: Document) -> RecipeError:
    """Return the first of *errors* about *document*, with the number of the others."""
    told = [_told(error, document) for error in errors]
    told.sort(key=lambda entry: _order(document.places.get(entry[0])))
    path, message, hint = told[0]
    more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
    return document.error(message + more, path=path, hint=hint)


def _order(place: Place | None) -> tuple[float, int]:
    return (place.line or 0, place.column) if place else (math.inf, 0)


def _told(error: ErrorDetails, document: Document) -> tuple[Path, str, str | None]:
    """Path, message and what to do."""
    path, context, kind = _path(error["loc"]), error.get("ctx", {}), error["type"]
    value, inner = cast(object, error["input"]), context.get("error")
    if kind == "located":
        return (*path, context["key"]), context["text"], context["hint"] or None
    if isinstance(inner, TieredError):
        return path, inner.message, inner.hint
    if path[:1] == ("tiers",) and len(path) == 2 and value == ABSENT:
        message, hint = f"there is no tier {shown(path[1])} to remove", _near_tiers(path, document)
        return path, message, hint or None
    if kind == "missing":
        hint = _MISSING.get(str(path[-1]))
        return (
            (path, "null removes it", hint) if path in document.places else (path[:-1], f"{path[-1]} is missing", hint)
        )
    if kind == "union_tag_not_found":
        return path, *_no_kind(path, document)
    if kind == "union_tag_invalid":
        given = cast("Mapping[str, object]", value)["kind"]
        guess = closest(given, _KINDS)
        choice = f"One of {', '.join(_KINDS)}."
        return (
            (*path, "kind"),
            f"{shown(given)} is no kind of tier",
            f"Did you mean '{guess}'? {choice}" if guess else choice,
        )
    if kind == "literal_error":
        wanted = str(context["expected"]).replace("True", "true")
        guess = closest(value, re.findall(r"'([^']+)'", wanted)) if isinstance(value, str) else None
        choose = f"Did you mean '{guess}'?" if guess else f"Choose {wanted}."
        return path, f"must be {wanted}, got {shown(value)}", _why(value, path, document) or choose
    wanted = _KIND_OF.get(kind, "a mapping" if kind.startswith(("model", "dict")) else str(error["msg"]))
    return path, f"must be {wanted}, got {shown(value)}", _why(value, path, document) or f"Give {wanted}."


def _no_kind(path: Path, document: Document) -> tuple[str, str]:
    """Message and what to do about a tier without a kind: it may be a misspelt one of what lies below."""
    choice = f"one of {', '.join(_KINDS)}."
    if document.layers == 1:
        return "kind is missing", choice.capitalize()
    message = f"there is no tier {shown(path[-1])} to change, and kind is missing for a new one"
    return message, f"{_near_tiers(path, document)} Kind is {choice}".strip()


def _near_tiers(path: Path, document: Document) -> str:
    others = [name for name in cast("Mapping[str, object]", document.value["tiers"]) if name != path[-1]]
    guess = closest(path[-1], others)
    start = f"Did you mean '{guess}'? " if guess else ""
    return f"{start}The recipe has {', '.join(others)}." if others else ""


def _path(loc: tuple[int | str, ...]) -> Path:
    """Where in the recipe: pydantic names the kind of a tier, and ways to write a value, as if they were keys."""
    path = loc[:2] + loc[3:] if loc[:1] == ("tiers",) and len(loc) > 2 else loc
    return tuple(part for part in path if not str(part).startswith("~"))


def _why(value: object, path: Path, document: Document) -> str | None:
    """Why YAML reads something else than what was meant."""
    place = document.places.get(path)
    text = place.text if place else None
    if isinstance(value, bool) and text is not None:
        return f"YAML reads {text} as {str(value).lower()}; quote it if text is meant."
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d[\d.]*[eE]\d+", value):
        return f"YAML 1.1 reads {value} as text; write the number out."
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d+)?", value):
        return f"Did you mean {value}, without quotes?"
    if isinstance(value, (int, float)) and text is not None:
        return f"Did you mean '{text}', in quotes?"
    return None
