"""Bad input to recipes and policies: one table. Every row names the class and the words that tell what to do;
for every row no secret is told, nothing is written and nothing runs for long.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sm_tiered import policies
from sm_tiered.errors import ConfigError, PolicyError, RecipeError
from sm_tiered.layout import check_namespace
from sm_tiered.recipe import Recipe, load_recipe

SENTINEL = "SENTINELvalue7f3a"


class Row(NamedTuple):
    id: str
    call: Callable[[], object]
    error: type[Exception]
    words: tuple[str, ...]
    text: str = ""
    """The recipe, where the row is one."""


def parse(row: str, text: str, *words: str) -> Row:
    return Row(row, lambda: Recipe.parse(text, source="run.yaml"), RecipeError, ("run.yaml", *words), text)


def top(row: str, line: str, *words: str) -> Row:
    """A line at the top of a recipe that is good but for it."""
    return parse(row, f"version: 1\nnamespace: run\ntiers: {{m: {{kind: memory}}}}\n{line}\n", *words)


def tier(row: str, lines: str, *words: str) -> Row:
    """The only tier of a recipe that is good but for it."""
    return parse(row, f"version: 1\nnamespace: run\ntiers:\n  t: {{{lines}}}\n", *words)


def s3(row: str, lines: str, *words: str) -> Row:
    uri = "" if "uri:" in lines else "uri: 's3://bucket/p', "
    return tier(row, f"kind: s3, {uri}{lines}", *words)


def save(row: str, policy: str, *words: str) -> Row:
    return tier(row, f"kind: memory, save: {policy}", *words)


def keep(row: str, policy: str, *words: str) -> Row:
    return tier(row, f"kind: local, path: /d, keep: {policy}", *words)


def namespace(row: str, value: object, *words: str) -> Row:
    return Row(row, lambda: check_namespace(value), ConfigError, ("namespace", *words))


def policy(row: str, name: str, args: tuple[object, ...], *words: str) -> Row:
    return Row(row, lambda: getattr(policies, name)(*args), PolicyError, (name, *words))


def mapping(row: str, value: Any, *words: str) -> Row:
    return Row(row, lambda: load_recipe(value), RecipeError, words)


def file(row: str, content: bytes, *words: str) -> Row:
    def call() -> object:
        path = Path(os.environ["BAD_DIR"], "run.yaml")
        path.write_bytes(content)
        return Recipe.load(path)

    return Row(row, call, RecipeError, ("run.yaml", *words))


def nested(depth: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for _ in range(depth):
        found = {"any": [found]}
    return found


def cyclic() -> dict[str, object]:
    found: dict[str, object] = {}
    found["tiers"] = found
    return found


GOOD = {"version": 1, "namespace": "run", "tiers": {"m": {"kind": "memory"}}}
LAUGHS = "a: &a0 [x]\n" + "".join(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))
MANY_ALIASES = "a: &a x\nb: [" + ", ".join(["*a"] * 101) + "]"
PRODUCER = "{best: {metric: val_loss, mode: min}}"

NAMESPACES = [
    namespace("1 empty", "", "is empty", "use 1 to 128"),
    namespace("2 parent", "../x", "illegal character '.'", "at 0"),
    namespace("3 slash", "a/b", "illegal character '/'", "at 1"),
    namespace("4 query", "a?b", "'?'", "at 1"),
    namespace("5 space", "a b", "' '", "at 1"),
    namespace("6 newline", "a\nb", r"'\n'", "at 1"),
    namespace("6 newline at the end", "ab\n", r"'\n'", "at 2"),
    namespace("7 not ASCII", "ä", "illegal character", "at 0"),
    namespace("8 leading dash", "-x", "'-'", "beginning with a letter or digit"),
    namespace("9 too long", "x" * 129, "too long", "129 > 128"),
    namespace("10 dot", ".", "'.'"),
    namespace("10 dots", "..", "'.'"),
    namespace("11 int", 5, "must be str, got int 5"),
    namespace("11 None", None, "must be str, got NoneType"),
    namespace("11 bytes", b"x", "must be str, got bytes"),
    namespace("12 NUL", "a\x00b", r"'\x00'", "at 1"),
    parse(
        "1 in a recipe", "version: 1\nnamespace: ''\ntiers: {m: {kind: memory}}", "line 2, col 1", "namespace is empty"
    ),
    parse(
        "2 in a recipe", "version: 1\nnamespace: ../x\ntiers: {m: {kind: memory}}", "line 2", "illegal character '.'"
    ),
    parse(
        "11 in a recipe",
        "version: 1\nnamespace: 5\ntiers: {m: {kind: memory}}",
        "must be text, got 5",
        "'5', in quotes",
    ),
    parse("11 missing", "version: 1\ntiers: {m: {kind: memory}}", "namespace is missing", "Name the run"),
    parse(
        "9 in a recipe", f"version: 1\nnamespace: {'x' * 129}\ntiers: {{m: {{kind: memory}}}}", "too long", "129 > 128"
    ),
]

ADDRESSES = [
    s3("19 no scheme", "uri: bucket/p", "tiers.t.uri", "must start with s3://", "Write s3://bucket/prefix"),
    s3("20 no bucket", "uri: 's3://'", "names no bucket"),
    s3("20 no bucket, prefix", "uri: 's3:///p'", "names no bucket"),
    s3("21 bucket rule", "uri: 's3://Bad_Bucket'", "'Bad_Bucket'", "3 to 63 of a-z"),
    s3("21 short", "uri: 's3://ab/p'", "'ab'", "3 to 63"),
    s3("21 long", f"uri: 's3://{'b' * 64}/p'", "3 to 63"),
    s3("21 dots", "uri: 's3://a..b/p'", "'a..b'"),
    s3("21 address", "uri: 's3://10.0.0.1/p'", "'10.0.0.1'", "bucket"),
    s3("22 upper case", "uri: 'S3://bucket'", "lower case"),
    s3("23 https", "uri: 'https://b.s3.amazonaws.com/p'", "s3://bucket/prefix", "endpoint_url"),
    s3("24 empty segment", "uri: 's3://bucket//p'", "empty or dot segment"),
    s3("24 dot segment", "uri: 's3://bucket/../p'", "empty or dot segment"),
    s3("24 single dot", "uri: 's3://bucket/p/.'", "empty or dot segment"),
    s3("24 character", "uri: 's3://bucket/a b'", "'a b'", "may not hold"),
    s3("24 newline", 'uri: "s3://bucket/a\\nb"', "may not hold"),
    s3("24 too long", f"uri: 's3://bucket/{'p' * 701}'", "701 > 700"),
    s3("24 credentials", f"uri: 's3://key:{SENTINEL}@bucket/p'", "credentials in a uri", "hidden"),
    s3("24 signed", f"uri: 's3://bucket/p?X-Amz-Signature={SENTINEL}'", "hidden"),
    tier("25 no uri", "kind: s3, save: {every_n_steps: 50}", "tiers.t", "uri is missing", "s3://bucket/prefix"),
    s3("25 bucket key", "bucket: b", "unknown key 'bucket'", "uri: s3://bucket/prefix"),
    s3(
        "26 endpoint without scheme",
        "endpoint_url: 'localhost:9000'",
        "tiers.t.endpoint_url",
        "scheme missing",
        "https://",
    ),
    s3("26 other scheme", "endpoint_url: 'ftp://host'", "no http or https"),
    s3("26 no host", "endpoint_url: 'https://'", "no http or https"),
    s3("26 port", "endpoint_url: 'https://host:99999'", "no URL"),
    s3("26 control", 'endpoint_url: "https://ho\\nst"', "scheme missing"),
    s3("27 plain http", "endpoint_url: 'http://minio.lan:9000'", "plain http", "allow_http: true"),
    s3("27 private network", "endpoint_url: 'http://10.0.0.5:9000'", "plain http"),
    s3("27 loopback look-alike", "endpoint_url: 'http://127.0.0.1.evil.com'", "plain http"),
    s3("28 credentials", f"endpoint_url: 'https://user:{SENTINEL}@host'", "credentials in a URL", "hidden"),
    s3("28 query", f"endpoint_url: 'https://host/?sig={SENTINEL}'", "query", "hidden"),
    s3("29 region", "region: us-esat-1", "tiers.t.region", "'us-esat-1'", "Did you mean 'us-east-1'?"),
    s3("29 region form", "region: Frankfurt", "form of a region", "us-east-1"),
    s3("30 sse text", "sse: 'aws:kms'", "tiers.t.sse", "must be a mapping"),
    s3("30 sse without key", "sse: {}", "kms_key_id is missing"),
    s3("30 sse key form", "sse: {kms_key_id: 'a b'}", "tiers.t.sse.kms_key_id", "no key id"),
    s3("30 sse flat", "sse_kms_key_id: k", "unknown key 'sse_kms_key_id'", "sse: {kms_key_id"),
    s3("30 profile", 'profile: "a\\nb"', "no profile"),
]

VALUES = [
    tier("35 no unit", "kind: memory, budget: '10'", "tiers.t.budget", "unit missing", "10GiB"),
    tier("35 int", "kind: memory, budget: 10", "unit missing", "10GiB"),
    tier("35 unknown unit", "kind: memory, budget: 16GB", "unit 'GB' is unknown", "16GiB"),
    tier("35 k8s unit", "kind: memory, budget: 500Mi", "unit 'Mi'", "500MiB"),
    tier("35 zero", "kind: memory, budget: 0GiB", "out of range"),
    tier("35 negative", "kind: memory, budget: -1GiB", "no size"),
    tier("35 words", "kind: memory, budget: lots", "no size", "16GiB"),
    s3("35 part size small", "part_size: 1MiB", "tiers.t.part_size", "5MiB to 5GiB"),
    s3("35 part size large", "part_size: 6GiB", "5MiB to 5GiB"),
    top("41 zero", "group_timeout_secs: 0", "line 4", "group_timeout_secs", "above 0", "got 0"),
    top("41 negative", "drain_timeout_secs: -5", "drain_timeout_secs", "above 0"),
    top("41 nan", "commit_deadline_secs: .nan", "commit_deadline_secs", "above 0"),
    top("41 inf", "stream_timeout_secs: .inf", "stream_timeout_secs", "at most"),
    top("41 text", "in_use_wait_secs: 30s", "in_use_wait_secs", "must be a number", "'30s'"),
    top("41 bool", "group_timeout_secs: true", "must be a number", "got True"),
    s3("41 request", "request_timeout_secs: 0", "tiers.t.request_timeout_secs", "above 0"),
    s3("41 retry", "retry: {attempts: 0}", "tiers.t.retry.attempts", "1 to 100"),
    s3("41 retry deadline", "retry: {deadline_secs: -1}", "tiers.t.retry.deadline_secs", "above 0"),
    s3("41 throughput", "throughput_gbps: 0", "throughput_gbps", "above 0"),
    s3("41 reader", "reader: crtt", "tiers.t.reader", "'boto3' or 'crt'", "'crtt'", "Did you mean 'crt'?"),
    top("42 unknown", "save_to_s3: true", "line 4", "unknown key 'save_to_s3'", "every_n_steps: 50"),
    top("42 world size", "world_size: 8", "unknown key 'world_size'", "process group"),
    top("42 save at the top", "save: {every_n_steps: 5}", "unknown key 'save'", "Each tier has its own"),
    top("43 checksum", "checksum: md5", "unknown key 'checksum'", "XXH3-128"),
    top("43 on_error", "on_error: ignore", "on_error", "'warn' or 'raise'", "'ignore'", "Choose 'warn' or 'raise'."),
    top("43 on_error no", "on_error: no", "got False", "YAML reads no as false"),
    top("43 unreachable", "unreachable: memory", "'raise' or 'use_memory'"),
    top("43 flag as text", "allow_pickle: 'yes'", "allow_pickle", "true or false", "'yes'"),
    top("43 flag as number", "allow_partial: 1", "allow_partial", "true or false", "got 1"),
    tier("43 no kind", "path: /d", "tiers.t", "kind is missing", "memory, local, s3"),
    tier("43 kind", "kind: memroy", "tiers.t.kind", "no kind of tier", "'memory'"),
    tier("43 kind of no text", "kind: [memory]", "tiers.t.kind", "no kind of tier"),
    tier("43 foreign key", "kind: memory, fsync: true", "unknown key 'fsync'", "Known here"),
    tier("43 no path", "kind: local", "path is missing"),
    tier("43 empty path", "kind: local, path: ''", "tiers.t.path", "empty"),
    tier("43 address as path", "kind: local, path: 's3://b/p'", "tiers.t.path", "kind: s3"),
    tier("43 NUL in path", 'kind: local, path: "a\\0b"', "tiers.t.path", "control characters"),
    tier("43 unknown home", "kind: local, path: ~nobodyhere/x", "home directory"),
    tier("43 null path", "kind: local, path: ", "tiers.t.path", "must be text, got nothing"),
]

STRUCTURE = [
    parse(
        "43 too many tiers",
        "version: 1\nnamespace: run\ntiers: {"
        + ", ".join(f"t{n}: {{kind: local, path: /d{n}, keep: {{latest: 1}}}}" for n in range(17))
        + "}",
        "line 3",
        "17 tiers, at most 16",
    ),
    parse("43 no tiers", "version: 1\nnamespace: run\ntiers: {}", "line 3", "no tier", "at least one"),
    parse("43 tiers missing", "version: 1\nnamespace: run", "tiers is missing"),
    parse("43 tiers null", "version: 1\nnamespace: run\ntiers:", "tiers", "must be a mapping, got nothing"),
    parse("43 tier null", "version: 1\nnamespace: run\ntiers: {m: }", "tiers.m", "must be a mapping, got nothing"),
    parse("43 tiers list", "version: 1\nnamespace: run\ntiers: [memory]", "tiers", "must be a mapping, got a list"),
    parse("43 tier name", "version: 1\nnamespace: run\ntiers: {My-Tier: {kind: memory}}", "'My-Tier'", "a-z 0-9 _"),
    parse(
        "43 memory last",
        "version: 1\nnamespace: run\ntiers:\n  d: {kind: local, path: /d}\n  m: {kind: memory}",
        "line 5",
        "tiers.m",
        "it comes first",
    ),
    parse(
        "43 two memories",
        "version: 1\nnamespace: r\ntiers: {a: {kind: memory}, b: {kind: memory, path: /x}}",
        "At most one",
    ),
    parse(
        "43 one place twice",
        "version: 1\nnamespace: r\ntiers: {a: {kind: local, path: /d}, b: {kind: local, path: /x/../d}}",
        "tiers.b",
        "same place as tier 'a'",
    ),
    parse(
        "43 one prefix twice",
        "version: 1\nnamespace: r\ntiers: {a: {kind: s3, uri: 's3://bucket/p'}, b: {kind: s3, uri: 's3://bucket/p/'}}",
        "same place as tier 'a'",
    ),
    parse("several", "version: 1\nnamespace: a/b\ntiers: {m: {kind: memory, budget: 1}}", "line 2", "(and 1 more)"),
]

YAML = [
    Row("45 missing", lambda: Recipe.load("nowhere.yaml"), RecipeError, ("recipe not found: nowhere.yaml",)),
    Row("46 directory", lambda: Recipe.load("/"), RecipeError, ("'/' is a directory", "Name the YAML file")),
    Row("46 device", lambda: Recipe.load("/dev/null"), RecipeError, ("not a regular file",)),
    Row("46 NUL", lambda: Recipe.load("a\x00b"), RecipeError, ("can't be read",)),
    file("47 empty", b"", "empty recipe", "version: 1"),
    parse("47 only comments", "# nothing\n", "empty recipe"),
    parse("48 tab", "version: 1\nnamespace: run\ntiers:\n\tm: {kind: memory}", "line 4, col 1", "tabs", "spaces"),
    parse("48 tab below", "version: 1\ntiers:\n  m:\n  \tkind: memory", "line 4", "tabs"),
    parse("48 syntax", "version: 1\nnamespace: 'run\n", "line", "not YAML"),
    parse("48 two documents", "version: 1\n---\nversion: 1\n", "line 2", "single document"),
    parse("48 control character", "version: 1\x07", "character", "not allowed"),
    parse("48 undefined alias", "version: *v", "line 1", "alias"),
    parse("49 list", "- version: 1", "expected a mapping, got a list"),
    parse("49 text", "hello", "expected a mapping, got 'hello'"),
    parse(
        "50 duplicate",
        "version: 1\nnamespace: a\ntiers: {}\nnamespace: b",
        "line 4",
        "'namespace' twice, lines 2 and 4",
    ),
    parse("50 duplicate below", "tiers:\n  m: {kind: memory, kind: local}", "'kind' twice, lines 2 and 2"),
    parse("51 typo", "version: 1\nnamspace: run\ntiers: {}", "line 2, col 1", "unknown key 'namspace'", "'namespace'"),
    tier("51 typo below", "kind: memory, bugdet: 1GiB", "line 4", "tiers.t.bugdet", "Did you mean 'budget'?"),
    parse(
        "52 tag",
        "version: !!python/object/apply:os.mkdir ['pwned']",
        "line 1, col 10",
        "not permitted",
        "nothing was executed",
    ),
    parse("52 tag below", "a:\n  b:\n    - !!python/name:os.system ''", "line 3", "not permitted"),
    parse("52 own tag", "version: !version 1", "tag '!version'"),
    parse("52 harmless tag", "version: !!int '1'", "not permitted"),
    parse("53 laughs", LAUGHS, "too many values"),
    parse("53 aliases", MANY_ALIASES, "more than 100 aliases"),
    parse("53 loop", "version: 1\ntiers: &t {m: *t}", "too many values"),
    parse("53 deep", "a: " + "[" * 5000, "deeply nested"),
    parse("53 wide", "a: [" + "1," * 30_000 + "]", "too many"),
    parse("53 merge", "a: &a {x: 1}\nb: {<<: *a}", "line 2", "merge keys"),
    file("54 latin-1", b"version: 1\nname: \xe4", "not UTF-8 at byte 17", "Save the file as UTF-8"),
    file("54 UTF-16", "version: 1".encode("utf-16"), "not UTF-8 at byte 0"),
    save("55 no", "{every_n_steps: no}", "line 4", "tiers.t.save.every_n_steps", "got False", "YAML reads no as false"),
    save("55 off", "{every_secs: off}", "must be a number, got False", "YAML reads off as false"),
    parse("55 key", "on: 1", "line 1", "'on' as True", "Quote it"),
    parse("55 int key", "1: 1", "a key must be text"),
    parse("55 list key", "[a]: 1", "a key must be text"),
    save("56 float text", "{every_n_steps: 1e3}", "must be an integer, got '1e3'", "write the number out"),
    save("56 quoted", "{every_n_steps: '10'}", "must be an integer", "10, without quotes"),
    save("56 fraction", "{every_n_steps: 2.5}", "must be an integer, got 2.5"),
    save("57 octal", "{every_n_steps: 010}", "line 4", "'010' as octal", "leading zeros"),
    save("57 base 60", "{every_secs: 12:30}", "'12:30' as a base-60 number"),
    save("57 huge", "{every_n_steps: 99999999999999999999}", "huge"),
    save("57 hex without digits", "{every_n_steps: 0x_}", "no int"),
    top("58 secret", f"aws_secret_access_key: {SENTINEL}", "line 4", "'aws_secret_access_key'", "AWS's own chain"),
    s3("58 below", f"session_token: {SENTINEL}", "line 4", "'session_token'", "AWS's own chain"),
    s3("58 dashes", f"access-key: {SENTINEL}", "looks like a secret"),
    s3("58 camel case", f"secretAccessKey: {SENTINEL}", "looks like a secret"),
    s3("58 password", f"retry: {{password: {SENTINEL}}}", "looks like a secret"),
    s3("58 octal secret", "token: 0123456701", "looks like a secret"),
    s3("58 misspelt", f"pasword: {SENTINEL}", "unknown key 'pasword'"),
    mapping("58 in a mapping", {**GOOD, "auth": {"token": SENTINEL}}, "'token' looks like a secret", "AWS's own chain"),
    top("58 from the environment", "on_error: ${AWS_SECRET_ACCESS_KEY}", "AWS_SECRET_ACCESS_KEY looks like a secret"),
    s3("58 a key id as a value", f"region: AKIA{'A' * 16}{SENTINEL}", "hidden"),
    parse(
        "58 wrong type", f"version: 1\nnamespace: {{x: {SENTINEL}}}\ntiers: {{m: {{kind: memory}}}}", "got a mapping"
    ),
    top("59 unset", "on_error: ${SURELY_UNSET}", "line 4", "SURELY_UNSET is not set", "${SURELY_UNSET:-default}"),
    top("59 malformed", "on_error: ${1X}", "malformed", "${NAME:-default}"),
    top("59 open", "on_error: '${X'", "malformed"),
    top("59 nested", "on_error: ${X:-${Y}}", "malformed"),
    top("59 key", "${HOME}: 1", "unknown key '${HOME}'"),
    top("59 control characters", "on_error: ${BAD_CONTROL}", "can't be printed"),
    save("59 not a number", "{every_n_steps: '${BAD_WORD}'}", "must be an integer, got 'ten'"),
    save("59 octal", "{every_n_steps: '${BAD_OCTAL}'}", "must be an integer, got '010'"),
    top("59 nothing left", "on_error: warn\nnamespace2: ${BAD_EMPTY}", "unknown key 'namespace2'"),
    parse(
        "59 empty namespace", "version: 1\nnamespace: ${BAD_EMPTY}\ntiers: {m: {kind: memory}}", "namespace is empty"
    ),
    file("60 long file", b"#" * (2**20 + 1), "longer than 1048576 bytes"),
    parse("60 long text", "#" * (2**20 + 1), "longer than 1048576 bytes"),
    parse("61 version", "version: 99\nfuture: 1", "line 1", "recipe version 99, this release knows 1"),
    parse("61 missing", "namespace: run\ntiers: {m: {kind: memory}}", "version is missing", "Write version: 1"),
    parse("61 text", "version: '1'", "must be 1, got '1'"),
    parse("61 bool", "version: true", "must be 1, got True"),
    mapping("given text", "version: 1\nnamespace: x", "Recipe.parse(text)"),
    mapping("given None", None, "got nothing"),
    mapping("given a number", 7, "got 7"),
    mapping("given an object inside", {**GOOD, "namespace": object()}, "namespace", "no plain value"),
    mapping("given bytes inside", {**GOOD, "namespace": b"run"}, "namespace", "no plain value"),
    mapping("given an int key", {**GOOD, 1: 2}, "a key must be text, got 1"),
    mapping("given a loop", cyclic(), "deeply nested"),
    mapping("given a deep one", {**GOOD, "tiers": {"m": {"kind": "memory", "save": nested(40)}}}, "deeply nested"),
    Row("JSON broken", lambda: Recipe.from_json("{"), RecipeError, ("not JSON",)),
    Row("JSON list", lambda: Recipe.from_json("[]"), RecipeError, ("expected a mapping",)),
    Row("JSON secret", lambda: Recipe.from_json(f'{{"token": "{SENTINEL}"}}'), RecipeError, ("looks like a secret",)),
]

IN_RECIPES = [
    save(
        "62 zero", "{every_n_steps: 0}", "tiers.t.save.every_n_steps", "at least 1, got 0", "Leave the save policy out"
    ),
    save("63 negative", "{every_n_steps: -5}", "at least 1, got -5"),
    save("63 epochs", "{every_n_epochs: 0}", "tiers.t.save.every_n_epochs", "at least 1, got 0"),
    save("63 secs", "{every_secs: 0}", "tiers.t.save.every_secs", "above 0"),
    save("63 nan", "{every_secs: .nan}", "above 0 and finite"),
    save("63 no steps", "{at_steps: []}", "tiers.t.save.at_steps", "no steps"),
    save("63 step", "{at_steps: [-1]}", "step -1 is out of range", "0 <= step"),
    save("63 step no list", "{at_steps: 5}", "must be a list, got 5"),
    save("63 step text", "{at_steps: [1, x]}", "tiers.t.save.at_steps[1]", "must be an integer, got 'x'"),
    save("64 nested", "{any: [{every_n_steps: 0}]}", "tiers.t.save.any[0].every_n_steps", "at least 1"),
    save(
        "64 two", "{every_n_steps: 5, on_end: true}", "holds 2 policies", "{any: [{every_n_steps: …}, on_end]}", "all:"
    ),
    save("64 none", "{}", "names no policy", "every_n_steps: 10"),
    save("64 empty any", "{any: []}", "tiers.t.save.any", "no policies"),
    save("64 unknown", "{every_n_step: 5}", "unknown key 'every_n_step'", "Did you mean 'every_n_steps'?"),
    save("64 every", "{every: 5}", "every_n_steps: 10 or every_secs"),
    save("64 bare word", "on_edn", "'on_edn' is no policy", "'on_end'"),
    save("64 bare with argument", "every_n_steps", "is no policy", "{every_n_steps: 10}"),
    save("64 number", "10", "must be a policy, got 10", "{every_n_steps: 10}"),
    save("64 list", "[on_end]", "must be a policy, got a list"),
    save("64 off", "{on_end: false}", "tiers.t.save.on_end", "must be true, got False"),
    save("64 offset", "{every_n_steps: {n: 5, offset: 5}}", "tiers.t.save.every_n_steps", "offset", "0 <= offset < n"),
    save("64 stop", "{every_n_steps: {n: 5, start: 9, stop: 3}}", "stop 3 is before start 9", "start <= stop"),
    save("64 n missing", "{every_n_steps: {offset: 1}}", "tiers.t.save.every_n_steps", "n is missing"),
    save("64 n of text", "{every_n_steps: {n: ten}}", "tiers.t.save.every_n_steps.n", "must be an integer, got 'ten'"),
    save("64 range typo", "{every_n_steps: {n: 5, ofset: 1}}", "unknown key 'ofset'", "Did you mean 'offset'?"),
    save("64 overhead", "{max_overhead: 5}", "tiers.t.save.max_overhead", "above 0 and below 1", "0.01 means 1 %"),
    save("64 overhead text", "{max_overhead: 1%}", "tiers.t.save.max_overhead", "must be a number, got '1%'"),
    save("64 mtbf", "{optimal: {mtbf_secs: 0}}", "tiers.t.save.optimal.mtbf_secs", "above 0"),
    save("64 mtbf missing", "{optimal: {observe: true}}", "tiers.t.save.optimal", "mtbf_secs is missing"),
    save("64 mtbf bare", "optimal", "'optimal' is no policy", "{optimal: {mtbf_secs: 21600}}"),
    save(
        "64 improved", "{when_improved: {metric: loss, mode: low}}", "tiers.t.save.when_improved", "'low'", "min or max"
    ),
    save("64 delta", "{when_improved: {metric: loss, mode: min, min_delta: -1}}", "min_delta", "at least 0"),
    save("64 request", "{on_request: {fil: /x}}", "unknown key 'fil'", "Did you mean 'file'?"),
    save("64 request address", "{on_request: {file: 's3://b/x'}}", "tiers.t.save.on_request.file", "is an address"),
    save("64 not of a list", "{not: [on_end]}", "tiers.t.save.not", "must be a policy, got a list"),
    save("64 not of a typo", "{not: on_edn}", "tiers.t.save.not", "'on_edn' is no policy", "'on_end'"),
    tier(
        "64 exception in memory", "kind: memory, save: {any: [on_exception]}", "tiers.t.save", "the memory tier has it"
    ),
    keep("65 zero", "{latest: 0}", "tiers.t.keep.latest", "at least 1, got 0", "would delete every checkpoint"),
    keep("65 name alone", "latest", "tiers.t.keep", "'latest' is no policy", "'latest' needs its value", "{latest: 3}"),
    keep("66 bool", "{latest: true}", "must be an integer, got True"),
    keep(
        "67 best without metric", "{best: {mode: min}}", "tiers.t.keep.best", "metric is missing", "best needs metric"
    ),
    keep("67 best without mode", "{best: {metric: loss}}", "mode is missing", "min or max"),
    keep("67 best of text", "{best: val_loss}", "tiers.t.keep.best", "must be a mapping"),
    keep("67 best metric empty", "{best: {metric: '', mode: min}}", "best", "metric"),
    keep("69 mode", "{best: {metric: loss, mode: minimum}}", "'minimum'", "min or max"),
    keep("69 n", "{best: {metric: loss, mode: min, n: 0}}", "at least 1", "delete every"),
    keep("69 two", "{latest: 1, every_n_steps: 5}", "holds 2 policies", "{any: [{latest: …}, {every_n_steps: …}]}"),
    keep("69 all two", "{all: [{latest: 1, best: {metric: a, mode: min}}]}", "keep.all[0]", "holds 2 policies"),
    keep("69 not empty", "{not: {}}", "tiers.t.keep.not", "names no policy"),
    keep("69 at no steps", "{at_steps: []}", "tiers.t.keep.at_steps", "never applies"),
    keep("69 bare", "latest", "'latest' is no policy", "{latest: 3}"),
    keep("69 newer", "{newer_than_secs: -1}", "tiers.t.keep.newer_than_secs", "above 0"),
    tier("69 memory keeps latest only", f"kind: memory, keep: {PRODUCER}", "tiers.t.keep", "recycles a fixed number"),
    tier("69 memory any", "kind: memory, keep: {any: [{latest: 1}]}", "only {latest: n}"),
]

IN_PYTHON = [
    policy("62 zero", "EveryNSteps", (0,), "at least 1, got 0", "None"),
    policy("63 negative", "EveryNSteps", (-5,), "at least 1, got -5"),
    policy("63 bool", "EveryNSteps", (True,), "must be an int, got bool True"),
    policy("63 float", "EveryNSteps", (2.5,), "must be an int, got float 2.5"),
    policy("63 text", "EveryNSteps", ("2",), "got str '2'", "Did you mean 2?"),
    policy("63 None", "EveryNSteps", (None,), "got None"),
    policy("63 epochs", "EveryNEpochs", (0,), "EveryNEpochs: n must be at least 1, got 0", "None"),
    policy("63 secs zero", "EverySecs", (0,), "above 0"),
    policy("63 secs nan", "EverySecs", (float("nan"),), "finite"),
    policy("63 secs inf", "EverySecs", (float("inf"),), "finite"),
    policy("63 secs bool", "EverySecs", (True,), "must be a number, got bool"),
    policy("63 secs text", "EverySecs", ("30s",), "must be a number, got str '30s'"),
    policy("63 no steps", "AtSteps", ([],), "never applies"),
    policy("63 bad step", "AtSteps", ([1, True],), "must be an int, got bool"),
    policy("63 step range", "AtSteps", ([10**10],), "out of range"),
    policy("63 no list", "AtSteps", (5,), "list of ints, got int 5"),
    policy("64 any of none", "AnyOf", ([],), "no policies"),
    policy("64 all of none", "AllOf", ([],), "no policies"),
    policy("64 any of text", "AnyOf", (["on_end"],), "no save policy"),
    policy("64 not of text", "Not", ("on_end",), "no save policy"),
    policy("64 offset", "EveryNSteps", (5, 7), "offset must be below n, got 7", "up to 4"),
    policy("64 offset negative", "EveryNSteps", (5, -1), "offset", "0 <= step"),
    policy("64 start", "EveryNSteps", (5, 0, True), "start must be an int, got bool"),
    policy("64 stop", "EveryNSteps", (5, 0, 10, 9), "stop 9 is before start 10", "start <= stop"),
    policy("64 improved", "WhenImproved", ("loss", "low"), "'low'", "min or max"),
    policy("64 improved metric", "WhenImproved", (None, "min"), "needs metric", "got None"),
    policy("64 delta", "WhenImproved", ("loss", "min", float("inf")), "min_delta", "at least 0"),
    policy("65 latest zero", "Latest", (0,), "at least 1", "would delete every checkpoint"),
    policy("66 latest bool", "Latest", (True,), "must be an int, got bool True"),
    policy("66 every", "KeepEveryNSteps", (0,), "at least 1"),
    policy("67 best without metric", "Best", ("", "min"), "needs metric"),
    policy("67 best metric None", "Best", (None, "min"), "needs metric", "got None"),
    policy("69 mode", "Best", ("loss", "minimum"), "'minimum'", "min or max"),
    policy("69 n", "Best", ("loss", "min", 0), "at least 1"),
    policy("69 newer", "NewerThanSecs", (0,), "above 0"),
    policy("69 any of none", "AnyOfKeep", ([],), "no policies"),
    policy("69 all of none", "AllOfKeep", ([],), "no policies"),
    policy("69 not of a save policy", "NotKeep", (policies.OnEnd(),), "no keep policy"),
    policy("69 no steps", "KeepAtSteps", ([],), "never applies"),
    policy("69 any of save policies", "AnyOfKeep", ([policies.OnEnd()],), "no keep policy"),
]

TABLE = [*NAMESPACES, *ADDRESSES, *VALUES, *STRUCTURE, *YAML, *IN_RECIPES, *IN_PYTHON]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory and home of every row; the row's own file lies elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("BAD_DIR", str(elsewhere))
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, SENTINEL)
    for name, value in (("CONTROL", "a\nb"), ("WORD", "ten"), ("OCTAL", "010"), ("EMPTY", "")):
        monkeypatch.setenv(f"BAD_{name}", value)
    return here


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)
def test_bad_input_is_refused_with_what_to_do(row: Row, place: Path) -> None:
    began = time.monotonic()
    with pytest.raises(row.error) as caught:
        row.call()
    assert time.monotonic() - began < 5
    assert isinstance(caught.value, ConfigError)
    text = str(caught.value)
    missing = [word for word in row.words if word not in text]
    assert not missing, text
    assert text.isprintable(), repr(text)
    assert len(text) < 900
    told = "".join(traceback.format_exception(caught.value))
    assert SENTINEL not in told
    assert list(place.iterdir()) == []


SEED_TEXT = """\
version: 1
namespace: ${JOB:-run}
tiers:
  m: {kind: memory, budget: 1GiB, save: {any: [{every_n_steps: 5}, on_end, {at_steps: [1]}]}, keep: {latest: 2}}
  s: {kind: s3, uri: "s3://bucket/p", region: us-east-1, retry: {attempts: 2}, keep: {best: {metric: a, mode: max}}}
