"""JSON Schema of a recipe, for editors and other checkers: pydantic's, in the form that people write recipes in.

Stricter than pydantic's where the checks of a value are code (`recipe_help` has them), and wider where a recipe may
say ``${NAME}``, name a policy alone, or change only part of the recipe that it extends. What only code can tell, such
as two tiers in one place, it lets through.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import cast

from pydantic import BaseModel

from sm_tiered.exchange import MOST_TIERS
from sm_tiered.recipe import Recipe
from sm_tiered.recipe_fill import REFERENCE
from sm_tiered.recipe_help import HELP
from sm_tiered.recipe_models import HyperPodTier, LocalTier, MemoryTier, S3Tier
from sm_tiered.recipe_policies import KeepSpec, SaveSpec
from sm_tiered.recipe_sources import EXTENDS

__all__ = ["recipe_schema", "schema_text"]

_Schema = dict[str, object]

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_POLICIES = {"SaveSpec": SaveSpec, "KeepSpec": KeepSpec}
_TIERS = ("MemoryTier", "LocalTier", "S3Tier", "HyperPodTier")
_SECTIONS = ("Recipe", *_TIERS, "Encryption", "Retry", "ServiceRetry", "LogSection")
"""What a recipe that extends another one can change in part; policies it replaces."""
_CHANGE = "Change"
_TIER_NAME = {"pattern": "^[a-z][a-z0-9_]{0,31}$"}
_EXTENDS = {
    "type": "string",
    "minLength": 1,
    "description": "The recipe to begin with, a path relative to this file: mappings merge, policies and lists are "
    "replaced, null removes.",
}
_NULL: _Schema = {"type": "null"}


def schema_text() -> str:
    """Return the schema as a JSON document."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=True) + "\n"


def recipe_schema() -> _Schema:
    """Return the JSON Schema (draft 2020-12) of a recipe."""
    generated = Recipe.model_json_schema(mode="validation", by_alias=True)
    definitions = cast("dict[str, _Schema]", generated.pop("$defs"))
    definitions["Recipe"] = generated
    for name, definition in definitions.items():
        definitions[name] = _described(name, definition)
    _described_tiers(definitions["Recipe"])
    _only_latest(definitions)
    for name in _SECTIONS:
        definitions[f"{name}{_CHANGE}"] = _change(definitions[name])
    definitions["Tier"], definitions[f"Tier{_CHANGE}"] = _tier(definitions), _tier_change()
    for name, policy in _POLICIES.items():
        definitions[name] = _policy(definitions[name], policy.bare)
    definitions["Reference"] = {"type": "string", "pattern": REFERENCE, "description": "Filled in by the environment."}
    return {
        "$schema": _DRAFT,
        "title": "A recipe of sm_tiered",
        "type": "object",
        "if": {"required": [EXTENDS]},
        "then": _ref(f"Recipe{_CHANGE}"),
        "else": _ref("Recipe"),
        "$defs": dict(sorted(definitions.items())),
    }


# ---- sections


def _described(name: str, definition: _Schema) -> _Schema:
    """Return a section with help and rules, `${NAME}` wherever a value stands, and without pydantic's titles."""
    properties = cast("dict[str, _Schema]", definition["properties"])
    found = {key: _value(HELP[f"{name}.{key}"], field) for key, field in properties.items()}
    order = sorted(found, key=lambda key: key != "kind")
    rest = {key: definition[key] for key in ("required", "additionalProperties") if key in definition}
    return {"type": "object", "properties": {key: found[key] for key in order}, **rest}


def _value(help_: Mapping[str, object], field: _Schema) -> _Schema:
    described: _Schema = {"description": help_["description"]}
    default = _without_absent(field.get("default"))
    if default is not None:
        described["default"] = default
    rules = {key: rule for key, rule in help_.items() if key != "description"}
    branches = [_ruled(branch, rules) for branch in _branches(field)]
    if any("$ref" not in branch and branch.get("type") not in ("array", "null") for branch in branches):
        branches.append(_ref("Reference"))
    # One `$ref` beside a description is what editors read best.
    return {**described, **(branches[0] if len(branches) == 1 else {"anyOf": branches})}


def _branches(field: _Schema) -> list[_Schema]:
    """Return the ways to write a value, without titles and defaults."""
    for way in ("anyOf", "oneOf"):
        if way in field:
            return [inner for branch in cast("list[_Schema]", field[way]) for inner in _branches(branch)]
    return [{key: rule for key, rule in field.items() if key not in ("title", "default", "discriminator")}]


def _ruled(branch: _Schema, rules: Mapping[str, object]) -> _Schema:
    """Return *branch* with those of *rules* that are about its type."""
    kind = cast(str, branch.get("type", ""))
    words = {
        "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        "string": ("pattern", "patternErrorMessage", "minLength", "enum"),
        "array": ("minItems",),
    }.get(kind, ())
    found = {**branch, **{key: rules[key] for key in words if key in rules}}
    if kind == "array":
        items = _ruled(cast(_Schema, branch["items"]), cast("Mapping[str, object]", rules.get("items", {})))
        found["items"] = items if "$ref" in items else {"anyOf": [items, _ref("Reference")]}
    return found


