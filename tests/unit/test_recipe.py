"""Recipes that can be used: what each key means, the environment, and that another process resolves the same."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sm_tiered.errors import RecipeError
from sm_tiered.policies import (
    AllOf,
    AnyOf,
    AnyOfKeep,
    AtSteps,
    Best,
    EveryNEpochs,
    EveryNSteps,
    EverySecs,
    KeepEveryNSteps,
    Latest,
    NewerThanSecs,
    OnEnd,
    OnPreemption,
)
from sm_tiered.recipe import Recipe, load_recipe
from sm_tiered.settings import LocalSettings, MemorySettings, S3Settings, Settings

DESIGN = """\
version: 1
namespace: ${TRAINING_JOB_NAME:-quickstart}
tiers:
  memory:
    kind: memory
    path: /dev/shm/sm_tiered-1000
    budget: 16GiB
    save: {every_n_steps: 10}
    keep: {latest: 2}
  s3:
    kind: s3
    uri: s3://my-bucket/checkpoints
    endpoint_url: ${AWS_ENDPOINT_URL:-}
    save: {any: [{every_n_steps: 50}, {every_secs: 1800}, on_preemption, on_end]}
    keep: {any: [{latest: 3}, {every_n_steps: 5000}, {best: {metric: val_loss, mode: min, n: 2}}]}
on_error: warn
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAINING_JOB_NAME", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


def settings(text: str) -> Settings:
    return Recipe.parse(text).settings()


def one_tier(lines: str, *, top: str = "") -> Settings:
    return settings(f"version: 1\nnamespace: run\n{top}tiers:\n  t: {{{lines}}}\n")


def test_the_recipe_of_the_design_means_what_it_says() -> None:
    found = settings(DESIGN)
    memory, s3 = found.tiers
    assert found.namespace == "quickstart"
    assert memory == MemorySettings(
        name="memory",
        save=EveryNSteps(10),
        keep=Latest(2),
        path="/dev/shm/sm_tiered-1000",
        budget_bytes=16 * 2**30,
    )
    assert s3 == S3Settings(
        name="s3",
        save=AnyOf([EveryNSteps(50), EverySecs(1800), OnPreemption(), OnEnd()]),
        keep=AnyOfKeep([Latest(3), KeepEveryNSteps(5000), Best("val_loss", "min", 2)]),
        bucket="my-bucket",
        prefix="checkpoints",
    )
    assert (found.memory, found.durable) == (memory, (s3,))


def test_what_a_recipe_leaves_out_has_the_defaults_of_the_settings() -> None:
    found = settings("version: 1\nnamespace: run\ntiers: {m: {kind: memory}, d: {kind: local, path: /d}}")
    memory, local = found.tiers
    assert memory == MemorySettings(
        name="m", save=None, keep=Latest(2), path=f"/dev/shm/sm_tiered-{os.getuid()}", budget_bytes=None
    )
    assert local == LocalSettings(name="d", save=None, keep=Latest(3), path="/d")
    plain = Settings(namespace="run", tiers=found.tiers, text=found.text)
    assert found == plain


def test_every_key_reaches_its_setting() -> None:
    found = settings(
        """\
version: 1
namespace: run
tiers:
  s3:
    kind: s3
    uri: s3://bucket/a/b/
    endpoint_url: http://127.0.0.1:9000
    region: garage
    profile: training
    force_path_style: true
    sse: {kms_key_id: alias/key}
    part_size: 64MiB
    throughput_gbps: 25
    reader: crt
    request_timeout_secs: 5.5
    retry: {attempts: 3, deadline_secs: 40}
  disk: {kind: local, path: /d, fsync: false}
on_error: raise
unreachable: use_memory
allow_pickle: true
allow_partial: true
drain_timeout_secs: 1
commit_deadline_secs: 2
group_timeout_secs: 3
in_use_wait_secs: 4
stream_timeout_secs: 5
"""
    )
    s3, disk = found.tiers
    assert s3 == S3Settings(
        name="s3",
        save=None,
        keep=Latest(3),
        bucket="bucket",
        prefix="a/b",
        endpoint_url="http://127.0.0.1:9000",
        region="garage",
        profile="training",
        force_path_style=True,
        sse_kms_key_id="alias/key",
        part_bytes=64 * 2**20,
        throughput_gbps=25.0,
        reader="crt",
        request_timeout_secs=5.5,
        retry_attempts=3,
        retry_deadline_secs=40.0,
    )
    assert isinstance(disk, LocalSettings)
    assert not disk.fsync
    assert (found.on_error, found.unreachable, found.allow_pickle, found.allow_partial) == (
        "raise",
        "use_memory",
        True,
        True,
    )
    waits = (found.drain_timeout_secs, found.commit_deadline_secs, found.group_timeout_secs)
    assert (*waits, found.in_use_wait_secs, found.stream_timeout_secs) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("{every_n_steps: 10}", EveryNSteps(10)),
        ("{every_n_epochs: 2}", EveryNEpochs(2)),
        ("{every_secs: 0.5}", EverySecs(0.5)),
        ("{at_steps: [100, 0]}", AtSteps([0, 100])),
        ("on_end", OnEnd()),
        ("{on_end: true}", OnEnd()),
        ("on_preemption", OnPreemption()),
        ("{any: [on_end, {at_steps: [1]}]}", AnyOf([OnEnd(), AtSteps([1])])),
        (
            "{all: [{every_n_steps: 2}, {any: [{every_secs: 9}, on_end]}]}",
            AllOf([EveryNSteps(2), AnyOf([EverySecs(9), OnEnd()])]),
        ),
    ],
)
def test_each_way_to_write_a_save_policy(text: str, policy: object) -> None:
    assert one_tier(f"kind: memory, save: {text}").tiers[0].save == policy


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("{latest: 4}", Latest(4)),
        ("{newer_than_secs: 60}", NewerThanSecs(60)),
        ("{best: {metric: loss, mode: max}}", Best("loss", "max", 1)),
        ("{any: [{latest: 1}, {every_n_steps: 7}]}", AnyOfKeep([Latest(1), KeepEveryNSteps(7)])),
    ],
)
def test_each_way_to_write_a_keep_policy(text: str, policy: object) -> None:
    assert one_tier(f"kind: local, path: /d, keep: {text}").tiers[0].keep == policy


