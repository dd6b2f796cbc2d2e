"""What all tests share: a real S3 endpoint, an environment without the user's AWS settings, a tmpfs directory."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

from sm_tiered.policies.keep import Latest
from sm_tiered.settings import S3Settings

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_MOTO = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def pytest_configure() -> None:
    """A shell starts what it runs in the background with SIGINT ignored, and so would every process of a test."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one `xdist_group` share a worker: xdist 3.8 says so in an attribute that pytest 9.2 does not read."""
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        told = vars(item).get("_nodeid", "")
        if told.startswith(f"{item.nodeid}@"):
            from _pytest.nodeid import coerce_node_id

            item._id = coerce_node_id(told)


@pytest.fixture(autouse=True)
def aws_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dummy credentials, no profile, no instance metadata, no HTTP proxy on the way to loopback."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A moto server in a process of its own, so that tests may fork."""
    with subprocess.Popen(
        [sys.executable, "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port.isdigit(), "the moto server did not start"
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.stdin.close()
            server.terminate()


@pytest.fixture(scope="session")
def s3_client(s3_endpoint: str) -> S3Client:
    """A plain boto3 client of that endpoint, to look and write past the tier."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=s3_endpoint,
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        config=Config(s3={"addressing_style": "path"}, proxies={}),
    )


@pytest.fixture(scope="session")
def make_s3_settings(s3_endpoint: str, s3_client: S3Client) -> Callable[..., S3Settings]:
    """Make settings for a new, empty bucket; keyword arguments change them."""

    def make(**changes: object) -> S3Settings:
        bucket = f"test-{uuid4().hex[:16]}"
        s3_client.create_bucket(Bucket=bucket)
        given: dict[str, object] = {
            "name": "s3",
            "save": None,
            "keep": Latest(3),
            "bucket": bucket,
            "prefix": "some/prefix",
            "endpoint_url": s3_endpoint,
            "region": "us-east-1",
            "force_path_style": True,
            "part_bytes": 8 * 1024 * 1024,
            "request_timeout_secs": 5.0,
            "retry_attempts": 4,
            "retry_deadline_secs": 20.0,
        }
        return S3Settings(**{**given, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def s3_settings(make_s3_settings: Callable[..., S3Settings]) -> S3Settings:
    """Settings for a new, empty bucket."""
    return make_s3_settings()


@pytest.fixture(scope="session")
def late_directories() -> Iterator[list[Path]]:
    """Directories to remove once more at the end: a drainer that outlives its test may write its last word into one."""
    found: list[Path] = []
    yield found
    for path in found:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def memory_dir(tmp_path: Path, late_directories: list[Path]) -> Iterator[Path]:
    """A directory of mode 0700 on /dev/shm (elsewhere where there is none), removed afterwards."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="sm_tiered-test-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        late_directories.append(path)


@pytest.fixture
def make_tmpfs(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
    """Mount a tmpfs of that name, below *tmp_path*, and of so many MiB; only root can."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    mounted: list[Path] = []

    def make(name: str, mib: int) -> Path:
        path = tmp_path / name
        path.mkdir(mode=0o700)
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "tmpfs", str(path)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"a tmpfs can't be mounted here: {made.stderr.strip()}")
        mounted.append(path)
        return path

    yield make
    gc.collect()  # what a test left mapped keeps a file system
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)
