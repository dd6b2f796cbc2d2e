"""Large uploads that only `complete` publishes: no exception, deadline or garbage collection leaves a cut object."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from sm_tiered import deadline
from sm_tiered.errors import CorruptPartError, TierError, TierUnavailableError
from sm_tiered.tiers.s3_client import S3Connection
from sm_tiered.tiers.s3_errors import clean
from sm_tiered.tiers.s3_window import WINDOW_BYTES, UploadWindow

if TYPE_CHECKING:
    from s3torchconnectorclient._mountpoint_s3_client import PutObjectStream

__all__ = ["CrtUpload", "MultipartUpload", "Upload", "exactly", "open_upload", "part_bytes_for"]

WRITE_BYTES = 8 * 1024 * 1024
MIN_PART_BYTES = 5 * 1024 * 1024
MAX_PARTS = 10_000
_IN_FLIGHT = 4

_T = TypeVar("_T")
_log = logging.getLogger("sm_tiered")


class Upload(Protocol):
    """An object in the making."""

    def write(self, data: bytes) -> None:
        """Add bytes."""
        ...

    def complete(self) -> None:
        """Publish the object, whole."""
        ...

    def abort(self) -> None:
        """Publish nothing, now or later. Raises nothing."""
        ...


def part_bytes_for(size: int, wanted: int) -> int:
    """Return the length of the parts of one multipart upload: *wanted*, or more where S3 allows only 10,000 of them."""
    mib = 1024 * 1024
    needed = -(-size // MAX_PARTS)
    return max(wanted, MIN_PART_BYTES, -(-needed // mib) * mib)


def exactly(chunks: Iterator[memoryview], size: int, key: str) -> Iterator[bytes]:
    """Yield the bytes of *chunks* in pieces of 8 MiB; the last one is shorter.

    Raises:
        CorruptPartError: they are not *size* bytes; said at the latest after the last piece.
    """
    pending, total = bytearray(), 0
    for chunk in chunks:
        data = chunk.cast("B")
        total += len(data)
        if total > size:
            raise CorruptPartError(f"the source gave at least {total} bytes, {size} were announced", key=key)
        for start in range(0, len(data), WRITE_BYTES):
            piece = data[start : start + WRITE_BYTES]
            if not pending and len(piece) == WRITE_BYTES:
                yield _as_bytes(piece)
                continue
            room = WRITE_BYTES - len(pending)
            pending += piece[:room]
            if len(pending) == WRITE_BYTES:
                yield bytes(pending)
                pending = bytearray(piece[room:])
    if total != size:
        raise CorruptPartError(f"the source gave {total} bytes, {size} were announced", key=key)
    if pending:
        yield bytes(pending)


def _as_bytes(view: memoryview) -> bytes:
    """Return the bytes of *view*: the very object behind it where that is all of one that can't change."""
    whole = view.obj
    return whole if isinstance(whole, bytes) and len(whole) == len(view) else bytes(view)


def open_upload(connection: S3Connection, key: str, size: int) -> Upload:
    """Begin the upload of *size* bytes to *key*."""
    # s3torchconnector can't send encryption headers; a multipart upload of boto3's can.
    if connection.settings.sse_kms_key_id:
        return MultipartUpload(connection, key, size)
    return CrtUpload(connection, key, size)


class _NoStream:
    """Stands where an `S3Writer` had its stream."""

    def write(self, data: bytes) -> None:
        raise ValueError("this writer has no stream")

    def close(self) -> None:
        return


