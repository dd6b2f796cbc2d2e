"""SIGKILL to the drainer at its first, second, third … request to S3: before it is carried out, or before its answer.

What is then on S3 must be enough for a fresh node, a second drainer must finish the work, and the job must go on.
"""

from __future__ import annotations

import copy
import mmap
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from sm_tiered import layout
from sm_tiered.manifest import manifest_from_json
from sm_tiered.settings import S3Settings
from sm_tiered.testing.proxy import FaultProxy, Recorded, Rule
from sm_tiered.tiers.s3_client import S3Connection
from tests.faults.core_jobs import SIZE, Job, s3_fields
from tests.faults.crash_loop import CrashLoop, kill_at_call

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

MIB = 1024 * 1024
Moment = Literal["half_open", "ack_lost"]
"""What becomes of the drainer's last request: it is never carried out, or it is and nobody hears of it."""
LAST_REQUESTS: list[tuple[Moment, str, str]] = [
    ("half_open", "PUT", "/__1_0.distcp"),
    ("half_open", "PUT", "/manifest.json"),
    ("ack_lost", "PUT", "/manifest.json"),
    ("half_open", "POST", "?delete"),
]
"""Where a drainer dies in the quick test, and what its last request holds."""
MOMENTS = pytest.mark.parametrize("moment", ["half_open", "ack_lost"])


