"""Bad input to recipes that extend others, and to what the environment and ``--set`` lay over them: one table.

Every row names where the value really stands and what to do; no secret is told and nothing is written.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest

from sm_tiered.errors import ConfigError, RecipeError
from sm_tiered.recipe import Recipe, load_recipe

SENTINEL = "SENTINELvalue7f3a"
AWS_KEY = "AKIA" + "A" * 16

BASE = """\
version: 1
namespace: run
tiers:
  memory: {kind: memory}
  s3:
    kind: s3
    uri: s3://bucket/base
    save: {any: [{every_n_steps: 50}, on_end]}
"""


class Row(NamedTuple):
    id: str
    words: tuple[str, ...]
    files: dict[str, str]
    environment: dict[str, str]
    options: tuple[str, ...]


def child(row: str, text: str, *words: str, base: str = BASE, more: dict[str, str] | None = None) -> Row:
    """``run.yaml``, which extends ``base.yaml``, beside *more* files."""
    return Row(row, words, {"base.yaml": base, "run.yaml": text, **(more or {})}, {}, ())


def variable(row: str, name: str, value: str, *words: str) -> Row:
    """``run.yaml`` is good but for a variable of the environment."""
    files = {"run.yaml": BASE}
    return Row(row, ("environment ", f"SM_TIERED__{name}", *words), files, {f"SM_TIERED__{name}": value}, ())


def option(row: str, given: str, *words: str) -> Row:
    """``run.yaml`` is good but for an option of the command line."""
    return Row(row, ("--set ", *words), {"run.yaml": BASE}, {}, (given,))


def circle(length: int) -> dict[str, str]:
    names = ["run.yaml", *(f"n{n}.yaml" for n in range(1, length))]
    return {name: f"extends: {after}\n" for name, after in zip(names, [*names[1:], names[0]], strict=True)}


def ladder(length: int) -> dict[str, str]:
    steps = {f"n{n}.yaml": f"extends: n{n + 1}.yaml\n" for n in range(length)}
    return {"run.yaml": "extends: n0.yaml\n", **steps, f"n{length}.yaml": BASE}


EXTENDS = [
    child("missing", "# mine\nextends: bsae.yaml\n", "run.yaml, line 2, col 1: extends: recipe not found: bsae.yaml"),
    child(
        "missing below",
        "extends: base.yaml\n",
        "base.yaml, line 1",
        "not found: other.yaml",
        base="extends: other.yaml",
    ),
    child("directory", "extends: .\n", "run.yaml, line 1", "extends", "is a directory", "Name the YAML file"),
    child("device", "extends: /dev/null\n", "run.yaml, line 1", "not a regular file"),
    child("itself", "extends: run.yaml\n", "run.yaml, line 1", "in a circle: run.yaml → run.yaml", "extends none"),
    child("itself by another name", "extends: ./x/../run.yaml\n", "in a circle: run.yaml → run.yaml"),
    child(
        "circle of three",
        circle(3)["run.yaml"],
        "n2.yaml, line 1, col 1: extends: goes round in a circle: run.yaml → n1.yaml → n2.yaml → run.yaml",
        more=circle(3),
    ),
    child("too many", "", "n6.yaml, line 1", "more than 8 recipes", "Put together", more=ladder(9)),
    child("null", "extends: null\n", "run.yaml, line 1", "extends: must be text, got nothing", "extends: base.yaml"),
    child("list", "extends: [base.yaml]\n", "extends: must be text, got a list", "the path of one recipe"),
    child("number", "extends: 5\n", "extends: must be text, got 5"),
    child("empty", "extends: ''\n", "extends: '' is no path of a file"),
    child("address", "extends: https://host/base.yaml\n", "is no path of a file", "extends: base.yaml"),
    child("control characters", 'extends: "a\\nb"\n', "is no path of a file"),
    child("address with a secret", f"extends: https://u:{SENTINEL}@host/b.yaml\n", "is no path", "hidden"),
    child("unset variable", "extends: ${SURELY_UNSET}\n", "run.yaml, line 1", "SURELY_UNSET is not set"),
    child("secret variable", "extends: ${AWS_SECRET_ACCESS_KEY}\n", "AWS_SECRET_ACCESS_KEY looks like a secret"),
    child("misspelt", "extend: base.yaml\n", "run.yaml, line 1", "unknown key 'extend'", "Write extends: base.yaml"),
    child("below the root", "extends: base.yaml\ntiers: {s3: {extends: x.yaml}}\n", "line 2", "unknown key 'extends'"),
    child("empty base", "extends: base.yaml\n", "base.yaml: empty recipe", base=""),
    child("base is no YAML", "extends: base.yaml\n", "base.yaml, line 3", "not YAML", base="a: 1\nb: [\n"),
    child("base in latin-1", "extends: base.yaml\n", "base.yaml: not UTF-8 at byte 2", base="# \udce4"),
    child("base is a list", "extends: base.yaml\n", "base.yaml: expected a mapping, got a list", base="- 1\n"),
    child("secret in the base", "extends: base.yaml\n", "base.yaml, line 1", "secret", base=f"token: {SENTINEL}\n"),
    child("tag in the base", "extends: base.yaml\n", "base.yaml, line 1", "not permitted", base="a: !!python/x []\n"),
    child(
        "two versions",
        "extends: base.yaml\nversion: 2\n",
        "run.yaml, line 2, col 1: version: 2 here, 1 in base.yaml, line 1",
    ),
    child("version of the base", "extends: base.yaml\n", "base.yaml, line 1", "version 9", base="version: 9\n"),
]

PLACES = [
    child(
        "value of the base",
        "extends: base.yaml\nnamespace: other\n",
        "base.yaml, line 7, col 5: tiers.s3.uri: 'bucket' must start with s3://",
        "Write s3://bucket/prefix",
        base=BASE.replace("s3://bucket/base", "bucket"),
    ),
    child(
        "value of the child",
        "extends: base.yaml\ntiers:\n  s3:\n    uri: bucket\n",
        "run.yaml, line 4, col 5: tiers.s3.uri: 'bucket' must start with s3://",
    ),
    child(
        "section of both",
        "extends: base.yaml\ntiers: {s3: {region: us-east-1}}\n",
        "base.yaml, line 5, col 3: tiers.s3: uri is missing",
        base=BASE.replace("    uri: s3://bucket/base\n", ""),
    ),
    child(
        "key of the child",
        "extends: base.yaml\ntiers:\n  s3: {urii: 's3://bucket'}\n",
        "run.yaml, line 3, col 8: tiers.s3.urii: unknown key 'urii'",
        "Did you mean 'uri'?",
    ),
    child(
        "key of the base",
        "extends: base.yaml\ntiers: {s3: {region: us-east-1}}\n",
        "base.yaml, line 9, col 5: tiers.s3.regoin",
        "Did you mean 'region'?",
        base=f"{BASE}    regoin: x\n",
    ),
    child(
        "policy of the child",
        "extends: base.yaml\ntiers: {s3: {save: {every_n_steps: 0}}}\n",
        "run.yaml, line 2, col 21: tiers.s3.save.every_n_steps",
        "at least 1, got 0",
    ),
    child(
        "tier of no base",
        "extends: base.yaml\ntiers: {s4: {uri: 's3://bucket/x'}}\n",
        "run.yaml, line 2, col 9: tiers.s4: there is no tier 's4' to change",
        "Did you mean 's3'?",
        "Kind is one of memory, local, s3, hyperpod.",
    ),
    child(
        "nothing to remove",
        "extends: base.yaml\ntiers: {memroy: null}\n",
        "run.yaml, line 2, col 9: tiers.memroy: there is no tier 'memroy' to remove",
        "Did you mean 'memory'?",
    ),
    child("null of no key", "extends: base.yaml\non_eror: null\n", "run.yaml, line 2", "'on_eror'", "'on_error'"),
    child("null of what is needed", "extends: base.yaml\nnamespace: null\n", "run.yaml, line 2", "null removes it"),
    child(
        "another kind",
        "extends: base.yaml\ntiers: {s3: {kind: local}}\n",
        "run.yaml, line 2",
        "tiers.s3: path is missing",
    ),
    child(
        "the same place",
        "extends: base.yaml\ntiers: {other: {kind: s3, uri: 's3://bucket/base'}}\n",
        "run.yaml, line 2, col 9: tiers.other: is the same place as tier 's3'",
    ),
    child("all tiers gone", "extends: base.yaml\ntiers: {s3: null, memory: null}\n", "no tier"),
    child("tiers replaced by text", "extends: base.yaml\ntiers: none\n", "run.yaml, line 2", "must be a mapping"),
]

ENVIRONMENT = [
    variable("key", "TIERS__S3__URII", "x", "tiers.s3.urii: unknown key 'urii'", "Did you mean 'uri'?"),
    variable("section", "TEIRS__S3__URI", "x", "unknown key 'teirs'", "Did you mean 'tiers'?"),
    variable("tier", "TIERS__S4__URI", "s3://bucket", "no tier 's4' to change", "Did you mean 's3'?"),
    variable("top key", "ON_EROR", "warn", "on_eror: unknown key 'on_eror'", "Did you mean 'on_error'?"),
    variable("value", "TIERS__S3__URI", "bucket", "tiers.s3.uri: 'bucket' must start with s3://"),
    variable("choice", "ON_ERROR", "wran", "on_error: must be 'warn' or 'raise', got 'wran'", "Did you mean 'warn'?"),
    variable("type", "DRAIN_TIMEOUT_SECS", "soon", "must be a number, got 'soon'"),
    variable("number as a name", "NAMESPACE", "123", "must be text, got 123", "Did you mean '123', in quotes?"),
    variable("policy", "TIERS__S3__SAVE", "on_ned", "tiers.s3.save: 'on_ned' is no policy", "Did you mean 'on_end'?"),
    variable("inside a list", "TIERS__S3__SAVE__ANY__0", "on_end", "tiers.s3.save.any: must be a list, got a mapping"),
    variable("inside a value", "NAMESPACE__X", "1", "namespace: must be text, got a mapping"),
    variable("empty", "TIERS__S3__URI", "", "is empty", "null", "''"),
    variable("blank", "TIERS__S3__URI", "  # nothing", "is empty", "null"),
    variable("no YAML", "TIERS__S3__SAVE", "{any: [", "not YAML"),
    variable("tag", "NAMESPACE", "!!python/name:os.system", "not permitted", "nothing was executed"),
    variable("two documents", "NAMESPACE", "a\n---\nb", "single document"),
    variable("no key", "", "x", "names no key of a recipe", "tiers.s3.uri=s3://bucket/prefix"),
    variable("empty key", "TIERS____URI", "x", "names no key of a recipe"),
    variable("odd name", "A B", "x", "'SM_TIERED__A B': names no key of a recipe"),
    variable("extends", "EXTENDS", "/base.yaml", "only a file says what it extends"),
    variable("needed", "NAMESPACE", "null", "namespace: null removes it", "Name the run"),
    variable(
        "secret key", "TIERS__S3__SECRET_ACCESS_KEY", SENTINEL, "'secret_access_key' looks like a secret", "AWS's"
    ),
    variable("secret in a mapping", "TIERS__S3", f"{{token: {SENTINEL}}}", "'token' looks like a secret"),
    variable("secret as a value", "TIERS__S3__REGION", f"{AWS_KEY}{SENTINEL}", "hidden"),
    variable("secret filled in", "NAMESPACE", "${AWS_SECRET_ACCESS_KEY}", "AWS_SECRET_ACCESS_KEY looks like a secret"),
    variable("deep", "__".join(["A"] * 40), "1", "names no key of a recipe"),
    Row(
        "two of one key",
        ("run.yaml: environment SM_TIERED__ON_ERROR and SM_TIERED__on_error mean the same key", "Unset one"),
        {"run.yaml": BASE},
        {"SM_TIERED__ON_ERROR": "warn", "SM_TIERED__on_error": "raise"},
        (),
    ),
    Row(
        "one inside the other",
        ("SM_TIERED__ON_ERROR__X", "environment SM_TIERED__ON_ERROR sets what this is inside of"),
        {"run.yaml": BASE},
        {"SM_TIERED__ON_ERROR": "warn", "SM_TIERED__ON_ERROR__X": "1"},
        (),
    ),
]

OPTIONS = [
    option("no equals", "tiers.s3.uri", "--set tiers.s3.uri: no value", "tiers.s3.uri=s3://bucket/prefix"),
    option("no value", "tiers.s3.uri=", "--set tiers.s3.uri: is empty", "null"),
    option("no key", "=x", "names no key of a recipe"),
    option("empty key", "tiers..uri=x", "--set tiers..uri: names no key"),
    option("blanks", "the uri=x", "'the uri'", "names no key"),
    option("key", "tiers.s3.regoin=x", "--set tiers.s3.regoin: unknown key 'regoin'", "Did you mean 'region'?"),
    option("case", "Tiers.s3.uri=s3://bucket", "unknown key 'Tiers'", "Did you mean 'tiers'?"),
    option("tier", "tiers.m2.path=/x", "tiers.m2: there is no tier 'm2' to change", "memory, s3"),
    option("value", "tiers.s3.retry.attempts=0", "--set tiers.s3.retry.attempts: must be 1 to 100, got 0"),
    option("base 60", "drain_timeout_secs=1:30", "as a base-60 number"),
    option("removing", "tiers.disk=null", "there is no tier 'disk' to remove", "The recipe has memory, s3."),
    option("secret key", f"tiers.s3.password={SENTINEL}", "'password' looks like a secret"),
    option("secret in the wrong place", f"https://u:{SENTINEL}@host=1", "hidden"),
    option("extends", "extends=/base.yaml", "only a file says what it extends"),
    Row(
        "whole after a part",
        ("--set tiers.s3.retry: tiers.s3.retry.attempts: must be 1 to 100",),
        {"run.yaml": BASE},
        {},
        ("tiers.s3.retry.attempts=3", "tiers.s3.retry={attempts: 0}"),
    ),
    Row(
        "inside", ("--set on_error.x", "--set on_error sets"), {"run.yaml": BASE}, {}, ("on_error=warn", "on_error.x=1")
    ),
]

TABLE = [*EXTENDS, *PLACES, *ENVIRONMENT, *OPTIONS]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory of every row, where its files are put."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SM_TIERED__")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SENTINEL)
    return tmp_path


def put(here: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (here / name).write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_bad_layers_are_refused_with_their_place(row: Row, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(here, row.files)
    for name, value in row.environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(RecipeError) as caught:
        Recipe.load("run.yaml", overrides=row.options)
    assert time.monotonic() - began < 5
    text = str(caught.value)
    if ".yaml, line" in row.words[0]:
        assert text.startswith(row.words[0])
    missing = [word for word in row.words if word not in text]
    assert not missing, text
    assert caught.value.hint or "version" in text
    assert text.isprintable(), repr(text)
    assert len(text) < 900
    assert SENTINEL not in "".join(traceback.format_exception(caught.value))
    assert {path.name for path in here.iterdir()} == set(row.files)


@pytest.mark.parametrize("text", [{"extends": "base.yaml", "namespace": "x"}, "extends: base.yaml\nnamespace: x\n"])
def test_a_recipe_in_no_file_can_t_name_a_relative_one(text: object, here: Path) -> None:
    put(here, {"base.yaml": BASE})
    with pytest.raises(ConfigError, match="'base.yaml' is relative, and this recipe is in no file") as caught:
        load_recipe(text) if isinstance(text, dict) else Recipe.parse(str(text))
    assert caught.value.hint == "Give an absolute path, or load the recipe from a file."


def test_the_json_for_the_drainer_extends_nothing(here: Path) -> None:
    put(here, {"base.yaml": BASE})
    with pytest.raises(RecipeError, match="unknown key 'extends'"):
        Recipe.from_json(f'{{"extends": "{here}/base.yaml"}}')


def test_a_circle_through_a_link_is_one(here: Path) -> None:
    put(here, {"run.yaml": "extends: link.yaml\n"})
    (here / "link.yaml").symlink_to("run.yaml")
    with pytest.raises(RecipeError, match=r"in a circle: run.yaml → link.yaml\. "):
        Recipe.load("run.yaml")


def test_eight_recipes_in_a_chain_are_fine(here: Path) -> None:
    put(here, ladder(6))
    assert Recipe.load("run.yaml").namespace == "run"
    assert len(Recipe.load("run.yaml").document.files) == 8


def test_the_good_recipe_that_rows_are_variations_of_is_good(here: Path) -> None:
    put(here, {"base.yaml": BASE, "run.yaml": "extends: base.yaml\n"})
    assert Recipe.load("run.yaml").values() == Recipe.load("base.yaml").values()
