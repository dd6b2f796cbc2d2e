"""`sm-tiered doctor` on the cluster's checkpoint service: there, absent, refusing, slow, or something else entirely."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from sm_tiered.cli import doctor_cluster
from sm_tiered.errors import ConfigError
from sm_tiered.testing.daemon import SMALL_STEPS, DaemonFault, StandInDaemon
from sm_tiered.testing.daemon_memory import StoredBlob
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    cluster_tier,
    write_attempt,
    write_checkpoint,
    write_recipe,
)

HTML = "<html><body>It works!</body></html>"
LOOKED_AT = ("address", "service", "namespace", "writing")

pytestmark = pytest.mark.usefixtures("plain_terminal")
Found = Callable[..., dict[str, Any]]


@pytest.fixture
def service() -> Iterator[StandInDaemon]:
    with StandInDaemon() as running:
        yield running


@pytest.fixture
def found(tmp_path: Path, run: Callable[..., Result]) -> Found:
    """What doctor finds of a service at an address, by check."""

    def look(url: str, *, ok: bool = True, more: str = "") -> dict[str, Any]:
        recipe = write_recipe(tmp_path, cluster=url)
        recipe.write_text(recipe.read_text().replace("kind: hyperpod,", f"kind: hyperpod,{more}"))
        result = run("doctor", recipe, "--json")
        document = json.loads(result.stdout)
        assert (result.exit_code, document["ok"]) == ((0, True) if ok else (1, False)), result.output
        return {each["check"]: each for each in document["findings"] if each["area"] == "cluster"}

    return look


def bad(checks: dict[str, Any]) -> Any:
    """The one check that fails, which is the last."""
    (failed,) = [each for each in checks.values() if each["level"] == "fail"]
    assert failed is [*checks.values()][-1]
    return failed


def test_an_empty_service_is_all_right_and_stays_empty(service: StandInDaemon, found: Found) -> None:
    checks = found(service.url)
    assert tuple(checks) == LOOKED_AT
    assert {each["level"] for each in checks.values()} == {"ok"}
    assert checks["address"]["text"] == service.url
    assert "with room for 6 steps a rank" in checks["namespace"]["text"]
    assert " ms" in checks["service"]["text"]
    assert service.namespaces == {}, "it takes its probe away"
    assert not any("reset" in request.path for request in service.requests)


def test_a_name_is_told_with_where_it_leads(service: StandInDaemon, found: Found) -> None:
    checks = found(f"http://localhost:{service.port}")
    assert checks["address"]["text"].startswith(f"http://localhost:{service.port} is ")


def test_what_the_namespace_has_is_told(service: StandInDaemon, found: Found) -> None:
    tier = cluster_tier(service.url)
    write_attempt(tier, 1)
    for step in (10, 20):
        write_checkpoint(tier, checkpoint(step), durable=True)
    tier.close()
    checks = found(service.url)
    assert checks["namespace"]["text"] == f"{NAMESPACE} has 4 slots, for up to 3 ranks, and keeps 6 steps of each"
    assert checks["checkpoints"]["text"] == "2 there, the newest is step 20"
    assert {each["level"] for each in checks.values()} == {"ok"}


def test_a_namespace_with_too_little_room_gets_one_beside_it(service: StandInDaemon, found: Found) -> None:
    service.memory.create(NAMESPACE, {"num_ranks": "3", "steps_retained": "3"})
    checks = found(service.url)
    assert "keeps 3 steps of each; that is less than 6 steps a rank" in checks["namespace"]["text"]
    assert f"Saves go to {NAMESPACE}__2, both are read" in checks["namespace"]["text"]
    assert "a namespace of its own" in checks["namespace"]["fix"]
    tier = cluster_tier(service.url)
    write_attempt(tier, 1)
    write_checkpoint(tier, checkpoint(10), durable=True)
    tier.close()
    assert f"{NAMESPACE}__2" in service.namespaces, "as it said"
    assert found(service.url)["checkpoints"]["text"] == "1 there, the newest is step 10"


def test_steps_of_another_program_are_told_and_stay(service: StandInDaemon, found: Found) -> None:
    service.memory.create(NAMESPACE, {"num_ranks": "3", "steps_retained": "6"})
    for rank in range(3):
        service.memory.put(NAMESPACE, rank, 150, StoredBlob(bytearray(b"a torch.save stream"), 19, ""))
    checks = found(service.url)
    assert checks["other steps"]["level"] == "warn"
    assert "of another program: 150" in checks["other steps"]["text"]
    assert "`sm-tiered import`" in checks["other steps"]["fix"]
    assert service.namespaces[NAMESPACE].blobs[0].keys() == {150}


def test_a_step_of_another_program_that_we_have_too_is_told(service: StandInDaemon, found: Found) -> None:
    service.memory.create(NAMESPACE, {"num_ranks": "3", "steps_retained": "6"})
    service.memory.put(NAMESPACE, 0, 20, StoredBlob(bytearray(b"a torch.save stream"), 19, ""))
    tier = cluster_tier(service.url)
    write_attempt(tier, 1)
    write_checkpoint(tier, checkpoint(20), durable=True)
    tier.close()
    checks = found(service.url)
    assert checks["checkpoints"]["text"] == "1 there, the newest is step 20"
    assert checks["other steps"]["text"] == f"{NAMESPACE} has steps of another program: 20"


@pytest.mark.parametrize("small", [False, True])
def test_our_own_steps_are_nobody_else_s(service: StandInDaemon, found: Found, small: bool) -> None:
    if small:
        service.memory.max_step = SMALL_STEPS
    tier = cluster_tier(service.url)
    write_attempt(tier, 1)
    write_checkpoint(tier, checkpoint(20), durable=True)
    tier.close()
    assert "other steps" not in found(service.url)


def test_a_service_that_counts_in_32_bits_is_all_right(service: StandInDaemon, found: Found) -> None:
    service.memory.max_step = SMALL_STEPS
    assert {each["level"] for each in found(service.url).values()} == {"ok"}


# ---- what is wrong


def test_absent_it_says_what_to_enable(found: Found) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        failed = bad(found(f"http://127.0.0.1:{free.getsockname()[1]}", ok=False))
    assert failed["check"] == "service"
    assert "it refuses connections" in failed["text"]
    assert failed["text"].endswith("saves and restores go on without it")
    assert "aws sagemaker update-cluster" in failed["fix"]
    assert "run this in a pod" in failed["fix"]


def test_a_name_that_is_not_known_is_told_as_that(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    failed = bad(found("http://ai-toolkit.invalid:9200", ok=False, more=" unreachable: raise,"))
    assert (failed["check"], failed["text"]) == (
        "address",
        "http://ai-toolkit.invalid:9200: its name is not known here",
    )
    assert "--tiered-storage-config Mode=Enable" in failed["fix"]


@pytest.mark.parametrize(
    ("fault", "check", "words", "fix"),
    [
        (DaemonFault(kind="status", status=403, text="no"), "service", "403 'no'", "Leave the tier's `url` out"),
        (DaemonFault(kind="status", status=200, text=HTML), "service", "is no JSON", "Leave the tier's `url` out"),
        (
            DaemonFault(kind="status", status=302, headers=(("Location", "http://127.0.0.1:1/"),)),
            "service",
            "302",
            "Leave the tier's `url` out",
        ),
        (DaemonFault(kind="status", status=503), "service", "503", "ai-toolkit"),
        (DaemonFault(kind="reset", at=0), "service", "no whole answer", "ai-toolkit"),
        (DaemonFault(kind="hang"), "service", "no whole answer", "ai-toolkit"),
        (DaemonFault(kind="status", status=507, method="POST"), "writing", "507", "Keep fewer checkpoints"),
        (DaemonFault(kind="flip", at=9, method="GET", path="/0/"), "writing", "than was written", "Leave the tier"),
    ],
    ids=["refuses", "html", "redirect", "down", "resets", "hangs", "full", "flips"],
)
def test_what_is_wrong_is_told_with_what_to_do(
    service: StandInDaemon, found: Found, fault: DaemonFault, check: str, words: str, fix: str
) -> None:
    service.restart(fault)
    failed = bad(found(service.url, ok=False))
    assert failed["check"] == check
    assert words in failed["text"]
    assert fix in failed["fix"]
    assert "\n" not in failed["text"]


def test_what_the_error_itself_says_to_do_is_told(service: StandInDaemon, found: Found) -> None:
    service.restart(DaemonFault(kind="status", status=403, text="no"))
    assert "without a proxy before it" in bad(found(service.url, ok=False))["fix"]


def test_slow_answers_are_a_warning(service: StandInDaemon, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_cluster, "_SLOW_SECS", 0.0)
    checks = found(service.url)
    assert checks["service"]["level"] == "warn"
    assert "another cluster's" in checks["service"]["fix"]


def test_it_is_never_asked_with_what_a_recipe_may_not_say(tmp_path: Path, run: Callable[..., Result]) -> None:
    recipe = write_recipe(tmp_path, cluster="http://user:pass@127.0.0.1:9200")
    result = run("doctor", recipe)
    assert result.exit_code == 2
    assert "pass@" not in result.output
    assert ConfigError.__name__ not in result.output


def test_people_are_told_the_same(service: StandInDaemon, tmp_path: Path, run: Callable[..., Result]) -> None:
    result = run("doctor", write_recipe(tmp_path, cluster=service.url))
    assert result.exit_code == 0
    for check in LOOKED_AT:
        assert f"ok  {check}" in result.stdout
