"""Runs `recipes/train_with_dcp.py` on ranks that are forked from a server with torch loaded: seconds less a launch."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from sm_tiered.locks import probe
from tests.distributed.dcp_jobs import ROOT, Job, start
from tests.waiting import wait_until

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

RECIPES = ROOT / "recipes"
_RESTORED = re.compile(r"^step (\d+) restored from (\S+) in \d+\.\d\d s$", re.MULTILINE)
_LOSS = re.compile(r"^step (\d+): loss (\d+\.\d{4})$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of the script."""

    job: Job
    outputs: tuple[Path, ...]
    """What each rank prints, stderr too."""

    @property
    def text(self) -> str:
        """What rank 0 has printed."""
        return self.outputs[0].read_text()

    def losses(self) -> dict[int, str]:
        """Return the losses by step, as printed."""
        return losses(self.text)

    def restored(self) -> tuple[int, str]:
        """Return step and tier that it said it restored, in its first line."""
        found = _RESTORED.search(self.text)
        assert found is not None, self.text
        return int(found[1]), found[2]

    def reach(self, step: int) -> None:
        """Return once *step* is done."""
        alive = [process.sentinel for process in self.job.processes]
        wait_until(lambda: max(self.losses(), default=0) >= step or wait(alive, 0), f"step {step} is not done", secs=60)
        assert max(self.losses(), default=0) >= step, (self.end(), self.text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop every rank meanwhile: small models keep all cores busy, and drainers are nice."""
        for signum in (signal.SIGSTOP, signal.SIGCONT):
            for rank in range(len(self.job.processes)):
                os.kill(self.job.pid(rank), signum)
            if signum is signal.SIGSTOP:
                yield

    def kill(self) -> int:
        """SIGKILL every rank; return the last step that was printed."""
        self.job.kill()
        self.job.wait()
        return max(self.losses(), default=0)

    def end(self) -> list[object]:
        """Return the exit status of each rank, once all have ended; of one that raised the traceback."""
        return [ended.trace or (ended.status if ended.status else ended.value) for ended in self.job.wait()]


def launch(
    folder: Path, recipe: str, *options: str, env: Mapping[str, str], ranks: Sequence[Mapping[str, str]] = ({}, {})
) -> Launch:
    """Start the script with *recipe* on one rank for each of *ranks*, which are their own environments.

    It runs in *folder*, like a user's; *env* is that of all ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(len(ranks))}
    number = len(list(folder.glob("printed-*-0.txt")))
    outputs = tuple(folder / f"printed-{number}-{rank}.txt" for rank in range(len(ranks)))
    for output in outputs:
        output.touch()
    argv = [str(RECIPES / "train_with_dcp.py"), "--small", "--recipe", str(RECIPES / recipe), *options]
    own = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting, **_quiet(), **env, **given}
        for rank, given in enumerate(ranks)
    ]
    # One job of so many processes, each without torch.distributed: the script joins them itself.
    jobs = [start(0, _main, argv, str(folder), str(outputs[rank]), env=own[rank]) for rank in range(len(ranks))]
    job = Job([job.processes[0] for job in jobs], [job.pipes[0] for job in jobs])
    return Launch(job=job, outputs=outputs)


@contextmanager
def launched(folder: Path, recipe: str, *options: str, **given: object) -> Iterator[Launch]:
    """Do as `launch` does; whatever happens inside, no rank is left behind."""
    running = launch(folder, recipe, *options, **given)  # type: ignore[arg-type]
    try:
        yield running
    finally:
        for process in running.job.processes:
            process.kill()


def _quiet() -> dict[str, str]:
    """What a test's drainers need: to be gone soon after it."""
    return {"GLOO_SOCKET_IFNAME": "lo", "SM_TIERED_DRAINER_IDLE_SECS": "2"}


def _main(rank: int, argv: list[str], folder: str, output: str) -> int:
    """In a rank: be the script."""
    os.chdir(folder)
    target = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - as long as the process
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = argv
    sys.path.insert(0, str(RECIPES))
    from train_with_dcp import main

    return main()


def losses(text: str) -> dict[int, str]:
    """Return the losses that were printed, by step."""
    return {int(step): loss for step, loss in _LOSS.findall(text)}


def repeats(earlier: dict[int, str], later: dict[int, str]) -> bool:
    """Whether what was trained again is what was trained before."""
    return all(earlier[step] == later[step] for step in earlier.keys() & later.keys())


def torchrun(
    folder: Path, recipe: str, *options: str, env: Mapping[str, str], launcher: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start the script under torchrun on two ranks, as its first lines say. What it prints comes through `stdout`."""
    path = os.pathsep.join(str(part) for part in (ROOT, ROOT / "integrations"))
    local = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    script = [str(RECIPES / "train_with_dcp.py"), "--small", "--recipe", str(RECIPES / recipe), *options]
    return subprocess.Popen(
        [sys.executable, *local, *launcher, *script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **_quiet(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def durable_steps(folder: Path) -> list[int]:
    """Return the steps that are complete below a durable directory."""
    return sorted(int(found.parent.name[5:15]) for found in folder.glob("*/step_*/manifest.json"))


def handed_over(*memories: Path) -> bool:
    """Whether the drainers have a step of both ranks: from then on they bring it to its tier, whoever is killed."""
    waiting = [entry for memory in memories for entry in memory.glob("*/.queue/*step_*-0000[01]-*.json")]
    return len({re.sub(r"^\D+step", "step", entry.name) for entry in waiting}) >= 2


def lose_memory(memory: Path, namespace: str) -> None:
    """Take away what a lost node takes with it: its drainer and its memory tier."""
    lock, end = memory / namespace / ".locks" / "drainer", time.monotonic() + 20.0
    while (holder := probe(lock)) is not None:
        assert time.monotonic() < end, "the drainer does not end"
        if holder.pid:
            with suppress(ProcessLookupError):
                os.killpg(holder.pid, signal.SIGKILL)  # it leads a group of its own
        time.sleep(0.02)
    shutil.rmtree(memory)


def s3_steps(client: S3Client, checkpoints: str) -> list[int]:
    """Return the steps that are complete below an ``s3://bucket/prefix``."""
    name, _, prefix = checkpoints.removeprefix("s3://").partition("/")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=f"{prefix}/")
    keys = [item.get("Key", "") for page in pages for item in page.get("Contents", ())]
    return sorted(int(found[1]) for key in keys if (found := re.search(r"/step_(\d{10})-[^/]+/manifest\.json$", key)))