class Stage:
    """A job with one durable save and two more in the queue, put back as it was for every kill.

    A loop that went on from where the last kill left it would not end: the longer the history, the more requests.
    """

    def __init__(self, root: Path, settings: S3Settings, client: S3Client, *, world: int, size: int = SIZE) -> None:
        self.client, self.bucket = client, settings.bucket
        self.job = Job(root / "job", world=world, durable_keep=1, s3=s3_fields(settings))
        self.job.root.mkdir(mode=0o700)
        # The description of S3's API takes long to read: what is forked from here inherits it.
        S3Connection(settings, "").client()
        self.loop = CrashLoop(self.job, size=size)
        assert not self.loop.run(promotes=1)
        self.loop.drain()
        assert not self.loop.run(promotes=2)
        self.saved = shutil.copytree(self.job.memory(), root / "saved")
        self.noted = {path: path.stat().st_size for path in (self.job.root / "near", self.job.root / "far")}
        self.objects = {key: self.stored(key) for key in self.keys()}

    def keys(self) -> list[str]:
        return [item.get("Key", "") for item in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])]

    def again(self) -> CrashLoop:
        """Put everything back, and return the loop that goes on from there."""
        self.job.wipe()
        shutil.copytree(self.saved, self.job.memory())
        for path, size in self.noted.items():
            os.truncate(path, size)
        for key in set(self.keys()) - set(self.objects):
            self.client.delete_object(Bucket=self.bucket, Key=key)
        for key, data in self.objects.items():
            self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
        return copy.copy(self.loop)

    def kills(self, drain: Callable[[int], int], numbers: Iterable[int]) -> int:
        """Have *drain* kill its drainer at each of *numbers*, up to one that it survives; return how many it killed."""
        kills = 0
        for number in numbers:
            loop = self.again()
            status = drain(number)
            self.check_committed()
            pruning = len(loop.told()) == loop.promoted
            killed = loop.finishes(status)
            self.check_committed()
            if not killed:
                break
            kills += 1
            if pruning:
                self.goes_on(loop)
        return kills

    def goes_on(self, loop: CrashLoop) -> None:
        """Fail unless the next save of the job is safe, and retention finishes what it left half deleted."""
        assert not loop.run(promotes=1)
        loop.drain()
        loop.judge_durable()
        left = {d: state for d, state in self.checkpoints().items() if state not in ("whole", "buried")}
        assert not left, f"nobody finished {left}"

    def check_committed(self) -> None:
        """Fail if a checkpoint is visible and not complete."""
        torn = [directory for directory, state in self.checkpoints().items() if state == "torn"]
        assert not torn, f"committed, and not whole: {torn}"

    def checkpoints(self) -> dict[str, str]:
        """Say of each checkpoint's directory what is in it."""
        found: dict[str, set[str]] = {}
        for directory, _, name in (key.rpartition("/") for key in self.keys() if "/step_" in key):
            found.setdefault(directory, set()).add(name)
        return {directory: self.state(directory, names) for directory, names in found.items()}

    def state(self, directory: str, names: set[str]) -> str:
        if layout.MANIFEST not in names:
            return "begun"
        if manifest_from_json(self.stored(f"{directory}/{layout.MANIFEST}")).tombstone:
            return "half buried" if len(names) > 1 else "buried"
        return "whole" if len(names) == 2 * self.job.world + 1 else "torn"

    def stored(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()


@pytest.fixture(scope="module")
def proxy(s3_endpoint: str) -> Iterator[FaultProxy]:
    with FaultProxy(s3_endpoint) as running:
        yield running


@pytest.fixture
def stage(
    memory_dir: Path, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client, proxy: FaultProxy
) -> Stage:
    return Stage(memory_dir, make_s3_settings(endpoint_url=proxy.url), s3_client, world=2)


@pytest.fixture
def multipart(
    memory_dir: Path, make_s3_settings: Callable[..., S3Settings], s3_client: S3Client, proxy: FaultProxy
) -> Stage:
    """A stage whose parts are sent in two pieces."""
    # It imports torch, which every drainer inherits.
    import s3torchconnector._s3client  # noqa: F401

    settings = make_s3_settings(endpoint_url=proxy.url, part_bytes=5 * MIB)
    return Stage(memory_dir, settings, s3_client, world=1, size=6 * MIB)


def at_request(
    job: Job, proxy: FaultProxy, moment: Moment, struck: list[Recorded], match: tuple[str, ...] = ()
) -> Callable[[int], int]:
    """Return what drains and dies at the n-th request that *matches*, which is then added to *struck*."""
    shared = mmap.mmap(-1, 8)

    def tell() -> None:
        shared[:] = os.getpid().to_bytes(8, "big")

    def kill() -> None:
        os.kill(int.from_bytes(shared, "big"), signal.SIGKILL)

    def drain(number: int) -> int:
        proxy.restart(Rule(kind=moment, match=match, first=number, times=1, then=kill))
        status, fired = job.drain(prepare=tell), proxy.fired
        proxy.restart()
        assert (status != 0) == bool(fired), f"the drainer ended with {status}"
        struck.extend(fired)
        return status

    return drain


def at_call(job: Job) -> Callable[[int], int]:
    """Return what drains and dies at the n-th call that changes files."""
    return lambda number: job.drain(prepare=lambda: kill_at_call(number, [os.getpid()]))


def assert_seen(struck: list[Recorded], *patterns: str) -> None:
    """Fail unless every pattern is found in a request: method, path and headers in one line."""
    seen = [f"{request.method} {request.path} {request.headers}" for request in struck]
    missing = [pattern for pattern in patterns if not any(re.search(pattern, line) for line in seen)]
    assert not missing, f"no drainer was killed at {missing}"


def test_a_kill_at_a_request_of_a_drainer_leaves_what_the_next_one_finishes(stage: Stage, proxy: FaultProxy) -> None:
    struck: list[Recorded] = []
    for moment, *match in LAST_REQUESTS:
        assert stage.kills(at_request(stage.job, proxy, moment, struck, tuple(match)), [1]) == 1


def test_a_kill_in_the_middle_of_a_multipart_upload_leaves_what_the_next_drainer_finishes(
    multipart: Stage, proxy: FaultProxy
) -> None:
    struck: list[Recorded] = []
    drain = at_request(multipart.job, proxy, "half_open", struck, ("POST", "?uploadId="))
    assert multipart.kills(drain, [1]) == 1


@pytest.mark.long
@pytest.mark.timeout(900)
@MOMENTS
def test_a_kill_at_each_and_every_request_of_a_drainer_leaves_what_the_next_one_finishes(
    stage: Stage, proxy: FaultProxy, moment: Moment
) -> None:
    struck: list[Recorded] = []
    assert stage.kills(at_request(stage.job, proxy, moment, struck), count(1)) == len(struck) >= 50
    assert_seen(
        struck, r"^PUT \S*/manifest.json .*if-none-match", r"^PUT \S*/manifest.json .*if-match", r"^POST \S*\?delete"
    )


@pytest.mark.long
@pytest.mark.timeout(900)
@MOMENTS
def test_a_kill_at_each_and_every_request_of_multipart_uploads_leaves_what_the_next_one_finishes(
    multipart: Stage, proxy: FaultProxy, moment: Moment
) -> None:
    struck: list[Recorded] = []
    assert multipart.kills(at_request(multipart.job, proxy, moment, struck), count(1)) == len(struck) >= 50
    assert_seen(struck, r"^POST \S*\?uploads", r"^PUT \S*\?partNumber=", r"^POST \S*\?uploadId", r"^HEAD ")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_kill_at_each_and_every_call_of_a_drainer_to_s3_leaves_what_the_next_one_finishes(stage: Stage) -> None:
    assert stage.kills(at_call(stage.job), count(1)) >= 50
