"""Starts a job under torchrun, watches its progress, and kills it as a crash or a lost node would."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from journal import Reader
from sm_tiered.locks import probe

__all__ = ["RANKS", "Job", "Launch", "QuickstartError", "end_drainer", "launched", "lose_node"]

HERE = Path(__file__).parent
RANKS = 2
DEADLINE_SECS = 300.0
POLL_SECS = 0.005


class QuickstartError(Exception):
    """The quickstart did not show what it should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training, in as many launches as it takes, and where it keeps things."""

    name: str
    steps: int
    small: bool
    root: Path
    """Journals, and the durable tier."""
    memory: Path
    """The memory tier; on a tmpfs."""

    @property
    def disk(self) -> Path:
        """The durable tier."""
        return self.root / "checkpoints"

    def steps_on_disk(self) -> list[int]:
        """Return the steps that are complete in the durable tier: the manifest is written last, and all at once."""
        return sorted(int(found.parent.name[5:15]) for found in self.disk.glob("*/step_*/manifest.json"))

    def environment(self) -> dict[str, str]:
        """Return the environment of its processes; the first three fill in the recipe."""
        return {
            **os.environ,
            "QUICKSTART_NAMESPACE": self.name,
            "QUICKSTART_MEMORY": str(self.memory),
            "QUICKSTART_DISK": str(self.disk),
            "TMPDIR": str(self.root),  # what killed processes leave lying about goes with the rest
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }


class Launch:
    """The processes of one launch, and what their ranks have told so far."""

    def __init__(self, job: Job, directory: Path) -> None:
        self.job = job
        self.ranks = [Reader(directory / f"rank-{rank}.jsonl") for rank in range(RANKS)]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={RANKS}", str(HERE / "quickstart_train.py")]
        command += [f"--steps={job.steps}", f"--journal={directory}", *(["--small"] if job.small else [])]
        # A session of its own: a Ctrl-C is for the supervisor, which then ends the others.
        self.torchrun = subprocess.Popen(
            command, env=job.environment(), stdin=subprocess.DEVNULL, start_new_session=True
        )

    @property
    def told(self) -> list[dict[str, Any]]:
        """What rank 0 has told."""
        return self.ranks[0].lines

    def step(self) -> int:
        """Return the newest step that any rank has done; 0: none."""
        return max((line.get("step", 0) for reader in self.ranks for line in reader.lines), default=0)

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield what rank 0 tells, as it comes, until the training has ended.

        Raises:
            QuickstartError: it failed, or took too long.
        """
        end = time.monotonic() + DEADLINE_SECS
        while True:
            ended = self.torchrun.poll() is not None  # asked before the last look, so that nothing is missed
            yield from [reader.look() for reader in self.ranks][0]
            if ended:
                break
            if time.monotonic() > end:
                raise QuickstartError(f"{self.job.name} is at step {self.step()} after {DEADLINE_SECS:.0f} s")
            time.sleep(POLL_SECS)
        finished = all(reader.lines and "finished" in reader.lines[-1] for reader in self.ranks)
        if self.torchrun.returncode != 0 or not finished:
            raise QuickstartError(f"{self.job.name} ended with {self.torchrun.returncode} at step {self.step()}")

    def kill(self) -> int:
        """SIGKILL every rank: nothing is closed, nobody is asked. Return the step that was reached."""
        for reader in self.ranks:
            reader.look()
        # torchrun first: it would complain about the others.
        for pid in (self.torchrun.pid, *(reader.lines[0]["pid"] for reader in self.ranks)):
            _kill(pid)
        self.torchrun.wait()
        for reader in self.ranks:
            reader.look()
        return self.step()


@contextmanager
def launched(job: Job) -> Iterator[Launch]:
    """Start *job* again; whatever happens, none of its ranks is left behind."""
    job.root.mkdir(exist_ok=True)
    directory = job.root / f"launch-{len(list(job.root.glob('launch-*'))) + 1}"
    directory.mkdir()
    launch = Launch(job, directory)
    try:
        yield launch
    finally:
        if launch.torchrun.poll() is None:
            launch.torchrun.terminate()  # it ends its ranks before itself
            launch.torchrun.wait()


def lose_node(launch: Launch) -> int:
    """Leave what is left when a node is gone: what is in the durable tier. Return the step that was reached."""
    reached = launch.kill()
    end_drainer(launch.job)
    shutil.rmtree(launch.job.memory)
    return reached


def end_drainer(job: Job) -> None:
    """SIGKILL the drainer, which outlives the training on purpose, and wait until it is gone."""
    lock = job.memory / job.name / ".locks" / "drainer"
    end = time.monotonic() + 30.0
    while (holder := probe(lock)) is not None:
        if time.monotonic() > end:
            raise QuickstartError(f"the drainer of {job.name} does not end")
        if holder.pid:
            with suppress(ProcessLookupError):
                # It leads a process group, in which its children are too.
                os.killpg(holder.pid, signal.SIGKILL)
        time.sleep(0.02)


def _kill(pid: int) -> None:
    try:
        # A pid is given to another process some day; this stays with the one that has it now.
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(process, signal.SIGKILL)
        if not select.select([process], [], [], 30.0)[0]:
            raise QuickstartError(f"process {pid} does not die")
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
