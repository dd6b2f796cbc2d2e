"""What a recipe comes to, value by value, and who said so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from sm_tiered.recipe import Recipe
from sm_tiered.recipe_fields import is_secret
from sm_tiered.recipe_policies import SaveSpec
from sm_tiered.recipe_yaml import Document, Filled, FromEnvironment, Path, Place

__all__ = ["Value", "explained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of a recipe: a scalar, a list or a whole policy."""

    path: Path
    value: object
    """None where it is hidden."""
    hidden: bool
    """Whether it looks like a secret."""
    place: Place | None
    """Where it was written; None: it is the default."""
    filled: tuple[Filled, ...]
    """What the environment filled in there."""


def explained(recipe: Recipe) -> tuple[Value, ...]:
    """Return every value of *recipe*: in each section first what was written, as it was ordered, then the defaults."""
    return tuple(_values(recipe.document, recipe.values(), recipe.document.value, ()))


def _values(document: Document, values: Mapping[str, object], given: object, path: Path) -> Iterator[Value]:
    written = cast("Mapping[str, object]", given if isinstance(given, Mapping) else {})
    keys = [key for key in written if key in values]
    for key in [*keys, *(key for key in values if key not in written)]:
        here, value = (*path, key), values[key]
        if _is_policy(here):
            yield _value(document, here, _bare(value), written.get(key))
        elif isinstance(value, dict):
            yield from _values(document, cast("dict[str, object]", value), written.get(key), here)
        else:
            yield _value(document, here, value, written.get(key))


def _value(document: Document, path: Path, value: object, given: object) -> Value:
    absent = given is None or (isinstance(given, FromEnvironment) and not given)
    hidden = _holds_secret(value)
    return Value(
        path=path,
        value=None if hidden else value,
        hidden=hidden,
        place=None if absent else document.place(path),
        filled=tuple(one for at, found in document.filled.items() if at[: len(path)] == path for one in found),
    )


def _is_policy(path: Path) -> bool:
    return path[0] == "tiers" and path[2:] in (("save",), ("keep",))


def _bare(policy: object) -> object:
    """Return *policy* with ``{on_end: true}`` as ``on_end``, the way people write it."""
    if isinstance(policy, list):
        return [_bare(member) for member in cast("list[object]", policy)]
    if not isinstance(policy, dict):
        return policy
    found = cast("dict[str, object]", policy)
    [name] = found if len(found) == 1 else [""]
    return name if name in SaveSpec.bare and found[name] is True else {key: _bare(found[key]) for key in found}


def _holds_secret(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_secret, cast("dict[str, object]", value).values()))
    if isinstance(value, list):
        return any(map(_holds_secret, cast("list[object]", value)))
    return isinstance(value, str) and is_secret(value)
