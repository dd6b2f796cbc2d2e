"""The stand-in answers as the predecessor's own test server does."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from sm_tiered.testing.daemon import StandInDaemon, shard_meta
from tests.predecessor import Server

CALLS = [
    ("GET", "namespaces/{ns}"),
    ("GET", "checkpoints/{ns}/latest"),
    ("POST", "checkpoints/{ns}/0/1"),
    ("POST", "namespaces/{ns}"),
    ("POST", "namespaces/{ns}?num_ranks=x"),
    ("POST", "namespaces/{ns}?num_ranks=3&steps_retained=2"),
    ("POST", "namespaces/{ns}?num_ranks=9&steps_retained=9"),
    ("GET", "namespaces/{ns}"),
    ("GET", "checkpoints/{ns}/latest"),
    ("GET", "checkpoints/{ns}/0/100"),
    *(("POST", f"checkpoints/{{ns}}/0/{step}") for step in (100, 300, 200, 110)),
    ("POST", "checkpoints/{ns}/2/30000000050"),
    ("POST", "checkpoints/{ns}/2/x"),
    *(("GET", f"checkpoints/{{ns}}/0/{step}") for step in (100, 110, 200, 300, 301)),
    ("GET", "checkpoints/{ns}/1/300"),
    ("GET", "checkpoints/{ns}/latest"),
    ("GET", "checkpoints/{ns}/latest?limit=2"),
    ("DELETE", "checkpoints/{ns}/0/300"),
    ("DELETE", "checkpoints/{ns}/0/300"),
    ("GET", "checkpoints/{ns}/latest"),
    ("DELETE", "namespaces/{ns}"),
    ("DELETE", "namespaces/{ns}"),
    ("DELETE", "checkpoints/{ns}/0/200"),
    ("GET", "checkpoints/{ns}/0/200"),
]


def _answer(url: str, method: str, path: str) -> tuple[int, Any, str]:
    """Return status, body and ``Shard-Meta`` of one call; of errors and of what has no answer, the status alone."""
    body = path.encode() if method == "POST" and "checkpoints" in path else None
    headers = {"Shard-Meta": shard_meta(body)} if body else {}
    request = urllib.request.Request(f"{url}/v1/cp/{path}", body, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            data, meta = answer.read(), answer.headers.get("Shard-Meta", "")
            told = data if meta else json.loads(data) if method == "GET" else None
            return answer.status, told, meta
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, None, ""


@pytest.mark.long
def test_it_answers_every_call_alike(predecessor_server: Server) -> None:
    with StandInDaemon() as daemon:
        for method, path in CALLS:
            ours, theirs = (
                _answer(url, method, path.format(ns="alike")) for url in (daemon.url, predecessor_server.url)
            )
            assert ours == theirs, f"{method} {path}"
