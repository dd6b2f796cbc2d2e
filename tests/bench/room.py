"""A room: one measurement in processes of its own, so that no other one's memory, caches or threads are in it.

``call("save_bench.steady", tensors=400)`` runs that function in a new process (*world* of them, joined by gloo) and
returns what rank 0's returned.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sm_tiered.locks import probe

__all__ = ["RoomError", "call", "directory", "end_drainer", "sink"]

_TIMEOUT_SECS = 300
_END_SECS = 60
_SHM = Path("/dev/shm")


class RoomError(RuntimeError):
    """A measurement did not end well; the message ends with what its process said."""


def call(function: str, /, *, world: int = 1, **settings: Any) -> Any:
    """Return what ``module.function(**settings)`` returns on rank 0 of *world* new processes.

    Raises:
        RoomError: one of them failed.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(Path(__file__)), function, json.dumps(settings)]
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **address, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        answers = [rank.communicate(timeout=_TIMEOUT_SECS) for rank in ranks]
    except subprocess.TimeoutExpired as error:
        raise RoomError(f"{function} took longer than {_TIMEOUT_SECS} s") from error
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank, (_, said) in zip(ranks, answers, strict=True):
        if rank.returncode != 0:
            raise RoomError(f"{function}{settings} ended with {rank.returncode}:\n{said[-3000:]}")
    return json.loads(answers[0][0].splitlines()[-1])


@contextmanager
def directory() -> Generator[str, None, None]:
    """Give a directory on tmpfs; its drainer and everything in it are gone afterwards."""
    path = tempfile.mkdtemp(prefix="sm_tiered-bench-", dir=_SHM)
    try:
        yield path
    finally:
        end_drainer(Path(path))
        shutil.rmtree(path, ignore_errors=True)


def end_drainer(memory: Path) -> None:
    """Let the drainers below *memory* end what they have, and wait for that."""
    end = time.monotonic() + _END_SECS
    for lock in memory.glob("*/.locks/drainer"):
        while (holder := probe(lock)) is not None and time.monotonic() < end:
            if holder.pid:
                with suppress(ProcessLookupError):
                    os.kill(holder.pid, signal.SIGTERM)
            time.sleep(0.05)


@contextmanager
def sink() -> Generator[str, None, None]:
    """Run the discarding S3 server in a process of its own, niced; give its address."""
    command = [sys.executable, "-m", "sm_tiered.testing.sink", "--port", "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.stdin.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _main() -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    module, function = sys.argv[1].split(".")
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    found = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
    if world > 1:
        dist.destroy_process_group()
    sys.stdout.write(f"\n{json.dumps(found)}\n")


if __name__ == "__main__":
    _main()
