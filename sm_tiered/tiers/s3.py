"""A prefix of an S3 bucket as a tier: conditional puts decide races, and a part appears whole or not at all."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from itertools import islice
from secrets import token_hex
from typing import TYPE_CHECKING, Any, cast

from sm_tiered import deadline
from sm_tiered.errors import (
    CorruptPartError,
    KeyExistsError,
    KeyNotFoundError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.layout import check_namespace
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.tiers.base import Blob, Chunks, Entry
from sm_tiered.tiers.conditions import check_conditions
from sm_tiered.tiers.s3_client import S3Connection
from sm_tiered.tiers.s3_errors import FAILURES, one_of_batch, translate
from sm_tiered.tiers.s3_read import RangeReader, drain_body
from sm_tiered.tiers.s3_upload import exactly, open_upload

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, PutObjectOutputTypeDef

    from sm_tiered.settings import S3Settings

__all__ = ["S3Tier"]

_BATCH = 1000
_SMALL_BYTES = 1024 * 1024
"""Up to here one PutObject is cheaper than the three requests of a multipart upload."""


class S3Tier:
    """``s3://<bucket>/<prefix>/<namespace>/``. It repeats nothing itself: wrap it in `RetryingTier`."""

    def __init__(self, settings: S3Settings, namespace: str, *, root: str | None = None) -> None:
        """Open it; nothing is asked yet. *root*: what all keys begin with, where another program chose that."""
        prefix = settings.prefix.strip("/")
        own = f"{prefix}/{check_namespace(namespace)}/" if prefix else f"{check_namespace(namespace)}/"
        self._root = own if root is None else root
        self._bucket = settings.bucket
        self._connection = S3Connection(settings, self._root)
        self._reader = RangeReader(self._connection)

    @property
    def name(self) -> str:
        """What the recipe calls it."""
        return self._connection.settings.name

    def list(self, prefix: str) -> list[Entry]:
        """Return every object whose key begins with *prefix*, in key order."""
        cut = len(self._root)
        found = [
            Entry(
                key=item["Key"][cut:],
                size=item["Size"],
                modified_at=item["LastModified"].timestamp(),
                version=item.get("ETag", ""),
            )
            for page in self._pages("list_objects_v2", prefix)
            for item in page.get("Contents", ())
            if not item["Key"].endswith("/")  # what the S3 console makes to stand for a directory
        ]
        return sorted(found, key=lambda entry: entry.key)

    def list_dirs(self, prefix: str) -> Sequence[str]:
        """Return the names directly below *prefix* that have keys below them."""
        cut = len(self._root) + len(prefix)
        return sorted(
            item["Prefix"][cut:-1]
            for page in self._pages("list_objects_v2", prefix, Delimiter="/")
            for item in page.get("CommonPrefixes", ())
        )

    def _pages(self, operation: str, prefix: str, **arguments: str) -> Iterator[dict[str, Any]]:
        """Yield the pages of a listing; every page is a request with a deadline of its own."""
        token: dict[str, str] = {}

        def ask(client: S3Client) -> dict[str, Any]:
            return getattr(client, operation)(Bucket=self._bucket, Prefix=self._root + prefix, **arguments, **token)

        while True:
            page = self._connection.call("ListBucket", prefix, ask)
            if "IsTruncated" not in page:
                message = f"ListBucket {self._connection.where(prefix)}: the answer is no listing"
                raise TierUnavailableError(message, tier=self.name, key=prefix or None)
            yield page
            if not page["IsTruncated"]:
                return
            last, token = token, _next_page(page)
            if token == last:
                message = f"ListBucket {self._connection.where(prefix)}: the listing does not advance"
                raise TierRefusedError(message, hint="Use a store that lists in pages.", tier=self.name)

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        """Return a small object; its version is the ETag."""
        whole = self._root + key
        answer: GetObjectOutputTypeDef = self._connection.call(
            "GetObject", key, lambda c: c.get_object(Bucket=self._bucket, Key=whole)
        )
        size = answer["ContentLength"]
        if size > max_bytes:
            answer["Body"].close()
            message = f"{self._connection.where(key)} is {size} bytes long, at most {max_bytes} were expected"
            raise CorruptPartError(message, tier=self.name, key=key)
        data = bytearray(size)
        limit = self._connection.settings.retry_deadline_secs + deadline.allowance(size)
        until = time.monotonic() + deadline.remaining(limit)
        try:
            drain_body(answer, memoryview(data), until, lambda: False)
        except EOFError as error:
            message = f"GetObject {self._connection.where(key)}: {error}"
            raise TierUnavailableError(message, tier=self.name, key=key) from error
        except FAILURES as error:
            where = self._connection.where(key)
            raise translate(error, doing="GetObject", where=where, tier=self.name, key=key) from error
        return Blob(data=bytes(data), version=answer["ETag"])

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *offset* on, by ranged requests."""
        self._reader.read_into(key, offset, buffer)

    def put(self, key: str, data: bytes) -> None:
        """Write a small object, in the place of what stood there."""
        self._put(key, data)

    def put_if_absent(self, key: str, data: bytes) -> None:
        """Write a small object unless something stands there."""
        self._put(key, data, IfNoneMatch="*")

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        """Write a small object in the place of the one whose ETag is *version*."""
        self._put(key, data, IfMatch=version)

    def _put(self, key: str, data: bytes, **condition: str) -> PutObjectOutputTypeDef:
        whole, extra = self._root + key, cast(Any, {**condition, **self._connection.sse()})
        return self._connection.call(
            "PutObject",
            key,
            lambda c: c.put_object(Bucket=self._bucket, Key=whole, Body=data, **extra),
            size=len(data),
        )

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        """Write a large object; what is not whole is aborted and never appears."""
        if size <= _SMALL_BYTES:
            self._put(key, b"".join(exactly(chunks(), size, key)))
            return
        upload = open_upload(self._connection, key, size)
        try:
            for data in exactly(chunks(), size, key):
                upload.write(data)
            upload.complete()
        except BaseException:
            upload.abort()
            raise
        self._verify(key, size)

    def _verify(self, key: str, size: int) -> None:
        whole = self._root + key
        head = self._connection.call("HeadObject", key, lambda c: c.head_object(Bucket=self._bucket, Key=whole))
        if head["ContentLength"] != size:
            message = f"{self._connection.where(key)} holds {head['ContentLength']} bytes after {size} were sent"
            raise TierUnavailableError(message, tier=self.name, key=key)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, 1,000 a request; those that S3 kept are named in the error."""
        rest, kept = iter(keys), list[Mapping[str, Any]]()
        while batch := list(islice(rest, _BATCH)):
            listing: Any = {"Objects": [{"Key": self._root + key} for key in batch], "Quiet": True}
            answer = self._connection.call(
                "DeleteObjects", "", lambda c, d=listing: c.delete_objects(Bucket=self._bucket, Delete=d)
            )
            kept.extend(cast(Mapping[str, Any], error) for error in answer.get("Errors", ()))
        if kept:
            raise one_of_batch(kept, where=self._connection.where(""), tier=self.name)

    def probe(self) -> None:
        """Write, read, list and delete a small object, and make sure that conditional puts are honoured.

        Raises:
            TierRefusedError: permission is missing, or the store ignores If-None-Match or If-Match.
        """
        key = f".probe-{token_hex(8)}"
        data = key.encode()
        self.put(key, data)
        try:
            blob = self.get(key, max_bytes=1024)
            if blob.data != data or [entry.key for entry in self.list(key)] != [key]:
                message = f"{self._connection.where(key)}: what was written is not what is read"
                raise TierRefusedError(message, hint="Use a store with read-after-write consistency.", tier=self.name)
            self._probe_conditions(key, data, blob.version)
        finally:
            self.delete([key])

    def _probe_conditions(self, key: str, data: bytes, version: str) -> None:
        check_conditions(self, key)
        try:
            self.replace(key, data + b".", version=version)
        except (KeyExistsError, KeyNotFoundError) as error:
            message = f"{self._connection.where('')}: the store refuses If-Match with the right ETag"
            raise TierRefusedError(message, hint="Use a store with conditional writes.", tier=self.name) from error

    def abort_stale_uploads(self, older_than_secs: float, *, count_only: bool = False) -> int:
        """Abort this namespace's unfinished multipart uploads that began longer ago by S3's clock; return how many.

        An upload that is still running fails then and is begun again: leave it more time than a part takes.
        *count_only*: abort none.
        """
        found = 0
        for page in self._pages("list_multipart_uploads", ""):
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for upload in page.get("Uploads", ()):
                if (now - upload["Initiated"]).total_seconds() >= older_than_secs:
                    found += 1
                    if not count_only:
                        self._abort(upload["Key"], upload["UploadId"])
        return found

    def _abort(self, whole: str, upload: str) -> None:
        self._connection.call(
            "AbortMultipartUpload",
            whole.removeprefix(self._root),
            lambda c: c.abort_multipart_upload(Bucket=self._bucket, Key=whole, UploadId=upload),
        )

    def close(self) -> None:
        """Free connections and threads; a later call makes new ones."""
        self._reader.close()
        self._connection.close()


def _next_page(page: Mapping[str, Any]) -> dict[str, str]:
    if "NextContinuationToken" in page:
        return {"ContinuationToken": page["NextContinuationToken"]}
    markers = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
    return {name: value for name, value in markers.items() if value}
