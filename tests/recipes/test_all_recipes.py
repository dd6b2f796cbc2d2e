"""Every recipe that is here can be copied: it loads with the environment that it says it needs, and says what for."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest

from sm_tiered.errors import RecipeError
from sm_tiered.recipe import Recipe
from sm_tiered.settings import LocalSettings, MemorySettings, S3Settings, Settings

RECIPES = Path(__file__).parents[2] / "recipes"
PATHS = sorted([*RECIPES.glob("*.yaml"), *RECIPES.glob("*/recipe.yaml")])
WITH_DCP = ("hyperpod/recipe", "large_model", "s3_compatible", "shared_filesystem", "single_node", "spot")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)(:-[^}]*)?\}")
_EXAMPLE = re.compile(r"\b([A-Z][A-Z0-9_]+)=([^\s,;]*[^\s,;.])")


def called(path: Path) -> str:
    """The recipe's name in test ids."""
    return path.relative_to(RECIPES).with_suffix("").as_posix()


def header(path: Path) -> str:
    """The comment that a recipe begins with, without what is for editors."""
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    above = "../" * (len(path.relative_to(RECIPES).parts) - 1)
    assert lines[0] == f"# yaml-language-server: $schema={above}sm_tiered.schema.json"
    return "\n".join(line.removeprefix("#").strip() for line in lines[1:first])


def scripts(path: Path) -> list[Path]:
    """What a recipe's header says is run with it."""
    named = [RECIPES / name for name in re.findall(r"\b[\w/]+\.py\b", header(path))]
    return [*named, RECIPES / "quickstart.py"] if "`make quickstart`" in header(path) else named


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A recipe's path, with the variables set that it, or its script, shows an example of, and no others."""
    path: Path = request.param
    for name in [*os.environ]:
        if name.startswith(("SM_TIERED", "QUICKSTART_")) or name in ("TRAINING_JOB_NAME", "CHECKPOINTS"):
            monkeypatch.delenv(name)
    shown = "\n".join([header(path), *(script.read_text().split('"""')[1] for script in scripts(path))])
    for name, example in _EXAMPLE.findall(shown):
        if name in {used for used, _ in _VARIABLE.findall(path.read_text())}:
            monkeypatch.setenv(name, example)
    return path


@pytest.mark.parametrize("documented", PATHS, ids=called, indirect=True)
def test_it_loads_with_the_environment_that_it_documents(documented: Path) -> None:
    recipe = Recipe.load(documented)
    assert recipe.warnings() == []
    settings = recipe.settings()
    assert settings.memory is not None
    assert settings.durable, "nothing would outlive the node"
    assert all(tier.save is not None for tier in settings.tiers)


@pytest.mark.parametrize("path", PATHS, ids=called)
def test_its_first_lines_say_what_it_is_for_and_what_runs_with_it(path: Path) -> None:
    assert re.match(r"[A-Z].{20,}[.:]", header(path)), "a sentence"
    assert scripts(path)
    for script in scripts(path):
        assert script.is_file(), script
    assert all(len(line) <= 120 for line in path.read_text().splitlines())


@pytest.mark.parametrize("stem", WITH_DCP)
def test_those_of_plain_dcp_say_when_to_use_them_and_name_every_variable(stem: str) -> None:
    path = RECIPES / f"{stem}.yaml"
    text = header(path)
    assert text.splitlines()[1].startswith("Use it ")
    assert "\nRun" in text
    for name, _ in _VARIABLE.findall(path.read_text()):
        assert re.search(rf"\b{name}\b", text[text.index("\nEnvironment") :]), name


def load(stem: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    """The settings of a recipe with an environment."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Recipe.load(RECIPES / f"{stem}.yaml").settings()


def test_a_single_node_can_save_to_s3_as_the_comment_says() -> None:
    text = (RECIPES / "single_node.yaml").read_text()
    place = text.index("  durable: #")
    told = text[text.index("  # durable:\n") :]
    assert all(line.startswith("  # ") for line in told.splitlines())
    in_s3 = Recipe.parse(text[:place] + told.replace("  # ", "  ")).settings()
    on_disk = Recipe.parse(text).settings()
    (s3,), (disk,) = in_s3.durable, on_disk.durable
    assert isinstance(s3, S3Settings)
    assert isinstance(disk, LocalSettings)
    assert (s3.save, s3.keep) == (disk.save, disk.keep)


def test_the_deadlines_of_spot_instances_fit_into_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load("spot", monkeypatch, CHECKPOINTS="s3://bucket/runs")
    assert settings.drain_timeout_secs <= 110
    (s3,) = settings.durable
    assert isinstance(s3, S3Settings)
    assert s3.request_timeout_secs < s3.retry_deadline_secs < settings.drain_timeout_secs
    memory, durable = (repr(tier.save) for tier in settings.tiers)
    assert "OnPreemption" in memory
    assert "OnPreemption" in durable


def test_the_numbers_of_the_large_model_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load("large_model", monkeypatch, CHECKPOINTS="s3://bucket/runs")
    gib, memory, (s3,) = 2**30, settings.memory, settings.durable
    assert isinstance(memory, MemorySettings)
    assert isinstance(s3, S3Settings)
    told = header(RECIPES / "large_model.yaml").replace("\n", " ")

    whole = 12 * 70e9
    node, rank = whole / 8, whole / 64
    assert f"12 bytes a parameter, 70e9 x 12 = {whole / gib:.0f} GiB; on 8 nodes {node / gib:.0f} GiB each" in told
    slots = settings.arena_slots
    assert f"({memory.generations} + 2) x {node / gib:.0f} GiB = {slots * round(node / gib)} GiB" in told
    assert memory.budget_bytes is not None
    assert slots * node <= memory.budget_bytes < 1.1 * slots * node
    assert f"{rank / gib:.1f} GiB, GPU to host. At 20 GiB/s that is {rank / gib / 20:.1f} s" in told
    assert f"{node / gib:.0f} GiB at the {s3.throughput_gbps:.0f} Gbit/s" in told
    drain = node * 8 / (s3.throughput_gbps * 1e9)
    assert f"take {drain:.0f} s" in told
    assert drain < 200 * 6, "durable saves every 200 steps of 6 s"
    parts = math.ceil(rank / s3.part_bytes)
    assert f"in parts of {s3.part_bytes // 2**20} MiB are {parts} of them, on 64 ranks {64 * parts:,}." in told
    assert f"In {drain:.0f} s that is {64 * parts / drain:.0f} a second" in told


def test_plain_http_is_taken_on_this_machine_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here = load("s3_compatible", monkeypatch, CHECKPOINTS="s3://bucket/runs", S3_ENDPOINT="http://127.0.0.1:9000")
    (store,) = here.durable
    assert isinstance(store, S3Settings)
    assert (store.endpoint_url, store.force_path_style, store.region) == ("http://127.0.0.1:9000", True, "us-east-1")
    with pytest.raises(RecipeError, match=r"endpoint_url: .*plain http leaves this machine.*allow_http: true"):
        load("s3_compatible", monkeypatch, S3_ENDPOINT="http://storage.example.com:9000")
