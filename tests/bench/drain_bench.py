"""The drain to S3: how fast, beside the same client with the same file alone, and in how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from save_bench import opened
from states import gpt_state
from timing import Peak, secs_of, unshared_bytes

from sm_tiered.drainer import _step_back
from sm_tiered.locks import probe

__all__ = ["client", "drain"]

_WRITE_BYTES = 8 * 1024 * 1024
_PART_BYTES = 32 * 1024 * 1024
_GBPS = 100.0
_LIMIT_SECS = 120.0
_WATCHED = 2
"""Drains whose memory is looked at."""


def drain(path: str, s3: str, tensors: int, size: int, runs: int) -> dict[str, Any]:
    """Save and drain again and again; between two drains the client alone uploads the same file.

    The first time, in which both load their libraries, is told apart. Memory is looked at in drains of its own: to
    count a process's pages 50 times a second would hold it up.
    """
    state = gpt_state(tensors, size)
    checkpointer = opened(path, state, s3)
    alone: list[float] = []
    command = [sys.executable, str(Path(__file__)), s3]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for step in range(runs + 1):
            checkpointer.save(step, state).wait("s3", timeout=_LIMIT_SECS)
            part = max(Path(path).glob("bench/step_*")) / "__0_0.distcp"
            other.stdin.write(f"{part}\n")
            other.stdin.flush()
            alone.append(float(other.stdout.readline()))
        other.stdin.close()
    drained = _commits(path)
    with Peak(lambda: _drainer_bytes(path), every_secs=0.02) as peak:
        for step in range(runs + 1, runs + 1 + _WATCHED):
            checkpointer.save(step, state).wait("s3", timeout=_LIMIT_SECS)
    checkpointer.close()
    return {
        "drained": [secs for secs, _ in drained[1:]],
        "alone": alone[1:],
        "first_drained": drained[0][0],
        "first_alone": alone[0],
        "bytes": drained[0][1],
        "peak_bytes": peak.highest,
    }


def _drainer_bytes(path: str) -> int:
    holder = probe(Path(path) / "bench/.locks/drainer")
    return unshared_bytes(holder.pid) if holder and holder.pid else 0


def _commits(path: str) -> list[tuple[float, int]]:
    lines = (Path(path) / "bench/events/drainer.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [(event["secs"], event["bytes"]) for event in events if event["event"] == "Committed"]


def client(s3: str) -> None:
    """Upload each file that standard input names as s3torchconnector's own writer does, and print the seconds."""
    from s3torchconnector._s3client import S3Client, S3ClientConfig

    config = S3ClientConfig(part_size=_PART_BYTES, throughput_target_gbps=_GBPS, force_path_style=True)
    crt = S3Client("us-east-1", endpoint=s3, s3client_config=config)

    def put(file: Path) -> None:
        buffer = memoryview(bytearray(_WRITE_BYTES))
        with open(file, "rb", buffering=0) as source, crt.put_object("bench", f"alone/{time.time_ns()}") as writer:
            while count := source.readinto(buffer):
                writer.write(bytes(buffer[:count]))

    for line in sys.stdin:
        file = Path(line.rstrip("\n"))
        sys.stdout.write(f"{secs_of(lambda file=file: put(file))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _step_back()  # as the drainer does
    client(sys.argv[1])
