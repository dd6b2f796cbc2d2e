"""The HTTP of the stand-in for the HyperPod service: every connection has a thread, bodies are not copied."""

from __future__ import annotations

import json
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from sm_tiered.testing.daemon_faults import DaemonFault, DaemonRequest, FaultList
from sm_tiered.testing.daemon_memory import HEAD_BYTES, DaemonError, DaemonMemory, StoredBlob, shard_meta

__all__ = ["DaemonServer", "Service"]

_BUFFER_BYTES = 4 * 1024 * 1024
_ZEROS = memoryview(bytes(1024 * 1024))
_NAMESPACE = re.compile(r"/v1/cp/namespaces/([^/]+)")
_LATEST = re.compile(r"/v1/cp/checkpoints/([^/]+)/latest")
_BLOB = re.compile(r"/v1/cp/checkpoints/([^/]+)/([^/]+)/([^/]+)")
_RESET = "/v1/cp/cluster/reset"
_Headers = tuple[tuple[str, str], ...]


@dataclass(kw_only=True)
class Service:
    """What all connections share."""

    host: str = "127.0.0.1"
    port: int = 0
    """0: any that is free, chosen when it is entered first."""
    latency_secs: float = 0.0
    """How long every request waits before anything is done; may be changed at any time."""
    discard: bool = False
    """Whether only the first MiB of a body is kept, for measuring clients; the rest is read as zeros."""
    memory: DaemonMemory = field(default_factory=DaemonMemory)
    faults: FaultList = field(default_factory=FaultList)
    requests: list[DaemonRequest] = field(default_factory=list[DaemonRequest])
    """Every request so far."""


