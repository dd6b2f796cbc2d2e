"""Ranged reads straight into the caller's memory; nothing writes there any more once the call has ended."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from sm_tiered import deadline
from sm_tiered.errors import CorruptPartError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.tiers.s3_client import S3Connection
from sm_tiered.tiers.s3_errors import FAILURES, clean, translate

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

__all__ = ["RANGE_BYTES", "RangeReader", "drain_body"]

RANGE_BYTES = 32 * 1024 * 1024
_RECEIVE_BYTES = 1024 * 1024
_THREADS = 4
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)", re.ASCII)


class _Cancelled(TimeoutError):
    """Another range of the same read has failed."""


def drain_body(answer: GetObjectOutputTypeDef, view: memoryview, until: float, cancelled: Callable[[], bool]) -> None:
    """Fill *view* from the body of *answer*, looking at the clock after each packet.

    Raises:
        TimeoutError: *until* (of `time.monotonic`) has passed, however steadily the bytes drip.
        EOFError: the body ended early.
    """
    # One receive a call: `readinto` and `read` wait until they have all that was asked for, byte by byte if need be.
    raw: Any = getattr(answer["Body"], "_raw_stream", answer["Body"])
    receive: Callable[[int], bytes] = getattr(raw, "read1", None) or raw.read
    done, size = 0, len(view)
    try:
        while done < size:
            data = receive(min(size - done, _RECEIVE_BYTES))
            if not data:
                raise EOFError(f"the answer ended after {done} of {size} bytes")
            view[done : done + len(data)] = data
            done += len(data)
            if done < size and time.monotonic() > until:
                raise TimeoutError(f"only {done} of {size} bytes had come when the deadline passed")
            if cancelled():
                raise _Cancelled
    except BaseException:
        answer["Body"].close()  # the connection can't be used again
        raise


class RangeReader:
    """Reads byte ranges of objects of one bucket, large ones over up to four connections."""

    def __init__(self, connection: S3Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* from *key*. Raises as `Tier.read_into` does."""
        view = buffer.cast("B")
        if not view:
            self._head(key)
        elif self._connection.settings.reader == "crt":
            self._read_crt(key, offset, view)
        else:
            self._read_boto3(key, offset, view)

    def _head(self, key: str) -> HeadObjectOutputTypeDef:
        bucket, whole = self._connection.bucket, self._connection.whole(key)
        return self._connection.call("HeadObject", key, lambda c: c.head_object(Bucket=bucket, Key=whole))

    def _read_boto3(self, key: str, offset: int, view: memoryview) -> None:
        limit = deadline.remaining(self._connection.settings.retry_deadline_secs + deadline.allowance(len(view)))
        until, failed = time.monotonic() + limit, threading.Event()
        if len(view) <= RANGE_BYTES:
            self._read_range(key, offset, view, until, failed)
            return
        pool = self._threads()
        ranges: list[Future[None]] = [
            pool.submit(self._read_range, key, offset + at, view[at : at + RANGE_BYTES], until, failed)
            for at in range(0, len(view), RANGE_BYTES)
        ]
        # Waited for to the last one: a range that still ran would write into memory that is the caller's again.
        errors = [error for error in (one.exception() for one in ranges) if error is not None]
        first = next((error for error in errors if not isinstance(error.__cause__, _Cancelled)), None)
        if first is not None or errors:
            raise first or errors[0]

    def _read_range(self, key: str, offset: int, view: memoryview, until: float, failed: threading.Event) -> None:
        try:
            with deadline.within(until - time.monotonic()):
                self._get_range(key, offset, view, until, failed.is_set)
        except BaseException:
            failed.set()
            raise

    def _get_range(self, key: str, offset: int, view: memoryview, until: float, cancelled: Callable[[], bool]) -> None:
        connection, whole, last = self._connection, self._connection.whole(key), offset + len(view) - 1
        if cancelled():
            raise TierUnavailableError("another range failed", key=key) from _Cancelled()
        answer = connection.call(
            "GetObject",
            key,
            lambda c: c.get_object(Bucket=connection.bucket, Key=whole, Range=f"bytes={offset}-{last}"),
        )
        self._check_range(answer, key, offset, len(view))
        try:
            drain_body(answer, view, until, cancelled)
        except EOFError as error:
            raise self._short(key, str(error)) from error
        except FAILURES as error:
            where, tier = connection.where(key), connection.settings.name
            raise translate(error, doing="GetObject", where=where, tier=tier, key=key) from error

    def _check_range(self, answer: GetObjectOutputTypeDef, key: str, offset: int, size: int) -> None:
        """The server must have understood the range; a whole object in its place would be read as the wrong bytes."""
        tier = self._connection.settings.name
        found = _CONTENT_RANGE.fullmatch(answer.get("ContentRange", ""))
        if found is None or int(found[1]) != offset:
            if found is None and offset == 0 and answer["ContentLength"] == size:
                return
            answer["Body"].close()
            raise TierRefusedError(
                f"GetObject {self._connection.where(key)}: the server ignores Range ({clean(found and found[0])})",
                hint="Use a store that answers ranged reads.",
                tier=tier,
                key=key,
            )
        if answer["ContentLength"] != size:
            answer["Body"].close()
            if found[3] != "*" and int(found[3]) < offset + size:
                message = f"{self._connection.where(key)} ends at {found[3]}, {offset + size} bytes were expected"
                raise CorruptPartError(message, tier=tier, key=key)
            raise self._short(key, f"{answer['ContentLength']} of {size} bytes were announced")

    def _short(self, key: str, how: str) -> TierUnavailableError:
        where, tier = self._connection.where(key), self._connection.settings.name
        return TierUnavailableError(f"GetObject {where}: {how}", tier=tier, key=key)

    def _read_crt(self, key: str, offset: int, view: memoryview) -> None:
        from s3torchconnector import S3ReaderConstructor
        from s3torchconnectorclient._mountpoint_s3_client import ObjectInfo

        connection, bucket, whole = self._connection, self._connection.bucket, self._connection.whole(key)
        facts = self._head(key)
        size = facts["ContentLength"]
        if offset + len(view) > size:
            message = f"{connection.where(key)} ends at {size}, {offset + len(view)} bytes were expected"
            raise CorruptPartError(message, tier=connection.settings.name, key=key)
        info = ObjectInfo(whole, facts["ETag"], size, int(facts["LastModified"].timestamp()), None, None)
        unbuffered = S3ReaderConstructor.range_based(buffer_size=0)
        # Through memory of its own: a call that overran its deadline may still write there.
        bounce = memoryview(bytearray(min(RANGE_BYTES, len(view))))

        def read(at: int, piece: memoryview) -> int:
            crt = connection.crt(max(connection.settings.part_bytes, 5 * 1024 * 1024))
            reader = crt.get_object(bucket, whole, object_info=info, reader_constructor=unbuffered)
            reader.seek(at)
            return cast(int, cast(Any, reader).readinto(piece))

        limit = connection.settings.retry_deadline_secs + deadline.allowance(len(view))
        with deadline.within(limit):
            for at in range(0, len(view), RANGE_BYTES):
                piece = bounce[: min(RANGE_BYTES, len(view) - at)]
                self._crt_piece(
                    key, deadline.Task(lambda at=at, piece=piece: read(offset + at, piece)), len(piece), limit
                )
                view[at : at + len(piece)] = piece

    def _crt_piece(self, key: str, task: deadline.Task[int], size: int, limit: float) -> None:
        try:
            done = task.result(deadline.remaining(limit))
        except TierError:
            raise
        except BaseException as error:
            if isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime":
                raise self._short(key, clean(error)) from error
            raise
        if done != size:
            raise self._short(key, f"the answer ended after {done} of {size} bytes")

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="sm_tiered-read")
            return self._pool

    def close(self) -> None:
        """End the threads; the next large read makes new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False)