def _without_absent(default: object) -> object:
    """A default as a recipe would write it."""
    if not isinstance(default, dict):
        return default
    return {key: value for key, value in cast(_Schema, default).items() if value is not None}


def _described_tiers(recipe: _Schema) -> None:
    properties = cast("dict[str, _Schema]", recipe["properties"])
    properties["tiers"] = {
        "description": properties["tiers"]["description"],
        "type": "object",
        "minProperties": 1,
        "maxProperties": MOST_TIERS,
        "propertyNames": _TIER_NAME,
        "additionalProperties": _ref("Tier"),
    }
    recipe["properties"] = {EXTENDS: _EXTENDS, **properties}


def _only_latest(definitions: Mapping[str, _Schema]) -> None:
    """Memory keeps by number alone."""
    keep = cast("dict[str, _Schema]", definitions["MemoryTier"]["properties"])["keep"]
    latest = cast("dict[str, _Schema]", definitions["KeepSpec"]["properties"])["latest"]
    del keep["$ref"]
    one = {"latest": _not_null(latest)}
    keep.update({"type": "object", "properties": one, "required": ["latest"], "additionalProperties": False})


def _change(section: _Schema) -> _Schema:
    """Return what a recipe may say to change part of *section*: any of its keys, each also null."""
    properties = cast("dict[str, _Schema]", deepcopy(section["properties"]))
    found = {key: field if key == EXTENDS else _changed(field) for key, field in properties.items()}
    return {"type": "object", "properties": found, "additionalProperties": False}


def _changed(field: _Schema) -> _Schema:
    described = {key: field.pop(key) for key in ("description", "default") if key in field}
    if "propertyNames" in field:  # `tiers`
        tier = {"anyOf": [_ref(f"Tier{_CHANGE}"), _NULL]}
        field = {"type": "object", "propertyNames": _TIER_NAME, "additionalProperties": tier}
    branches = cast("list[_Schema]", field.get("anyOf", [field]))
    changed = {f"#/$defs/{name}": _ref(f"{name}{_CHANGE}") for name in _SECTIONS}
    found = [changed.get(cast(str, branch.get("$ref")), branch) for branch in branches]
    return {**described, "anyOf": found if _NULL in found else [*found, _NULL]}


# ---- tiers


def _tier(definitions: Mapping[str, _Schema]) -> _Schema:
    """Return any tier: what its kind says it is, so that an error is about that one."""
    kinds = [cast(str, model.model_json_schema()["properties"]["kind"]["const"]) for model in _tier_models()]
    described = [cast("dict[str, _Schema]", definitions[name]["properties"])["kind"]["description"] for name in _TIERS]
    told = " ".join(f"{kind}: {text}" for kind, text in zip(kinds, described, strict=True))
    return {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"description": told, "anyOf": [{"enum": kinds}, _ref("Reference")]}},
        "allOf": [
            *(_when({"const": kind}, _ref(name)) for kind, name in zip(kinds, _TIERS, strict=True)),
            _when({"type": "string", "pattern": REFERENCE}, _ref(f"Tier{_CHANGE}")),
        ],
    }


def _tier_models() -> tuple[type[BaseModel], ...]:
    return (MemoryTier, LocalTier, S3Tier, HyperPodTier)


def _when(kind: _Schema, then: _Schema) -> _Schema:
    return {"if": {"required": ["kind"], "properties": {"kind": kind}}, "then": then}


def _tier_change() -> _Schema:
    return {"type": "object", "anyOf": [_ref(f"{name}{_CHANGE}") for name in _TIERS]}


# ---- policies


def _policy(definition: _Schema, bare: tuple[str, ...]) -> _Schema:
    """Return one policy: alone where it needs nothing more, or as the only key of a mapping."""
    properties = cast("dict[str, _Schema]", definition["properties"])
    alone: list[_Schema] = [{"enum": list(bare)}] if bare else []
    return {
        "anyOf": [{"type": "object"}, *alone, _ref("Reference")],
        # Out here, and the count below: that is what editors need to complete them, and to say what is wrong.
        "properties": {key: _not_null(field) for key, field in properties.items()},
        "additionalProperties": False,
        "minProperties": 1,
        "allOf": [{"maxProperties": 1}],
    }


def _not_null(field: _Schema) -> _Schema:
    if "anyOf" not in field:
        return field
    rest = {key: rule for key, rule in field.items() if key != "anyOf"}
    branches = [branch for branch in cast("list[_Schema]", field["anyOf"]) if branch != _NULL]
    return {**rest, **(branches[0] if len(branches) == 1 else {"anyOf": branches})}


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/$defs/{name}"}
