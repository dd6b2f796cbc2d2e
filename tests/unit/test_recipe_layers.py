"""A recipe that extends another one, and what the environment and ``--set`` lay over it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sm_tiered.policies import AnyOf, EveryNSteps, Latest, OnEnd
from sm_tiered.recipe import Recipe, load_recipe
from sm_tiered.recipe_origins import Value, explained
from sm_tiered.settings import LocalSettings, S3Settings

BASE = """\
version: 1
namespace: ${JOB:-run}
tiers:
  memory:
    kind: memory
    path: /dev/shm/x
    save: {every_n_steps: 10}
  s3:
    kind: s3
    uri: s3://bucket/base
    save: {any: [{every_n_steps: 50}, on_end]}
    keep: {latest: 5}
    region: us-east-1
    retry: {attempts: 5, deadline_secs: 60}
on_error: raise
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a base, which is the current one."""
    for name in [name for name in os.environ if name == "JOB" or name.startswith("SM_TIERED__")]:
        monkeypatch.delenv(name)
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def child(text: str, name: str = "run.yaml", base: str = "base.yaml") -> Recipe:
    Path(name).write_text(f"extends: {base}\n{text}\n")
    return Recipe.load(name)


def values(recipe: Recipe) -> Any:
    return recipe.values()


def s3(recipe: Recipe) -> S3Settings:
    [found] = [tier for tier in recipe.settings().tiers if isinstance(tier, S3Settings)]
    return found


# ---- extends


def test_a_recipe_that_changes_nothing_is_the_one_that_it_extends() -> None:
    assert values(child("")) == values(Recipe.load("base.yaml"))
    assert child("").settings().source == "run.yaml"


def test_mappings_merge_and_scalars_policies_and_lists_are_replaced() -> None:
    found = child("on_error: warn\ntiers: {s3: {uri: 's3://bucket/own', save: on_end, retry: {attempts: 2}}}")
    tier = s3(found)
    assert (tier.bucket, tier.prefix, tier.region) == ("bucket", "own", "us-east-1")
    assert (tier.save, tier.keep) == (OnEnd(), Latest(5))
    assert (tier.retry_attempts, tier.retry_deadline_secs) == (2, 60)
    assert found.on_error == "warn"


def test_a_policy_is_replaced_whole_even_by_one_of_the_same_name() -> None:
    assert s3(child("tiers: {s3: {save: {any: [{every_n_steps: 7}]}}}")).save == AnyOf([EveryNSteps(7)])
    assert s3(child("tiers: {s3: {keep: {every_n_steps: 7}}}")).keep != Latest(5)


def test_a_tier_of_another_kind_is_replaced_whole_in_its_place() -> None:
    found = child("tiers: {s3: {kind: local, path: /d}}").settings().tiers
    assert found[1] == LocalSettings(name="s3", save=None, keep=Latest(3), path="/d")
    assert s3(child("tiers: {s3: {kind: s3, region: eu-west-1}}")).keep == Latest(5)


def test_null_removes_what_was_there() -> None:
    found = child("on_error: null\ntiers: {memory: null, s3: {region: null, retry: {attempts: null}, keep: null}}")
    tier = s3(found)
    assert [tier.name for tier in found.settings().tiers] == ["s3"]
    assert (tier.region, tier.retry_attempts, tier.retry_deadline_secs, tier.keep) == (None, 8, 60, Latest(3))
    assert found.on_error == "warn"


def test_the_base_s_tiers_come_first_but_for_a_memory_tier() -> None:
    disk, memory = "disk: {kind: local, path: /d}", "m: {kind: memory}"
    assert list(child(f"tiers: {{{disk}, s3: {{region: eu-west-1}}}}").tiers) == ["memory", "s3", "disk"]
    assert list(child(f"tiers: {{memory: null, {disk}, {memory}}}").tiers) == ["m", "s3", "disk"]


def test_a_chain_is_followed_relative_to_each_file(place: Path) -> None:
    (place / "deep").mkdir()
    (place / "deep/middle.yaml").write_text("extends: ../base.yaml\nnamespace: middle\non_error: warn\n")
    found = child("namespace: last", base="deep/middle.yaml")
    assert (found.namespace, found.on_error) == ("last", "warn")
    assert found.document.files == ("run.yaml", "deep/middle.yaml", "base.yaml")
    os.chdir("/")
    assert values(Recipe.load(place / "run.yaml")) == values(found)


def test_what_extends_may_be_absolute_or_come_from_the_environment(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WHERE", str(place))
    for base in (f"{place}/base.yaml", "${WHERE}/base.yaml"):
        assert values(child("namespace: other", base=base))["namespace"] == "other"
    mapping = {"extends": f"{place}/base.yaml", "namespace": "other"}
    assert values(load_recipe(mapping)) == values(child("namespace: other"))
    assert values(Recipe.parse(json.dumps(mapping))) == values(child("namespace: other"))


def test_a_base_may_be_a_part() -> None:
    Path("part.yaml").write_text("tiers: {s3: {kind: s3, keep: {latest: 9}}}\n")
    found = child("version: 1\nnamespace: run\ntiers: {s3: {uri: 's3://bucket'}}", base="part.yaml")
    assert s3(found).keep == Latest(9)


def test_the_text_for_the_drainer_is_resolved(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.setenv("SM_TIERED__NAMESPACE", "from-the-environment")
    text = child("").settings().text
    assert "extends" not in text
    monkeypatch.setenv("SM_TIERED__NAMESPACE", "another")
    os.chdir("/")
    assert Recipe.from_json(text).namespace == "from-the-environment"


# ---- overrides


def test_the_command_line_goes_over_the_environment_and_that_over_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "tiers.s3.uri"
    assert s3(child("")).prefix == "base"
    assert s3(child("tiers: {s3: {uri: 's3://bucket/child'}}")).prefix == "child"
    monkeypatch.setenv("SM_TIERED__TIERS__S3__URI", "s3://bucket/environment")
    assert s3(Recipe.load("run.yaml")).prefix == "environment"
    found = Recipe.load("run.yaml", overrides=[f"{key}=s3://bucket/first", f"{key}=s3://bucket/last"])
    assert s3(found).prefix == "last"


@pytest.mark.parametrize(
    "name", ["TIERS__S3__RETRY__ATTEMPTS", "tiers__s3__retry__attempts", "Tiers__S3__rETRY__Attempts"]
)
def test_the_environment_is_not_about_case(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"SM_TIERED__{name}", "3")
    assert s3(child("")).retry_attempts == 3


def test_the_environment_holds_for_every_way_to_give_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_TIERED__ON_ERROR", "raise")
    mapping: dict[str, Any] = {"version": 1, "namespace": "run", "tiers": {"m": {"kind": "memory"}}}
    assert load_recipe(mapping).on_error == "raise"
    assert Recipe.parse(json.dumps(mapping)).on_error == "raise"
    assert mapping == {"version": 1, "namespace": "run", "tiers": {"m": {"kind": "memory"}}}


def test_a_value_is_yaml_and_the_environment_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "job-1")
    monkeypatch.setenv("SM_TIERED__NAMESPACE", "${JOB}-b")
    monkeypatch.setenv("SM_TIERED__TIERS__S3__SAVE", "{any: [on_end, {at_steps: [1, 2]}]}")
    monkeypatch.setenv("SM_TIERED__TIERS__S3__FORCE_PATH_STYLE", "true")
    monkeypatch.setenv("SM_TIERED__TIERS__S3__REGION", "~")
    found = child("")
    assert found.namespace == "job-1-b"
    assert values(found)["tiers"]["s3"]["save"] == {"any": [{"on_end": True}, {"at_steps": [1, 2]}]}
    assert (s3(found).force_path_style, s3(found).region) == (True, None)


def test_a_tier_can_be_added_and_changed_and_removed() -> None:
    add = ["tiers.disk.kind=local", "tiers.disk.path=/d", "tiers.m2={kind: memory, path: /m2}", "tiers.memory=null"]
    found = Recipe.load("base.yaml", overrides=[*add, "tiers.m2.budget=1GiB"])
    assert list(found.tiers) == ["m2", "s3", "disk"]
    assert values(found)["tiers"]["m2"]["budget"] == "1GiB"


def test_the_environment_sets_a_part_of_what_it_sets_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_TIERED__TIERS__S3__RETRY__ATTEMPTS", "3")
    monkeypatch.setenv("SM_TIERED__TIERS__S3__RETRY", "{deadline_secs: 9}")
    assert (s3(child("")).retry_attempts, s3(child("")).retry_deadline_secs) == (3, 9)


def test_parts_of_one_policy_belong_together() -> None:
    parts = ["tiers.s3.keep.best.metric=loss", "tiers.s3.keep.best.mode=min"]
    assert values(Recipe.load("base.yaml", overrides=parts))["tiers"]["s3"]["keep"] == {
        "best": {"metric": "loss", "mode": "min", "n": 1}
    }


SCALARS = {
    ("namespace",): st.from_regex(r"[a-zA-Z][a-z0-9_-]{0,8}", fullmatch=True).filter(
        lambda text: text.lower() not in ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
    ),
    ("on_error",): st.sampled_from(["warn", "raise", None]),
    ("drain_timeout_secs",): st.integers(1, 1000) | st.floats(1, 1000).map(lambda x: round(x, 3)) | st.none(),
    ("allow_pickle",): st.booleans() | st.none(),
    ("tiers", "memory"): st.none(),
    ("tiers", "s3", "uri"): st.sampled_from(["s3://bucket/a", "s3://other"]),
    ("tiers", "s3", "keep"): st.sampled_from([{"latest": 2}, {"any": [{"latest": 1}, {"every_n_steps": 7}]}, None]),
    ("tiers", "s3", "save"): st.sampled_from(["on_end", {"every_n_steps": 3}, {"all": ["on_preemption"]}, None]),
    ("tiers", "s3", "retry", "attempts"): st.integers(1, 100) | st.none(),
    ("tiers", "s3", "region"): st.sampled_from(["eu-west-1", None]),
    ("tiers", "disk"): st.sampled_from(
        [{"kind": "local", "path": "/d"}, {"kind": "local", "path": "/e", "fsync": False}]
    ),
}
CHANGES = st.lists(st.sampled_from(sorted(SCALARS)), unique=True, max_size=6).flatmap(
    lambda paths: st.fixed_dictionaries({path: SCALARS[path] for path in paths})
)


def nested(changes: Mapping[tuple[str, ...], object]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in changes.items():
        inner = found
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = value
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CHANGES, CHANGES)
def test_a_file_the_environment_and_the_command_line_mean_the_same(
    place: Path, changes: dict[tuple[str, ...], object], other: dict[tuple[str, ...], object]
) -> None:
    """Any changes by any way are the same recipe; a later way goes over an earlier one."""
    if ("tiers", "memory") in changes:
        other.pop(("tiers", "memory"), None)  # what is gone can't be removed again
    (place / "file.yaml").write_text(json.dumps({"extends": "base.yaml", **nested(changes)}))
    by_file = values(Recipe.load("file.yaml"))
    options = [f"{'.'.join(path)}={json.dumps(value)}" for path, value in changes.items()]
    assert values(Recipe.load("base.yaml", overrides=options)) == by_file
    with pytest.MonkeyPatch.context() as patch:
        for path, value in changes.items():
            patch.setenv(f"SM_TIERED__{'__'.join(path).upper()}", json.dumps(value))
        by_environment = values(Recipe.load("base.yaml"))
        assert by_environment == by_file
        assert list(by_environment["tiers"]) == list(by_file["tiers"])
        over = [f"{'.'.join(path)}={json.dumps(value)}" for path, value in other.items()]
        by_both = values(Recipe.load("base.yaml", overrides=over))
    (place / "file2.yaml").write_text(json.dumps({"extends": "file.yaml", **nested(other)}))
    assert values(Recipe.load("file2.yaml")) == by_both


# ---- where values come from


def origins(recipe: Recipe) -> dict[str, Value]:
    return {".".join(map(str, value.path)): value for value in explained(recipe)}


def test_each_value_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SM_TIERED__TIERS__S3__RETRY__ATTEMPTS", "3")
    child("tiers:\n  s3:\n    uri: s3://bucket/${WHERE:-own}\n    keep: null")
    found = origins(Recipe.load("run.yaml", overrides=["tiers.memory.budget=1GiB"]))
    assert {key: str(found[key].place) for key in found if found[key].place is not None} == {
        "version": "base.yaml, line 1, col 1",
        "namespace": "base.yaml, line 2, col 1",
        "tiers.memory.kind": "base.yaml, line 5, col 5",
        "tiers.memory.path": "base.yaml, line 6, col 5",
        "tiers.memory.save": "base.yaml, line 7, col 5",
        "tiers.memory.budget": "--set tiers.memory.budget",
        "tiers.s3.kind": "base.yaml, line 9, col 5",
        "tiers.s3.uri": "run.yaml, line 4, col 5",
        "tiers.s3.save": "base.yaml, line 11, col 5",
        "tiers.s3.region": "base.yaml, line 13, col 5",
        "tiers.s3.retry.attempts": "environment SM_TIERED__TIERS__S3__RETRY__ATTEMPTS",
        "tiers.s3.retry.deadline_secs": "base.yaml, line 14, col 26",
        "on_error": "base.yaml, line 15, col 1",
    }
    assert {"tiers.s3.keep", "tiers.s3.part_size", "drain_timeout_secs"} <= set(found)
    [filled] = found["tiers.s3.uri"].filled
    assert (filled.name, filled.default) == ("WHERE", True)
    assert found["tiers.s3.save"].value == {"any": [{"every_n_steps": 50}, "on_end"]}


def test_what_is_filled_in_inside_a_policy_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERY", "20")
    found = origins(child("tiers: {s3: {save: {any: [{every_n_steps: '${EVERY}'}, '${WHEN:-on_end}']}}}"))
    assert [(one.name, one.default) for one in found["tiers.s3.save"].filled] == [("EVERY", False), ("WHEN", True)]
    assert found["tiers.s3.keep"].filled == ()


def test_a_default_that_an_empty_variable_leaves_is_a_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    found = origins(child("tiers: {s3: {part_size: '${EMPTY}'}}"))["tiers.s3.part_size"]
    assert (found.value, found.place) == ("32MiB", None)


@pytest.mark.parametrize(
    ("secret", "hidden"),
    [
        ("AKIA" + "A" * 16, True),
        ("https://user:word@host", True),
        ("ghp_" + "a1" * 18, True),
        ("hf_" + "aB" * 17, True),
        ("eyJhbGciOiJI.eyJzdWIiOiIx", True),
        ("password=word", True),
        ("wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY12", True),
        ("training", False),
        ("0123456789abcdef0123456789abcdef01234567", False),
        ("arn-of-something-that-is-quite-long-2026", False),
    ],
)
def test_what_looks_like_a_secret_is_hidden(monkeypatch: pytest.MonkeyPatch, secret: str, hidden: bool) -> None:
    monkeypatch.setenv("WHO", secret)
    found = origins(child("tiers: {s3: {profile: '${WHO}'}}"))["tiers.s3.profile"]
    assert found.hidden is hidden
    assert found.value == (None if hidden else secret)
