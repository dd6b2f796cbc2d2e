"""One script for two libraries: what runs in a rank, where "ours" and the predecessor differ in their imports only."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

__all__ = [
    "Library",
    "Loaded",
    "Side",
    "dcp_load",
    "library",
    "load",
    "save",
    "save_steps",
    "settle",
    "state_of",
]

_LOGS = "/var/log/sagemaker_checkpointing"
LOST = -1.0
"""What a state holds before it is loaded."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """Where a job runs, and with which library."""

    predecessor: str | None
    """Where its sources are; None: ours."""
    namespace: str
    world: int
    daemon: str
    uri: str | None
    """``s3://bucket/base``; None: no S3."""
    endpoint: str
    memory: str
    """The node's own tmpfs, which the predecessor has no use for."""
    logs: str
    """A directory in the place of ``/var/log``."""

    def of(self, **changes: Any) -> Side:
        """Return it with *changes*."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Loaded:
    """How a load ended."""

    values: Mapping[str, list[float]]
    """The different values of each tensor afterwards, this rank's part of it."""
    error: str | None = None


@dataclass(frozen=True)
class Library:
    """The three names that a training script imports."""

    config: Callable[..., Any]
    writer: Callable[..., Any]
    reader: Callable[..., Any]
    side: Side

    def configure(self, **changes: Any) -> Any:
        """Return the config that the documentation's scripts make."""
        given = {"namespace": self.side.namespace, "world_size": self.side.world}
        if self.side.uri:
            given["s3_tier_base_path"] = self.side.uri
        return self.config(**{**given, **changes})


def library(side: Side) -> Library:
    """Import one of the two, in a rank."""
    logging.disable(logging.CRITICAL)
    os.environ["AWS_ENDPOINT_URL"] = side.endpoint
    return _theirs(side, side.predecessor) if side.predecessor else _ours(side)


def _ours(side: Side) -> Library:
    os.environ["SM_TIERED_HYPERPOD_URL"] = side.daemon
    os.environ["CHECKPOINT_MEMORY"] = side.memory
    from sm_tiered_dcp import compat
    from sm_tiered_dcp.compat import logs

    logs.DIRECTORY = side.logs
    return Library(
        compat.SageMakerCheckpointConfig,
        compat.SageMakerTieredStorageWriter,
        compat.SageMakerTieredStorageReader,
        side,
    )


def _theirs(side: Side, sources: str) -> Library:
    sys.path.insert(0, sources)
    from amzn_sagemaker_checkpointing.checkpointing.filesystem import (  # type: ignore[import-not-found]
        filesystem,
        storage_base,
    )
    from amzn_sagemaker_checkpointing.config import (  # type: ignore[import-not-found]
        in_memory_client,
        sagemaker_checkpoint_config,
    )

    # Its address can't be set by its users.
    client = in_memory_client.InMemoryClientConfig
    client.__init__.__defaults__ = (side.daemon, *client.__init__.__defaults__[1:])
    place = os.path.join(side.logs, os.path.basename(_LOGS))

    class _FileHandler(logging.FileHandler):
        def __init__(self, path: str, **options: Any) -> None:
            super().__init__(path.replace(_LOGS, place, 1), **options)

    storage_base.FileHandler = _FileHandler
    made = lambda path, **options: os.makedirs(path.replace(_LOGS, place, 1), **options)  # noqa: E731
    storage_base.os = SimpleNamespace(path=os.path, makedirs=made)
    return Library(
        sagemaker_checkpoint_config.SageMakerCheckpointConfig,
        filesystem.SageMakerTieredStorageWriter,
        filesystem.SageMakerTieredStorageReader,
        side,
    )


def state_of(value: float, rows: int = 12, **more: Any) -> dict[str, Any]:
    """Return a state whose tensor ``w`` is full of *value*, sharded over the ranks where there are several."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.full((rows, 100), value)
    if dist.is_initialized() and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return {"w": distribute_tensor(whole, mesh, [Shard(0)]), **more}
    return {"w": whole, **more}


def values_of(state: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the different values of each tensor of *state*, this rank's part of it."""
    import torch

    found: dict[str, list[float]] = {}
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            local = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
            found[name] = sorted(set(local.flatten().tolist()))
    return found


def save(lib: Library, config: Any, step: int, state: dict[str, Any], **facts: Any) -> None:
    """Save and see it through to every tier."""
    import torch.distributed.checkpoint as dcp

    writer = lib.writer(checkpoint_config=config, step=step)
    dcp.save(state, storage_writer=writer, **facts)
    settle(lib, config, writer)


def settle(lib: Library, config: Any, writer: Any) -> None:
    """Wait for the tiers that ours saves to after the call; the predecessor's call has waited for all."""
    if lib.side.predecessor is None:
        writer.handle.wait("cluster", timeout=45)
        if config.save_to_s3:
            writer.handle.wait("s3", timeout=45)


def load(lib: Library, config: Any, state: dict[str, Any], step: int | None = None, **facts: Any) -> Loaded:
    """Load into *state*; an error is told, never raised."""
    return dcp_load(lambda: lib.reader(checkpoint_config=config, step=step), state, **facts)


def dcp_load(reader: Callable[[], Any], state: dict[str, Any], **facts: Any) -> Loaded:
    """Load into *state* with what *reader* makes."""
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(state, storage_reader=reader(), **facts)
    except BaseException as error:  # DCP's own derives from it
        return Loaded(values_of(state), error=f"{type(error).__name__}: {error}")
    return Loaded(values_of(state))


def save_steps(rank: int, side: Side, saves: Mapping[int, tuple[float, bool]]) -> None:
    """In a rank: save at each step that value, with or without S3."""
    lib = library(side)
    config = lib.configure()
    for step, (value, to_s3) in saves.items():
        config.save_to_s3 = to_s3
        save(lib, config, step, state_of(value))


def load_step(rank: int, side: Side, step: int | None = None) -> Loaded:
    """In a rank: load that step, or the latest."""
    lib = library(side)
    return load(lib, lib.configure(), state_of(LOST), step)
