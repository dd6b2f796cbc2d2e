"""Whether S3 lets us do what a job will do: each operation once, under the namespace's own prefix, and cleaned up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sm_tiered.errors import KeyExistsError, TierError, TierRefusedError, TierUnavailableError
from sm_tiered.layout import check_namespace
from sm_tiered.tiers.s3_client import S3Connection

if TYPE_CHECKING:
    from sm_tiered.settings import S3Settings

__all__ = ["Credentials", "Probed", "S3Probe", "credentials_of"]

_T = TypeVar("_T")
_NO_ETAG = '"0123456789abcdef0123456789abcdef"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Where AWS's chain found credentials; nothing of what they are."""

    method: str | None
    """As botocore calls the provider; None: none has any."""
    tried: tuple[str, ...]
    """All providers, in the order in which they are asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """One operation."""

    operation: str
    permission: str
    error: TierError | None
    """None: it works."""
    tried: bool = True
    note: str = ""


def credentials_of(profile: str | None) -> Credentials:
    """Ask AWS's chain.

    Raises:
        TierRefusedError: it can't be asked, because its configuration is wrong.
    """
    import boto3
    from botocore.exceptions import BotoCoreError

    try:
        session: Any = boto3.Session(profile_name=profile)
        resolver = session._session.get_component("credential_provider")
        tried = tuple(str(provider.METHOD) for provider in resolver.providers)
        found = session.get_credentials()
    except BotoCoreError as error:
        raise TierRefusedError(f"AWS's credential chain: {type(error).__name__}: {error}") from error
    return Credentials(method=None if found is None else str(found.method), tried=tried)


class S3Probe:
    """Probes one tier. Use `run`, then `close`."""

    def __init__(self, settings: S3Settings, namespace: str) -> None:
        prefix = settings.prefix.strip("/")
        root = f"{prefix}/{check_namespace(namespace)}/" if prefix else f"{check_namespace(namespace)}/"
        self._connection = S3Connection(settings, root)
        self._bucket = settings.bucket
        self._key = f".doctor-{token_hex(8)}"
        self._done: list[Probed] = []
        self.server_time: float | None = None
        """UTC seconds by S3's clock, when it answered the first request."""
        self.old_uploads = 0
        """Multipart uploads of this namespace that began more than a day ago and never ended."""

    def run(self) -> list[Probed]:
        """Try everything; what could only fail too is left out, and told so."""
        listed = self._try("ListBucket", "s3:ListBucket", self._list)
        if isinstance(listed, TierUnavailableError):
            return [*self._done, self._left_out("everything else", "", "S3 does not answer")]
        written = self._try("PutObject", "s3:PutObject", self._put)
        if written is None:
            self._try("conditional PutObject", "s3:PutObject", self._conditions)
            self._try("GetObject", "s3:GetObject", self._get)
        else:
            for operation in ("conditional PutObject", "GetObject"):
                self._done.append(self._left_out(operation, "", "nothing could be written"))
        self._multipart()
        if written is None:
            self._try("DeleteObjects", "s3:DeleteObject", self._delete)
        else:
            self._done.append(self._left_out("DeleteObjects", "s3:DeleteObject", "nothing could be written"))
        return self._done

    def close(self) -> None:
        """Free connections."""
        self._connection.close()

    def _try(self, operation: str, permission: str, action: Callable[[], str | None]) -> TierError | None:
        note, failure = "", None
        try:
            note = action() or ""
        except TierError as error:
            failure = error
        self._done.append(Probed(operation=operation, permission=permission, error=failure, note=note))
        return failure

    def _left_out(self, operation: str, permission: str, why: str) -> Probed:
        return Probed(operation=operation, permission=permission, error=None, tried=False, note=f"not tried: {why}")

    def _call(self, doing: str, send: Callable[[Any], _T]) -> _T:
        return self._connection.call(doing, self._key, send)

    @property
    def _whole(self) -> str:
        return self._connection.whole(self._key)

    def _list(self) -> None:
        root = self._connection.root
        answer = self._call("ListBucket", lambda c: c.list_objects_v2(Bucket=self._bucket, Prefix=root, MaxKeys=1))
        date = cast("Mapping[str, str]", answer["ResponseMetadata"]["HTTPHeaders"]).get("date")
        self.server_time = parsedate_to_datetime(date).timestamp() if date else None

    def _put(self, **condition: str) -> str | None:
        extra = {**condition, **self._connection.sse()}
        data = token_hex(8).encode()
        self._call("PutObject", lambda c: c.put_object(Bucket=self._bucket, Key=self._whole, Body=data, **extra))
        return None

    def _conditions(self) -> str | None:
        """If-None-Match and If-Match must be refused where they do not hold, and If-Match accepted where it does."""
        for name, condition in (("If-None-Match", {"IfNoneMatch": "*"}), ("If-Match", {"IfMatch": _NO_ETAG})):
            try:
                self._put(**condition)
            except KeyExistsError:
                continue
            hint = "Two jobs could not be kept apart there. Use a store with conditional writes, e.g. Amazon S3."
            raise TierRefusedError(f"the store ignores {name}", hint=hint, tier=self._connection.settings.name)
        head = self._call("HeadObject", lambda c: c.head_object(Bucket=self._bucket, Key=self._whole))
        try:
            self._put(IfMatch=head["ETag"])
        except KeyExistsError as error:
            hint = "Use a store with conditional writes."
            raise TierRefusedError("the store refuses If-Match with the right ETag", hint=hint) from error
        return "If-None-Match and If-Match are honoured"

    def _get(self) -> None:
        answer = self._call("GetObject", lambda c: c.get_object(Bucket=self._bucket, Key=self._whole))
        answer["Body"].close()

    def _multipart(self) -> None:
        upload: list[str] = []

        def begin() -> None:
            sse = self._connection.sse()
            made = self._call(
                "CreateMultipartUpload",
                lambda c: c.create_multipart_upload(Bucket=self._bucket, Key=self._whole, **sse),
            )
            upload.append(made["UploadId"])

        def abort() -> None:
            self._call(
                "AbortMultipartUpload",
                lambda c: c.abort_multipart_upload(Bucket=self._bucket, Key=self._whole, UploadId=upload[0]),
            )

        begun = self._try("CreateMultipartUpload", "s3:PutObject", begin)
        self._try("ListMultipartUploads", "s3:ListBucketMultipartUploads", self._list_uploads)
        if begun is None:
            self._try("AbortMultipartUpload", "s3:AbortMultipartUpload", abort)

    def _list_uploads(self) -> None:
        root = self._connection.root
        page = self._call("ListMultipartUploads", lambda c: c.list_multipart_uploads(Bucket=self._bucket, Prefix=root))
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        others = [upload for upload in page.get("Uploads", ()) if upload["Key"] != self._whole]
        ages = [(now - upload["Initiated"]).total_seconds() for upload in others]
        self.old_uploads = sum(age > 86400 for age in ages)

    def _delete(self) -> str | None:
        listing: Any = {"Objects": [{"Key": self._whole}], "Quiet": True}
        answer = self._call("DeleteObjects", lambda c: c.delete_objects(Bucket=self._bucket, Delete=listing))
        for error in answer.get("Errors", ()):
            text = f"{self._connection.where(self._key)} stays: {error.get('Code')}"
            raise TierRefusedError(text, hint="Allow s3:DeleteObject on the prefix, and remove it.")
        return None
