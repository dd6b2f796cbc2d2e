"""Checkpoints of real tensors made by hand: each tensor cut over the ranks as a test says, on any tier."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sm_tiered import checksum, layout
from sm_tiered.manifest import compose_manifest, manifest_to_json, record_to_json
from sm_tiered.records import CheckpointId, Item, ItemTable, Part, Record
from sm_tiered.settings import S3Settings
from sm_tiered.tiers.base import Tier
from tests.unit.cli_checkpoints import NAMESPACE

ALIGNMENT = 64


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, row-major."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


def write_tensors(
    tier: Tier,
    which: CheckpointId,
    tensors: Mapping[str, torch.Tensor],
    *,
    durable: bool,
    world: int = 1,
    split: Mapping[str, int] | None = None,
    ties: Mapping[str, str] | None = None,
    values: Mapping[str, bytes] | None = None,
    files: Mapping[str, bytes] | None = None,
    lead: int = 0,
) -> None:
    """Write a whole checkpoint.

    Args:
        tier: where to.
        which: its name.
        tensors: by name, whole; the keys that lead to one are its name cut at the dots.
        durable: whether it gets a manifest.
        world: how many ranks.
        split: along which dimension a tensor is cut over the ranks; others are stored by rank 0.
        ties: further names for tensors.
        values: what is no tensor, stored by rank 0.
        files: whole files, stored by rank 0.
        lead: bytes that stand before all else in each part.
    """
    records: dict[int, bytes] = {}
    for rank in range(world):
        data, items = bytearray(lead), list[Item]()
        for name, tensor in tensors.items():
            for chunk, offsets in _share(tensor, (split or {}).get(name), rank, world):
                data += bytes(-len(data) % ALIGNMENT)
                items += _items(name, tensor, chunk, offsets, layout.part_name(rank, 0), len(data), ties or {})
                data += raw(chunk)
        contents = {layout.part_name(rank, 0): bytes(data)}
        if rank == 0:
            for name, value in (values or {}).items():
                part = layout.part_name(0, 1)
                place = len(contents.get(part, b""))
                items.append(Item(fqn=name, path=(name,), part=part, offset=place, length=len(value)))
                contents[part] = contents.get(part, b"") + value
            for name, value in (files or {}).items():
                items.append(Item(fqn=name, path=(name,), part=name, offset=0, length=len(value)))
                contents[name] = value
        records[rank] = _write_rank(tier, which, rank, world, contents, items)
    if durable:
        index = {"kind": "index", "step": which.step, "attempt": str(which.attempt)}
        tier.put(layout.in_dir(which, layout.INDEX), json.dumps(index).encode())
        tier.put(layout.in_dir(which, layout.METADATA), b"\x80\x04not for us")
        tier.put(layout.in_dir(which, layout.MANIFEST), manifest_to_json(compose_manifest(records)))


def _share(tensor: torch.Tensor, dim: int | None, rank: int, world: int) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    if dim is None:
        return [(tensor, (0,) * tensor.dim())] if rank == 0 else []
    pieces = tensor.tensor_split(world, dim)
    before = sum(piece.shape[dim] for piece in pieces[:rank])
    return [(pieces[rank], tuple(before if place == dim else 0 for place in range(tensor.dim())))]


def _items(
    name: str,
    tensor: torch.Tensor,
    chunk: torch.Tensor,
    offsets: tuple[int, ...],
    part: str,
    start: int,
    ties: Mapping[str, str],
) -> list[Item]:
    return [
        Item(
            fqn=fqn,
            path=tuple(fqn.split(".")),
            part=part,
            offset=start,
            length=chunk.numel() * chunk.dtype.itemsize,
            payload=start,
            dtype=str(tensor.dtype).removeprefix("torch."),
            sizes=tuple(chunk.shape),
            offsets=offsets,
            shape=tuple(tensor.shape),
        )
        for fqn in (name, *(alias for alias, first in ties.items() if first == name))
    ]


def _write_rank(
    tier: Tier, which: CheckpointId, rank: int, world: int, contents: Mapping[str, bytes], items: list[Item]
) -> bytes:
    parts: list[Part] = []
    for name, data in contents.items():
        tier.put_part(layout.in_dir(which, name), lambda data=data: iter([memoryview(data)] if data else []), len(data))
        parts.append(Part(name=name, size=len(data), chunks=checksum.digest_chunks(memoryview(data))))
    record = record_to_json(
        Record(
            namespace=NAMESPACE,
            checkpoint=which,
            rank=rank,
            world=world,
            saved_at=time.time(),
            parts=tuple(parts),
            tables=(ItemTable(items=tuple(items)),),
        )
    )
    tier.put(layout.in_dir(which, layout.record_name(rank)), record)
    return record


def s3_yaml(settings: S3Settings) -> str:
    """The tier ``s3`` of *settings*, as the last lines of a recipe."""
    return (
        f"  s3: {{kind: s3, uri: 's3://{settings.bucket}/{settings.prefix}', save: {{every_n_steps: 20}}, "
        f"allow_http: true, region: {settings.region}, force_path_style: true, "
        f"endpoint_url: '{settings.endpoint_url}'}}\n"
    )


def everything_below(path: Path) -> dict[str, Any]:
    """What stands below *path*: names, and the bytes of files."""
    return {str(one.relative_to(path)): one.read_bytes() if one.is_file() else None for one in sorted(path.rglob("*"))}
