"""HTTP to the HyperPod checkpoint service: one request a call, nothing repeated, no redirect or proxy followed."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, cast
from urllib.parse import urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NameResolutionError, NewConnectionError
from urllib3.response import BaseHTTPResponse

from sm_tiered import deadline
from sm_tiered.errors import (
    ConfigError,
    KeyNotFoundError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.settings import HyperPodSettings
from sm_tiered.tiers.hyperpod_looks import THREADS

__all__ = ["Body", "HttpClient"]

_ENABLE = (
    "Enable tiered storage on the HyperPod cluster (TieredStorageConfig {Mode: Enable}), or take this tier out of the "
    "recipe."
)

_MAX_ANSWER_BYTES = 1024 * 1024
_RECEIVE_BYTES = 1024 * 1024
_QUICKACK: int | None = getattr(socket, "TCP_QUICKACK", None)
_SHORTEST_SECS = 0.01
"""A timeout of nothing would mean none."""


class _SourceError(Exception):
    """The source of a body failed: carried past urllib3, which would take some errors for the connection's own."""


class _Progress:
    """A connection that is made within the connect timeout, however many addresses a name has, and then may be slow."""

    progress_secs: float = 30.0

    def connect(self) -> None:
        """Connect; see `http.client.HTTPConnection.connect`. With TLS it is not `request` that calls it."""
        me = cast(HTTPConnection, self)
        secs = me.timeout or self.progress_secs
        try:
            deadline.run(super().connect, secs)  # type: ignore[misc]
        except TimeoutError as error:
            raise ConnectTimeoutError(me, f"no connection within {secs:.1f} s") from error

    def request(self, *args: Any, **kwargs: Any) -> None:
        """Send a request; see `http.client.HTTPConnection.request`."""
        me = cast(HTTPConnection, self)
        if me.sock is None:
            me.connect()
        me.timeout = max(_SHORTEST_SECS, deadline.remaining(self.progress_secs))
        super().request(*args, **kwargs)  # type: ignore[misc]
        if _QUICKACK is not None and me.sock is not None:
            # A server that sends the head of an answer by itself may wait for its acknowledgement before the rest.
            with suppress(OSError):
                me.sock.setsockopt(socket.IPPROTO_TCP, _QUICKACK, 1)


class _Http(_Progress, HTTPConnection):
    pass


class _Https(_Progress, HTTPSConnection):
    pass


class Body:
    """The body of an answer that is being received, in order. Close it."""

    def __init__(self, answer: BaseHTTPResponse, size: int | None, fail: Callable[[BaseException], TierError]) -> None:
        self._answer, self._fail = answer, fail
        self.size = size
        """In bytes, as it was announced; None: it was not."""
        self.meta = answer.headers.get("Shard-Meta", "")
        """The ``Shard-Meta`` header as it came; empty: there was none."""

    def receive(self, limit: int) -> bytes:
        """Return up to *limit* bytes, or none at the end: whatever comes next, without waiting for more.

        Raises:
            TierUnavailableError: the connection broke, or nothing came in time.
        """
        try:
            return self._answer.read1(min(limit, _RECEIVE_BYTES)) or b""
        except (HTTPError, OSError, ValueError) as error:
            raise self._fail(error) from error

    def take(self, size: int) -> bytes:
        """Return the next *size* bytes: fewer where it ends.

        Raises:
            TierUnavailableError: the connection broke, or the deadline passed before all had come.
        """
        data = bytearray()
        while len(data) < size and (piece := self.receive(size - len(data))):
            data += piece
            if len(data) < size and deadline.remaining(1.0) <= 0:
                raise self._fail(TimeoutError(f"only {len(data)} of {size} bytes had come when the deadline passed"))
        return bytes(data)

    def close(self) -> None:
        """Let go of the connection, which can be used again only when all was received."""
        self._answer.close()
        self._answer.release_conn()


