"""What S3 says, as one of our types; what to do about it; and nothing that must stay secret."""

from __future__ import annotations

import pytest
from botocore import exceptions as botocore_errors

from sm_tiered.errors import (
    CorruptPartError,
    KeyExistsError,
    KeyNotFoundError,
    TierError,
    TierFullError,
    TierRefusedError,
    TierUnavailableError,
)
from sm_tiered.tiers.s3_errors import clean, one_of_batch, translate


def answered(status: int, code: str, **more: object) -> botocore_errors.ClientError:
    meta = {"HTTPStatusCode": status, "HTTPHeaders": more.get("headers", {})}
    error = {"Code": code, "Message": "said the server"}
    return botocore_errors.ClientError({"Error": error, "ResponseMetadata": meta}, "GetObject")  # type: ignore[arg-type]


def told(error: BaseException) -> TierError:
    return translate(error, doing="GetObject", where="s3://b/k", tier="s3", key="k")


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "NoSuchKey", KeyNotFoundError),
        (404, "404", KeyNotFoundError),
        (404, "NoSuchBucket", TierRefusedError),
        (404, "NoSuchUpload", TierUnavailableError),
        (412, "PreconditionFailed", KeyExistsError),
        (409, "ConditionalRequestConflict", TierUnavailableError),
        (416, "InvalidRange", CorruptPartError),
        (403, "AccessDenied", TierRefusedError),
        (403, "403", TierRefusedError),
        (400, "ExpiredToken", TierRefusedError),
        (403, "InvalidAccessKeyId", TierRefusedError),
        (403, "SignatureDoesNotMatch", TierRefusedError),
        (401, "Unauthorized", TierRefusedError),
        (403, "RequestTimeTooSkewed", TierRefusedError),
        (301, "PermanentRedirect", TierRefusedError),
        (301, "301", TierRefusedError),
        (400, "AuthorizationHeaderMalformed", TierRefusedError),
        (405, "MethodNotAllowed", TierRefusedError),
        (501, "NotImplemented", TierRefusedError),
        (400, "KMS.DisabledException", TierRefusedError),
        (400, "KMS.ThrottlingException", TierUnavailableError),
        (400, "RequestTimeout", TierUnavailableError),
        (429, "TooManyRequests", TierUnavailableError),
        (500, "InternalError", TierUnavailableError),
        (503, "SlowDown", TierUnavailableError),
        (502, "502", TierUnavailableError),
        (200, "InternalError", TierUnavailableError),
        (507, "InsufficientStorage", TierFullError),
        (403, "QuotaExceeded", TierRefusedError),
        (400, "QuotaExceeded", TierFullError),
    ],
)
def test_an_answer_is_an_error_of_one_type(status: int, code: str, kind: type[TierError]) -> None:
    error = told(answered(status, code))
    assert type(error) is kind
    assert error.facts() == {"tier": "s3", "key": "k"}
    assert f"{status} {code}: said the server" in str(error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (botocore_errors.EndpointConnectionError(endpoint_url="http://u:p@h"), TierUnavailableError),
        (botocore_errors.ConnectTimeoutError(endpoint_url="http://u:p@h"), TierUnavailableError),
        (botocore_errors.ReadTimeoutError(endpoint_url="http://u:p@h"), TierUnavailableError),
        (botocore_errors.ConnectionClosedError(endpoint_url="http://u:p@h"), TierUnavailableError),
        (botocore_errors.ProxyConnectionError(proxy_url="http://u:p@h"), TierUnavailableError),
        (botocore_errors.IncompleteReadError(actual_bytes=1, expected_bytes=2), TierUnavailableError),
        (TimeoutError("no answer within 1.0 s"), TierUnavailableError),
        (ConnectionResetError(104, "reset"), TierUnavailableError),
        (botocore_errors.NoCredentialsError(), TierRefusedError),
        (botocore_errors.PartialCredentialsError(provider="env", cred_var="x"), TierRefusedError),
        (botocore_errors.ProfileNotFound(profile="nope"), TierRefusedError),
        (botocore_errors.SSLError(endpoint_url="http://u:p@h", error=OSError("verify")), TierRefusedError),
        (botocore_errors.NoRegionError(), TierRefusedError),
        (botocore_errors.ParamValidationError(report="bad"), TierRefusedError),
    ],
)
def test_no_answer_is_an_error_of_one_type_without_addresses(error: Exception, kind: type[TierError]) -> None:
    found = told(error)
    assert type(found) is kind
    assert "u:p" not in str(found)


def test_missing_credentials_name_the_chain() -> None:
    assert "AWS_PROFILE" in str(told(botocore_errors.NoCredentialsError()))


def test_a_redirect_names_the_region() -> None:
    error = told(answered(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-1"}))
    assert "'eu-west-1'" in str(error)


def test_text_from_outside_is_one_short_line() -> None:
    assert clean("a\x1b[31m\nb") == "a [31m b"
    assert len(clean("x" * 5000)) == 300


def test_a_batch_is_worth_a_retry_when_any_key_is() -> None:
    errors = [{"Key": "a", "Code": "AccessDenied"}, {"Key": "b", "Code": "SlowDown"}]
    assert isinstance(one_of_batch(errors[:1], where="s3://b/", tier="s3"), TierRefusedError)
    error = one_of_batch(errors, where="s3://b/", tier="s3")
    assert isinstance(error, TierUnavailableError)
    assert "2 keys were not deleted: 'a' (AccessDenied), 'b' (SlowDown)" in str(error)
