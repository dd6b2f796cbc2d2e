"""From what boto3 raises to the errors of `sm_tiered.errors`: by type, status and code, never by text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any, cast

from botocore import exceptions as botocore_errors
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from sm_tiered.errors import (
    CorruptPartError,
    KeyExistsError,
    KeyNotFoundError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)

__all__ = ["FAILURES", "clean", "one_of_batch", "translate"]

FAILURES: tuple[type[Exception], ...] = (
    botocore_errors.BotoCoreError,
    botocore_errors.ClientError,
    ResponseParserError,
    HTTPError,
    HTTPException,
    OSError,
)
"""What a call of boto3, or reading its answer, raises when S3 or the way to it is at fault."""

_CHAIN = (
    "Credentials come from AWS's own chain: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the tier's "
    "`profile`, web identity, container or instance role; `aws sts get-caller-identity` shows what it finds."
)
_ALLOW = (
    "Allow s3:PutObject, s3:GetObject, s3:DeleteObject and s3:AbortMultipartUpload on the prefix, "
    "and s3:ListBucket on the bucket."
)
_REGION = "Set the tier's `region` to the bucket's."

_FULL = frozenset({"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "InsufficientCapacity"})
_EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_MISSING = frozenset({"NoSuchKey", "NotFound", "404"})
_REGION_CODES = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"})
_AGAIN = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "NoSuchUpload",
        "OperationAborted",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_NO_CREDENTIALS = (
    botocore_errors.NoCredentialsError,
    botocore_errors.PartialCredentialsError,
    botocore_errors.CredentialRetrievalError,
    botocore_errors.TokenRetrievalError,
    botocore_errors.SSOError,
    botocore_errors.ProfileNotFound,
    botocore_errors.ConfigParseError,
)

_ON_THE_WAY = (
    botocore_errors.ConnectionError,
    botocore_errors.HTTPClientError,
    botocore_errors.IncompleteReadError,
    botocore_errors.FlexibleChecksumError,
)


def clean(text: object, limit: int = 300) -> str:
    """Return *text* from outside as one printable line of at most *limit* characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def translate(error: BaseException, *, doing: str, where: str, tier: str, key: str | None) -> TierError:
    """Return *error*, one of `FAILURES`, as ours. *doing* is the S3 operation, *where* the ``s3://`` address."""
    if isinstance(error, botocore_errors.ClientError):
        return _answered(cast(Mapping[str, Any], error.response), doing=doing, where=where, tier=tier, key=key)
    name = type(error).__name__
    if isinstance(error, _NO_CREDENTIALS):
        return TierRefusedError(f"{doing} {where}: no usable AWS credentials ({name})", hint=_CHAIN, tier=tier, key=key)
    if isinstance(error, botocore_errors.SSLError):
        hint = "Check the endpoint's certificate; AWS_CA_BUNDLE names the authorities that are trusted."
        return TierRefusedError(f"{doing} {where}: no trusted TLS connection ({name})", hint=hint, tier=tier, key=key)
    if isinstance(error, botocore_errors.BotoCoreError) and not isinstance(error, _ON_THE_WAY):
        return TierRefusedError(f"{doing} {where}: {name}: {clean(error)}", tier=tier, key=key)
    # The text of these is left out: it may repeat an endpoint, a proxy or a signed URL.
    how = clean(error) if type(error) is TimeoutError else f"no whole answer ({name})"
    return TierUnavailableError(f"{doing} {where}: {how}", tier=tier, key=key)


def _answered(response: Mapping[str, Any], *, doing: str, where: str, tier: str, key: str | None) -> TierError:
    facts = cast(Mapping[str, Any], response.get("Error") or {})
    meta = cast(Mapping[str, Any], response.get("ResponseMetadata") or {})
    code, status = str(facts.get("Code", "")), int(meta.get("HTTPStatusCode") or 0)
    text = clean(facts.get("Message") or "no reason given")
    message = f"{doing} {where}: {status} {clean(code, 60)}: {text}"
    kind, hint = classify(code, status)
    if hint is _REGION:
        headers = cast(Mapping[str, str], meta.get("HTTPHeaders") or {})
        region = headers.get("x-amz-bucket-region") or facts.get("Region")
        hint = f"Set the tier's `region` to {clean(region, 40)!r}, where the bucket is." if region else _REGION
    return kind(message, hint=hint, tier=tier, key=key)


def classify(code: str, status: int) -> tuple[type[TierError], str | None]:
    """Return the class for an S3 error *code* and HTTP *status*, and what to do about it."""
    code = code.removeprefix("KMS.")
    refused = _refusal(code, status)
    if refused is not None:
        return TierRefusedError, refused or None
    if code in _FULL or status == 507:
        return TierFullError, "Free space in the bucket or raise its quota."
    if code == "PreconditionFailed" or status == 412:
        return KeyExistsError, None
    if code == "InvalidRange" or status == 416:
        return CorruptPartError, None
    if code in _AGAIN or status in (408, 409, 429) or (status >= 500 and status != 501) or status < 300:
        return TierUnavailableError, None
    if code in _MISSING or status == 404:
        return KeyNotFoundError, None
    return TierRefusedError, None


def _refusal(code: str, status: int) -> str | None:
    """Return the hint for what only a person can change, or None when it is something else."""
    if code == "NoSuchBucket":
        return "Create the bucket, or correct the tier's `uri`."
    if code in _REGION_CODES or status in (301, 307):
        return _REGION
    if code in _EXPIRED:
        return "The AWS session has expired: renew it. " + _CHAIN
    if code == "RequestTimeTooSkewed":
        return "Set this machine's clock."
    if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken") or status == 401:
        return _CHAIN
    if code == "AccessDenied" or status == 403:
        return _ALLOW
    return None


def one_of_batch(errors: Sequence[Mapping[str, Any]], *, where: str, tier: str) -> TierError:
    """Return one error for the keys that DeleteObjects kept: worth a retry if that is so for any of them."""
    # The answer as a whole was a 200; 400 stands for "a code that says no more than itself".
    kinds = [classify(str(error.get("Code", "")), 400) for error in errors]
    kind, hint = next((found for found in kinds if found[0] is TierUnavailableError), kinds[0])
    shown = ", ".join(f"{clean(e.get('Key'), 200)!r} ({clean(e.get('Code'), 60)})" for e in errors[:3])
    return kind(f"DeleteObjects {where}: {len(errors)} keys were not deleted: {shown}", hint=hint, tier=tier)
