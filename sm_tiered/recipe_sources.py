"""The files that a recipe is made of: it may extend another one, whose values it changes.

Mappings merge; scalars, lists, policies (what stands under ``save`` and ``keep``) and a tier of another kind replace
what was there; null removes it. Tiers keep their order, new ones come after them, a new memory tier before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from sm_tiered.errors import RecipeError
from sm_tiered.recipe_fields import shown
from sm_tiered.recipe_fill import fill
from sm_tiered.recipe_yaml import ABSENT, MAX_BYTES, Document, Path, Place, parse_yaml

__all__ = ["EXTENDS", "layered", "read_recipe", "with_bases"]

EXTENDS = "extends"
"""The key that names the recipe to begin with."""

_MAX_CHAIN = 8


def read_recipe(path: str | os.PathLike[str]) -> Document:
    """Return the values of the YAML file at *path* alone.

    Raises:
        RecipeError: it can't be read, or is no recipe.
    """
    source = os.fspath(path)
    return replace(parse_yaml(_read(source), source), files=(source,))


def with_bases(document: Document, *, environment: Mapping[str, str]) -> Document:
    """Return *document* laid over the recipe that it extends, and that one over its own, and so on.

    Raises:
        RecipeError: one of them can't be read, they go round in a circle, or are of different versions.
    """
    chain = [document]
    while EXTENDS in chain[-1].value:
        chain.append(_base(chain, environment))
    found = chain.pop()
    while chain:
        child = chain.pop()
        _same_version(found, child)
        found = layered(found, _without_extends(child))
    return found


def layered(base: Document, over: Document) -> Document:
    """Return *base* with what *over* changes, each value with its own place."""
    merger = _Merger(base, over)
    value = merger.merged(base.value, over.value, ())
    return replace(
        over,
        value=value,
        places=merger.places(),
        files=(*over.files, *base.files),
        layers=base.layers + over.layers,
    )


# ---- reading


def _read(source: str) -> str:
    try:
        found = os.stat(source)
        if not stat.S_ISREG(found.st_mode):  # a pipe would block
            kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise RecipeError(f"recipe {source!r} is {kind}", hint="Name the YAML file.")
        if found.st_size > MAX_BYTES:
            raise RecipeError(f"{source}: longer than {MAX_BYTES} bytes", hint="A recipe is a few dozen lines.")
        with open(source, "rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 at byte {error.start}", hint="Save the file as UTF-8.") from None
    except FileNotFoundError as error:
        raise RecipeError(f"recipe not found: {source}", hint=f"Looked from {os.getcwd()}.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"recipe {source!r} can't be read: {error}") from error


# ---- extends


def _base(chain: list[Document], environment: Mapping[str, str]) -> Document:
    """Return what the last of *chain* extends."""
    child = chain[-1]
    path = _named(child, environment)
    files = [document.files[0] for document in chain if document.files]
    if os.path.realpath(path) in map(os.path.realpath, files):
        message = f"goes round in a circle: {' → '.join([*files, path])}"
        raise child.error(message, path=(EXTENDS,), hint="The last recipe of a chain extends none.")
    if len(chain) >= _MAX_CHAIN:
        message = f"more than {_MAX_CHAIN} recipes, one extending the other"
        raise child.error(message, path=(EXTENDS,), hint="Put together what belongs together.")
    try:
        return read_recipe(path)
    except RecipeError as error:
        if os.path.isfile(path):
            raise  # it tells its own line
        raise child.error(error.message, path=(EXTENDS,), hint=error.hint) from error


def _named(child: Document, environment: Mapping[str, str]) -> str:
    """Return the path under `extends`, as seen from here."""
    given = fill(replace(child, value={EXTENDS: child.value[EXTENDS]}), environment=environment).value[EXTENDS]
    hint = "Give the path of one recipe, e.g. extends: base.yaml."
    if not isinstance(given, str):
        raise child.error(f"must be text, got {shown(given)}", path=(EXTENDS,), hint=hint)
    if not given.strip() or "://" in given or not given.isprintable():
        raise child.error(f"{shown(given)} is no path of a file", path=(EXTENDS,), hint=hint)
    path = os.path.expanduser(given)
    if child.files:
        return os.path.normpath(os.path.join(os.path.dirname(child.files[0]), path))
    if not os.path.isabs(path):
        message = f"{shown(given)} is relative, and this recipe is in no file that it could be relative to"
        raise child.error(message, path=(EXTENDS,), hint="Give an absolute path, or load the recipe from a file.")
    return path


def _without_extends(document: Document) -> Document:
    return replace(document, value={key: value for key, value in document.value.items() if key != EXTENDS})


def _same_version(base: Document, child: Document) -> None:
    given, wanted = child.value.get("version"), base.value.get("version")
    if "version" in base.value and "version" in child.value and given != wanted:
        message = f"{shown(given)} here, {shown(wanted)} in {base.place(('version',)) or base.source}"
        raise child.error(message, path=("version",), hint="A recipe has the version of the one that it extends.")


# ---- merging


class _Merger:
    """Lays one document over another, and works out where each value of the result stands."""

    def __init__(self, base: Document, over: Document) -> None:
        self._base, self._over = base, over
        self._taken: set[Path] = set()
        """Where what *over* says stands whole."""

    def merged(self, base: Mapping[str, object], over: Mapping[str, object], path: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in base.items():
            here = (*path, key)
            if key not in over:
                found[key] = value
            elif over[key] is not None and not _whole(value, over[key], here):
                inner = cast("Mapping[str, object]", value), cast("Mapping[str, object]", over[key])
                found[key] = self.merged(*inner, here)
            else:
                self._taken.add(here)
                if over[key] is not None:
                    found[key] = over[key]
        # A null may repeat a default, but not hide a key that is misspelt.
        new = {key: ABSENT if value is None else value for key, value in over.items() if key not in base}
        self._taken.update((*path, key) for key in new)
        first = {key: value for key, value in new.items() if path == ("tiers",) and _kind(value) == "memory"}
        return {**first, **found, **new}

    def places(self) -> dict[Path, Place]:
        """Of what was merged: those of the base but where something else was taken, and what was taken."""
        kept = {path: place for path, place in self._base.places.items() if not self._is_taken(path)}
        return kept | {path: place for path, place in self._over.places.items() if self._is_taken(path)}

    def _is_taken(self, path: Path) -> bool:
        return any(path[:n] in self._taken for n in range(1, len(path) + 1))


def _whole(old: object, new: object, path: Path) -> bool:
    """Whether *new* replaces *old* as a whole."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return True
    if path[:1] != ("tiers",):
        return False
    if len(path) == 2:
        kind = _kind(cast(object, new))
        return kind is not None and kind != _kind(cast(object, old))
    return path[2:] in (("save",), ("keep",))


def _kind(tier: object) -> object:
    return cast("Mapping[str, object]", tier).get("kind") if isinstance(tier, Mapping) else None
