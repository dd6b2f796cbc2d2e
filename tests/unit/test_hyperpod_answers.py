"""Answers of the HyperPod service that are none: each ends in an error of ours, in time, and none is believed."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sm_tiered import deadline, layout
from sm_tiered.errors import (
    CorruptPartError,
    KeyNotFoundError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.inventory import read_holding
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from tests.unit.hyperpod_sharing import FIRST, WIRE, at, bare, data_of, read, save, settings, share


@pytest.fixture
def service(daemon: StandInDaemon) -> Iterator[HyperPodService]:
    service = HyperPodService(settings(daemon.url))
    yield service
    service.close()


@contextmanager
def answering(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve *answer* to every GET, whatever HTTP it makes of it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.mark.parametrize(
    "text",
    ['["1"]', "[-1]", f"[{10**30}]", "{}", "null", '"../x"', "[1.5]", "[true]", "[[1]]", "nonsense", "", "[" * 100_000,
     "NaN", "[1," + " " * 2_000_000 + "2]"],
)  # fmt: skip
def test_a_listing_that_is_none_is_refused(daemon: StandInDaemon, text: str) -> None:
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 100)
    daemon.restart(DaemonFault(kind="status", path="/latest", status=200, text=text))
    for call in (lambda: tier.list_dirs(""), lambda: tier.list("")):
        with pytest.raises(TierRefusedError, match="a strange answer"):
            call()
    tier.close()


@pytest.mark.parametrize(
    "facts",
    [
        {}, [], 5, {"num_ranks": 3}, {"num_ranks": "3", "steps_to_retain_per_rank": 5},
        {"num_ranks": -1, "steps_to_retain_per_rank": 5}, {"num_ranks": 10**30, "steps_to_retain_per_rank": 5},
        {"num_ranks": 3, "steps_to_retain_per_rank": 0}, {"num_ranks": True, "steps_to_retain_per_rank": 5},
    ],
)  # fmt: skip
def test_a_namespace_that_is_none_is_refused(daemon: StandInDaemon, facts: object) -> None:
    tier = bare(daemon.url)
    daemon.restart(DaemonFault(kind="status", path="/namespaces/", status=200, text=json.dumps(facts)))
    with pytest.raises(TierRefusedError, match="a strange answer"):
        tier.list_dirs("")
    with pytest.raises(TierRefusedError, match="a strange answer"):
        tier.put_share(share(at(FIRST, 10), 0, 1, 100))
    tier.close()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(daemon: StandInDaemon, status: int) -> None:
    with StandInDaemon() as elsewhere:
        fault = DaemonFault(kind="status", status=status, headers=(("Location", f"{elsewhere.url}/v1/cp/x"),))
        daemon.restart(fault)
        tier = bare(daemon.url)
        for call in (
            lambda: tier.list_dirs(""),
            lambda: tier.put_share(share(at(FIRST, 10), 0, 1, 100)),
            tier.probe,
        ):
            with pytest.raises(TierRefusedError, match=str(status)):
                call()
        assert elsewhere.requests == []
        tier.close()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, TierRefusedError), (401, TierRefusedError), (403, TierRefusedError), (405, TierRefusedError),
        (422, TierRefusedError), (501, TierRefusedError), (408, TierUnavailableError), (429, TierUnavailableError),
        (500, TierUnavailableError), (502, TierUnavailableError), (503, TierUnavailableError),
        (413, TierFullError), (507, TierFullError), (404, KeyNotFoundError),
    ],
)  # fmt: skip
def test_each_status_has_its_class_and_the_servers_words_are_quoted(
    daemon: StandInDaemon, service: HyperPodService, status: int, kind: type[TierError]
) -> None:
    text = "no\nsuch \x1b[31mthing" + "!" * 5000
    daemon.restart(DaemonFault(kind="status", status=status, text=text))
    with pytest.raises(kind) as caught:
        service.open(Slot(namespace="run", rank=0, wire=0))
    message = str(caught.value)
    assert type(caught.value) is kind
    assert str(status) in message
    assert "\\x1b[31mthing" in message
    assert message.isprintable()
    assert len(message) < 500


@pytest.mark.parametrize("meta", ["", "nonsense", '{"checksum": "AAAAAAAAAAAAAAAAAAAAAA==", "algorithm": "xxh3_128"}'])
def test_shard_meta_is_not_what_we_go_by(daemon: StandInDaemon, meta: str) -> None:
    """What is read is verified by digests of our own, part by part: a service that loses this header loses nothing."""
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 100)
    daemon.restart(DaemonFault(kind="meta", path="/checkpoints/", text=meta))
    assert read_holding(tier, at(FIRST, 10), durable=True).problem is None
    assert read(tier, at(FIRST, 10), "__0_0.distcp", 100) == data_of(10, 0, 0, 100)
    assert daemon.fired != []
    tier.close()


@pytest.mark.parametrize("announced", ["99999999999999999", "-5", "abc", "1" * 100, "10, 20"])
def test_a_length_that_is_none_ends_in_an_error_of_ours(announced: str) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", announced)
        handler.end_headers()
        handler.wfile.write(b"SMTSHAR1" + b"\0" * 100)
        handler.close_connection = True

    with answering(answer) as url:
        tier = bare(url)
        with pytest.raises(TierError):
            tier.list_dirs("")
        service = HyperPodService(settings(url))
        with pytest.raises(TierError):
            _drained(service, Slot(namespace="run", rank=0, wire=0))
        for one in (tier, service):
            one.close()


def _drained(service: HyperPodService, slot: Slot) -> None:
    body = service.open(slot)
    try:
        while body.receive(1000):
            pass
        assert body.size is not None, "nothing was announced, and all that came was taken"
    except AssertionError as error:
        raise TierError("no length") from error
    finally:
        body.close()


def test_an_answer_without_a_length_is_read_all_the_same(daemon: StandInDaemon) -> None:
    """Only then is a share that was cut found while it is read, not before."""
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 5000)
    blob = bytes(daemon.namespaces["run"].blobs[0][WIRE + 10].data)
    tier.close()
    cut = [0]

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = handler.path.partition("?")[0]
        if path.endswith("/0/10000000010"):
            data = blob[: len(blob) - cut[0]]
        else:
            given = {"/v1/cp/namespaces/run": {"num_ranks": 2, "steps_to_retain_per_rank": 5}}
            found = given.get(path, [WIRE + 10] if path.endswith("/latest") else None)
            data = json.dumps(found).encode()
            if found is None:
                handler.send_response(404)
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    with answering(answer) as url:
        tier = bare(url)
        assert read(tier, at(FIRST, 10), "__0_0.distcp", 5000) == data_of(10, 0, 0, 5000)
        cut[0] = 1
        with pytest.raises(CorruptPartError, match="it ends at byte"):
            read(tier, at(FIRST, 10), "__0_0.distcp", 5000)
        tier.close()


def test_an_answer_that_drips_ends_at_the_deadline() -> None:
    """Every byte comes within the request's own timeout."""
    ended = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        try:
            while not ended.wait(0.05):
                handler.wfile.write(b" ")
        except OSError:
            pass
        handler.close_connection = True

    with answering(answer) as url:
        tier = bare(url, retry_deadline_secs=0.5)
        try:
            with pytest.raises(TierUnavailableError, match="too slowly"):
                tier.list_dirs("")
        finally:
            ended.set()
            tier.close()


def test_keys_are_never_sent(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url)
    for key in ("../../cluster/reset", "step_0000000010-a000001-1-00000000/../../x", layout.attempt_key(FIRST) + "?"):
        with pytest.raises(KeyNotFoundError):
            tier.get(key)
    tier.close()
    assert all("reset" not in request.path and ".." not in request.path for request in daemon.requests)


def test_what_has_come_whole_is_taken_though_the_deadline_passed_with_it(daemon: StandInDaemon) -> None:
    tier = bare(daemon.url)
    save(tier, at(FIRST, 10), 1, 100)
    service = HyperPodService(settings(daemon.url))
    for size, whole in ((8, True), (10**6, False)):
        body = service.open(Slot(namespace="run", rank=0, wire=WIRE + 10))
        with deadline.within(0.0):
            if whole:
                assert body.take(size) == b"SMTSHAR1"
            else:
                with pytest.raises(TierUnavailableError, match="bytes had come when the deadline passed") as caught:
                    body.take(size)
                assert caught.value.tier == "cluster"
        body.close()
    for one in (tier, service):
        one.close()
