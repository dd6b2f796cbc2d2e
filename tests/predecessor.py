"""The predecessor, fetched when a test needs it: it runs in child processes only, and never enters the repository."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

__all__ = ["DOCUMENTED", "NEWEST", "Server", "child_env", "predecessor", "running_server", "source"]

DOCUMENTED, NEWEST = "1.0.13", "1.1.3"
_PACKAGE = "amzn-sagemaker-checkpointing"
_SHA256 = {
    DOCUMENTED: "60f6fa3eb20e53b66b52292ab97a53564d7ce5f9da4fb32c34e3a5281bd0cbc5",
    NEWEST: "c6e88ba0f09932b141305288530262c53914ec4fdd53c70909e469a24bda3794",
}
_SERVER_NEEDS = ("fastapi>=0.110,<1", "uvicorn>=0.30,<1")
_PIP_SECS = 180.0
_SERVE = """
import socket, sys, threading
import uvicorn
from tests.local_tests.membrain_server import app
listening = socket.create_server(("127.0.0.1", 0), backlog=128)
server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
def end():
    sys.stdin.read()
    server.should_exit = True
threading.Thread(target=end, daemon=True).start()
print(listening.getsockname()[1], flush=True)
server.run(sockets=[listening])
"""


@dataclass(frozen=True, slots=True)
class Server:
    """The predecessor's own test server, running."""

    url: str
    pid: int


def predecessor(version: str = NEWEST) -> Path:
    """Return what to put on ``PYTHONPATH`` of a child to import that version; skip the test where it can't be had."""
    return source(version) / "src"


def source(version: str = NEWEST) -> Path:
    """Return its source distribution, unpacked; skip the test where it can't be had."""
    return _had(version, lambda place: _fetch(version, place))


def child_env(version: str = NEWEST, /, **changes: str) -> dict[str, str]:
    """Return this process's environment for a child that imports that version."""
    return {**os.environ, "PYTHONPATH": str(predecessor(version)), **changes}


@contextmanager
def running_server(env: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Run its own test server in a child, on a free port of loopback, with *env* besides this process's environment.

    Skip the test where it can't be had.
    """
    tree = source(NEWEST)
    libraries = _had("server", lambda place: _pip(["install", "--target", str(place), *_SERVER_NEEDS]))
    env = {**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join([str(tree), str(libraries)])}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tree
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        port = child.stdout.readline().strip()
        assert port.isdigit(), "the predecessor's server did not start"
        try:
            yield Server(f"http://127.0.0.1:{port}", child.pid)
        finally:
            child.stdin.close()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


@pytest.fixture(scope="session")
def predecessor_server() -> Iterator[Server]:
    """Its own test server: shared, so that tests use namespaces of their own."""
    with running_server() as server:
        yield server


def _had(name: str, make: Callable[[Path], None]) -> Path:
    reason = _tried(name, make)
    if isinstance(reason, str):
        pytest.skip(f"{_PACKAGE} ({name}) can't be fetched here: {reason}")
    return reason


_ANSWERS: dict[str, Path | str] = {}


def _tried(name: str, make: Callable[[Path], None]) -> Path | str:
    """Return the place where *make* has put something, now or in an earlier run; or why it could not."""
    if name not in _ANSWERS:
        _ANSWERS[name] = _make_once(name, make)
    return _ANSWERS[name]


def _make_once(name: str, make: Callable[[Path], None]) -> Path | str:
    place = _cache() / name
    with (_cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers want the same
        if place.exists():
            return place
        made = Path(tempfile.mkdtemp(dir=_cache()))
        try:
            make(made)
            made.rename(place)
        except (OSError, subprocess.SubprocessError, tarfile.TarError, ValueError) as error:
            return _said(error)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return place


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in str(error.stderr).splitlines() if line.startswith("ERROR")]
        return (lines or [f"pip ended with status {error.returncode}"])[-1]
    return str(error)


@cache
def _cache() -> Path:
    """A directory that outlives the run and is this user's alone: what lies there is executed."""
    path = Path(tempfile.gettempdir()) / f"sm_tiered-tests-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    assert stat.S_ISDIR(found.st_mode), f"{path} is no directory"
    assert found.st_uid == os.geteuid(), f"{path} belongs to uid {found.st_uid}"
    assert not found.st_mode & 0o077, f"{path} is open to others"
    return path


def _fetch(version: str, place: Path) -> None:
    # It is published as source only; pip asks its build backend for its name, so that goes on in isolation.
    _pip(["download", "--no-deps", "--no-binary", _PACKAGE, "--dest", str(place), f"{_PACKAGE}=={version}"])
    (archive,) = place.glob("*.tar.gz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != _SHA256[version]:
        raise ValueError(f"{archive.name} has SHA256 {found}, which is not that of the release")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    (tree,) = (path for path in place.iterdir() if path.is_dir())
    for path in tree.iterdir():
        path.rename(place / path.name)


def _pip(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--retries", "1", "--disable-pip-version-check"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PIP_SECS)
