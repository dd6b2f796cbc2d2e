"""Uploads: what is not whole never appears, not even when the process is falling apart."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from sm_tiered.errors import CorruptPartError, TierUnavailableError
from sm_tiered.settings import S3Settings
from sm_tiered.testing.contract import chunked, payload
from sm_tiered.tiers import abort_stale_uploads, open_tier
from sm_tiered.tiers.s3 import S3Tier
from sm_tiered.tiers.s3_upload import MAX_PARTS, CrtUpload, exactly, part_bytes_for

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1024 * 1024
GIB = 1024 * MIB


def keys(client: S3Client, settings: S3Settings) -> list[str]:
    return [item.get("Key", "") for item in client.list_objects_v2(Bucket=settings.bucket).get("Contents", [])]


@pytest.mark.parametrize("size", [0, 1, 319 * GIB, 320 * GIB, 500 * GIB, 5000 * GIB])
def test_no_upload_has_more_than_ten_thousand_parts(size: int) -> None:
    part_bytes = part_bytes_for(size, 32 * MIB)
    assert -(-size // part_bytes) <= MAX_PARTS
    assert part_bytes == 32 * MIB if size <= 312 * GIB else part_bytes % MIB == 0


def test_parts_are_as_long_as_wanted_but_never_shorter_than_s3_allows() -> None:
    assert part_bytes_for(100 * MIB, 64 * MIB) == 64 * MIB
    assert part_bytes_for(100 * MIB, 1) == 5 * MIB


@pytest.mark.parametrize(
    "lengths", [(1, 3), (8 * MIB,), (8 * MIB + 1,), (20 * MIB,), (7 * MIB, 2 * MIB), (100, 8 * MIB)]
)
def test_pieces_are_of_one_length_and_lose_nothing(lengths: tuple[int, ...]) -> None:
    data = payload(3000 if lengths == (1, 3) else 21 * MIB + 3)
    pieces = list(exactly(chunked(data, *lengths)(), len(data), "k"))
    assert b"".join(pieces) == data
    assert all(len(piece) == 8 * MIB for piece in pieces[:-1])


@pytest.mark.parametrize("given", [0, 9, 11, 30 * MIB])
def test_a_wrong_length_is_said_before_the_last_piece_is_handed_on(given: int) -> None:
    pieces = exactly(chunked(payload(given))(), 10, "k")
    with pytest.raises(CorruptPartError, match="10 were announced"):
        next(pieces)


@pytest.mark.parametrize("done", [0, 1, 8 * MIB, 20 * MIB])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_garbage_collection_never_publishes_a_cut_object(
    s3_settings: S3Settings, s3_client: S3Client, done: int, error: type[BaseException]
) -> None:
    tier, size = S3Tier(s3_settings, "run-1"), 24 * MIB

    def breaking() -> Iterator[memoryview]:
        yield from chunked(payload(done))()
        raise error

    with pytest.raises(error):
        tier.put_part("part", breaking, size)
    gc.collect()
    assert keys(s3_client, s3_settings) == []


def test_an_upload_that_is_merely_forgotten_publishes_nothing(s3_settings: S3Settings, s3_client: S3Client) -> None:
    tier = S3Tier(s3_settings, "run-1")
    upload = CrtUpload(tier._connection, "part", 24 * MIB)
    upload.write(payload(8 * MIB))
    upload.write(payload(8 * MIB))
    del upload
    gc.collect()
    assert keys(s3_client, s3_settings) == []


_DYING = """
import os, sys, threading
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import S3Settings
from sm_tiered.tiers.s3 import S3Tier
url, bucket, how = sys.argv[1:]
settings = S3Settings(name="s3", save=None, keep=Latest(1), bucket=bucket, prefix="", endpoint_url=url,
                      region="us-east-1", force_path_style=True, part_bytes=8 * 2**20)
half, hold = threading.Event(), threading.Event()
def chunks():
    for _ in range(2):
        yield memoryview(bytes(8 * 2**20))
    half.set()
    if how == "exit":
        sys.exit(7)
    hold.wait()
tier = S3Tier(settings, "run-1")
thread = threading.Thread(target=lambda: tier.put_part("part", chunks, 32 * 2**20), daemon=True)
if how == "exit":
    tier.put_part("part", chunks, 32 * 2**20)
thread.start()
half.wait()
"""


@pytest.mark.parametrize(("how", "status"), [("exit", 7), ("return", 0)])
def test_a_process_that_ends_in_the_middle_publishes_nothing(
    s3_settings: S3Settings, s3_client: S3Client, how: str, status: int
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_DYING), str(s3_settings.endpoint_url), s3_settings.bucket, how]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == status, ended.stderr
    assert keys(s3_client, s3_settings) == []


@pytest.mark.parametrize("changes", [{}, {"sse_kms_key_id": "k"}], ids=["crt", "boto3"])
def test_a_failed_upload_leaves_no_unfinished_one(
    make_s3_settings: Callable[..., S3Settings], s3_client: S3Client, changes: dict[str, object]
) -> None:
    settings = make_s3_settings(**changes)
    tier = S3Tier(settings, "run-1")
    with pytest.raises(CorruptPartError):
        tier.put_part("part", chunked(payload(20 * MIB)), 24 * MIB)

    def unfinished() -> list[str | None]:
        uploads = s3_client.list_multipart_uploads(Bucket=settings.bucket).get("Uploads", [])
        return [upload.get("Key") for upload in uploads]

    # The client aborts in threads of its own, once what it has begun to send is sent.
    end = time.monotonic() + 10
    while unfinished() and time.monotonic() < end:
        time.sleep(0.05)
    assert unfinished() == []


def test_unfinished_uploads_of_this_namespace_are_aborted_once_old(
    s3_settings: S3Settings, s3_client: S3Client
) -> None:
    mine, others = "some/prefix/run-1/step/part", "some/prefix/run-10/step/part"
    for key in (mine, mine, others):
        s3_client.create_multipart_upload(Bucket=s3_settings.bucket, Key=key)
    tier = open_tier(s3_settings, "run-1")
    assert abort_stale_uploads(tier, 1e12) == 0  # moto says that all began in 2010
    assert abort_stale_uploads(tier, 0.0) == 2
    left = s3_client.list_multipart_uploads(Bucket=s3_settings.bucket).get("Uploads", [])
    assert [upload.get("Key") for upload in left] == [others]


def test_a_store_that_lost_bytes_is_asked_to_take_them_again(
    s3_settings: S3Settings, s3_client: S3Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = S3Tier(s3_settings, "run-1")
    complete = CrtUpload.complete

    def lossy(upload: CrtUpload) -> None:
        complete(upload)
        s3_client.put_object(Bucket=s3_settings.bucket, Key="some/prefix/run-1/part", Body=b"short")

    monkeypatch.setattr(CrtUpload, "complete", lossy)
    with pytest.raises(TierUnavailableError, match=f"holds 5 bytes after {2 * MIB} were sent"):
        tier.put_part("part", chunked(payload(2 * MIB)), 2 * MIB)
