"""Imports of two ranks' step 10, and what happens in the middle of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sm_tiered.errors import TierUnavailableError
from sm_tiered.policies.keep import Latest
from sm_tiered.records import CheckpointId
from sm_tiered.settings import HyperPodSettings
from sm_tiered.testing.daemon import StandInDaemon, shard_meta
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.hyperpod_service import HyperPodService, Slot
from sm_tiered_dcp.predecessor import import_step, look_at
from tests.integrations.predecessor_made import NAMESPACE, Made, made, source

SHARD = f"{NAMESPACE}/rank_1/step_10/checkpoint.pt"


def taken(base: Path, target: Any, **options: Any) -> Any:
    place = source(base)
    return import_step(place, place.listed()[0], target, namespace="ours", **options)


def named(base: Path, target: Any) -> CheckpointId:
    place = source(base)
    return look_at(place, place.listed()[0], target, namespace="ours").checkpoint


def loaded(where: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"a": torch.zeros(40, 3), "b": torch.zeros(6, dtype=torch.int64), "epoch": 0, "note": ""}
    dcp.load(found, storage_reader=dcp.FileSystemReader(where), no_dist=True)
    return found


def again(step: int, values: int) -> Made:
    """Another save of *step*: of the same names and shapes, other *values*, and bytes of the same length."""
    return made(
        {"a": torch.full((40, 3), float(values)), "epoch": step // 10},
        {"b": torch.arange(6) + values, "note": f"step {values}"},
    )


class Between:
    """A tier before whose call of *name* for a key that ends in *last* something happens, once."""

    def __init__(self, tier: Tier, name: str = "", last: str = "", then: Callable[[], None] = lambda: None) -> None:
        self._tier, self._when, self._then = tier, (name, last), then
        self.written: list[str] = []

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._tier, name)
        if not callable(call):
            return call

        def watched(*args: Any, **options: Any) -> Any:
            if self._when[0] == name and str(args[0]).endswith(self._when[1]):
                self._when = ("", "")
                self._then()
            if name == "put_part":
                self.written.append(args[0])
            return call(*args, **options)

        return watched


def gone() -> None:
    raise TierUnavailableError("gone")


def cut(base: Path, target: Tier) -> None:
    """Import what rank 0 stored, and end before the record of rank 1."""
    with pytest.raises(TierUnavailableError, match="gone"):
        taken(base, Between(target, "put_if_absent", "record-00001.json", gone))


def damage(path: Path) -> None:
    """Flip a bit of a tensor."""
    data = bytearray(path.read_bytes())
    stored = [torch.full((40, 3), 10.0).numpy().tobytes(), (torch.arange(6) + 10).numpy().tobytes()]
    data[max(data.find(each) for each in stored) + 8] ^= 0x10
    path.write_bytes(data)


def filled_again(daemon: StandInDaemon, step: int) -> None:
    """Let the predecessor save *step* once more, with other values."""
    service = HyperPodService(HyperPodSettings(name="cluster", save=None, keep=Latest(3), url=daemon.url))
    for rank, data in enumerate(again(step, 77).shards):
        place = Slot(namespace=NAMESPACE, rank=rank, wire=step)
        service.put(place, lambda data=data: iter([memoryview(data)]), len(data), shard_meta(data))
    service.close()
