"""Fills the environment into a recipe's values: ``${NAME}`` and ``${NAME:-default}``, in values alone, once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from sm_tiered.recipe_fields import shown
from sm_tiered.recipe_yaml import (
    MAX_DEPTH,
    MAX_VALUES,
    NO_SECRETS,
    Document,
    Filled,
    FromEnvironment,
    Path,
    looks_secret,
)

__all__ = ["REFERENCE", "fill"]

REFERENCE = r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^${}]*))?\}"
"""What stands for a variable; the groups are its name and its default."""

_REFERENCE = re.compile(REFERENCE, re.ASCII)


def fill(document: Document, *, environment: Mapping[str, str] | None) -> Document:
    """Return *document* with the environment filled in (None: left as it is) and nothing but plain values.

    Raises:
        RecipeError: a variable is not set, a key looks like a secret, a key is no text, a value no plain one.
    """
    filler = _Filler(document, environment)
    value = cast("dict[str, object]", filler.fill(document.value, ()))
    return replace(document, value=value, filled=filler.filled)


class _Filler:
    """Copies plain values, and remembers what it filled in."""

    def __init__(self, document: Document, environment: Mapping[str, str] | None) -> None:
        self._document, self._environment, self._values = document, environment, 0
        self.filled: dict[Path, tuple[Filled, ...]] = {}

    def fill(self, value: object, path: Path) -> object:
        self._values += 1
        if self._values > MAX_VALUES or len(path) > MAX_DEPTH:
            raise self._document.error("too many or too deeply nested values", path=path[:3])
        if isinstance(value, Mapping):
            return self._mapping(cast("Mapping[object, object]", value), path)
        if isinstance(value, (list, tuple)):
            return [self.fill(entry, (*path, index)) for index, entry in enumerate(cast("list[object]", value))]
        if isinstance(value, str):
            return value if self._environment is None or "${" not in value else self._text(value, path)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**63:
            raise self._document.error("a huge number is not permitted", path=path)
        if value is None or isinstance(value, (bool, int, float)):
            return value
        raise self._document.error(
            f"{shown(value)} is no plain value", path=path, hint="Use text, numbers, lists, mappings."
        )

    def _mapping(self, value: Mapping[object, object], path: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, entry in value.items():
            if not isinstance(key, str):
                raise self._document.error(f"a key must be text, got {shown(key)}", path=path)
            if looks_secret(key):
                raise self._document.error(f"key {shown(key)} looks like a secret", path=path, hint=NO_SECRETS)
            found[key] = self.fill(entry, (*path, key))
        return found

    def _text(self, value: str, path: Path) -> str:
        if "${" in _REFERENCE.sub("", value):
            hint = "Write ${NAME} or ${NAME:-default}; a default holds no braces."
            raise self._document.error("a ${…} is malformed", path=path, hint=hint)
        filled = _REFERENCE.sub(lambda found: self._looked_up(found, path), value)
        if not filled.isprintable():
            raise self._document.error(f"{shown(value)} brings in characters that can't be printed", path=path)
        return FromEnvironment(filled)

    def _looked_up(self, found: re.Match[str], path: Path) -> str:
        name, default = found[1], cast("str | None", found[2])
        if looks_secret(name):
            message = f"environment variable {name} looks like a secret"
            raise self._document.error(message, path=path, hint=NO_SECRETS)
        value = (self._environment or {}).get(name)
        if value is None and default is None:
            hint = f"Set it, or write ${{{name}:-default}}."
            raise self._document.error(f"environment variable {name} is not set", path=path, hint=hint)
        one = Filled(name=name, default=not value and default is not None)
        self.filled[path] = (*self.filled.get(path, ()), one)
        return value or default or ""
