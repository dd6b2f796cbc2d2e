"""Checkpoints made by hand, for tests of what reads them: parts, records, index and manifest on any tier."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from pathlib import Path

from sm_tiered import checksum, layout
from sm_tiered.manifest import (
    attempt_record_to_json,
    compose_manifest,
    manifest_to_json,
    record_to_json,
)
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, AttemptRecord, CheckpointId, Item, ItemTable, Part, Record
from sm_tiered.settings import HyperPodSettings, LocalSettings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Chunks, Tier
from sm_tiered.tiers.files import DirectoryTier
from sm_tiered.tiers.local import LocalTier
from sm_tiered.tiers.shares import Share, ShareTier

NAMESPACE = "run-1"
BEGAN = 1_700_000_000


def attempt(ordinal: int) -> Attempt:
    """Return the attempt of that ordinal."""
    return Attempt(ordinal=ordinal, utc_secs=BEGAN + ordinal, nonce=f"{ordinal:08x}")


def checkpoint(step: int, ordinal: int = 1) -> CheckpointId:
    """Return that step of that attempt."""
    return CheckpointId(attempt=attempt(ordinal), step=step)


def local_tier(path: Path, name: str = "local") -> LocalTier:
    """Return a durable tier in *path*."""
    settings = LocalSettings(name=name, save=None, keep=Latest(n=3), path=str(path), fsync=False)
    return LocalTier(settings, NAMESPACE)


def memory_tier(path: Path) -> DirectoryTier:
    """Return what the files of a memory tier in *path* look like, made without taking any lock."""
    return DirectoryTier(name="memory", base=str(path), namespace=NAMESPACE, fsync=False)


def cluster_tier(url: str, *, keep: int = 3, namespace: str = NAMESPACE) -> Tier:
    """Return a tier in the memory of the cluster whose service is at *url*."""
    settings = HyperPodSettings(name="cluster", save=None, keep=Latest(n=keep), url=url, retry_attempts=1)
    return open_tier(settings, namespace)


def write_attempt(tier: Tier, ordinal: int, parent: CheckpointId | None = None, *, chosen: bool = False) -> None:
    """Write the record of an attempt."""
    record = AttemptRecord(namespace=NAMESPACE, attempt=attempt(ordinal), parent=parent, chosen=chosen)
    write = tier.put_if_absent if isinstance(tier, ShareTier) else tier.put
    write(layout.attempt_key(attempt(ordinal)), attempt_record_to_json(record))


def write_checkpoint(
    tier: Tier,
    which: CheckpointId,
    *,
    durable: bool,
    world: int = 2,
    size: int = 4096,
    saved_at: float | None = None,
    metrics: Mapping[str, float] | None = None,
    tensors: int = 1,
    skip_ranks: frozenset[int] = frozenset(),
    commit: bool = True,
    replica: bool = True,
) -> None:
    """Write a whole checkpoint; of *skip_ranks* nothing is written (not for ones that have a manifest).

    In memory every rank also has a *replica*, unless that is False: then records are those of other tiers.
    """
    records: dict[int, bytes] = {}
    for rank in range(world):
        if rank in skip_ranks:
            continue
        data = random.Random(f"{which}/{rank}").randbytes(size)
        name = layout.part_name(rank, 0)
        chunks: Chunks = lambda data=data: iter([memoryview(data)])  # noqa: E731
        if not isinstance(tier, ShareTier):
            tier.put_part(layout.in_dir(which, name), chunks, size)
        parts = [Part(name=name, size=size, chunks=checksum.digest_chunks(memoryview(data)))]
        if not durable and replica:
            copy = f"replica-{rank}.bin"
            tier.put(layout.in_dir(which, copy), data[:100])
            parts.append(Part(name=copy, size=100, chunks=(checksum.digest(data[:100]),), replica=True))
        record = Record(
            namespace=NAMESPACE,
            checkpoint=which,
            rank=rank,
            world=world,
            saved_at=time.time() if saved_at is None else saved_at,
            parts=tuple(parts),
            tables=(ItemTable(items=_items(rank, world, name, size, tensors)),),
            watermark=CheckpointId(attempt=which.attempt, step=which.step - 1) if which.step else None,
            metrics=dict(metrics or {}),
        )
        records[rank] = record_to_json(record)
        if isinstance(tier, ShareTier):
            share = Share(checkpoint=which, rank=rank, world=world, record=records[rank], parts=((parts[0], chunks),))
            tier.put_share(share)
        else:
            tier.put(layout.in_dir(which, layout.record_name(rank)), records[rank])
    if durable and commit and not isinstance(tier, ShareTier):
        index = {"kind": "index", "step": which.step, "attempt": str(which.attempt)}
        tier.put(layout.in_dir(which, layout.INDEX), json.dumps(index).encode())
        tier.put(layout.in_dir(which, layout.METADATA), b"\x80\x04not for us")
        tier.put(layout.in_dir(which, layout.MANIFEST), manifest_to_json(compose_manifest(records)))


def _items(rank: int, world: int, part: str, size: int, tensors: int) -> tuple[Item, ...]:
    rows = size // 4 // 64 // tensors
    each = rows * 64 * 4
    found = [
        Item(
            fqn=f"model.layers.{n}.attention.weight",
            path=("model", f"layers.{n}.attention.weight"),
            part=part,
            offset=n * each,
            length=each,
            payload=n * each,
            dtype="float32",
            sizes=(rows, 64),
            offsets=(rank * rows, 0),
            shape=(world * rows, 64),
        )
        for n in range(tensors)
    ]
    found.append(Item(fqn=f"per_rank.{rank}.rng", path=("per_rank", rank, "rng"), part=part, offset=0, length=10))
    return tuple(found)


def file_of(base: Path, which: CheckpointId, name: str) -> Path:
    """Return where a file of a checkpoint lies below the directory of a tier."""
    return base / NAMESPACE / layout.checkpoint_dir(which) / name


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def write_recipe(
    directory: Path,
    *,
    memory: Path | None = None,
    cluster: str | None = None,
    local: Path | None = None,
    more: str = "",
) -> Path:
    """Write a recipe with those tiers, *cluster* being the address of a service; *more* is YAML for further ones."""
    lines = ["version: 1", f"namespace: {NAMESPACE}", "tiers:"]
    if memory is not None:
        lines += ["  memory:", f"    {{kind: memory, path: {memory}, allow_disk: true, save: {{every_n_steps: 5}}}}"]
    if cluster is not None:
        haste = "connect_timeout_secs: 1, request_timeout_secs: 2, retry: {attempts: 1, deadline_secs: 2}"
        lines += ["  cluster:", f"    {{kind: hyperpod, url: '{cluster}', save: {{every_n_steps: 10}}, {haste}}}"]
    if local is not None:
        lines += ["  local:", f"    {{kind: local, path: {local}, save: {{every_n_steps: 20}}}}"]
    path = directory / "recipe.yaml"
    path.write_text("\n".join(lines) + "\n" + more, encoding="utf-8")
    return path
