"""The page about HyperPod: its commands are ones that AWS knows, its figures and names are those of the files."""

from __future__ import annotations

import json
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import botocore.session
import pytest
import typer
import yaml
from botocore import xform_name
from botocore.validate import ParamValidator
from typer.testing import CliRunner

from sm_tiered.cli.app import app
from sm_tiered.errors import ConfigError, TierUnavailableError
from sm_tiered.policies.keep import Latest
from sm_tiered.recipe import Recipe
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_service import HyperPodService
from sm_tiered.tiers.s3_errors import classify
from tests.recipes.test_hyperpod_recipe import FOLDER, RECIPE, environment, gib

TEXT = (FOLDER / "README.md").read_text(encoding="utf-8")
GIB = 2**30


def blocks(kind: str) -> list[str]:
    """The code of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every command."""
    return [shlex.split(line) for text in blocks("bash") for line in text.splitlines()]


AWS = [words for words in commands() if words[0] == "aws"]


@pytest.mark.parametrize("words", AWS, ids=lambda words: " ".join(words[1:3]))
def test_what_it_asks_of_aws_is_an_operation_with_such_parameters(words: list[str]) -> None:
    service, operation = words[1].removesuffix("api"), words[2].replace("-", "_")
    model: Any = botocore.session.get_session().get_service_model(service)
    named = {xform_name(name): name for name in model.operation_names}
    shape = model.operation_model(named[operation]).input_shape
    members = {xform_name(name): name for name in shape.members}
    given = dict(zip(words[3::2], words[4::2], strict=True))
    query, _ = given.pop("--query", None), given.pop("--output", None)
    assert query is None or set(re.findall(r"\w+", query)) <= set(
        model.operation_model(named[operation]).output_shape.members
    )
    values: dict[str, object] = {}
    for option, text in given.items():
        name = members[option.removeprefix("--").replace("-", "_")]
        if text.startswith("file://"):
            text = (FOLDER / text.removeprefix("file://")).read_text()
            json.loads(text)
        values[name] = json.loads(text) if shape.members[name].type_name == "structure" else text
    report = ParamValidator().validate(values, shape)
    assert not report.has_errors(), report.generate_report()


def test_it_enables_and_shows_what_the_service_needs() -> None:
    (update,) = [words for words in AWS if "--tiered-storage-config" in words]
    config = json.loads(update[update.index("--tiered-storage-config") + 1])
    assert config == {"Mode": "Enable", "InstanceMemoryAllocationPercentage": 20}
    assert {words[0] for words in commands()} == {"aws", "kubectl"}
    assert ["kubectl", "apply", "-f", "job.yaml"] in commands()


def test_the_role_is_one_that_pods_can_take() -> None:
    (statement,) = json.loads((FOLDER / "trust_policy.json").read_text())["Statement"]
    assert statement["Principal"] == {"Service": "pods.eks.amazonaws.com"}
    assert statement["Action"] == ["sts:AssumeRole", "sts:TagSession"]
    asked = [words[2] for words in AWS]
    assert asked.index("create-role") < asked.index("put-role-policy") < asked.index("create-pod-identity-association")
    (addon,) = [words for words in AWS if words[2] == "create-addon"]
    assert addon[-2:] == ["--addon-name", "eks-pod-identity-agent"]


def test_no_bucket_s_own_policy_is_replaced_unseen() -> None:
    asked = [words[2] for words in AWS]
    assert asked.index("get-bucket-policy") + 1 == asked.index("put-bucket-policy")
    assert "`put-bucket-policy` replaces the whole policy" in TEXT


