"""Uploads don't run ahead of S3, and go on where a store can't tell how far it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sm_tiered.policies.keep import Latest
from sm_tiered.settings import S3Settings
from sm_tiered.testing.sink import Sink
from sm_tiered.tiers import s3_upload, s3_window
from sm_tiered.tiers.s3 import S3Tier

MIB = 1024 * 1024
PART, PARTS = 8 * MIB, 10


class GatedSink(Sink):
    """A store that takes no part before the gate is open; *refusing*: it doesn't tell what it has, either."""

    def __init__(self, *, refusing: bool = False) -> None:
        super().__init__()
        self.gate, self.looked, self.refusing = threading.Event(), threading.Event(), refusing

    def answer(self, request: Any) -> tuple[int, dict[str, str], bytes, int]:
        if request.method == "PUT" and "uploadId" in request.query:
            assert self.gate.wait(20)
        if request.method == "GET" and "uploadId" in request.query:
            self.looked.set()
        if self.refusing and request.method == "GET" and ("uploads" in request.query or "uploadId" in request.query):
            return 501, {}, b"<Error><Code>NotImplemented</Code></Error>", 0
        return super().answer(request)


@pytest.fixture
def settings(aws_environment: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sink], S3Settings]:
    for module in (s3_window, s3_upload):
        monkeypatch.setattr(module, "WINDOW_BYTES", 2 * PART)

    def make(sink: Sink) -> S3Settings:
        return S3Settings(
            name="s3",
            save=None,
            keep=Latest(1),
            bucket="bucket",
            prefix="",
            endpoint_url=f"http://127.0.0.1:{sink.listen()}",
            region="us-east-1",
            force_path_style=True,
            part_bytes=PART,
        )

    return make


class Upload:
    """Ten parts on their way in a thread."""

    def __init__(self, settings: S3Settings) -> None:
        self.tier, self.asked = S3Tier(settings, "run"), 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.tier.put_part("step/part", self._chunks, PART * PARTS)

    def _chunks(self) -> Iterator[memoryview]:
        for _ in range(PARTS):
            self.asked += 1
            yield memoryview(bytes(PART))

    def ended(self, secs: float) -> bool:
        self._thread.join(secs)
        return not self._thread.is_alive()


def test_an_upload_waits_for_a_store_that_is_slower_than_memory(settings: Callable[[Sink], S3Settings]) -> None:
    sink = GatedSink()
    upload = Upload(settings(sink))
    assert sink.looked.wait(20)
    assert not upload.ended(0.5)
    assert upload.asked <= 5  # the window, the part that waits, and the next in the making
    sink.gate.set()
    assert upload.ended(20)
    assert upload.asked == PARTS
    assert [entry.size for entry in upload.tier.list("step/")] == [PART * PARTS]


def test_an_upload_goes_on_where_the_store_does_not_tell(settings: Callable[[Sink], S3Settings]) -> None:
    sink = GatedSink(refusing=True)
    sink.gate.set()
    upload = Upload(settings(sink))
    assert upload.ended(20)
    assert [entry.size for entry in upload.tier.list("step/")] == [PART * PARTS]
