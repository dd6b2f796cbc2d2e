"""Records, manifests and attempt records as JSON, read strictly: what is not exactly ours is a `FormatError`.

Each ends with the digest of all that stands before it, so that no flipped bit passes for another fact. The same facts
always give the same bytes, so whoever sees all records composes the same manifest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from sm_tiered import checksum, layout
from sm_tiered.errors import FormatError
from sm_tiered.records import AttemptRecord, CheckpointId, Item, ItemTable, Manifest, Part, Record
from sm_tiered.sealed_json import (
    FORMAT,
    MAX_BYTES,
    Json,
    digest_of,
    dump,
    integer,
    integers,
    list_of,
    mapping,
    number,
    parsed,
    sealed,
    text,
)

__all__ = [
    "FORMAT",
    "MAX_BYTES",
    "attempt_record_from_json",
    "attempt_record_to_json",
    "compose_manifest",
    "items_to_json",
    "manifest_from_json",
    "manifest_to_json",
    "record_from_json",
    "record_to_json",
]


def items_to_json(items: Iterable[Item]) -> str:
    """Return *items* as the inside of a JSON list."""
    return ",".join(dump(_item_fields(item)) for item in items)


def _item_fields(item: Item) -> dict[str, object]:
    fields: dict[str, object] = {
        "fqn": item.fqn,
        "path": list(item.path),
        "part": item.part,
        "offset": item.offset,
        "length": item.length,
    }
    if item.payload is not None:
        fields |= {
            "payload": item.payload,
            "dtype": item.dtype,
            "sizes": list(item.sizes),
            "offsets": list(item.offsets),
            "shape": list(item.shape),
        }
    return fields


def record_to_json(record: Record) -> bytes:
    """Return *record* as the bytes of its file."""
    head = dump(
        {
            "format": FORMAT,
            "kind": "record",
            "namespace": record.namespace,
            **_checkpoint_fields(record.checkpoint),
            "rank": record.rank,
            "world": record.world,
            "saved_at": record.saved_at,
            "parts": [
                {"name": part.name, "size": part.size, "chunks": list(part.chunks), "replica": part.replica}
                for part in record.parts
            ],
            "watermark": layout.checkpoint_dir(record.watermark) if record.watermark else None,
            "metrics": _finite(record.metrics),
            "failed": record.failed,
        }
    )
    items = ",".join(table.json for table in record.tables if table.items)
    return sealed(f'{head[:-1]},"items":[{items}]}}')


def manifest_to_json(manifest: Manifest) -> bytes:
    """Return *manifest* as the bytes of its file."""
    return sealed(
        dump(
            {
                "format": FORMAT,
                "kind": "tombstone" if manifest.tombstone else "manifest",
                "namespace": manifest.namespace,
                **_checkpoint_fields(manifest.checkpoint),
                "world": manifest.world,
                "saved_at": manifest.saved_at,
                "parts": manifest.parts,
                "records": {layout.record_name(rank): found for rank, found in manifest.records.items()},
                "metrics": _finite(manifest.metrics),
            }
        )
    )


def attempt_record_to_json(record: AttemptRecord) -> bytes:
    """Return *record* as the bytes of its file."""
    return sealed(
        dump(
            {
                "format": FORMAT,
                "kind": "attempt",
                "namespace": record.namespace,
                "attempt": str(record.attempt),
                "parent": layout.checkpoint_dir(record.parent) if record.parent else None,
                "chosen": record.chosen,
                **({} if record.source is None else {"source": record.source}),
            }
        )
    )


def compose_manifest(records: Mapping[int, bytes]) -> Manifest:
    """Return the manifest of the checkpoint whose record files, by rank, are *records*.

    Raises:
        FormatError: the records are not all of one checkpoint, one is missing, or one tells of a failure.
    """
    parsed = {rank: record_from_json(data) for rank, data in sorted(records.items())}
    first = parsed.get(0)
    if first is None or set(parsed) != set(range(first.world)):
        raise FormatError(f"records of ranks {sorted(parsed)} do not make a checkpoint")
    for rank, record in parsed.items():
        same = (record.namespace, record.checkpoint, record.world) == (first.namespace, first.checkpoint, first.world)
        if not same or record.rank != rank or record.failed:
            raise FormatError(
                f"the record of rank {rank} is of {record.checkpoint}, rank {record.rank}, failed: {record.failed}"
            )
    _check_names(parsed.values())
    return Manifest(
        namespace=first.namespace,
        checkpoint=first.checkpoint,
        world=first.world,
        saved_at=first.saved_at,
        parts={part.name: part.size for record in parsed.values() for part in record.parts if not part.replica},
        records={rank: checksum.digest(data) for rank, data in sorted(records.items())},
        metrics=first.metrics,
    )


def _check_names(records: Iterable[Record]) -> None:
    """Of two ranks' parts under one name all but one are lost."""
    owners: dict[str, int] = {}
    for record in records:
        for part in record.parts:
            if not part.replica and owners.setdefault(part.name, record.rank) != record.rank:
                raise FormatError(f"ranks {owners[part.name]} and {record.rank} both have a part {part.name!r}")


def record_from_json(data: bytes | memoryview) -> Record:
    """Return the record that *data* holds.

    Raises:
        FormatError: it holds none, or one of a newer release.
    """
    return parsed(data, "record", _record)


