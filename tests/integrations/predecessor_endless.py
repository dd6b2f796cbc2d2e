"""A service whose answer never ends: what stands behind it tells everything but what one slot holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PIECE = bytes(64 * 1024)


@dataclass
class Endless:
    """Which path never ends, and how much of it was sent."""

    slot: str
    """What its path ends in, e.g. ``theirs/1/10``."""
    url: str = ""
    announces: int | None = None
    """How many bytes it says it has; None: it does not say."""
    piece: bytes = _PIECE
    pause_secs: float = 0.0
    begins_with: bytes = b""
    sent: int = 0
    asked: int = 0
    """How often the slot was asked for."""
    gates: threading.Event = field(default_factory=threading.Event)
    """Set: it ends."""


@contextmanager
def endless(behind: str, found: Endless) -> Generator[Endless, None, None]:
    """Serve what *behind* serves, and at the slot of *found* bytes without an end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(found.slot):
                self._never_ends()
                return
            host = HTTPConnection(behind.removeprefix("http://"))
            host.request("GET", self.path)
            answer = host.getresponse()
            data = answer.read()
            self.send_response(answer.status)
            for name in ("Shard-Meta", "Content-Type"):
                if answer.headers.get(name):
                    self.send_header(name, str(answer.headers[name]))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            host.close()

        def _never_ends(self) -> None:
            found.asked += 1
            self.send_response(200)
            if found.announces is not None:
                self.send_header("Content-Length", str(found.announces))
            self.end_headers()
            self.close_connection = True
            try:
                self.wfile.write(found.begins_with)
                while not found.gates.is_set():
                    self.wfile.write(found.piece)
                    found.sent += len(found.piece)
                    time.sleep(found.pause_secs)
            except OSError:
                return  # the client has had enough, which is what is tested

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield found
    finally:
        found.gates.set()
        server.shutdown()
        server.server_close()