@pytest.mark.parametrize(
    ("text", "size"), [("1B", 1), ("500MiB", 500 * 2**20), ("1.5GiB", 3 * 2**29), ("2 TiB", 2**41), ("3KiB", 3072)]
)
def test_sizes_have_units(text: str, size: int) -> None:
    memory = one_tier(f"kind: memory, budget: {text}").memory
    assert memory is not None
    assert memory.budget_bytes == size


def test_the_environment_is_filled_in_as_what_is_wanted_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB", "12345")
    monkeypatch.setenv("EVERY", "20")
    monkeypatch.setenv("FSYNC", "false")
    found = settings(
        "version: 1\nnamespace: ${JOB}\ntiers: {d: {kind: '${KIND:-local}', path: '/d/${JOB}/x', fsync: '${FSYNC}', "
        "save: {any: [{every_n_steps: '${EVERY}'}, {at_steps: ['${AT:-7}']}]}}}\ndrain_timeout_secs: ${WAIT:-2.5}"
    )
    disk = found.tiers[0]
    assert isinstance(disk, LocalSettings)
    assert (found.namespace, disk.path, disk.fsync, found.drain_timeout_secs) == ("12345", "/d/12345/x", False, 2.5)
    assert disk.save == AnyOf([EveryNSteps(20), AtSteps([7])])


def test_an_optional_value_that_the_environment_leaves_empty_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    found = one_tier(
        "kind: s3, uri: 's3://bucket', endpoint_url: '${EMPTY}', region: '${UNSET:-}', profile: '${EMPTY:-}'"
    )
    s3 = found.tiers[0]
    assert isinstance(s3, S3Settings)
    assert (s3.endpoint_url, s3.region, s3.profile, s3.prefix) == (None, None, None, "")


def test_what_a_variable_holds_is_not_expanded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "/d/${INNER}")
    monkeypatch.setenv("INNER", "wrong")
    text = one_tier("kind: local, path: '${OUTER}'").text
    again = Recipe.from_json(text).settings().tiers[0]
    assert isinstance(again, LocalSettings)
    assert again.path == "/d/${INNER}"


def test_a_namespace_may_look_like_a_date() -> None:
    assert settings("version: 1\nnamespace: 2026-08-22\ntiers: {m: {kind: memory}}").namespace == "2026-08-22"


def test_relative_paths_are_resolved_where_the_recipe_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    found = settings("version: 1\nnamespace: r\ntiers: {a: {kind: local, path: ./c}, b: {kind: local, path: ~/c}}")
    monkeypatch.chdir("/")
    paths = [tier.path for tier in Recipe.from_json(found.text).settings().tiers if isinstance(tier, LocalSettings)]
    assert paths == [f"{tmp_path}/c", "/home/user/c"]


def test_another_process_resolves_the_same_settings_from_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINING_JOB_NAME", "job-7")
    found = settings(DESIGN.replace("/dev/shm/sm_tiered-1000", "relative"))
    assert Recipe.from_json(found.text).settings() == found
    script = "import sys; from sm_tiered.recipe import Recipe; print(Recipe.from_json(sys.argv[1]).settings())"
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", script, found.text], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == repr(found)
    assert f"{tmp_path}/relative" in done.stdout


