"""Connections to the HyperPod service: absent, silent, broken off, repeated, and none left open."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from sm_tiered import deadline
from sm_tiered.errors import (
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.inventory import list_checkpoints, read_holding
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.wrappers import Retry
from tests.unit.children import in_child
from tests.unit.hyperpod_sharing import FIRST, MIB, at, bare, data_of, read, save, settings, share

# ---- a service that is not there


def _closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_a_service_that_refuses_connections_says_what_to_enable() -> None:
    tier = bare(f"http://127.0.0.1:{_closed_port()}")
    for call in (tier.probe, lambda: tier.list(""), lambda: tier.put_share(share(at(FIRST, 10), 0, 1, 100))):
        with pytest.raises(TierUnavailableError, match="refuses connections") as caught:
            call()
        assert "TieredStorageConfig {Mode: Enable}" in (caught.value.hint or "")
        assert "out of the recipe" in (caught.value.hint or "")
    tier.close()


def test_a_name_that_nobody_knows_says_what_to_enable() -> None:
    tier = bare("http://ai-toolkit-gossip-headless.invalid:9200")
    with pytest.raises(TierUnavailableError, match="(its name is not known|no connection in time)") as caught:
        tier.probe()
    assert "TieredStorageConfig {Mode: Enable}" in (caught.value.hint or "")
    tier.close()


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_connect_timeout_holds_whatever_resolving_and_connecting_do(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A resolver may wait for minutes, and a name may have hundreds of addresses."""
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: never.wait(60) or [])
    tier = bare(f"{scheme}://somewhere.example:9200", connect_timeout_secs=0.3)
    try:
        with pytest.raises(TierUnavailableError, match="no connection in time"):
            tier.probe()
    finally:
        never.set()
        tier.close()


def test_what_never_answers_is_given_up_in_time(daemon: StandInDaemon) -> None:
    tier = open_tier(settings(daemon.url, request_timeout_secs=0.2, retry_attempts=2, retry_deadline_secs=5.0), "run")
    daemon.restart(DaemonFault(kind="hang"))
    with pytest.raises(TierUnavailableError, match="gave up after 2 tries"):
        tier.list_dirs("")
    tier.close()


def test_an_outer_deadline_is_respected(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url, request_timeout_secs=60.0)
    daemon.restart(DaemonFault(kind="hang"))
    with deadline.within(0.3), pytest.raises(TierUnavailableError):
        tier.list_dirs("")
    tier.close()


# ---- retries, connections, environment


@pytest.mark.parametrize(
    "fault",
    [
        DaemonFault(kind="status", status=503, times=1),
        DaemonFault(kind="status", status=500, method="POST", times=1),
        DaemonFault(kind="reset", method="POST", path="/checkpoints/run/0/10000000010", at=1000, times=1),
        DaemonFault(kind="ack_lost", method="POST", path="/checkpoints/run/0/10000000010", times=1),
        DaemonFault(kind="ack_lost", method="POST", path="/namespaces/", times=1),
        DaemonFault(kind="reset", method="GET", path="/latest", times=1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.method}",
)
def test_what_fails_once_is_repeated(daemon: StandInDaemon, fault: DaemonFault) -> None:
    told: list[Retry] = []
    tier = open_tier(settings(daemon.url), "run", on_retry=told.append)
    daemon.restart(fault)
    tier.put_share(share(at(FIRST, 10), 0, 1, 100_000))  # type: ignore[attr-defined]
    assert [(one.tier, one.operation) for one in told] == [("cluster", "put_share")]
    assert len(daemon.fired) == 1
    assert read_holding(tier, at(FIRST, 10), durable=True).problem is None
    tier.close()


def test_reads_that_break_off_are_repeated(daemon: StandInDaemon) -> None:
    told: list[Retry] = []
    tier = open_tier(settings(daemon.url), "run", on_retry=told.append)
    tier.put_share(share(at(FIRST, 10), 0, 1, 9 * MIB))  # type: ignore[attr-defined]
    list_checkpoints(tier)
    daemon.restart(DaemonFault(kind="reset", method="GET", path="/0/10000000010", at=5 * MIB, times=1))
    assert read(tier, at(FIRST, 10), "__0_0.distcp", 9 * MIB) == data_of(10, 0, 0, 9 * MIB)  # type: ignore[arg-type]
    assert [one.operation for one in told] == ["read_into"]
    tier.close()


def test_what_a_retry_would_not_change_is_not_repeated(daemon: StandInDaemon) -> None:
    tier = open_tier(settings(daemon.url), "run")
    daemon.restart(DaemonFault(kind="status", status=403))
    with pytest.raises(TierRefusedError):
        tier.list_dirs("")
    paths = [request.path for request in daemon.requests]
    assert 1 <= len(paths) == len(set(paths))
    tier.close()


def _sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


def test_forty_saves_leave_no_more_sockets_than_two() -> None:
    from tests.unit.hyperpod_serving import daemon_in_child

    with daemon_in_child() as url:
        tier, counts = bare(url), list[int]()
        for step in range(1, 41):
            save(tier, at(FIRST, step), 2, 1000)
            assert read_holding(tier, at(FIRST, step), durable=True).problem is None
            read(tier, at(FIRST, step), "__1_0.distcp", 500)
            if step > 2:
                tier.drop(at(FIRST, step - 2))
            counts.append(_sockets())
        tier.close()
        assert max(counts[2:]) <= counts[1] + 4  # four shares that were read last stay open
        assert _sockets() < counts[0]


def test_proxies_of_the_environment_are_not_for_us(daemon: StandInDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{_closed_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 100)
    assert read_holding(tier, at(FIRST, 10), durable=True).problem is None
    tier.close()


def test_a_child_does_not_wait_for_what_its_parent_held(daemon: StandInDaemon) -> None:
    """It may have been forked while another thread had the lock, and that thread is not in it."""
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 1000)

    def child() -> None:
        done = threading.Thread(target=lambda: tier.list_dirs(""), daemon=True)
        done.start()
        done.join(20)
        assert not done.is_alive()

    with tier._service._http._lock:
        assert in_child(child) == 0
    tier.close()


def test_a_closed_tier_can_be_used_again(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 1000)
    for _ in range(3):
        tier.close()
    assert read(tier, at(FIRST, 10), "__0_0.distcp", 1000) == data_of(10, 0, 0, 1000)
    tier.close()


# ---- probe


def test_probe_passes_and_leaves_nothing(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url)
    tier.probe()
    assert daemon.namespaces == {}
    tier.close()


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (DaemonFault(kind="flip", method="GET", path=r"/0/\d+$", at=9), "something else than was written"),
        (DaemonFault(kind="cut", method="GET", path=r"/0/\d+$", at=9), "something else than was written"),
        (DaemonFault(kind="status", path="/latest", status=200, text="[]"), "does not list it"),
        (DaemonFault(kind="status", method="POST", status=405), "405"),
    ],
)
def test_probe_finds_a_service_that_is_none(daemon: StandInDaemon, fault: DaemonFault, match: str) -> None:
    tier = bare(daemon.url)
    daemon.restart(fault)
    with pytest.raises(TierRefusedError, match=match):
        tier.probe()
    assert daemon.namespaces == {}
    tier.close()
