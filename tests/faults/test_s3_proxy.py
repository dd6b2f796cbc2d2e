"""S3 that fails, lies, drips or falls silent: what comes back is right, or a typed error in time."""

from __future__ import annotations

import dataclasses
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sm_tiered import layout
from sm_tiered.errors import TierError, TierRefusedError, TierUnavailableError
from sm_tiered.group import SoloGroup
from sm_tiered.settings import S3Settings
from sm_tiered.testing.contract import chunked, payload
from sm_tiered.testing.proxy import FaultProxy, Rule
from sm_tiered.tiers import Tier, open_tier
from sm_tiered.tiers.conditions import check_conditions
from tests.faults.core_jobs import Job, s3_fields

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1024 * 1024
ROOT = "some/prefix/run-1/"
SEED = b'{"seed": 1}'
DEADLINE_SECS = 2.0


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_endpoint) as running:
        yield running
    # Calls that overran their deadline end once the server is gone: nothing is left behind for good.
    for thread in threading.enumerate():
        if thread.name == "sm_tiered-call":
            thread.join(20)
            assert not thread.is_alive()


@dataclasses.dataclass
class Rig:
    """A tier behind the proxy, and a client past both."""

    tier: Tier
    proxy: FaultProxy
    client: S3Client
    settings: S3Settings

    def stored(self, key: str) -> bytes | None:
        found = {
            item.get("Key") for item in self.client.list_objects_v2(Bucket=self.settings.bucket).get("Contents", [])
        }
        if ROOT + key not in found:
            return None
        return self.client.get_object(Bucket=self.settings.bucket, Key=ROOT + key)["Body"].read()

    def clean(self) -> None:
        for item in self.client.list_objects_v2(Bucket=self.settings.bucket).get("Contents", []):
            self.client.delete_object(Bucket=self.settings.bucket, Key=item.get("Key", ""))


def make_rig(make: Callable[..., S3Settings], proxy: FaultProxy, client: S3Client, **changes: Any) -> Rig:
    proxy.restart()
    settings = make(
        **{
            "endpoint_url": proxy.url,
            "request_timeout_secs": 0.5,
            "retry_deadline_secs": DEADLINE_SECS,
            "part_bytes": 5 * MIB,
            **changes,
        }
    )
    return Rig(tier=open_tier(settings, "run-1"), proxy=proxy, client=client, settings=settings)


@pytest.fixture(scope="module")
def shared_rig(make_s3_settings: Callable[..., S3Settings], proxy: FaultProxy, s3_client: S3Client) -> Rig:
    return make_rig(make_s3_settings, proxy, s3_client)


@pytest.fixture
def rig(shared_rig: Rig) -> Rig:
    shared_rig = dataclasses.replace(shared_rig)
    shared_rig.proxy.restart()
    shared_rig.clean()
    shared_rig.client.put_object(Bucket=shared_rig.settings.bucket, Key=ROOT + "seed", Body=SEED)
    return shared_rig


def put(rig: Rig) -> None:
    rig.tier.put("k", b"value")
    assert rig.stored("k") == b"value"


def get(rig: Rig) -> None:
    assert rig.tier.get("seed").data == SEED
    buffer = bytearray(4)
    rig.tier.read_into("seed", 3, memoryview(buffer))
    assert bytes(buffer) == SEED[3:7]


def list_keys(rig: Rig) -> None:
    assert [entry.key for entry in rig.tier.list("")] == ["seed"]


def commit(rig: Rig) -> None:
    rig.tier.put_if_absent("manifest.json", b"mine")
    assert rig.stored("manifest.json") == b"mine"