"""
SNIPPETS = [
    "",
    "0",
    "-1",
    "{",
    "]",
    ": ",
    "\n",
    "\t",
    "&a ",
    "*a",
    "!t ",
    "${",
    "}",
    "'",
    '"',
    "null",
    "1e3",
    "[]",
    "\x00",
    "é",
    "#",
]
EDITS = st.lists(st.tuples(st.integers(0, len(SEED_TEXT)), st.integers(0, 6), st.sampled_from(SNIPPETS)), max_size=4)
VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["on_end", "s3", "1GiB"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
KEYS = ("version", "namespace", "tiers", "on_error", "allow_pickle", "group_timeout_secs")
TIER_KEYS = ("kind", "uri", "path", "save", "keep", "budget", "retry", "sse", "region", "endpoint_url", "part_size")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS)
def test_text_that_was_damaged_is_a_recipe_or_a_recipe_error(edits: list[tuple[int, int, str]]) -> None:
    text = SEED_TEXT
    for start, length, snippet in edits:
        text = text[:start] + snippet + text[start + length :]
    with contextlib.suppress(RecipeError):
        found = Recipe.parse(text).settings()
        assert Recipe.from_json(found.text).settings() == found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["memory", "local", "s3"]), st.sampled_from(TIER_KEYS), st.sampled_from(KEYS), VALUE, VALUE)
def test_any_value_under_any_key_is_a_recipe_or_a_recipe_error(
    kind: str, below: str, key: str, inner: object, outer: object
) -> None:
    tier = {"kind": kind, **({"path": "/d"} if kind == "local" else {"uri": "s3://bucket"} if kind == "s3" else {})}
    for value in ({**GOOD, "tiers": {"t": {**tier, below: inner}}}, {**GOOD, key: outer}):
        with contextlib.suppress(RecipeError):
            found = load_recipe(value).settings()
            assert Recipe.from_json(found.text).settings() == found


def test_the_good_recipe_that_rows_are_variations_of_is_good() -> None:
    load_recipe(GOOD)
    Recipe.parse("version: 1\nnamespace: run\ntiers: {m: {kind: memory}}\n")
    Recipe.parse("version: 1\nnamespace: run\ntiers:\n  t: {kind: s3, uri: 's3://bucket/p'}\n")
    Recipe.parse("version: 1\nnamespace: run\ntiers:\n  t: {kind: local, path: /d}\n")