def inline() -> list[list[str]]:
    """Commands in the text; a name alone, as in "`sm-tiered ls` shows", is none."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    found = [shlex.split(text) for text in re.findall(r"`(sm-tiered [^`]+)`", prose)]
    return [words for words in found if len(words) > 2]


OURS = [words for words in (*commands(), *inline()) if "sm-tiered" in words]


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_our_commands_are_whole(words: list[str]) -> None:
    """None of them is run: their words are parsed, and what is missing or unknown is an error."""
    name, *arguments = words[words.index("sm-tiered") + 1 :]
    command = cast("Any", typer.main.get_command(app)).commands[name]
    given = command.make_context(name, arguments).params
    assert given["recipe"] == "/opt/recipes/hyperpod/recipe.yaml", "where the image has it"


def test_what_needs_the_environment_of_a_pod_is_run_in_one() -> None:
    run = [words for words in commands() if "sm-tiered" in words]
    assert len(run) >= 5
    for words in run:
        assert words[:4] == ["kubectl", "exec", "$POD", "--"], words
    imports = [words for words in run if "import" in words]
    assert any("--from-namespace" in words for words in imports)
    assert any("--from-namespace" not in words for words in imports)
    assert "the same as `TRAINING_JOB_NAME`" in " ".join(TEXT.split())


def test_it_is_said_alike_that_an_import_is_older_than_what_we_saved() -> None:
    told = CliRunner().invoke(app, ["import", "--help"], env={"COLUMNS": "200"}).stdout
    for text in (TEXT, told, (FOLDER.parent.parent / "README.md").read_text(encoding="utf-8")):
        assert "older than every save of ours" in " ".join(text.split())
        assert "before every save of ours" not in " ".join(text.split())


def messages() -> Iterator[str]:
    """What a compat script is told that makes the mistakes that the predecessor's documentation has."""
    from sm_tiered_dcp.compat import SageMakerCheckpointConfig, SageMakerTieredStorageWriter

    good = SageMakerCheckpointConfig(namespace="run", world_size=1)
    mistakes: list[Callable[[], object]] = [
        lambda: SageMakerCheckpointConfig(namespace="", world_size=1),
        lambda: SageMakerCheckpointConfig(namespace="run", world_size=1, s3_tier_base_path="my-bucket/checkpoints"),
        lambda: SageMakerTieredStorageWriter(checkpoint_config=good, path="some/where"),
    ]
    for mistake in mistakes:
        with pytest.raises(ConfigError) as told:
            mistake()
        yield str(told.value)


def silences(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What is said where nobody answers: at an address, and for a name that is none."""

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for url in ("http://127.0.0.1:9", "http://ai-toolkit.invalid:9200"):
        if "invalid" in url:
            monkeypatch.setattr(socket, "getaddrinfo", unknown)
        service = HyperPodService(HyperPodSettings(name="cluster", save=None, keep=Latest(n=3), url=url))
        with pytest.raises(TierUnavailableError) as told:
            service.describe("run")
        yield str(told.value)
        service.close()


def test_the_errors_that_it_quotes_are_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TEXT[TEXT.index("| there | here |") :]
    rows = [line for line in table.splitlines() if line.count("|") == 3]
    quoted = [text for line in rows for text in re.findall(r"`([^`]+)`", line) if " " in text]
    told = [*messages(), classify("ExpiredToken", 400)[1] or "", *silences(monkeypatch)]
    assert len(quoted) == 6
    for text in quoted:
        assert any(text in message for message in told), text


def test_the_files_that_it_names_are_there() -> None:
    names = set(re.findall(r"`([\w/.]+\.(?:yaml|json|py))`", TEXT)) | set(re.findall(r"file://(\S+)", TEXT))
    assert {"recipe.yaml", "job.yaml", "iam_policy.json", "bucket_policy.json", "trust_policy.json"} <= names
    for name in names:
        assert (FOLDER / name).is_file(), name


def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Those of the recipe in a pod."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return Recipe.load(RECIPE).settings()


def test_its_short_recipe_has_the_tiers_of_the_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Recipe.parse({"version": 1, "namespace": "x", **yaml.safe_load(blocks("yaml")[0])}).settings()
    long = settings(monkeypatch)
    assert [(tier.name, type(tier)) for tier in short.tiers] == [(tier.name, type(tier)) for tier in long.tiers]
    for one, other in zip(short.tiers, long.tiers, strict=True):
        assert repr(one.save) in repr(other.save)
    (cluster,) = [tier for tier in long.tiers if isinstance(tier, HyperPodSettings)]
    assert cluster.url in TEXT, "the address that it has when none is given"


def test_its_figures_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    told, long = " ".join(TEXT.split()), settings(monkeypatch)
    cluster = next(tier for tier in long.tiers if isinstance(tier, HyperPodSettings))
    whole, held = round(12 * 7e9 / GIB), cluster.most_kept + 2
    assert f"7B parameters with Adam in fp32 are {whole} GiB, so {held} × {whole} × 2 = {held * whole * 2} GiB" in told
    lent = 0.2 * 2 * 2048
    assert f"lend {lent:.0f} GiB at 20 %" in told
    assert held * whole * 2 < lent
    slots = long.arena_slots
    assert f"here {slots} × {whole // 2} GiB" in told
    assert slots * whole / 2 <= gib(environment()["MEMORY_BUDGET"]) < 1.1 * slots * whole / 2


def test_every_row_of_what_survives_tells_of_every_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TEXT[TEXT.index("## What survives what") :].split("\n\n")[2]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    names = [tier.name for tier in settings(monkeypatch).tiers]
    assert head == ["what happens", *names, "restored"]
    assert len(rows) >= 8
    for row in rows:
        left = [name for name, cell in zip(names, row[1:4], strict=True) if cell.startswith("stays")]
        if row[0] != "S3 does not answer":
            assert re.split(r"\W", row[4])[0] == left[0], row
