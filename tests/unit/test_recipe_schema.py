"""The JSON Schema of recipes: it takes what the recipe language takes, and refuses what a schema can tell."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sm_tiered.errors import RecipeError
from sm_tiered.recipe import Recipe
from sm_tiered.recipe_help import HELP
from sm_tiered.recipe_policies import KeepSpec, SaveSpec
from sm_tiered.recipe_schema import recipe_schema, schema_text
from sm_tiered.recipe_yaml import parse_yaml
from tests.unit.test_bad_recipes import EDITS, KEYS, SEED_TEXT, TABLE, TIER_KEYS, VALUE

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("*/recipe.yaml")])
SCHEMA: Any = recipe_schema()
VALIDATOR: Any = Draft202012Validator(SCHEMA)

ONLY_CODE_CAN_TELL = {
    *("24 too long", "26 port", "27 plain http", "27 private network", "27 loopback look-alike", "29 region"),
    *("35 part size small", "35 part size large", "41 nan", "63 nan", "43 unknown home", "57 huge"),
    *("43 memory last", "43 two memories", "43 one place twice", "43 one prefix twice"),
    *("58 from the environment", "59 unset", "59 nested", "59 control characters", "59 not a number", "59 octal"),
    *("59 empty namespace", "64 offset", "64 stop", "64 exception in memory"),
}


def accepts(text: str) -> bool:
    return VALIDATOR.is_valid(parse_yaml(text, "recipe").value)


def with_tier(lines: str) -> str:
    return f"version: 1\nnamespace: run\ntiers: {{t: {{{lines}}}}}\n"


def test_it_is_a_schema_that_an_editor_can_find() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (RECIPES / "sm_tiered.schema.json").read_text(encoding="utf-8") == schema_text(), (
        "write it anew: sm-tiered schema -o recipes/sm_tiered.schema.json"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_names_the_schema(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == RECIPES / "sm_tiered.schema.json"
    assert [error.message for error in VALIDATOR.iter_errors(parse_yaml(text, path.name).value)] == []


BAD = [row for row in TABLE if row.text]


@pytest.mark.parametrize("row", BAD, ids=lambda row: row.id)
def test_it_refuses_what_the_recipe_refuses_but_for_what_only_code_can_tell(row: Any) -> None:
    try:
        accepted = accepts(row.text)
    except RecipeError:
        return  # no YAML: an editor says so itself
    assert accepted == (row.id in ONLY_CODE_CAN_TELL)


def test_what_only_code_can_tell_is_among_the_bad_rows() -> None:
    assert {row.id for row in BAD} >= ONLY_CODE_CAN_TELL


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["memory", "local", "s3"]), st.sampled_from(TIER_KEYS), st.sampled_from(KEYS), VALUE, VALUE)
@example("s3", "part_size", "on_error", "1.5 GiB", "raise")
@example("s3", "retry", "log", {"attempts": 3}, {"console": True})
@example("s3", "sse", "on_error", {"kms_key_id": "alias/x"}, "${WORD:-warn}")
@example("s3", "keep", "on_error", {"not": {"any": [{"latest": 1}, {"best": {"metric": "a", "mode": "max"}}]}}, "warn")
@example("local", "save", "on_error", {"every_n_steps": {"n": 5, "offset": 1, "stop": None}}, "warn")
@example("local", "save", "on_error", {"any": ["on_request", {"on_request": {"file": "/x"}}]}, "warn")
@example("memory", "budget", "group_timeout_secs", "${ROOM:-1GiB}", "${SECS:-5}")
def test_what_the_recipe_takes_the_schema_takes(kind: str, below: str, key: str, inner: object, outer: object) -> None:
    tier = {"kind": kind, **({"path": "/d"} if kind == "local" else {"uri": "s3://bucket"} if kind == "s3" else {})}
    good: dict[str, object] = {"version": 1, "namespace": "run"}
    for value in ({**good, "tiers": {"t": {**tier, below: inner}}}, {**good, "tiers": {"t": tier}, key: outer}):
        with contextlib.suppress(RecipeError):
            Recipe.parse(value)
            assert [error.message for error in VALIDATOR.iter_errors(value)] == []


@settings(max_examples=200, deadline=None)
@given(EDITS)
def test_what_the_recipe_takes_after_it_was_damaged_the_schema_takes(edits: list[tuple[int, int, str]]) -> None:
    text = SEED_TEXT
    for start, length, snippet in edits:
        text = text[:start] + snippet + text[start + length :]
    with contextlib.suppress(RecipeError):
        Recipe.parse(text)
        assert accepts(text)


@pytest.mark.parametrize(
    "text",
    [
        with_tier("kind: '${KIND:-local}', path: /d, fsync: '${FSYNC}'"),
        with_tier("kind: local, path: /d, save: {every_n_steps: '${EVERY}'}"),
        with_tier("kind: local, path: /d, save: {at_steps: ['${AT:-7}']}"),
        with_tier("kind: memory, save: on_end").replace("run", "run-${JOB}"),
    ],
)
def test_the_environment_may_stand_where_a_value_is_wanted(text: str) -> None:
    assert accepts(text)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("tiers: {s3: {uri: 's3://bucket/other'}}", True),
        ("tiers: {s3: {uri: null, keep: {latest: 9}}, disk: null}", True),
        ("tiers: {s3: {retry: {attempts: null}}}\non_error: null", True),
        ("tiers: {s3: {kind: local, path: ./d}}", True),
        ("namespace: other", True),
        ("tiers: {s3: {urii: 's3://bucket/other'}}", False),
        ("tiers: {s3: {kind: memory, uri: 's3://bucket/other'}}", False),
        ("tiers: {s3: {keep: {latest: null}}}", False),
        ("tiers: {s3: {retry: {attempts: 0}}}", False),
        ("namspace: other", False),
        ("on_error: ignore", False),
    ],
)
def test_a_recipe_that_extends_another_one_may_say_a_part(text: str, valid: bool) -> None:
    assert accepts(f"extends: base.yaml\n{text}\n") is valid
    assert not accepts(f"version: 1\n{text}\n")


@pytest.mark.parametrize("value", ["null", "5", "''", "[base.yaml]"])
def test_extends_is_one_path(value: str) -> None:
    assert not accepts(f"extends: {value}\n")


def properties(schema: object) -> list[tuple[str, dict[str, Any]]]:
    """Every property of every object in *schema*."""
    found: list[tuple[str, dict[str, Any]]] = []
    if isinstance(schema, dict):
        if schema.get("additionalProperties") is False:
            found += schema["properties"].items()
        for inner in schema.values():
            found += properties(inner)
    elif isinstance(schema, list):
        for inner in schema:
            found += properties(inner)
    return found


def test_every_key_is_described_and_no_description_is_left_over() -> None:
    every = properties(SCHEMA)
    assert len(every) > 100
    assert [key for key, field in every if not field.get("description")] == []
    told = {key for key, _ in every}
    assert [key for key in HELP if key.split(".")[1] not in told] == []


def test_every_time_has_its_unit_and_every_default_is_the_recipes() -> None:
    fields = SCHEMA["$defs"]["Recipe"]["properties"]
    for key, field in fields.items():
        if key.endswith("_secs"):
            assert "In seconds" in field["description"]
    values: Any = Recipe.parse(with_tier("kind: s3, uri: 's3://bucket'")).values()
    tier = SCHEMA["$defs"]["S3Tier"]["properties"]
    assert {key: field["default"] for key, field in fields.items() if "default" in field} == {
        key: value for key, value in values.items() if key not in ("version", "namespace", "tiers")
    }
    assert {key: field["default"] for key, field in tier.items() if "default" in field} == {
        key: value for key, value in values["tiers"]["t"].items() if key not in ("kind", "uri")
    }


@pytest.mark.parametrize("policy", [SaveSpec, KeepSpec])
def test_policies_are_all_there(policy: type[SaveSpec | KeepSpec]) -> None:
    one = SCHEMA["$defs"][policy.__name__]
    assert set(one["properties"]) == set(policy.known())
    alone = [way["enum"] for way in one["anyOf"] if "enum" in way]
    assert alone == ([list(policy.bare)] if policy.bare else [])


def test_an_editor_shows_the_error_of_the_tier_that_is_meant() -> None:
    value = parse_yaml(with_tier("kind: s3, uri: 's3://bucket', bugdet: 1GiB"), "recipe").value
    [error] = VALIDATOR.iter_errors(value)
    assert list(error.absolute_path) == ["tiers", "t"]
    assert "'bugdet' was unexpected" in error.message


def test_the_text_is_ascii_json_with_nothing_of_pydantics_names() -> None:
    text = schema_text()
    assert text.isascii()
    assert json.loads(text) == SCHEMA
    assert '"title": "Namespace"' not in text
