"""Checkpoints in the predecessor's format, made without it: for tests of their bytes, and where it can't be had."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItemType

from sm_tiered.policies.keep import Latest
from sm_tiered.settings import LocalSettings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from sm_tiered_dcp.predecessor import TierSource

NAMESPACE = "theirs"
_MODULE = "amzn_sagemaker_checkpointing.checkpointing.filesystem.storage_info"


@dataclass
class _SageMakerStorageInfo:
    rank: int
    offset: int
    length: int


@contextmanager
def named() -> Generator[None, None, None]:
    """Let pickles name the class as the predecessor's do."""
    names = [_MODULE.rsplit(".", count)[0] for count in range(_MODULE.count(".") + 1)]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[_MODULE]._SageMakerStorageInfo = _SageMakerStorageInfo  # type: ignore[attr-defined]
    _SageMakerStorageInfo.__module__ = _MODULE
    try:
        yield
    finally:
        _SageMakerStorageInfo.__module__ = __name__
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@dataclass
class Made:
    """One checkpoint."""

    metadata: Metadata
    shards: list[bytes]

    def pickled(self) -> bytes:
        with named():
            return pickle.dumps(self.metadata, protocol=pickle.HIGHEST_PROTOCOL)

    def put(self, base: Path, step: int, *, by_step: bool = False, but: Sequence[str] = ()) -> None:
        """Write it below *base*, without the files whose names are in *but*, e.g. ``rank_1/checkpoint.pt``."""
        files = {f"rank_{rank}/checkpoint.pt": data for rank, data in enumerate(self.shards)}
        files["rank_0/metadata.metadata"] = self.pickled()
        for name, data in files.items():
            rank, _, file = name.partition("/")
            place = base / NAMESPACE / (f"step_{step}/{rank}" if by_step else f"{rank}/step_{step}") / file
            if name not in but:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)


def made(*states: Mapping[str, Any]) -> Made:
    """Save as the predecessor does what each rank holds of *states*."""
    planners = [DefaultSavePlanner() for _ in states]
    plans: list[Any] = []
    for rank, (planner, state) in enumerate(zip(planners, states, strict=True)):
        planner.set_up_planner(dict(state), is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    plans, metadata = planners[0].create_global_plan(plans)
    stored: dict[Any, Any] = {}
    shards: list[bytes] = []
    for rank, (planner, plan) in enumerate(zip(planners, plans, strict=True)):
        buffer = io.BytesIO()
        for item in planner.finish_plan(plan).items:
            begin, data = buffer.tell(), planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                buffer.write(data.getbuffer())
            else:
                assert isinstance(data, torch.Tensor)
                torch.save(data.detach().contiguous().cpu(), buffer)
            stored[item.index] = _SageMakerStorageInfo(rank, begin, buffer.tell() - begin)
        shards.append(buffer.getvalue())
    metadata.storage_data, metadata.storage_meta = stored, StorageMeta()
    return Made(metadata=metadata, shards=shards)


def two_ranks(step: int) -> Made:
    """A checkpoint of two ranks, each of which stored something."""
    one = {"a": torch.full((40, 3), float(step)), "epoch": step // 10}
    other = {"b": torch.arange(6) + step, "note": f"step {step}"}
    return made(one, other)


def imported(namespace: Path, step: int) -> Path:
    """The directory, below that of our *namespace*, of the one import of *step*."""
    (found,) = namespace.glob(f"step_{step:010d}-a000001-*")
    return found


def directory(path: Path, namespace: str, name: str = "local") -> Tier:
    """A directory as a tier."""
    return open_tier(LocalSettings(name=name, save=None, keep=Latest(3), path=str(path), fsync=False), namespace)


def source(base: Path, namespace: str = NAMESPACE) -> TierSource:
    """What is below *base*."""
    return TierSource([directory(base, namespace, "predecessor")], f"{base.name}/{namespace}")
