"""Values that the environment or a command line sets over those of a recipe.

``SM_TIERED__TIERS__S3__URI=s3://…`` and ``--set tiers.s3.uri=s3://…`` mean what the same key means in a recipe that
extends the other one: policies replace whole, null removes. The value is YAML. The command line goes over the
environment, and that over the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

from sm_tiered.errors import RecipeError
from sm_tiered.recipe_fields import shown
from sm_tiered.recipe_sources import EXTENDS, layered
from sm_tiered.recipe_yaml import MAX_DEPTH, NO_SECRETS, Document, Path, Place, looks_secret, parse_value

__all__ = ["PREFIX", "overridden"]

PREFIX = "SM_TIERED__"
"""What the names of environment variables that override begin with."""

_EXAMPLE = "tiers.s3.uri=s3://bucket/prefix"
_EMPTY = "Write null to remove what the recipe says, '' for empty text."
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,256}", re.ASCII)
_NULL = re.compile(r"\s*(~|null)\s*", re.IGNORECASE)


def overridden(document: Document, *, environment: Mapping[str, str], options: Iterable[str] = ()) -> Document:
    """Return *document* with what *environment* sets, and over it what *options* (``KEY.KEY=VALUE``) set.

    Raises:
        RecipeError: one of them has no key or no value, or can't be a recipe's; names it.
    """
    for layer in (_from_environment(document, environment), _from_options(document, options)):
        if layer.value:
            document = layered(document, layer)
    return document


class _Layer:
    """Overrides as a recipe that holds nothing else."""

    def __init__(self) -> None:
        self.value: dict[str, object] = {}
        self.places: dict[Path, Place] = {}

    def put(self, path: tuple[str, ...], text: str, source: str) -> None:
        for key in path:
            if looks_secret(key):
                raise RecipeError(f"{source}: key {shown(key)} looks like a secret", hint=NO_SECRETS)
        if len(path) > MAX_DEPTH or not all(path):
            raise RecipeError(f"{source}: names no key of a recipe", hint=f"Write it like {_EXAMPLE}.")
        if path[0] == EXTENDS:
            hint = "Name another recipe instead."
            raise RecipeError(f"{source}: only a file says what it extends", hint=hint)
        value = parse_value(text, source)
        if value is None and not _NULL.fullmatch(text):
            raise RecipeError(f"{source}: is empty", hint=_EMPTY)
        inner = self.value
        for n, key in enumerate(path[:-1], 1):
            self.places.setdefault(path[:n], Place(source=source))
            below = inner.setdefault(key, {})
            if not isinstance(below, dict):
                other = self.places[path[:n]].source
                raise RecipeError(f"{source}: {other} sets what this is inside of", hint="Keep one of them.")
            inner = cast("dict[str, object]", below)
        inner[path[-1]] = value
        for old in [old for old in self.places if old[: len(path)] == path]:
            del self.places[old]
        self.places[path] = Place(source=source, text=text.strip())


def _from_environment(document: Document, environment: Mapping[str, str]) -> Document:
    layer, names = _Layer(), dict[tuple[str, ...], str]()
    for name in environment:
        if name.startswith(PREFIX):
            _check_name("environment", name)
            path = tuple(name.removeprefix(PREFIX).lower().split("__"))
            if path in names:
                message = f"environment {names[path]} and {name} mean the same key"
                raise RecipeError(f"{document.source}: {message}", hint="Unset one of them.")
            names[path] = name
    for path, name in sorted(names.items(), key=lambda entry: (len(entry[0]), entry[0])):
        layer.put(path, environment[name], f"environment {name}")
    return Document(source=document.source, value=layer.value, places=layer.places)


def _from_options(document: Document, options: Iterable[str]) -> Document:
    layer = _Layer()
    for option in options:
        name, separator, text = option.partition("=")
        name = name.strip()
        _check_name("--set", name)
        if not separator:
            raise RecipeError(f"--set {name}: no value", hint=f"Write --set {_EXAMPLE}.")
        layer.put(tuple(name.split(".")), text, f"--set {name}")
    return Document(source=document.source, value=layer.value, places=layer.places)


def _check_name(what: str, name: str) -> None:
    if not _NAME.fullmatch(name):  # it may be a value in the wrong place
        raise RecipeError(f"{what} {shown(name)}: names no key of a recipe", hint=f"Write it like {_EXAMPLE}.")
