"""The stand-in for the HyperPod service: what it keeps, what it refuses, and what can be made to go wrong."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from sm_tiered.testing.contract import payload
from sm_tiered.testing.daemon import SMALL_STEPS, DaemonFault, StandInDaemon, shard_meta

MIB = 1024 * 1024
DATA = payload(3 * MIB + 5)


@pytest.fixture
def daemon() -> Iterator[StandInDaemon]:
    with StandInDaemon() as running:
        yield running


class Client(http.client.HTTPConnection):
    """One connection, kept open."""

    def ask(self, method: str, path: str, body: bytes | None = None, meta: str = "") -> tuple[int, bytes, str]:
        self.request(method, path, body, {"Shard-Meta": meta} if meta else {})
        answer = self.getresponse()
        return answer.status, answer.read(), answer.getheader("Shard-Meta", "")

    def put(self, step: int, data: bytes = DATA, rank: int = 0, namespace: str = "ns") -> int:
        return self.ask("POST", f"/v1/cp/checkpoints/{namespace}/{rank}/{step}", data, shard_meta(data))[0]

    def read(self, step: int, rank: int = 0) -> tuple[int, bytes, str]:
        return self.ask("GET", f"/v1/cp/checkpoints/ns/{rank}/{step}")


@pytest.fixture
def client(daemon: StandInDaemon) -> Iterator[Client]:
    with closing(Client(daemon.host, daemon.port, timeout=20)) as made:
        assert made.ask("POST", "/v1/cp/namespaces/ns?num_ranks=3&steps_retained=2")[0] == 200
        yield made


def test_a_namespace_is_made_once_and_tells_its_bounds(client: Client) -> None:
    assert client.ask("POST", "/v1/cp/namespaces/ns?num_ranks=9&steps_retained=9")[0] == 409
    status, body, _ = client.ask("GET", "/v1/cp/namespaces/ns")
    assert (status, json.loads(body)) == (200, {"num_ranks": 3, "steps_to_retain_per_rank": 2})
    assert client.ask("GET", "/v1/cp/namespaces/other")[0] == 404
    assert client.ask("DELETE", "/v1/cp/namespaces/ns")[0] == 200
    assert client.ask("DELETE", "/v1/cp/namespaces/ns")[0] == 404


@pytest.mark.parametrize("query", ["", "?num_ranks=0", "?num_ranks=x", "?num_ranks=2&steps_retained=0"])
def test_a_namespace_without_bounds_is_refused(client: Client, query: str) -> None:
    assert client.ask("POST", f"/v1/cp/namespaces/other{query}")[0] == 422


@pytest.mark.parametrize("data", [b"", b"x", DATA], ids=len)
def test_what_was_put_is_what_is_got(client: Client, daemon: StandInDaemon, data: bytes) -> None:
    assert client.put(7, data) == 200
    assert client.read(7) == (200, data, shard_meta(data))
    assert bytes(daemon.namespaces["ns"].blobs[0][7].data) == data
    assert client.ask("DELETE", "/v1/cp/checkpoints/ns/0/7")[0] == 200
    assert client.ask("DELETE", "/v1/cp/checkpoints/ns/0/7")[0] == client.read(7)[0] == 404
    assert [(request.method, request.size) for request in daemon.requests[1:3]] == [("POST", len(data)), ("GET", 0)]


def test_ranks_end_at_num_ranks(client: Client) -> None:
    assert client.put(1, rank=2) == 200
    assert client.put(1, rank=3) == 400
    assert client.put(1, namespace="other") == 404


def test_the_lowest_step_of_a_rank_is_dropped_even_when_it_is_the_newest(client: Client, daemon: StandInDaemon) -> None:
    for step in (100, 300, 200, 110):
        assert client.put(step, b"x") == 200
    assert daemon.namespaces["ns"].steps == {0: [200, 300]}
    assert daemon.dropped == [("ns", 0, 100), ("ns", 0, 110)]


def test_latest_has_a_step_of_which_any_rank_has_anything(client: Client) -> None:
    for rank, step in ((0, 10), (0, 20), (1, 30)):
        client.put(step, b"x", rank=rank)
    assert json.loads(client.ask("GET", "/v1/cp/checkpoints/ns/latest")[1]) == [30, 20, 10]
    assert json.loads(client.ask("GET", "/v1/cp/checkpoints/ns/latest?limit=2")[1]) == [30, 20]
    assert client.ask("GET", "/v1/cp/checkpoints/other/latest")[0] == 404


def test_reset_forgets_everything_by_whatever_path_it_is_spelt(client: Client, daemon: StandInDaemon) -> None:
    assert client.ask("POST", "/v1/cp/cluster/reset?num_ranks=2")[0] == 200
    assert daemon.namespaces == {}


@pytest.mark.parametrize(
    "path", ["/v1/cp/checkpoints/ns/-1/5", "/v1/cp/checkpoints/ns/0/x", "/v1/cp/checkpoints/ns/0/1e3"]
)
def test_a_rank_or_step_that_is_no_number_is_refused(client: Client, path: str) -> None:
    assert client.ask("POST", path, b"x")[0] == client.ask("GET", path)[0] == 422
    assert client.ask("GET", "/elsewhere")[0] == 404


def test_a_service_with_small_steps_refuses_large_ones(client: Client, daemon: StandInDaemon) -> None:
    assert client.put(2**40, b"x") == 200
    daemon.memory.max_step = SMALL_STEPS
    assert client.put(2**31, b"x") == 400
    assert client.put(2**31 - 1, b"x") == 200


def test_where_bodies_are_thrown_away_the_first_mib_is_kept(client: Client, daemon: StandInDaemon) -> None:
    daemon.discard = True
    assert client.put(1) == 200
    assert len(daemon.namespaces["ns"].blobs[0][1].data) == MIB
    assert client.put(2, b"small") == 200
    assert client.read(1)[1] == DATA[:MIB] + bytes(len(DATA) - MIB)
    assert client.read(2)[1] == b"small"


# What can be made to go wrong


def test_a_fault_strikes_the_requests_it_is_about_and_no_other(client: Client, daemon: StandInDaemon) -> None:
    daemon.restart(DaemonFault(kind="status", method="POST", path=r"/0/\d+$", first=2, times=2, status=507))
    assert [client.put(1), client.put(1, rank=1), client.put(2), client.put(2), client.put(2)] == [
        200,
        200,
        507,
        507,
        200,
    ]
    assert [request.path[-3:] for request in daemon.fired] == ["0/2", "0/2"]
    assert client.read(2)[0] == 200
    daemon.restart(DaemonFault(kind="status", status=307, headers=(("Location", "http://127.0.0.1:1/"),)))
    client.request("GET", "/v1/cp/namespaces/ns")
    answer = client.getresponse()
    assert (answer.status, answer.getheader("Location"), answer.read()) == (307, "http://127.0.0.1:1/", b"injected")


@pytest.mark.parametrize("at", [0, 1, 2 * MIB])
def test_a_put_that_is_cut_short_stores_nothing(client: Client, daemon: StandInDaemon, at: int) -> None:
    daemon.restart(DaemonFault(kind="reset", method="POST", at=at))
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on how far the client had got
        client.put(1)
    daemon.restart()
    with closing(Client(daemon.host, daemon.port)) as other:
        assert other.read(1)[0] == 404
        other.putrequest("POST", "/v1/cp/checkpoints/ns/0/1")
        other.putheader("Content-Length", "1000")
        other.endheaders(b"x" * 999)
    with closing(Client(daemon.host, daemon.port)) as other:
        assert other.read(1)[0] == 404


def test_an_answer_can_end_in_the_middle(client: Client, daemon: StandInDaemon) -> None:
    client.put(1)
    daemon.restart(DaemonFault(kind="reset", method="GET", at=1000))
    with pytest.raises((OSError, http.client.IncompleteRead)):
        client.read(1)


def test_a_blob_can_be_short_and_still_look_whole(client: Client, daemon: StandInDaemon) -> None:
    client.put(1)
    daemon.restart(
        DaemonFault(kind="cut", at=1000, times=1),
        DaemonFault(kind="cut", first=2, times=1, sealed=True),
        DaemonFault(kind="flip", first=3, at=8001),
    )
    assert client.read(1) == (200, DATA[:1000], shard_meta(DATA))
    assert client.read(1) == (200, b"", shard_meta(b""))
    status, data, meta = client.read(1)
    assert (status, meta, data[1000] ^ DATA[1000]) == (200, shard_meta(DATA), 2)
    assert data[:1000] + data[1001:] == DATA[:1000] + DATA[1001:]
    daemon.restart()
    assert client.read(1)[1] == DATA


def test_what_is_stored_can_rot(client: Client, daemon: StandInDaemon) -> None:
    client.put(1)
    daemon.flip("ns", 0, 1, 8003)
    assert client.read(1)[1][1000] ^ DATA[1000] == 8
    daemon.restart(DaemonFault(kind="meta", text="{}"))
    assert client.read(1)[2] == "{}"


def test_a_lost_answer_was_done_all_the_same(client: Client, daemon: StandInDaemon) -> None:
    daemon.restart(DaemonFault(kind="ack_lost", times=1))
    with pytest.raises((OSError, http.client.HTTPException)):
        client.put(1)
    assert daemon.namespaces["ns"].steps == {0: [1]}


def test_a_request_that_hangs_ends_with_the_service(client: Client, daemon: StandInDaemon) -> None:
    daemon.restart(DaemonFault(kind="hang"))
    ending = threading.Timer(0.2, daemon.__exit__)
    ending.start()
    with pytest.raises((OSError, http.client.HTTPException)):
        client.read(1)
    ending.join()


def test_a_request_can_be_late(client: Client, daemon: StandInDaemon) -> None:
    daemon.latency_secs = 0.1
    daemon.restart(DaemonFault(kind="late", secs=0.1, times=1))
    began = time.monotonic()
    assert client.put(1, b"x") == 200
    assert time.monotonic() - began >= 0.2


def test_left_and_entered_again_it_keeps_its_port_and_its_blobs(client: Client, daemon: StandInDaemon) -> None:
    client.put(1, b"x")
    daemon.__exit__()
    with pytest.raises((OSError, http.client.HTTPException)):
        client.read(1)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        client.read(1)
    client.close()
    with daemon:
        assert client.read(1)[:2] == (200, b"x")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.com", ""])
def test_it_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(ValueError, match="is not loopback"):
        StandInDaemon(host=host)


def test_as_a_program_it_prints_its_address_and_ends_on_sigterm() -> None:
    command = [sys.executable, "-m", "sm_tiered.testing.daemon", "--port", "0", "--small-steps"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        host, port = program.stdout.readline().strip().removeprefix("http://").split(":")
        with closing(Client(host, int(port))) as client:
            assert client.ask("POST", "/v1/cp/namespaces/ns?num_ranks=1")[0] == 200
            assert client.put(2**31, b"x") == 400
        os.kill(program.pid, signal.SIGTERM)
        assert program.wait(20) == 0
    refused = subprocess.run([*command, "--host", "0.0.0.0"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "loopback" in refused.stderr
