"""What a defect is shown on: the stand-in for the service, S3 behind a proxy that fails, and one of two libraries."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sm_tiered import drainer, layout
from sm_tiered.locks import probe
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.testing.proxy import FaultProxy
from tests.distributed import dcp_jobs
from tests.rival.sides import Loaded, Side, load_step, save_steps

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

__all__ = ["PATIENCE_SECS", "Rig"]

BASE = "base"
PATIENCE_SECS = 45.0
"""How long a drainer may take on a machine that has other work: it is niced."""


@dataclass
class Rig:
    """One defect's world: a namespace and a bucket of its own."""

    daemon: StandInDaemon
    proxy: FaultProxy
    client: S3Client
    predecessor: str | None
    tmp: Path
    memory: Path
    bucket: str = field(default_factory=lambda: f"rival-{uuid4().hex[:12]}")
    namespace: str = field(default_factory=lambda: f"job-{uuid4().hex[:8]}")

    def __post_init__(self) -> None:
        self.client.create_bucket(Bucket=self.bucket)

    @property
    def ours(self) -> bool:
        """Whether it is about ours."""
        return self.predecessor is None

    def side(self, world: int = 1, *, s3: bool = False, **changes: Any) -> Side:
        """Return a job of *world* ranks; without S3 its config names no path there."""
        made = Side(
            predecessor=self.predecessor,
            namespace=self.namespace,
            world=world,
            daemon=self.daemon.url,
            uri=f"s3://{self.bucket}/{BASE}" if s3 else None,
            endpoint=self.proxy.url,
            memory=str(self.memory),
            logs=str(self.tmp / "logs"),
        )
        return replace(made, **changes)

    def run(
        self, side: Side, work: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None
    ) -> list[Any]:
        """Run ``work(rank, side, *arguments)`` on all ranks of a new job."""
        return dcp_jobs.run(side.world, work, side, *arguments, env=env)

    def save(self, side: Side, saves: dict[int, tuple[float, bool]]) -> None:
        """Save in a new job."""
        self.run(side, save_steps, saves)

    def load(self, side: Side, step: int | None = None) -> list[Loaded]:
        """Load in a new job; return how that ended on each rank."""
        return self.run(side, load_step, step)

    # What can be lost

    def lose_node(self) -> None:
        """The node with its own memory is gone; the service still has what it has."""
        self.end_drainer()
        shutil.rmtree(self.memory / self.namespace, ignore_errors=True)

    def lose_memory(self) -> None:
        """All memory is gone: of nodes and of the service."""
        self.lose_node()
        self.daemon.namespaces.clear()

    def end_drainer(self) -> None:
        """SIGKILL our drainer, where one is at work: a node that is lost has none."""
        holder = probe(self.memory / self.namespace / layout.LOCKS / drainer.DRAINER_LOCK)
        if holder is not None and holder.pid is not None:
            os.kill(holder.pid, signal.SIGKILL)

    def blobs(self, rank: int) -> list[tuple[str, int]]:
        """Return namespace and step on the wire of all that *rank* has in the service, the newest last."""
        found = [(step, name) for name, kept in self.daemon.namespaces.items() for step in kept.blobs.get(rank, {})]
        return [(name, step) for step, name in sorted(found)]

    def lose_newest_shard(self, rank: int) -> None:
        """What *rank* put last is gone from the service, and its node too."""
        self.lose_node()
        name, step = self.blobs(rank)[-1]
        del self.daemon.namespaces[name].blobs[rank][step]

    # Objects in S3

    def objects(self) -> list[str]:
        """Return all keys in S3."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return sorted(entry["Key"] for page in pages for entry in page.get("Contents", []))  # type: ignore[typeddict-item]

    def shard(self, step: int, rank: int = 0) -> str:
        """Return the key of what *rank* wrote at *step*, of the newest attempt."""
        ours, theirs = f"step_{step:010d}-", f"rank_{rank}/step_{step}/checkpoint.pt"
        found = [key for key in self.objects() if (ours in key and f"__{rank}_0" in key) or key.endswith(theirs)]
        return max(found)

    def read(self, key: str) -> bytes:
        """Return an object."""
        return self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        """Put an object."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=data)
