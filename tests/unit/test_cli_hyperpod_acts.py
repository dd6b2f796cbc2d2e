"""The commands that change something, on a recipe with the cluster's memory between a node's memory and a directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from sm_tiered import layout
from sm_tiered.inventory import list_checkpoints, read_holding
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.base import Tier
from tests.unit.acting import names_of
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    cluster_tier,
    local_tier,
    memory_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

pytestmark = pytest.mark.usefixtures("plain_terminal")
Run = Callable[..., Result]


@pytest.fixture
def service() -> Iterator[StandInDaemon]:
    with StandInDaemon() as running:
        yield running


@pytest.fixture
def cluster(service: StandInDaemon) -> Iterator[Tier]:
    """The cluster's memory, with steps 10 to 50 of two ranks: two more than its policy keeps."""
    tier = cluster_tier(service.url)
    write_attempt(tier, 1)
    for step in (10, 20, 30, 40, 50):
        write_checkpoint(tier, checkpoint(step), durable=True, saved_at=1e9 + step)
    yield tier
    tier.close()


@pytest.fixture
def local(tmp_path: Path) -> Tier:
    tier = local_tier(tmp_path / "local")
    write_attempt(tier, 1)
    write_checkpoint(tier, checkpoint(20), durable=True, saved_at=1e9 + 20)
    return tier


@pytest.fixture
def recipe(tmp_path: Path, memory_dir: Path, service: StandInDaemon, cluster: Tier, local: Tier) -> Path:
    (memory_dir / NAMESPACE).mkdir(mode=0o700)
    memory = memory_tier(memory_dir)
    write_attempt(memory, 1)
    write_checkpoint(memory, checkpoint(60), durable=False, replica=False)
    return write_recipe(tmp_path, memory=memory_dir, cluster=service.url, local=tmp_path / "local")


def steps(tier: Tier) -> list[int]:
    """The steps that are committed there."""
    return [c.step for c in list_checkpoints(tier) if read_holding(tier, c, durable=True).problem is None]


def document(result: Result, status: int = 0) -> Any:
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


# ---- pins


def test_it_keeps_no_pins_and_says_where_they_belong(recipe: Path, run: Run, cluster: Tier, local: Tier) -> None:
    refused = run("pin", recipe, "--step", 20, "--tier", "cluster")
    assert refused.exit_code == 2
    assert "--tier: cluster can't keep a pin" in refused.stderr
    assert "What shall stay belongs on local." in refused.stderr
    pinned = document(run("pin", recipe, "--step", 20, "--json"))
    assert [(row["tier"], row["state"]) for row in pinned["pins"]] == [("local", "pinned")]
    assert [row["tier"] for row in document(run("pin", recipe, "--json"))["pins"]] == ["local"]
    only_there = run("pin", recipe, "--step", 50)
    assert only_there.exit_code == 1
    assert "step 50 is in cluster and on no tier that keeps pins" in only_there.stderr
    assert "`sm-tiered promote … --step 50 --pin`" in only_there.stderr
    in_memory = run("pin", recipe, "--step", 60)
    assert "step 60 is in memory and on no tier that keeps pins" in in_memory.stderr


def test_a_recipe_without_another_tier_is_told_to_add_one(tmp_path: Path, service: StandInDaemon, run: Run) -> None:
    refused = run("pin", write_recipe(tmp_path, cluster=service.url))
    assert refused.exit_code == 2
    assert "Add a tier for what shall stay" in refused.stderr


def test_promote_refuses_to_pin_there_before_anything_is_done(recipe: Path, run: Run, cluster: Tier) -> None:
    refused = run("promote", recipe, "--step", 60, "--to", "cluster", "--pin")
    assert refused.exit_code == 2
    assert "--pin: cluster can't keep a pin" in refused.stderr
    assert 60 not in steps(cluster)


# ---- moving


@pytest.mark.timeout(120)
def test_the_drainer_promotes_from_memory_to_it(recipe: Path, run: Run, cluster: Tier) -> None:
    done = document(run("promote", recipe, "--step", 60, "--to", "cluster", "--timeout", 60, "--json"))
    assert (done["from"], done["to"], done["by"], done["ok"]) == ("memory", "cluster", "drainer", True)
    assert 60 in steps(cluster)
    again = document(run("promote", recipe, "--step", 60, "--to", "cluster", "--json"))
    assert again["by"] == "nothing"


def test_from_there_it_goes_to_a_lasting_tier_with_what_other_readers_need(
    recipe: Path, run: Run, local: Tier, tmp_path: Path
) -> None:
    done = document(run("promote", recipe, "--step", 50, "--to", "local", "--pin", "--json"))
    assert (done["from"], done["by"], done["pinned"]) == ("cluster", "copy", True)
    assert steps(local) == [20, 50]
    assert {layout.INDEX, layout.METADATA, layout.MANIFEST} <= set(names_of(local, checkpoint(50)))
    copied = document(run("copy", recipe, "--step", 40, "--from", "cluster", "--to", "local", "--json"))
    assert copied["ok"] is True
    assert steps(local) == [20, 40, 50]
    assert document(run("verify", recipe, "--tier", "local", "--json"))["errors"] == {}


def test_copies_go_there_also_into_another_namespace_and_not_onto_themselves(
    recipe: Path, run: Run, cluster: Tier, local: Tier, service: StandInDaemon
) -> None:
    onto = run("copy", recipe, "--all", "--from", "cluster", "--to", "cluster")
    assert onto.exit_code == 2
    assert "can't be copied onto itself" in onto.stderr
    write_checkpoint(local, checkpoint(25), durable=True)
    for step, already in ((20, True), (25, False), (25, True)):
        there = document(run("copy", recipe, "--step", step, "--from", "local", "--to", "cluster", "--json"))
        assert [each["already"] for each in there["checkpoints"]] == [already]
    assert 25 in steps(cluster)
    other = ("--from", "cluster", "--to", "cluster", "--namespace", "run-2")
    assert document(run("copy", recipe, "--step", 50, *other, "--json"))["ok"] is True
    tier = cluster_tier(service.url, namespace="run-2")
    assert steps(tier) == [50]
    tier.close()


def test_a_damaged_share_is_not_copied(recipe: Path, run: Run, service: StandInDaemon, local: Tier) -> None:
    blob = service.namespaces[NAMESPACE].blobs[1][10**10 + 50]
    service.flip(NAMESPACE, 1, 10**10 + 50, 8 * blob.size - 3)
    result = run("copy", recipe, "--step", 50, "--from", "cluster", "--to", "local")
    assert result.exit_code == 3
    assert steps(local) == [20]


# ---- retention


def test_prune_keeps_what_its_policy_keeps(recipe: Path, run: Run, cluster: Tier, service: StandInDaemon) -> None:
    told = document(run("prune", recipe, "--tier", "cluster", "--json"))
    (tier,) = told["tiers"]
    assert [each["step"] for each in tier["delete"]] == [10, 20]
    assert tier["freed_bytes"] > 4 * 4096
    assert steps(cluster) == [10, 20, 30, 40, 50]
    done = document(run("prune", recipe, "--tier", "cluster", "--yes", "--json"))
    assert [each["step"] for each in done["tiers"][0]["deleted"]] == [10, 20]
    assert steps(cluster) == [30, 40, 50]
    assert {wire % 10**10 for wire in service.namespaces[NAMESPACE].blobs[0]} == {30, 40, 50}
    assert not any("reset" in request.path for request in service.requests)