class CrtUpload:
    """An upload through s3torchconnector.

    Its `S3Writer` completes the upload when it is garbage-collected, even after an exception in the middle. So the
    stream is taken out of the writer at once, and a stream that is dropped without `close` aborts.
    """

    def __init__(self, connection: S3Connection, key: str, size: int) -> None:
        self._connection, self._key, self._whole = connection, key, connection.whole(key)
        self._limit = connection.settings.retry_deadline_secs + deadline.allowance(size)
        self._end = time.monotonic() + self._limit
        self._pending: deadline.Task[None] | None = None
        self._written = 0
        part_bytes = part_bytes_for(size, connection.settings.part_bytes)
        self._window = UploadWindow(connection, key, part_bytes) if size > WINDOW_BYTES else None
        connection.call("PutObject", key, lambda client: None)  # credentials and region, with boto3's typed errors
        self._stream: PutObjectStream | None = self._guarded(deadline.Task(lambda: self._open(part_bytes)))

    def _open(self, part_bytes: int) -> PutObjectStream:
        writer = self._connection.crt(part_bytes).put_object(self._connection.bucket, self._whole)
        stream, writer.stream = writer.stream, cast(Any, _NoStream())
        return stream

    def write(self, data: bytes) -> None:
        """Hand *data* to the client; the wait for it is at the next call, so that making and sending overlap."""
        self._settle()
        if deadline.remaining(self._end - time.monotonic()) <= 0:
            raise self._unavailable(TimeoutError(f"not done within {self._limit:.0f} s"))
        if self._window is not None:
            self._window.admit(self._written)
        self._written += len(data)
        self._pending = deadline.Task(self._bound("write", data))

    def complete(self) -> None:
        """Send what is left and publish."""
        self._settle()
        self._guarded(deadline.Task(self._bound("close")))
        self._stream = None

    def abort(self) -> None:
        """Drop the stream; once a write that still runs has ended, the client aborts the upload."""
        self._stream = self._pending = None

    def _bound(self, method: str, *arguments: bytes) -> Callable[[], None]:
        if self._stream is None:
            raise ValueError("the upload has ended")
        bound = getattr(self._stream, method)
        return lambda: bound(*arguments)

    def _settle(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._guarded(pending)

    def _guarded(self, task: deadline.Task[_T]) -> _T:
        try:
            return task.result(deadline.remaining(self._limit))
        except TierError:
            raise
        except TimeoutError as error:
            raise self._unavailable(error) from error
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
                self._ask_why()
                raise self._unavailable(error) from error
            raise

    def _ask_why(self) -> None:
        """Raise what S3 answers boto3 to the same request: the CRT client's one exception has only a text."""
        bucket, whole, sse = self._connection.bucket, self._whole, self._connection.sse()
        begun = self._connection.call(
            "CreateMultipartUpload", self._key, lambda c: c.create_multipart_upload(Bucket=bucket, Key=whole, **sse)
        )
        upload = begun["UploadId"]
        self._connection.call(
            "AbortMultipartUpload",
            self._key,
            lambda c: c.abort_multipart_upload(Bucket=bucket, Key=whole, UploadId=upload),
        )

    def _unavailable(self, error: BaseException) -> TierUnavailableError:
        where, tier = self._connection.where(self._key), self._connection.settings.name
        return TierUnavailableError(f"upload to {where}: {_unsigned(clean(error))}", tier=tier, key=self._key)


def _unsigned(text: str) -> str:
    """Return *text* without the query strings of addresses, which may be signed."""
    return re.sub(r"\?\S+", "?…", text)


class MultipartUpload:
    """An upload through boto3, with up to four parts under way; for what CRT can't send."""

    def __init__(self, connection: S3Connection, key: str, size: int) -> None:
        self._connection, self._key, self._whole = connection, key, connection.whole(key)
        self._part_bytes = part_bytes_for(size, connection.settings.part_bytes)
        self._limit = connection.settings.retry_deadline_secs + deadline.allowance(size)
        bucket, whole, sse = connection.bucket, self._whole, connection.sse()
        begun = connection.call(
            "CreateMultipartUpload", key, lambda c: c.create_multipart_upload(Bucket=bucket, Key=whole, **sse)
        )
        self._id = begun["UploadId"]
        self._buffer = bytearray()
        self._sent: list[Future[str]] = []
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="sm_tiered-upload")

    def write(self, data: bytes) -> None:
        """Buffer *data*; send each whole part."""
        view = memoryview(data)
        while view:
            room = self._part_bytes - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if len(self._buffer) == self._part_bytes:
                self._send()

    def _send(self) -> None:
        number, body, self._buffer = len(self._sent) + 1, self._buffer, bytearray()
        if number > _IN_FLIGHT:
            self._etag(self._sent[number - _IN_FLIGHT - 1])
        self._sent.append(self._pool.submit(self._put, number, body))

    def _put(self, number: int, body: bytearray) -> str:
        answer = self._connection.call(
            "UploadPart",
            self._key,
            lambda c: c.upload_part(
                Bucket=self._connection.bucket,
                Key=self._whole,
                UploadId=self._id,
                PartNumber=number,
                Body=cast(bytes, body),  # botocore takes both
            ),
            size=len(body),
        )
        return answer["ETag"]

    def _etag(self, sent: Future[str]) -> str:
        limit = deadline.remaining(self._limit)
        try:
            return sent.result(limit)
        except TimeoutError as error:
            where, tier = self._connection.where(self._key), self._connection.settings.name
            message = f"UploadPart {where}: no answer within {limit:.1f} s"
            raise TierUnavailableError(message, tier=tier, key=self._key) from error

    def complete(self) -> None:
        """Send the last part and publish."""
        if self._buffer:
            self._send()
        etags = [self._etag(sent) for sent in self._sent]
        listing: Any = {"Parts": [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(etags, 1)]}
        self._connection.call(
            "CompleteMultipartUpload",
            self._key,
            lambda c: c.complete_multipart_upload(
                Bucket=self._connection.bucket, Key=self._whole, UploadId=self._id, MultipartUpload=listing
            ),
        )
        self._pool.shutdown(wait=False)

    def abort(self) -> None:
        """Ask S3 to forget the parts; what it still keeps, `abort_stale_uploads` finds."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        try:
            self._connection.call(
                "AbortMultipartUpload",
                self._key,
                lambda c: c.abort_multipart_upload(Bucket=self._connection.bucket, Key=self._whole, UploadId=self._id),
            )
        except TierError as error:
            _log.info("sm_tiered: %s", error)
