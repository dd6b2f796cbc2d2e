"""The client of the HyperPod service: what no name, rank or address can spell."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sm_tiered.errors import (
    ConfigError,
)
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_service import HyperPodService, Namespace, Slot
from tests.unit.hyperpod_sharing import FIRST, at, bare, read, save, settings


@pytest.fixture
def service(daemon: StandInDaemon) -> Iterator[HyperPodService]:
    service = HyperPodService(settings(daemon.url))
    yield service
    service.close()


NAMES = [
    "..", "../cluster/reset", "../cluster/reset?", "%2e%2e", "a/b", "a?b", "a#b", "a b", "a\nb", "a\r\nX: y", "", "ä",
    "a" * 137, "-a", "a\x00",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_could_spell_another_call_sends_nothing(
    daemon: StandInDaemon, service: HyperPodService, name: str
) -> None:
    calls: list[Callable[[], object]] = [
        lambda: service.describe(name),
        lambda: service.create(name, ranks=2, kept=3),
        lambda: service.remove(name),
        lambda: service.latest(Namespace(name=name, ranks=2, kept=3)),
        lambda: service.put_small(Slot(namespace=name, rank=0, wire=0), b"x"),
        lambda: service.open(Slot(namespace=name, rank=0, wire=0)),
        lambda: service.delete(Slot(namespace=name, rank=0, wire=0)),
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError):
        bare(daemon.url, name)
    assert daemon.requests == []


@pytest.mark.parametrize("value", [-1, 2**53, 10**30, "1", "../../cluster/reset", 1.0, True, None])
@pytest.mark.parametrize("field", ["rank", "wire"])
def test_a_rank_or_step_that_is_no_bounded_integer_sends_nothing(
    daemon: StandInDaemon, service: HyperPodService, field: str, value: object
) -> None:
    given: dict[str, Any] = {"namespace": "run", "rank": 0, "wire": 0, field: value}
    slot = Slot(**given)
    for call in (lambda: service.put_small(slot, b"x"), lambda: service.open(slot), lambda: service.delete(slot)):
        with pytest.raises(ConfigError):
            call()
    assert daemon.requests == []


def test_all_that_is_ever_asked_for_has_one_of_three_forms(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 2, 100)
    tier.list("")
    read(tier, at(FIRST, 10), "__0_0.distcp", 100)
    tier.probe()
    tier.drop(at(FIRST, 10))
    tier.close()
    form = re.compile(
        r"/v1/cp/(namespaces/[\w-]+(\?num_ranks=\d+&steps_retained=\d+)?"
        r"|checkpoints/[\w-]+/(\d+/\d+|latest\?limit=\d+))",
        re.ASCII,
    )
    assert [request.path for request in daemon.requests if not form.fullmatch(request.path)] == []
    assert len(daemon.requests) > 10


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://user:secret@127.0.0.1:1", "127.0.0.1:9200", "http://127.0.0.1:1/path"]
)
def test_an_address_that_is_none_is_refused_and_no_secret_repeated(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HyperPodTier(settings(url), "run")
    assert "secret" not in str(caught.value)


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="there is nothing to ask for here")
def test_the_head_of_each_answer_is_acknowledged_at_once(
    daemon: StandInDaemon, service: HyperPodService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that waits for that before it sends the rest would take 40 ms for each small answer."""
    asked: list[tuple[int, ...]] = []
    real = socket.socket.setsockopt

    def told(one: socket.socket, *options: int) -> None:
        asked.append(options)
        real(one, *options)

    monkeypatch.setattr(socket.socket, "setsockopt", told)
    for _ in range(3):
        assert service.describe("run") is None
    assert asked.count((socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)) == 3
    assert len(daemon.requests) == 3