class HttpClient:
    """Requests to one service. Its connections belong to the process that made them; threads may share it."""

    def __init__(self, settings: HyperPodSettings) -> None:
        parts = urlsplit(settings.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.path not in ("", "/"):
            raise ConfigError("url must be http://host:port, without a path", hint="The service takes no credentials.")
        self._settings = settings
        self._forget_parent()

    def _forget_parent(self) -> None:
        """Sockets are not shared with the process that this one was forked from, and it may have held the lock."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None

    @property
    def tier(self) -> str:
        """What the recipe calls the tier."""
        return self._settings.name

    def close(self) -> None:
        """Close all connections; the next call makes new ones."""
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def open(self, path: str) -> Body:
        """Begin to receive what stands at *path*.

        Raises:
            KeyNotFoundError: nothing does.
        """
        answer = self._send("GET", path)
        self._check(answer, "GET", path, ())
        announced = answer.headers.get("Content-Length", "")
        size = int(announced) if re.fullmatch(r"\d{1,18}", announced, re.ASCII) else None
        return Body(answer, size, lambda error: self._translate(error, f"GET {path}"))

    def call(
        self,
        method: str,
        path: str,
        *,
        body: Callable[[], Iterator[memoryview]] | None = None,
        size: int = 0,
        headers: dict[str, str] | None = None,
        accept: tuple[int, ...] = (),
    ) -> tuple[int, bytes]:
        """Return status and text of the answer, which is small; a status of *accept* is as good as success."""
        secs = deadline.remaining(self._settings.retry_deadline_secs + deadline.allowance(size))
        with deadline.within(secs):
            answer = self._send(method, path, body=body, headers=headers)
            self._check(answer, method, path, accept)
            return answer.status, self._small(answer, f"{method} {path}")

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Callable[[], Iterator[memoryview]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> BaseHTTPResponse:
        settings, failed = self._settings, list[BaseException]()
        left = deadline.remaining(settings.request_timeout_secs)
        if left <= 0:
            raise TierUnavailableError(f"{method} {path}: no time was left for it", tier=self.tier)
        connect = min(settings.connect_timeout_secs, left)
        try:
            return self._connections().urlopen(
                method,
                path,
                body=cast(Any, None if body is None else self._guarded(body, failed)),
                headers=headers,
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(connect=connect, read=left),
                preload_content=False,
                decode_content=False,
            )
        except _SourceError:
            raise failed[0] from None
        except (HTTPError, OSError) as error:
            raise self._translate(error, f"{method} {path}") from error

    def _guarded(self, body: Callable[[], Iterator[memoryview]], failed: list[BaseException]) -> Iterator[memoryview]:
        try:
            for piece in body():
                yield piece
                if deadline.remaining(1.0) <= 0:
                    raise TierUnavailableError("the deadline passed while bytes were sent", tier=self.tier)
        except GeneratorExit:
            raise
        except BaseException as error:
            failed.append(error)
            raise _SourceError from error

    def _connections(self) -> urllib3.HTTPConnectionPool:
        if self._pid != os.getpid():
            self._forget_parent()
        with self._lock:
            if self._pool is None:
                pool = urllib3.connection_from_url(self._settings.url, maxsize=THREADS, block=False, retries=False)
                base = _Https if urlsplit(self._settings.url).scheme == "https" else _Http
                secs = self._settings.request_timeout_secs
                pool.ConnectionCls = cast(Any, type(base.__name__, (base,), {"progress_secs": secs}))
                self._pool = pool
            return self._pool

    def _small(self, answer: BaseHTTPResponse, what: str) -> bytes:
        body, data = Body(answer, None, lambda error: self._translate(error, what)), bytearray()
        try:
            while piece := body.receive(_RECEIVE_BYTES):
                data += piece
                if len(data) > _MAX_ANSWER_BYTES:
                    raise self.strange(what, f"its answer is longer than {_MAX_ANSWER_BYTES} bytes")
                if deadline.remaining(1.0) <= 0 and not answer.closed:
                    raise TierUnavailableError(f"{what}: the answer came too slowly", tier=self.tier)
        finally:
            body.close()
        return bytes(data)

    # ---- answers

    def _check(self, answer: BaseHTTPResponse, method: str, path: str, accept: tuple[int, ...]) -> None:
        status = answer.status
        if 200 <= status < 300 or status in accept:
            return
        text, what = "", f"{method} {path.partition('?')[0]}"
        with suppress(TierError), deadline.within(self._settings.connect_timeout_secs):
            text = self._small(answer, what).decode(errors="replace")
        told = f"{what}: {status} {text[:200]!r}"
        if status == 404:
            raise KeyNotFoundError(told, tier=self.tier)
        if status in (413, 507):
            raise TierFullError(
                told, hint="Keep fewer checkpoints there, or give the service more memory.", tier=self.tier
            )
        if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
            raise TierUnavailableError(told, tier=self.tier)
        hint = "Make sure that the tier's `url` is the checkpoint service itself, without a proxy before it."
        raise TierRefusedError(told, hint=hint, tier=self.tier)

    def strange(self, what: str, how: str) -> TierRefusedError:
        """Return the error for an answer to *what* that no such service gives."""
        hint = "Something else than the checkpoint service answers at the tier's `url`."
        return TierRefusedError(f"{what}: a strange answer: {how}", hint=hint, tier=self.tier)

    def _translate(self, error: BaseException, what: str) -> TierError:
        if isinstance(error, TierError):
            return error
        where = f"{self._settings.url} does not answer"
        if isinstance(error, NameResolutionError):
            return TierUnavailableError(f"{where}: its name is not known", hint=_ENABLE, tier=self.tier)
        if isinstance(error, NewConnectionError):
            return TierUnavailableError(f"{where}: it refuses connections", hint=_ENABLE, tier=self.tier)
        if isinstance(error, ConnectTimeoutError):
            return TierUnavailableError(f"{where}: no connection in time", hint=_ENABLE, tier=self.tier)
        told = str(error) if type(error) is TimeoutError else type(error).__name__
        return TierUnavailableError(f"{what}: no whole answer ({told[:200]})", tier=self.tier)