def test_the_same_recipe_has_the_same_text_however_it_is_written() -> None:
    mapping = {
        "namespace": "run",
        "version": 1,
        "tiers": {"m": {"keep": {"latest": 2}, "kind": "memory", "save": {"any": ["on_end", {"at_steps": (3,)}]}}},
    }
    text = "version: 1\nnamespace: run\ntiers: {m: {kind: memory, save: {any: [{on_end: true}, {at_steps: [3]}]}}}"
    assert Recipe.parse(mapping).settings() == settings(text)


def test_load_recipe_takes_a_path_a_mapping_or_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + DESIGN.encode())
    loaded = load_recipe(path)
    assert load_recipe(str(path)).settings() == loaded.settings()
    assert load_recipe(loaded) is loaded
    assert loaded.settings().source == str(path)
    mapping = {"version": 1, "namespace": "run", "tiers": {"m": {"kind": "memory"}}}
    assert load_recipe(mapping).settings().namespace == "run"


def test_the_order_of_the_tiers_is_kept() -> None:
    names = ["m", "z", "a", "k"]
    tiers = ", ".join(f"{name}: {{kind: local, path: /{name}}}" for name in names[1:])
    text = settings(f"version: 1\nnamespace: r\ntiers: {{m: {{kind: memory}}, {tiers}}}").text
    assert [tier.name for tier in Recipe.from_json(text).settings().tiers] == names


def test_aliases_are_fine_in_moderation() -> None:
    found = settings(
        "version: 1\nnamespace: r\n"
        "tiers: {m: {kind: memory, save: &s {every_n_steps: 2}}, d: {kind: local, path: /d, save: *s}}"
    )
    assert [tier.save for tier in found.tiers] == [EveryNSteps(2)] * 2


def test_durable_steps_that_are_no_memory_steps_are_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "uneven.yaml"
    path.write_text(
        "version: 1\nnamespace: r\ntiers: {memory: {kind: memory, save: {every_n_steps: 20}}, "
        "disk: {kind: local, path: /d, save: {any: [{every_n_steps: 50}, {every_n_steps: 40}, on_end]}}}"
    )
    with caplog.at_level(logging.WARNING, "sm_tiered"):
        load_recipe(path)
    [message] = caplog.messages
    assert "tiers.disk.save: steps 50 are no multiples" in message
    assert "'memory' (20)" in message


@pytest.mark.parametrize(
    ("memory", "disk", "warned"),
    [
        ("{every_n_steps: {n: 10, offset: 3}}", "{every_n_steps: {n: 50, offset: 3}}", None),
        ("{every_n_steps: {n: 10, offset: 3}}", "{every_n_steps: {n: 50, offset: 43}}", None),
        (
            "{every_n_steps: {n: 10, offset: 3}}",
            "{every_n_steps: 50}",
            "steps 50 are no multiples of .* \\(10 \\+ 3\\)",
        ),
        ("{any: [{any: [{every_n_steps: 10}]}, on_end]}", "{every_n_steps: {n: 50, offset: 3}}", "steps 50 \\+ 3 are"),
        ("on_end", "{every_n_steps: 50}", None),
    ],
)
def test_offsets_count_when_steps_are_compared(memory: str, disk: str, warned: str | None) -> None:
    tiers = f"{{m: {{kind: memory, save: {memory}}}, d: {{kind: local, path: /d, save: {disk}}}}}"
    found = Recipe.parse(f"version: 1\nnamespace: r\ntiers: {tiers}").warnings()
    assert len(found) == (warned is not None)
    assert warned is None or re.search(warned, found[0])


def test_the_good_recipe_warns_of_nothing() -> None:
    assert Recipe.parse(DESIGN).warnings() == []


def test_a_recipe_is_a_value_that_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, "SENTINEL")
    recipe = Recipe.parse(DESIGN)
    assert "SENTINEL" not in f"{recipe!r}{recipe}{recipe.settings()!r}{recipe.settings().text}"
    with pytest.raises(ValueError, match="frozen"):
        recipe.namespace = "other"
    assert hash(recipe.settings()) == hash(Recipe.parse(DESIGN).settings())


def test_a_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(ValueError, match="illegal character") as caught:
        Recipe(version=1, namespace="a/b", tiers={})
    assert not isinstance(caught.value, RecipeError)
    made = Recipe.model_validate({"version": 1, "namespace": "r", "tiers": {"m": {"kind": "memory"}}})
    assert made.settings().source == "recipe"


def test_loading_a_recipe_loads_no_framework() -> None:
    script = "import sys, sm_tiered.recipe; print(sorted({'torch', 'boto3', 'lightning'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
