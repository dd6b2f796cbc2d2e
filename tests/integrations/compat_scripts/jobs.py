"""Jobs that run the scripts of the documentation: real processes, a real S3 endpoint, memory on tmpfs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BUCKETS = {"quick_start": "my-bucket", "distributed_example": "my-training-bucket"}
"""Where the scripts save, as the documentation has it."""
LIMIT_SECS = 110.0


@dataclass
class ScriptJob:
    """One launch of a script; a context manager that leaves no process behind."""

    script: str
    world: int
    folder: Path
    """Takes what the ranks print, save and load."""
    env: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    def __enter__(self) -> ScriptJob:
        self.folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "integrations"))
        here = Path(__file__).parent
        for rank in range(self.world):
            env = {**os.environ, "PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world), **self.env}
            with open(self.folder / f"out-{rank}.txt", "wb") as out:
                command = [sys.executable, str(here / "run.py"), str(here / f"{self.script}.py"), str(self.folder)]
                self.processes.append(subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT))
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL all ranks."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def wait(self, secs: float = LIMIT_SECS) -> list[int]:
        """Return the exit codes of all ranks."""
        end = time.monotonic() + secs
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def printed(self, rank: int = 0) -> str:
        """Return what *rank* has printed so far."""
        return (self.folder / f"out-{rank}.txt").read_text(errors="replace")

    def lines(self, what: str, rank: int = 0) -> list[dict[str, Any]]:
        """Return what *rank* noted of ``saved`` or ``loaded`` states so far: step and digest."""
        path = self.folder / f"{what}-{rank}.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def until(self, what: str, ready: Any) -> None:
        """Return once *ready()* is true; no rank may end before."""
        end = time.monotonic() + LIMIT_SECS
        while not ready():
            ended = [process.poll() for process in self.processes]
            told = "\n".join(self.printed(rank)[-3000:] for rank in range(self.world))
            assert ended == [None] * self.world, f"ended with {ended} before {what}:\n{told}"
            assert time.monotonic() < end, f"not {what} in time:\n{told}"
            time.sleep(0.02)


def digests(*jobs: ScriptJob) -> dict[int, set[str]]:
    """Return the digests of what all ranks of *jobs* saved, by step."""
    found: dict[int, set[str]] = {}
    for job in jobs:
        for rank in range(job.world):
            for line in job.lines("saved", rank):
                found.setdefault(line["step"], set()).add(line["digest"])
    return found
