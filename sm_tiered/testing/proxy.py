"""An HTTP proxy in front of an S3 endpoint that answers wrongly, late or never, request by request, and records all."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

__all__ = ["FaultProxy", "Recorded", "Rule"]

Kind = Literal["status", "reset", "truncate", "slow", "half_open", "ack_lost", "strip"]
"""What goes wrong:

- ``status``: an answer of the proxy's own (*status*, *code*, *headers*, *text*), without asking the upstream.
- ``reset``: the connection is reset after *at* bytes of the answer.
- ``truncate``: the connection is closed properly after *at* bytes of the answer's body.
- ``slow``: the answer drips, a byte each *pause_secs*.
- ``half_open``: the request is read and never answered.
- ``ack_lost``: the upstream does it, the connection is closed without an answer.
- ``strip``: the upstream does not see the request's *headers*: a server that does not know them.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What goes wrong at the requests *first* to *first* + *times* - 1 (from 1) whose line contains all of *match*."""

    kind: Kind
    match: tuple[str, ...] = ()
    """Parts of ``METHOD /path?query``, or of ``header: value`` in lower case."""
    first: int = 1
    times: int = 1_000_000
    status: int = 503
    code: str = "SlowDown"
    headers: tuple[tuple[str, str], ...] = ()
    text: str | None = None
    """Body in the place of an S3 error."""
    at: int = 0
    pause_secs: float = 0.1
    then: Callable[[], object] = lambda: None
    """Called, in the proxy's thread, at each request struck, between what the upstream does and any answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One request as it came."""

    method: str
    path: str
    """With its query."""
    headers: dict[str, str]
    """Names in lower case."""
    struck: Kind | None


@dataclass
class FaultProxy:
    """Forwards to *upstream* (``http://host:port``) but for what *rules* say. A context manager; listens at `url`."""

    upstream: str
    rules: Sequence[Rule] = ()
    requests: list[Recorded] = field(default_factory=list[Recorded])
    """Every request so far."""
    _counts: dict[int, int] = field(default_factory=dict[int, int])
    _port: int = 0

    @property
    def url(self) -> str:
        """Where it listens, on loopback."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def fired(self) -> list[Recorded]:
        """The requests that a rule struck."""
        return [request for request in self.requests if request.struck]

    def restart(self, *rules: Rule) -> None:
        """Forget what was recorded and counted, and follow *rules* from now on."""
        self.rules = rules
        self._counts.clear()
        self.requests.clear()

    def __enter__(self) -> FaultProxy:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise TimeoutError("the proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        connections = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (OSError, EOFError, asyncio.LimitOverrunError):
            pass  # a client that went away: what a proxy lives with
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serve one request; return whether the connection may be used again."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, path, _ = line.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        rule = self._rule(method, path, headers)
        self.requests.append(
            Recorded(method=method, path=path, headers=headers, struck=rule.kind if rule is not None else None)
        )
        answer = await self._asked(rule, method, path, headers, body)
        if rule is not None:
            rule.then()
        if rule is not None and rule.kind == "half_open":
            await reader.read()  # until the client gives up
            return False
        if rule is not None and rule.kind not in ("status", "strip"):
            await _spoil(rule, answer, writer)
            return False
        writer.write(answer)
        await writer.drain()
        return True

    async def _asked(self, rule: Rule | None, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        """The answer: the upstream's, or the proxy's own where *rule* keeps the request from it."""
        if rule is not None and rule.kind == "half_open":
            return b""
        if rule is not None and rule.kind == "status":
            return _error(rule, method)
        stripped = {name for name, _ in rule.headers} if rule is not None and rule.kind == "strip" else set[str]()
        kept = {name: value for name, value in headers.items() if name not in stripped}
        return await self._forward(method, path, kept, body)

    def _rule(self, method: str, path: str, headers: dict[str, str]) -> Rule | None:
        text = "\n".join([f"{method} {path}", *(f"{name}: {value.lower()}" for name, value in headers.items())])
        struck = None
        for index, rule in enumerate(self.rules):
            if all(part in text for part in rule.match):
                self._counts[index] = count = self._counts.get(index, 0) + 1
                if struck is None and rule.first <= count < rule.first + rule.times:
                    struck = rule
        return struck

    async def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        address = urlsplit(self.upstream)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        kept = {name: value for name, value in headers.items() if name not in ("expect", "connection")}
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in kept.items()),
            "connection: close",
        ]
        try:
            writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).rstrip().split(b"\r\n")
            sizes = [0] if method == "HEAD" else [int(t[15:]) for t in head if t.lower().startswith(b"content-length:")]
            # Not up to its end where the length is known: closing may take a server longer than answering.
            rest = await (reader.readexactly(sizes[0]) if sizes else reader.read())
        finally:
            writer.close()
        # The client's connection outlives this one.
        return b"\r\n".join(text for text in head if not text.lower().startswith(b"connection:")) + b"\r\n\r\n" + rest


def _error(rule: Rule, method: str) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{rule.code}</Code><Message>injected {rule.code}</Message></Error>"
    body = b"" if method == "HEAD" else (text if rule.text is None else rule.text).encode()
    lines = [
        f"HTTP/1.1 {rule.status} Injected",
        f"content-length: {len(body)}",
        "content-type: application/xml",
        *(f"{name}: {value}" for name, value in rule.headers),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _spoil(rule: Rule, answer: bytes, writer: asyncio.StreamWriter) -> None:
    if rule.kind == "slow":
        for index in range(len(answer)):
            writer.write(answer[index : index + 1])
            await writer.drain()
            await asyncio.sleep(rule.pause_secs)
    elif rule.kind in ("reset", "truncate"):
        begin = 0 if rule.kind == "reset" else answer.index(b"\r\n\r\n") + 4
        writer.write(answer[: begin + rule.at])
        await writer.drain()
        if rule.kind == "reset":
            tcp: socket.socket = writer.get_extra_info("socket")
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