OPERATIONS = [put, get, list_keys, commit]
PASSING = {
    "503 SlowDown twice": Rule(kind="status", times=2),
    "500 twice": Rule(kind="status", status=500, code="InternalError", times=2),
    "429 with Retry-After": Rule(
        kind="status", status=429, code="TooManyRequests", headers=(("retry-after", "1"),), times=1
    ),
    "409 conflict": Rule(kind="status", status=409, code="ConditionalRequestConflict", times=1),
    "400 RequestTimeout": Rule(kind="status", status=400, code="RequestTimeout", times=1),
    "200 and an error": Rule(kind="status", status=200, text="<Error><Code>Internal", times=1),
    "reset at once": Rule(kind="reset", times=1),
    "reset in the headers": Rule(kind="reset", at=30, times=1),
    "cut body": Rule(kind="truncate", at=3, times=1),
    "body cut to nothing": Rule(kind="truncate", times=1),
    "half open": Rule(kind="half_open", times=1),
    "ack lost": Rule(kind="ack_lost", times=1),
}
REFUSED = {
    "403": (Rule(kind="status", status=403, code="AccessDenied"), "s3:PutObject"),
    "403 expired": (Rule(kind="status", status=403, code="ExpiredToken"), "expired"),
    "403 key id": (Rule(kind="status", status=403, code="InvalidAccessKeyId"), "AWS_PROFILE"),
    "403 clock": (Rule(kind="status", status=403, code="RequestTimeTooSkewed"), "clock"),
    "404 bucket": (Rule(kind="status", status=404, code="NoSuchBucket"), "Create the bucket"),
    "400": (Rule(kind="status", status=400, code="InvalidRequest"), "InvalidRequest"),
    "501": (Rule(kind="status", status=501, code="NotImplemented"), "NotImplemented"),
    "301": (
        Rule(kind="status", status=301, code="PermanentRedirect", headers=(("x-amz-bucket-region", "eu-west-1"),)),
        "eu-west-1",
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", [name for name in PASSING if name != "200 and an error"])
def test_a_fault_that_passes_is_not_noticed(rig: Rig, fault: str, operation: Callable[[Rig], None]) -> None:
    rig.proxy.restart(PASSING[fault])
    operation(rig)
    assert rig.proxy.fired


def test_half_a_listing_under_a_200_is_asked_for_again(rig: Rig) -> None:
    rig.proxy.restart(PASSING["200 and an error"])
    list_keys(rig)
    assert rig.proxy.fired


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_is_told_at_once_with_what_to_do(rig: Rig, fault: str, operation: Callable[[Rig], None]) -> None:
    rule, words = REFUSED[fault]
    rig.proxy.restart(rule)
    with pytest.raises(TierRefusedError) as caught:
        operation(rig)
    assert words in str(caught.value)
    assert "s3://" in str(caught.value)
    # After a 301 botocore tries the region that the answer names, once.
    assert len(rig.proxy.requests) <= (2 if fault == "301" else 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "rule",
    [
        Rule(kind="slow", pause_secs=0.2),
        Rule(kind="half_open"),
        Rule(kind="status"),
        Rule(kind="reset", at=20),
    ],
    ids=lambda rule: rule.kind,
)
def test_a_fault_that_stays_is_an_error_within_the_deadline(
    rig: Rig, rule: Rule, operation: Callable[[Rig], None]
) -> None:
    rig.tier = open_tier(dataclasses.replace(rig.settings, retry_deadline_secs=0.8), "run-1")
    rig.proxy.restart(rule)
    began = time.monotonic()
    with pytest.raises(TierUnavailableError):
        operation(rig)
    assert time.monotonic() - began < 0.8 + 1.0


@pytest.mark.parametrize("at", [0, 60, 147])
def test_a_cut_answer_to_a_deletion_is_not_success(rig: Rig, at: int) -> None:
    rig.proxy.restart(Rule(kind="truncate", at=at, times=1))
    rig.tier.delete(["seed"])
    assert len(rig.proxy.requests) == 2


def test_an_empty_body_is_not_an_empty_listing(rig: Rig) -> None:
    rig.proxy.restart(Rule(kind="status", status=200, text="", times=2))
    list_keys(rig)
    assert len(rig.proxy.requests) == 3


def test_a_body_that_drips_is_cut_although_every_read_brings_a_byte(rig: Rig) -> None:
    rig.client.put_object(Bucket=rig.settings.bucket, Key=ROOT + "p", Body=payload(MIB))
    rig.proxy.restart(Rule(kind="slow", pause_secs=0.0005))
    began, buffer = time.monotonic(), bytearray(MIB)
    with pytest.raises(TierUnavailableError, match="bytes had come when the deadline passed"):
        rig.tier.read_into("p", 0, memoryview(buffer))
    assert time.monotonic() - began < DEADLINE_SECS + 1.0
    after = bytes(buffer)
    time.sleep(0.2)
    assert bytes(buffer) == after, "something still writes into the caller's memory"


def test_giving_up_tells_tries_and_seconds(rig: Rig) -> None:
    rig.proxy.restart(Rule(kind="status"))
    with pytest.raises(TierUnavailableError, match=r"503 SlowDown.*gave up after 4 tries in \d+\.\d s"):
        rig.tier.put("k", b"value")
    assert len(rig.proxy.requests) == 4


def put_part(rig: Rig) -> None:
    data = payload(6 * MIB)
    rig.tier.put_part("part", chunked(data, 3 * MIB), len(data))
    assert rig.stored("part") == data


def put_empty_part(rig: Rig) -> None:
    rig.tier.put_part("part", chunked(b""), 0)
    assert rig.stored("part") == b""


def put_small_part(rig: Rig) -> None:
    rig.tier.put_part("part", chunked(b"small"), 5)
    assert rig.stored("part") == b"small"


def replace(rig: Rig) -> None:
    rig.client.put_object(Bucket=rig.settings.bucket, Key=ROOT + "seed", Body=SEED)
    rig.tier.replace("seed", b"tombstone", version=rig.tier.get("seed").version)
    assert rig.stored("seed") == b"tombstone"


def delete(rig: Rig) -> None:
    rig.client.put_object(Bucket=rig.settings.bucket, Key=ROOT + "seed", Body=SEED)
    rig.tier.delete(["seed", "other"])
    assert rig.stored("seed") is None


def loop_until_clean(rig: Rig, operation: Callable[[Rig], None], rule: Rule) -> int:
    """Let each request in turn meet *rule*; return how many there were."""
    for index in count(1):
        rig.clean()
        rig.client.put_object(Bucket=rig.settings.bucket, Key=ROOT + "seed", Body=SEED)
        rig.proxy.restart(dataclasses.replace(rule, first=index, times=1))
        operation(rig)
        if not rig.proxy.fired:
            return index - 1
    raise AssertionError


@pytest.mark.parametrize(
    ("operation", "at_least"),
    [(put_part, 5), (put_small_part, 1), (put_empty_part, 1), (commit, 1), (put, 1), (replace, 2), (delete, 1)],
)
def test_a_lost_answer_at_any_request_is_no_failure(rig: Rig, operation: Callable[[Rig], None], at_least: int) -> None:
    assert loop_until_clean(rig, operation, Rule(kind="ack_lost")) >= at_least


def test_a_503_at_any_request_of_a_part_is_no_failure(rig: Rig) -> None:
    assert loop_until_clean(rig, put_part, Rule(kind="status")) >= 5


def test_a_lost_answer_at_any_request_of_an_encrypted_part_is_no_failure(
    make_s3_settings: Callable[..., S3Settings], proxy: FaultProxy, s3_client: S3Client
) -> None:
    rig = make_rig(make_s3_settings, proxy, s3_client, sse_kms_key_id="alias/k")
    assert loop_until_clean(rig, put_part, Rule(kind="ack_lost")) >= 5


def test_a_second_commit_after_a_lost_answer_still_loses(rig: Rig) -> None:
    rig.client.put_object(Bucket=rig.settings.bucket, Key=ROOT + "manifest.json", Body=b"theirs")
    rig.proxy.restart(Rule(kind="ack_lost", times=1))
    with pytest.raises(FileExistsError):
        rig.tier.put_if_absent("manifest.json", b"mine")
    assert rig.stored("manifest.json") == b"theirs"


@pytest.mark.parametrize("kind", ["half_open", "status", "slow"])
def test_a_part_that_cannot_be_sent_ends_in_time_and_never_appears(
    make_s3_settings: Callable[..., S3Settings], proxy: FaultProxy, s3_client: S3Client, kind: Any
) -> None:
    rig = make_rig(make_s3_settings, proxy, s3_client, retry_attempts=1, retry_deadline_secs=2.0)
    data = payload(6 * MIB)
    rig.proxy.restart(Rule(kind=kind, match=("partNumber=2",), pause_secs=0.2))
    began = time.monotonic()
    with pytest.raises(TierUnavailableError):
        rig.tier.put_part("part", chunked(data), len(data))
    assert time.monotonic() - began < 2.0 + 6 / 4 + 1.0
    rig.proxy.restart()
    assert rig.stored("part") is None


def test_a_refused_upload_is_told_as_refused_although_crt_has_only_a_text(rig: Rig) -> None:
    rig.proxy.restart(Rule(kind="status", status=403, code="AccessDenied", match=("POST", "uploads")))
    with pytest.raises(TierRefusedError, match="403 AccessDenied") as caught:
        rig.tier.put_part("part", chunked(payload(6 * MIB)), 6 * MIB)
    assert caught.value.key == "part"


def test_no_credential_is_in_any_message(
    make_s3_settings: Callable[..., S3Settings],
    proxy: FaultProxy,
    s3_client: S3Client,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secrets = ["AKIASENTINELSENTINEL", "secret-sentinel/42", "token-sentinel-42"]
    for name, value in zip(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), secrets, strict=True):
        monkeypatch.setenv(f"AWS_{name}", value)
    rig = make_rig(make_s3_settings, proxy, s3_client, retry_attempts=2, retry_deadline_secs=0.5)
    caplog.set_level("DEBUG", logger="sm_tiered")
    told: list[str] = [repr(rig.tier)]
    rules = [rule for rule, _ in REFUSED.values()] + [Rule(kind="reset"), Rule(kind="status"), Rule(kind="half_open")]
    for rule in rules:
        for operation in (get, commit, *([put_part] if rule.status in (301, 403) else [])):
            rig.proxy.restart(rule)
            with pytest.raises(TierError) as caught:
                operation(rig)
            told.append("".join(traceback.format_exception(caught.value)))
    assert any(secrets[0] in str(request.headers) for request in rig.proxy.requests), "the sentinel was not in use"
    text = "\n".join(told) + caplog.text
    assert not [secret for secret in secrets if secret in text]


def test_only_the_documented_api_is_called(rig: Rig) -> None:
    for operation in (put, get, commit, put_part, put_empty_part, replace, delete):
        operation(rig)
    rig.tier.list("")
    rig.tier.list_dirs("")
    rig.tier.probe()
    seen = {f"{r.method} {_shape(r.path, rig.settings.bucket)}" for r in rig.proxy.requests}
    assert seen <= {
        "PUT key",
        "PUT key partNumber uploadId",
        "POST key uploads",
        "POST key uploadId",
        "DELETE key uploadId",
        "HEAD key",
        "GET key",
        "GET bucket list-type",
        "POST bucket delete",
    }


def _shape(path: str, bucket: str) -> str:
    address, _, query = path.partition("?")
    names = sorted(part.partition("=")[0] for part in query.split("&") if part)
    what = "bucket" if address.strip("/") == bucket else "key"
    told = [name for name in names if name in ("partNumber", "uploadId", "uploads", "list-type", "delete")]
    return " ".join([what, *told])


def test_encryption_headers_are_on_every_request_that_makes_an_object(
    make_s3_settings: Callable[..., S3Settings], proxy: FaultProxy, s3_client: S3Client
) -> None:
    rig = make_rig(make_s3_settings, proxy, s3_client, sse_kms_key_id="alias/k")
    for operation in (put, commit, put_part, put_empty_part, replace):
        operation(rig)
    making = [r for r in rig.proxy.requests if (r.method == "PUT" and "uploadId" not in r.path) or "uploads" in r.path]
    assert len(making) == 5
    for request in making:
        assert request.headers["x-amz-server-side-encryption"] == "aws:kms"
        assert request.headers["x-amz-server-side-encryption-aws-kms-key-id"] == "alias/k"


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_probe_refuses_a_store_that_ignores_conditions(rig: Rig, header: str) -> None:
    rig.proxy.restart(Rule(kind="strip", headers=((header, ""),)))
    with pytest.raises(TierRefusedError, match=header.title().replace("If-N", "If-N")) as caught:
        rig.tier.probe()
    assert "conditional writes" in str(caught.value)
    assert [entry.key for entry in rig.tier.list("")] == ["seed"]


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
def test_a_job_commits_nothing_on_a_store_that_ignores_conditions(rig: Rig, memory_dir: Path, header: str) -> None:
    """Without them a tombstone or a second job could be written over, and nobody would know."""
    rig.proxy.restart(Rule(kind="strip", headers=((header, ""),)))
    engine = Job(memory_dir, s3=s3_fields(rig.settings)).open(SoloGroup())
    handle = engine.save(1, b"x" * 1000)
    handle.wait("memory")
    with pytest.raises(TierRefusedError, match="the store ignores If-"):
        handle.wait("durable", timeout=30)
    engine.close()
    assert not [entry.key for entry in rig.tier.list("") if entry.key.endswith("manifest.json")]


def test_a_store_is_not_refused_for_an_answer_that_was_lost(rig: Rig) -> None:
    """The retry finds what an earlier try wrote: that is its own success, and no condition that was ignored."""
    for first in range(1, 4):
        rig.proxy.restart(Rule(kind="ack_lost", match=("PUT",), first=first, times=1))
        check_conditions(rig.tier, layout.CONDITIONS)
    assert rig.stored(layout.CONDITIONS)


def test_a_server_that_ignores_ranges_is_refused_not_misread(rig: Rig) -> None:
    rig.proxy.restart(Rule(kind="strip", headers=(("range", ""),)))
    with pytest.raises(TierRefusedError, match="ignores Range"):
        rig.tier.read_into("seed", 3, memoryview(bytearray(4)))


def test_keys_that_s3_kept_are_named(rig: Rig) -> None:
    error = "<Error><Key>some/prefix/run-1/seed</Key><Code>{}</Code><Message>x</Message></Error>"
    answer = f"<DeleteResult>{error}</DeleteResult>"
    rig.proxy.restart(Rule(kind="status", status=200, text=answer.format("AccessDenied"), times=1))
    with pytest.raises(TierRefusedError, match=r"1 keys were not deleted: 'some/prefix/run-1/seed' \(AccessDenied\)"):
        rig.tier.delete(["seed"])
    rig.proxy.restart(Rule(kind="status", status=200, text=answer.format("InternalError"), times=1))
    rig.tier.delete(["seed"])
    assert rig.stored("seed") is None
