"""Where jobs of the predecessor save, for tests of what they left; and what they had saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sm_tiered.policies.keep import Latest
from sm_tiered.settings import HyperPodSettings, S3Settings
from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered_dcp.predecessor import Source
from sm_tiered_dcp.predecessor.origins import open_daemon, open_s3
from tests.integrations import predecessor_job
from tests.predecessor import child_env

if TYPE_CHECKING:
    pass

STEPS = (10, 20)
BASE = "jobs/base"


@dataclass(frozen=True)
class Place:
    """Where the predecessor's jobs of this module save."""

    settings: S3Settings
    daemon: StandInDaemon

    def save(self, version: str, namespace: str, world: int, *, steps: Sequence[int] = STEPS, **options: Any) -> None:
        """Run a job of that release."""
        wanted: Mapping[str, Any] = {
            "namespace": namespace,
            "steps": list(steps),
            "world": world,
            "base": f"s3://{self.settings.bucket}/{BASE}",
            "endpoint": self.settings.endpoint_url,
            "daemon": self.daemon.url,
            **options,
        }
        script = Path(predecessor_job.__file__)
        env = child_env(
            version, AWS_ENDPOINT_URL=str(self.settings.endpoint_url), AWS_REGION="us-east-1", OMP_NUM_THREADS="1"
        )
        done = subprocess.run(
            [sys.executable, str(script), json.dumps(wanted)], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def s3(self, namespace: str) -> Source:
        return open_s3(self.settings, self.settings.bucket, BASE, namespace)

    def service(self, namespace: str) -> Source:
        return open_daemon(self.service_settings(), namespace)

    def service_settings(self) -> HyperPodSettings:
        return HyperPodSettings(
            name="cluster", save=None, keep=Latest(3), url=self.daemon.url, retry_attempts=2, retry_deadline_secs=3.0
        )


def same(found: object, wanted: object, where: str = "state") -> None:
    """See that two states are equal to the bit."""
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor), where
        assert found.dtype is wanted.dtype, where
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, Mapping):
        assert isinstance(found, Mapping), where
        assert set(found) == set(wanted), where
        for key in wanted:
            same(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, (list, tuple)):
        assert isinstance(found, type(wanted)), where
        assert len(found) == len(wanted), where
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            same(one, other, f"{where}[{index}]")
    else:
        assert found == wanted, where


def wanted_state(step: int, world: int) -> dict[str, Any]:
    found = predecessor_job.local_state(step)
    return {**found, "sharded": predecessor_job.whole(step)} if world > 1 else found


def empty_state(world: int) -> dict[str, Any]:
    """The same structure with other values."""
    found = predecessor_job.local_state(999)
    return {**found, "sharded": torch.zeros(5, 4)} if world > 1 else found
