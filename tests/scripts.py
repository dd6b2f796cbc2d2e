"""Scripts run as ``__main__`` on ranks that are forked from a server with a framework loaded: seconds less a launch.

Each file that a user launches has a test besides in which it is launched as users do.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.distributed import dcp_jobs

_PLACES = ("TRAINING_JOB_NAME", "CHECKPOINTS")
"""What recipes read, and no test takes from the environment that the tests are run in."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a script ended."""

    statuses: list[int]
    """Of each rank; minus the number of a signal."""
    printed: str
    """What rank 0 has printed, stderr too; then what any rank has raised."""


def preload(*modules: str) -> None:
    """Have the server load *modules*, too; before its first rank."""
    dcp_jobs._PRELOADED = tuple(dict.fromkeys((*dcp_jobs._PRELOADED, *modules)))


def run_script(
    script: Path, *arguments: object, cwd: Path, env: Mapping[str, str] | None = None, ranks: int = 0
) -> Ran:
    """Run *script* in *cwd* on as many *ranks* as a launcher would have made; 0 is one process without a launcher."""
    argv, output = [str(script), *map(str, arguments)], cwd / ".printed.txt"
    jobs = [
        dcp_jobs.start(0, _main, argv, str(cwd), str(output) if rank == 0 else os.devnull, [*(env or ())], env=own)
        for rank, own in enumerate({**(env or {}), **place} for place in _places(ranks))
    ]
    ends = dcp_jobs.Job([job.processes[0] for job in jobs], [job.pipes[0] for job in jobs]).wait()
    traces = "\n".join(ended.trace for ended in ends if ended.trace)
    return Ran([ended.status for ended in ends], output.read_text() + traces)


def _places(ranks: int) -> list[dict[str, str]]:
    """What a launcher tells each rank."""
    if not ranks:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    all_alike = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": 0, "GLOO_SOCKET_IFNAME": "lo"}
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
    places = ({**all_alike, **sizes, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks))
    return [{name: str(value) for name, value in place.items()} for place in places]


def _main(rank: int, argv: list[str], folder: str, output: str, given: list[str]) -> None:
    """In a rank: be the script."""
    for name in {*_PLACES} - {*given}:
        os.environ.pop(name, None)
    os.chdir(folder)
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = argv
    sys.path.insert(0, os.path.dirname(argv[0]))
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
