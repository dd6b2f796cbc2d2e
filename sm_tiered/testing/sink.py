"""An S3 server on loopback that throws large bodies away: what it measures is the client.

``python -m sm_tiered.testing.sink --port 0`` prints its port and serves until its standard input ends. Small objects
(up to 1 MiB, one PutObject) are kept, with conditions honoured, so that commits work; of larger ones only the size is
kept, and reading them gives synthetic bytes. An object that was never put is *--object-bytes* long when that is set.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["Sink", "main"]

_BUFFER_BYTES = 4 * 1024 * 1024
_KEPT_BYTES = 1024 * 1024
_DATE = "2026-01-01T00:00:00.000Z"
_HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
_RANGE = re.compile(r"bytes=(\d+)-(\d*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Object:
    size: int
    etag: str
    data: bytes | None
    """None: thrown away."""


@dataclass(slots=True)
class _Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    size: int
    body: bytes | None
    """None: thrown away."""


@dataclass
class Sink:
    """The server. `listen` returns its port; every connection has a thread."""

    object_bytes: int = 0
    _objects: dict[str, _Object] = field(default_factory=dict[str, _Object])
    _parts: dict[str, dict[int, int]] = field(default_factory=dict[str, dict[int, int]])
    _uploads: dict[str, str] = field(default_factory=dict[str, str])
    """Path of each unfinished upload."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _serial: count[int] = field(default_factory=lambda: count(1))

    def listen(self, port: int = 0) -> int:
        """Serve on loopback from daemon threads; return the port."""
        server = socket.create_server(("127.0.0.1", port), backlog=128)
        threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        return server.getsockname()[1]

    def _accept(self, server: socket.socket) -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=_Connection(self, connection).serve, daemon=True).start()

    def answer(self, request: _Request) -> tuple[int, dict[str, str], bytes, int]:
        """Return status, headers, body and how many synthetic bytes follow it."""
        key, query = request.path, request.query
        with self._lock:
            if request.method == "PUT" and "uploadId" in query:
                self._parts.setdefault(query["uploadId"], {})[int(query["partNumber"])] = request.size
                return 200, {"etag": self._etag()}, b"", 0
            if request.method == "PUT":
                return self._put(request)
            if request.method == "POST" and "uploads" in query:
                upload = f"upload-{next(self._serial)}"
                self._uploads[upload] = key
                return 200, {}, _xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>"), 0
            if request.method == "POST" and "uploadId" in query:
                self._uploads.pop(query["uploadId"], None)
                size = sum(self._parts.pop(query["uploadId"], {}).values())
                made = self._objects[key] = _Object(size, self._etag(), None)
                tag = f"<ETag>{escape(made.etag)}</ETag>"
                return 200, {}, _xml("CompleteMultipartUploadResult", tag), 0
            if request.method == "POST" and "delete" in query:
                bucket = key.split("/")[1]
                for name in re.findall(r"<Key>([^<]*)</Key>", (request.body or b"").decode()):
                    self._objects.pop(f"/{bucket}/{name}", None)
                return 200, {}, _xml("DeleteResult", ""), 0
            if request.method == "DELETE":
                self._parts.pop(query.get("uploadId", ""), None)
                self._uploads.pop(query.get("uploadId", ""), None)
                self._objects.pop(key, None) if "uploadId" not in query else None
                return 204, {}, b"", 0
            if request.method == "GET" and "uploadId" in query:
                return 200, {}, self._part_listing(query), 0
            if key.strip("/").count("/") == 0:
                listing = self._upload_listing(key) if "uploads" in query else self._listing(key.strip("/"), query)
                return 200, {}, listing, 0
            return self._get(request)

    def _etag(self) -> str:
        return f'"{next(self._serial):032x}"'

    def _put(self, request: _Request) -> tuple[int, dict[str, str], bytes, int]:
        key, old = request.path, self._objects.get(request.path)
        wanted = request.headers.get("if-match")
        if wanted is not None and old is None:
            return _failure(404, "NoSuchKey")
        if (request.headers.get("if-none-match") == "*" and old) or (wanted and old and old.etag != wanted):
            return _failure(412, "PreconditionFailed")
        if key.strip("/").count("/") == 0:
            return 200, {}, b"", 0  # the bucket itself
        self._objects[key] = made = _Object(request.size, self._etag(), request.body)
        return 200, {"etag": made.etag}, b"", 0

    def _get(self, request: _Request) -> tuple[int, dict[str, str], bytes, int]:
        found = self._objects.get(request.path)
        if found is None and self.object_bytes:
            found = _Object(self.object_bytes, '"synthetic"', None)
        if found is None:
            return _failure(404, "NoSuchKey", head=request.method == "HEAD")
        begin, end, status = 0, found.size, 200
        headers = {"etag": found.etag, "last-modified": _HTTP_DATE, "accept-ranges": "bytes"}
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if asked:
            begin, status = int(asked[1]), 206
            end = min(found.size, int(asked[2]) + 1) if asked[2] else found.size
            if begin >= found.size:
                return _failure(416, "InvalidRange")
            headers["content-range"] = f"bytes {begin}-{end - 1}/{found.size}"
        if request.method == "HEAD":
            return status, {**headers, "content-length": str(end - begin)}, b"", 0
        if found.data is not None:
            return status, headers, found.data[begin:end], 0
        return status, headers, b"", end - begin

    def _part_listing(self, query: dict[str, str]) -> bytes:
        parts, after = self._parts.get(query["uploadId"], {}), int(query.get("part-number-marker", "0"))
        listed = "".join(
            f"<Part><PartNumber>{number}</PartNumber><Size>{size}</Size></Part>"
            for number, size in sorted(parts.items())
            if number > after
        )
        return _xml("ListPartsResult", f"<IsTruncated>false</IsTruncated>{listed}")

    def _upload_listing(self, bucket: str) -> bytes:
        listed = "".join(
            f"<Upload><Key>{escape(path[len(bucket.rstrip('/')) + 1 :])}</Key><UploadId>{upload}</UploadId>"
            f"<Initiated>{_DATE}</Initiated></Upload>"
            for upload, path in self._uploads.items()
        )
        return _xml("ListMultipartUploadsResult", f"<IsTruncated>false</IsTruncated>{listed}")

    def _listing(self, bucket: str, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        contents, prefixes = "", set[str]()
        for path in sorted(self._objects):
            key = path.removeprefix(f"/{bucket}/")
            if key == path or not key.startswith(prefix):
                continue
            if delimiter and delimiter in key[len(prefix) :]:
                prefixes.add(prefix + key[len(prefix) :].split(delimiter)[0] + delimiter)
                continue
            facts = self._objects[path]
            contents += (
                f"<Contents><Key>{escape(key)}</Key><Size>{facts.size}</Size><ETag>{escape(facts.etag)}</ETag>"
                f"<LastModified>{_DATE}</LastModified></Contents>"
            )
        shared = "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(prefixes))
        return _xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{contents}{shared}")


class _Connection:
    """One client, served with one buffer that every body is received into."""

    def __init__(self, sink: Sink, connection: socket.socket) -> None:
        self._sink, self._socket = sink, connection
        self._buffer = bytearray(_BUFFER_BYTES)
        self._pending = b""

    def serve(self) -> None:
        """Answer until the client goes."""
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._socket:
            try:
                while self._one():
                    pass
            except OSError:
                return

    def _one(self) -> bool:
        while b"\r\n\r\n" not in self._pending:
            data = self._socket.recv(65536)
            if not data:
                return False
            self._pending += data
        head, _, self._pending = self._pending.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = line.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (text.partition(":") for text in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        size = int(headers.get("content-length", "0"))
        body = self._receive(size)
        address = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        request = _Request(method, unquote(address.path), query, headers, size, body)
        status, found, answer, synthetic = self._sink.answer(request)
        found = {"content-length": str(len(answer) + synthetic), "date": _HTTP_DATE, **found}
        text = "".join(f"{name}: {value}\r\n" for name, value in found.items())
        self._socket.sendall(f"HTTP/1.1 {status} X\r\n{text}\r\n".encode("latin-1") + answer)
        self._send_synthetic(synthetic)
        return True

    def _receive(self, size: int) -> bytes | None:
        if size <= _KEPT_BYTES:
            data = bytearray(self._pending[:size])
            self._pending = self._pending[size:]
            while len(data) < size:
                more = self._socket.recv(size - len(data))
                if not more:
                    raise ConnectionResetError
                data += more
            return bytes(data)
        left = size - len(self._pending)
        self._pending = b""
        view = memoryview(self._buffer)
        while left > 0:
            received = self._socket.recv_into(view, min(left, _BUFFER_BYTES))
            if received == 0:
                raise ConnectionResetError
            left -= received
        return None

    def _send_synthetic(self, size: int) -> None:
        view = memoryview(self._buffer)
        while size > 0:
            size -= self._socket.send(view[: min(size, _BUFFER_BYTES)])


def _xml(name: str, inside: str) -> bytes:
    text = f'<?xml version="1.0" encoding="UTF-8"?><{name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    return f"{text}{inside}</{name}>".encode()


def _failure(status: int, code: str, *, head: bool = False) -> tuple[int, dict[str, str], bytes, int]:
    body = b"" if head else f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return status, {}, body, 0


def main() -> None:
    """Serve, niced, until standard input ends."""
    parser = argparse.ArgumentParser(description="An S3 server that throws part bodies away.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--object-bytes", type=int, default=0, help="size of objects that were never put; 0: missing")
    arguments = parser.parse_args()
    os.nice(10)
    sys.stdout.write(f"{Sink(object_bytes=arguments.object_bytes).listen(arguments.port)}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