def manifest_from_json(data: bytes | memoryview) -> Manifest:
    """Return the manifest or tombstone that *data* holds.

    Raises:
        FormatError: it holds none, or one of a newer release.
    """
    return parsed(data, ("manifest", "tombstone"), _manifest)


def attempt_record_from_json(data: bytes | memoryview) -> AttemptRecord:
    """Return the attempt record that *data* holds.

    Raises:
        FormatError: it holds none, or one of a newer release.
    """
    return parsed(data, "attempt", _attempt_record)


def _record(fields: Json) -> Record:
    parts = tuple(_part(mapping(entry)) for entry in list_of(fields, "parts"))
    sizes = {part.name: part.size for part in parts}
    items = tuple(_item(mapping(entry), sizes) for entry in list_of(fields, "items"))
    watermark, failed = fields["watermark"], fields["failed"]
    if len(sizes) != len(parts):
        raise FormatError("two parts have one name")
    return Record(
        namespace=layout.check_namespace(fields["namespace"]),
        checkpoint=_checkpoint(fields),
        rank=integer(fields, "rank", below=layout.MAX_WORLD),
        world=integer(fields, "world", low=1, below=layout.MAX_WORLD + 1),
        saved_at=number(fields["saved_at"]),
        parts=parts,
        tables=(ItemTable(items=items),),
        watermark=None if watermark is None else _named_checkpoint(watermark),
        metrics=_metrics(fields),
        failed=None if failed is None else text(failed),
    )


def _part(fields: Json) -> Part:
    chunks = tuple(digest_of(entry) for entry in list_of(fields, "chunks"))
    size, replica = integer(fields, "size"), fields["replica"]
    if len(chunks) != checksum.chunk_count(size) or not isinstance(replica, bool):
        raise FormatError(f"a part of {size} bytes can't have {len(chunks)} chunks, replica {replica!r}")
    return Part(name=layout.check_part_name(text(fields["name"])), size=size, chunks=chunks, replica=replica)


def _item(fields: Json, part_sizes: Mapping[str, int]) -> Item:
    part, offset, length = text(fields["part"]), integer(fields, "offset"), integer(fields, "length")
    if part not in part_sizes or offset + length > part_sizes[part]:
        raise FormatError(f"item {str(fields['fqn'])[:80]!r} lies outside part {part[:80]!r}")
    path = tuple(key if isinstance(key, int) else text(key) for key in list_of(fields, "path"))
    fqn = text(fields["fqn"])
    if "payload" not in fields:
        return Item(fqn=fqn, path=path, part=part, offset=offset, length=length)
    sizes, offsets, shape = (integers(fields, name) for name in ("sizes", "offsets", "shape"))
    payload = integer(fields, "payload")
    fits = len(sizes) == len(offsets) == len(shape) and all(
        start + size <= whole for start, size, whole in zip(offsets, sizes, shape, strict=True)
    )
    if not fits or not offset <= payload <= offset + length:
        raise FormatError(f"item {fqn[:80]!r}: sizes {sizes}, offsets {offsets}, shape {shape} do not fit")
    return Item(
        fqn=fqn,
        path=path,
        part=part,
        offset=offset,
        length=length,
        payload=payload,
        dtype=text(fields["dtype"]),
        sizes=sizes,
        offsets=offsets,
        shape=shape,
    )


def _manifest(fields: Json) -> Manifest:
    records: dict[int, str] = {}
    for name, found in mapping(fields["records"]).items():
        rank = layout.parse_record_name(name)
        if rank is None:
            raise FormatError(f"{name[:80]!r} is no record")
        records[rank] = digest_of(found)
    parts = mapping(fields["parts"])
    world, tombstone = integer(fields, "world", low=1, below=layout.MAX_WORLD + 1), fields["kind"] == "tombstone"
    if not tombstone and set(records) != set(range(world)):
        raise FormatError(f"world is {world}, records are of ranks {sorted(records)[:8]}")
    return Manifest(
        namespace=layout.check_namespace(fields["namespace"]),
        checkpoint=_checkpoint(fields),
        world=world,
        saved_at=number(fields["saved_at"]),
        parts={layout.check_part_name(name): integer(parts, name) for name in parts},
        records=records,
        metrics=_metrics(fields),
        tombstone=tombstone,
    )


def _attempt_record(fields: Json) -> AttemptRecord:
    parent, chosen, source = fields["parent"], fields["chosen"], fields.get("source")
    if not isinstance(chosen, bool):
        raise FormatError(f"chosen must be true or false, got {chosen!r}")
    return AttemptRecord(
        namespace=layout.check_namespace(fields["namespace"]),
        attempt=layout.parse_attempt(text(fields["attempt"])),
        parent=None if parent is None else _named_checkpoint(parent),
        chosen=chosen,
        source=None if source is None else text(source),
    )


def _checkpoint_fields(checkpoint: CheckpointId) -> dict[str, object]:
    return {"step": checkpoint.step, "attempt": str(checkpoint.attempt)}


def _checkpoint(fields: Json) -> CheckpointId:
    return CheckpointId(attempt=layout.parse_attempt(text(fields["attempt"])), step=layout.check_step(fields["step"]))


def _named_checkpoint(value: object) -> CheckpointId:
    found = layout.parse_checkpoint_dir(text(value))
    if found is None:
        raise FormatError(f"{value!r} names no checkpoint")
    return found


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """JSON has no NaN; a metric without a value is no metric."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _metrics(fields: Json) -> dict[str, float]:
    return {name: number(value) for name, value in mapping(fields["metrics"]).items()}