class DaemonServer(ThreadingHTTPServer):
    """Knows its connections, so that all are gone when it is."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, service: Service) -> None:
        self.service = service
        self.ended = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
        self._open: set[Any] = set()
        super().__init__((service.host, service.port), _Handler)

    def server_bind(self) -> None:
        """Bind, and ask no resolver for the machine's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.service.host, int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Close a connection."""
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, but for a client that went away: what a server lives with."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def end(self) -> None:
        """Stop listening and let go of every client, those too that wait for an answer."""
        self.shutdown()
        self.ended.set()
        self.server_close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # its client was faster


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: DaemonServer  # type: ignore[assignment]
    _scratch = memoryview(b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are recorded, not printed."""

    def do_GET(self) -> None:
        """Serve it."""
        self._serve(self._read)

    def do_POST(self) -> None:
        """Serve it."""
        self._serve(self._write)

    def do_DELETE(self) -> None:
        """Serve it."""
        self._serve(self._remove)

    def _serve(self, act: Callable[[], None]) -> None:
        service, length = self.server.service, self.headers.get("content-length", "0")
        self._left = int(length) if length.isdigit() else 0
        address = urlsplit(self.path)
        self._path = address.path
        self._query = {name: values[0] for name, values in parse_qs(address.query).items()}
        fault = self._fault = service.faults.strike(self.command, self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        struck = fault.kind if fault else None
        service.requests.append(
            DaemonRequest(method=self.command, path=self.path, headers=headers, size=self._left, struck=struck)
        )
        self.server.ended.wait(service.latency_secs + (fault.secs if fault else 0.0))
        try:
            if "transfer-encoding" in headers or not length.isdigit():
                self.close_connection = True
                raise DaemonError(411, "a body must have a Content-Length")
            if fault is None or not self._replaced(fault):
                act()
        except DaemonError as error:
            self._skip()
            self._answer({"detail": str(error)}, status=error.status)

    def _replaced(self, fault: DaemonFault) -> bool:
        """Do what *fault* does in the place of the request; return whether that was all."""
        if fault.kind == "reset" and (self._left or fault.at == 0):
            self._receive(memoryview(bytearray(min(fault.at, self._left))))
            self._abort()
        elif fault.kind == "status":
            self._skip()
            self._send(fault.status, fault.text.encode(), fault.headers)
        elif fault.kind == "hang":
            self._skip()
            self.server.ended.wait()
            self.close_connection = True
        else:
            return False
        return True

    def _read(self) -> None:
        memory = self.server.service.memory
        self._skip()
        if matched := _NAMESPACE.fullmatch(self._path):
            self._answer(memory.describe(unquote(matched[1])))
        elif matched := _LATEST.fullmatch(self._path):
            self._answer(memory.latest(unquote(matched[1]), self._query.get("limit", "5")))
        elif matched := _BLOB.fullmatch(self._path):
            self._send_blob(memory.get(unquote(matched[1]), matched[2], matched[3]))
        elif self._path == "/health":
            self._answer({"status": "healthy"})
        else:
            raise DaemonError(404, "Not found")

    def _write(self) -> None:
        service = self.server.service
        if matched := _NAMESPACE.fullmatch(self._path):
            self._skip()
            service.memory.create(unquote(matched[1]), self._query)
        elif matched := _BLOB.fullmatch(self._path):
            name, size = unquote(matched[1]), self._left
            rank, step = service.memory.check(name, matched[2], matched[3])
            data = bytearray(min(size, HEAD_BYTES) if service.discard else size)
            self._receive(memoryview(data))
            self._skip()
            service.memory.put(name, rank, step, StoredBlob(data, size, self.headers.get("shard-meta", "")))
        elif self._path == _RESET:
            self._skip()
            service.memory.reset()
        else:
            raise DaemonError(404, "Not found")
        self._answer({"status": "ok"})

    def _remove(self) -> None:
        memory = self.server.service.memory
        self._skip()
        if matched := _NAMESPACE.fullmatch(self._path):
            memory.drop(unquote(matched[1]))
        elif matched := _BLOB.fullmatch(self._path):
            memory.delete(unquote(matched[1]), matched[2], matched[3])
        else:
            raise DaemonError(404, "Not found")
        self._answer({"status": "ok"})

    def _send_blob(self, blob: StoredBlob) -> None:
        fault, data, size, meta = self._fault, memoryview(blob.data), blob.size, blob.meta
        if fault and fault.kind == "cut":
            data, size = data[: fault.at], min(size, fault.at)
        elif fault and fault.kind == "flip":
            data = memoryview(bytearray(data))
            data[fault.at // 8] ^= 1 << fault.at % 8
        elif fault and fault.kind == "meta":
            meta = fault.text
        if fault and fault.sealed:
            meta = shard_meta(data)
        headers = (("Shard-Meta", meta),) if meta else ()
        if fault and fault.kind == "reset":
            self._head(200, size, headers)
            self.wfile.write(data[: fault.at])
            self._abort()
        else:
            self._send(200, data, headers, zeros=size - len(data))

    def _receive(self, view: memoryview) -> None:
        """Fill *view* with what comes of the body.

        Raises:
            ConnectionError: the client went away before.
        """
        while view:
            got = self.rfile.readinto(view)
            if not got:
                raise ConnectionResetError("the body was cut short")
            view = view[got:]
            self._left -= got

    def _skip(self) -> None:
        """Throw the rest of the body away, so that the next request is found."""
        if len(self._scratch) < min(self._left, _BUFFER_BYTES):
            self._scratch = memoryview(bytearray(_BUFFER_BYTES))
        while self._left:
            self._receive(self._scratch[: self._left])

    def _answer(self, value: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), (("Content-Type", "application/json"),))

    def _head(self, status: int, size: int, headers: _Headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, data: bytes | memoryview, headers: _Headers, *, zeros: int = 0) -> None:
        if self._fault and self._fault.kind == "ack_lost":
            self.close_connection = True
            return
        self._head(status, len(data) + zeros, headers)
        self.wfile.write(data)
        while zeros > 0:
            zeros -= self.wfile.write(_ZEROS[:zeros])

    def _abort(self) -> None:
        """Reset the connection once this is done: what was sent may or may not arrive."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
