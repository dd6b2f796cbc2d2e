"""What a save meets at the end: of the interpreter, of a time limit, of what a line remembers."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sm_tiered import checksum
from sm_tiered.errors import ConfigError, TierUnavailableError
from sm_tiered.generations import Generations
from sm_tiered.group import SoloGroup
from sm_tiered.handle import SaveHandle, TierState
from sm_tiered.policies.keep import Latest
from sm_tiered.recipe import Recipe
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import S3Settings
from sm_tiered.testing.plain import PlainEngine
from sm_tiered.tiers.s3_upload import CrtUpload

MIB = 1024 * 1024
NAMES = [CheckpointId(attempt=Attempt(ordinal=1, utc_secs=0, nonce="00000000"), step=step) for step in range(1000)]


def test_digests_are_made_also_when_no_thread_can_be_had_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    data = memoryview(os.urandom(MIB) * 33)
    expected = tuple(map(checksum.digest, checksum.chunks_of(data)))
    assert checksum.digest_chunks(data) == expected
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert checksum.digest_chunks(data) == expected


_ENDS = """
import atexit, sys, time
from sm_tiered.group import SoloGroup
from sm_tiered.recipe import Recipe
from sm_tiered.testing.plain import PlainEngine
engine = PlainEngine(Recipe.parse(sys.argv[1]).settings(), SoloGroup())
atexit.register(engine.saver.close)
engine.saver._worker.submit(lambda: time.sleep(0.3))
engine.save(7, b"x" * (64 * 2**20), ["memory"])
"""
"""As an integration does it; the digests begin when the interpreter is on its way down."""


def test_a_script_that_just_ends_after_a_large_save_has_it_in_memory(memory_dir: Path, tmp_path: Path) -> None:
    tiers: dict[str, Any] = {
        "memory": {"kind": "memory", "path": str(memory_dir), "keep": {"latest": 1}},
        "disk": {"kind": "local", "path": str(tmp_path / "disk"), "fsync": False},
    }
    settings = Recipe.parse({"version": 1, "namespace": "run", "tiers": tiers}).settings()
    command = [sys.executable, "-c", _ENDS, settings.text]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 0, ended.stderr
    engine = PlainEngine(settings, SoloGroup())
    try:
        restored = engine.restore()
        assert restored is not None
        assert (restored[0], len(restored[1])) == (7, 64 * MIB)
    finally:
        engine.close()


def test_an_upload_that_is_past_its_limit_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = S3Settings(name="s3", save=None, keep=Latest(1), bucket="b", prefix="", retry_deadline_secs=20.0)
    now, sent = [1000.0], list[bytes]()
    writer = SimpleNamespace(stream=SimpleNamespace(write=sent.append, close=lambda: None))
    connection: Any = SimpleNamespace(
        settings=settings,
        bucket="b",
        whole=str,
        where=str,
        call=lambda *given, **facts: None,
        crt=lambda part_bytes: SimpleNamespace(put_object=lambda bucket, key: writer),
    )
    monkeypatch.setattr("sm_tiered.tiers.s3_upload.time", SimpleNamespace(monotonic=lambda: now[0]))
    upload = CrtUpload(connection, "part", 4 * MIB)  # 20 s, and one for its bytes
    for secs in (0.0, 20.5):
        now[0] = 1000.0 + secs
        upload.write(b"more")
    now[0] = 1021.5
    with pytest.raises(TierUnavailableError, match="not done within 21 s"):
        upload.write(b"too late")
    assert sent == [b"more", b"more"]
    upload.abort()


def test_a_wait_for_nan_seconds_is_refused() -> None:
    looks = iter([False] * 20)
    handle = SaveHandle(step=1, nudge=lambda: None)
    handle.add("disk", TierState(lambda: (next(looks, True), None)), 10.0)
    with pytest.raises(ConfigError, match="nan"):
        handle.wait("disk", timeout=float("nan"))


def test_a_line_of_which_nothing_is_ever_told_to_be_whole_stays_short() -> None:
    line = Generations(keep=3)
    for name in NAMES:
        line.add(name)
    assert len(line.line) < 200
    assert line.recent() == NAMES[:-9:-1]


def test_a_line_that_is_cut_keeps_the_watermark_and_what_it_protects() -> None:
    line = Generations(keep=3)
    for name in NAMES:
        line.add(name)
        if name.step == 9:
            line.learn([True] * 8)
    assert len(line.line) < 200
    assert line.watermark == NAMES[9]
    assert line.releasable(NAMES[:10], ()) == set(NAMES[:7])
