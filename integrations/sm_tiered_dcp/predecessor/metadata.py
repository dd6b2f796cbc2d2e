"""What the predecessor's metadata says of one checkpoint, checked: which value stands where in which rank's shard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch

from sm_tiered import layout
from sm_tiered.errors import FormatError, SaveError
from sm_tiered_dcp.predecessor.contents import Contents, Span, StoredTensor, StoredValue
from sm_tiered_dcp.predecessor.tiling import are_apart
from sm_tiered_dcp.predecessor.unpickling import Made, Named, read_pickle
from sm_tiered_dcp.tensor_reads import dtype_named

__all__ = ["read_contents"]

_MOST_DIMS = 64
_LONGEST = 2**62
_LONGEST_NAME, _DEEPEST = 4096, 256
_HINT = (
    "It is damaged, or nothing that amzn-sagemaker-checkpointing wrote. Import an older step, or from the other place "
    "that it was saved to, S3 or the cluster's service."
)

_T = TypeVar("_T")


def read_contents(data: bytes, what: str) -> Contents:
    """Return what the pickled metadata *data* says. Nothing that it names is run. *what*: its name, for messages.

    Raises:
        FormatError: it is no such metadata, contradicts itself, or names something else than DCP's metadata.
        SaveError: there is not enough memory for it.
    """
    try:
        found = read_pickle(data, what)
    except MemoryError as error:
        hint = "It is not damaged: import where there is more."
        raise SaveError(f"{what}: there is not enough memory for what {len(data)} bytes tell", hint=hint) from error
    try:
        contents = _contents(_fields(_made(found, "Metadata", "what it holds")))
        _check_apart(contents)
    except FormatError as error:
        raise FormatError(f"{what}: {error.message}", hint=error.hint or _HINT) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {str(error)[:120]}"
        raise FormatError(f"{what} is no DCP metadata: {said}", hint=_HINT) from error
    return contents


def _contents(fields: Mapping[str, Any]) -> Contents:
    described = _mapping(fields["state_dict_metadata"], "state_dict_metadata")
    paths = _paths(fields.get("planner_data"), described)
    spans = _spans(_mapping(fields.get("storage_data"), "storage_data"))
    tensors: list[StoredTensor] = []
    values: list[StoredValue] = []
    lists: set[int] = set()
    for name, entry in described.items():
        fqn = _name(name)
        if not isinstance(entry, Made) or entry.name not in ("TensorStorageMetadata", "BytesStorageMetadata"):
            raise FormatError(f"{fqn} is neither a tensor nor a value, but {_shown(entry)}")
        if entry.name == "BytesStorageMetadata":
            values.append(StoredValue(fqn=fqn, path=paths[fqn], span=_taken(spans, fqn, None)))
        else:
            described_by = _fields(entry)
            chunks = _typed(described_by["chunks"], list, f"{fqn}: chunks")
            if id(chunks) in lists:
                raise FormatError(f"{fqn}: its chunks are another tensor's")
            lists.add(id(chunks))
            tensors += _chunks(fqn, paths[fqn], described_by, spans)
    if spans:
        (fqn, offsets), _ = spans.popitem()
        raise FormatError(f"{fqn} at {offsets} is stored and not described")
    if not described:
        raise FormatError("it holds nothing", hint="Look whether that is the run that you mean.")
    return Contents(tensors=tuple(tensors), values=tuple(values))


def _chunks(
    fqn: str, path: tuple[str | int, ...], fields: Mapping[str, Any], spans: dict[tuple[str, Any], Span]
) -> Iterable[StoredTensor]:
    shape, dtype = _size(fields["size"], fqn), _dtype(fields["properties"], fqn)
    known: dict[tuple[int, ...], tuple[int, ...]] = {}
    for chunk in _typed(fields["chunks"], list, f"{fqn}: chunks"):
        place = _fields(_made(chunk, "ChunkStorageMetadata", fqn))
        offsets, sizes = _size(place["offsets"], fqn), _size(place["sizes"], fqn)
        inside = len(offsets) == len(sizes) == len(shape) and all(
            offset + size <= whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)
        )
        if not inside or known.setdefault(offsets, sizes) != sizes:
            raise FormatError(f"{fqn}: a chunk of {sizes} at {offsets} is no part of {shape}, or stands twice")
    if sum(map(math.prod, known.values())) != math.prod(shape) or (len(known) < 2 and shape not in known.values()):
        raise FormatError(f"{fqn}: its chunks are not all of {shape}")
    if not are_apart(list(known.items())):
        raise FormatError(f"{fqn}: two of its chunks hold the same elements, and others are missing")
    for offsets, sizes in known.items():
        span = _taken(spans, fqn, offsets)
        if math.prod(sizes) * dtype.itemsize > span.length:
            raise FormatError(f"{fqn}: {dtype} {sizes} doesn't fit into {span.length} stored bytes")
        yield StoredTensor(fqn=fqn, path=path, span=span, dtype=dtype, sizes=sizes, offsets=offsets, shape=shape)


def _taken(spans: dict[tuple[str, Any], Span], fqn: str, offsets: tuple[int, ...] | None) -> Span:
    span = spans.pop((fqn, offsets), None)
    if span is None:
        raise FormatError(f"{fqn}: nothing says where its part at {offsets} is stored")
    return span


def _spans(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...] | None], Span]:
    """Where everything stands, by name and by where it begins in its tensor (None: a value)."""
    found: dict[tuple[str, tuple[int, ...] | None], Span] = {}
    for index, info in stored.items():
        key = _fields(_made(index, "MetadataIndex", "storage_data"))
        fqn = _name(key["fqn"])
        offsets = None if key.get("offset") is None else _size(key["offset"], fqn)
        place = _fields(_made(info, "StorageInfo", fqn))
        span = Span(
            rank=_int(place["rank"], layout.MAX_WORLD, f"{fqn}: rank"),
            offset=_int(place["offset"], _LONGEST, f"{fqn}: offset"),
            length=_int(place["length"], _LONGEST, f"{fqn}: length"),
        )
        if (fqn, offsets) in found:
            raise FormatError(f"{fqn} at {offsets} is stored twice")
        found[fqn, offsets] = span
    return found


def _check_apart(contents: Contents) -> None:
    """No byte is two values': else a small shard could be made to stand for any amount of data."""
    spans = sorted((entry.span.rank, entry.span.offset, entry.span.end, entry.fqn) for entry in contents.entries)
    for one, other in zip(spans, spans[1:], strict=False):
        if one[0] == other[0] and other[1] < one[2]:
            raise FormatError(f"{one[3]} and {other[3]} overlap in the shard of rank {one[0]}")


# ---- plain values out of what was pickled


def _paths(planner_data: object, described: Mapping[Any, object]) -> dict[str, tuple[str | int, ...]]:
    """The keys that lead to each value; where the planner kept none, its name."""
    if planner_data is None:
        return {_name(fqn): (_name(fqn),) for fqn in described}
    given = _mapping(planner_data, "planner_data")
    if set(given) != set(described):
        raise FormatError("planner_data and state_dict_metadata don't name the same values")
    paths: dict[str, tuple[str | int, ...]] = {}
    for fqn, keys in given.items():
        path = _typed(keys, tuple, f"{_name(fqn)}: path")
        if not 0 < len(path) <= _DEEPEST or not all(type(key) in (str, int) for key in path):
            raise FormatError(
                f"{_name(fqn)}: its path is none, {str(path)[:200]}: allowed are 1 to {_DEEPEST} texts and numbers"
            )
        paths[fqn] = tuple(key if isinstance(key, str) else _int(key, _LONGEST, f"{fqn}: path") for key in path)
        if ".".join(map(str, path)) != fqn:
            raise FormatError(f"{fqn}: its path leads to another name, {str(path)[:200]}")
    return paths


def _name(value: object) -> str:
    text: str = _typed(value, str, "a name")
    if not 0 < len(text) <= _LONGEST_NAME or layout.parse_part_name(text) is not None:
        raise FormatError(
            f"{text[:80]!r} can't be the name of a value: allowed are 1 to {_LONGEST_NAME} characters, but no part's "
            "name, such as '__0_0.distcp'"
        )
    return text


def _size(value: object, what: str) -> tuple[int, ...]:
    numbers: tuple[object, ...] = _typed(value, tuple, f"{what}: size")
    if len(numbers) > _MOST_DIMS:
        raise FormatError(f"{what}: {len(numbers)} dimensions, allowed are {_MOST_DIMS}")
    return tuple(_int(number, _LONGEST, f"{what}: size") for number in numbers)


def _dtype(properties: object, what: str) -> torch.dtype:
    made = _made(properties, "TensorProperties", what)
    # It pickles itself as (dtype, layout, requires_grad, memory format, pin_memory).
    dtype, order, *_ = _typed(made.state, tuple, f"{what}: properties")
    if not isinstance(order, Made) or order.name != "layout" or order.arguments != ("torch.strided",):
        raise FormatError(f"{what}: not a dense tensor: its layout is {_shown(order)}, allowed is torch.strided")
    if not isinstance(dtype, Named):
        raise FormatError(f"{what}: no dtype: {_shown(dtype)}")
    return dtype_named(dtype.name)


def _made(value: object, name: str, what: str) -> Made:
    if not isinstance(value, Made) or value.name != name:
        raise FormatError(f"{what}: a {name} was expected, not {_shown(value)}")
    return value


def _shown(value: object) -> str:
    """What stands there, in few words: whatever it is, it may be deep."""
    if isinstance(value, Made):
        first = value.arguments[:1]
        return f"{value.name} {first[0][:40]}" if first and isinstance(first[0], str) else value.name
    return value.name if isinstance(value, Named) else f"a {type(value).__name__}"


def _fields(made: Made) -> Mapping[str, Any]:
    return _mapping(made.state, made.name)


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    return _typed(value, dict, what)


def _typed(value: object, kind: type[_T], what: str) -> Any:
    if not isinstance(value, kind):
        raise FormatError(f"{what}: a {kind.__name__} was expected, not a {type(value).__name__}")
    return cast("Any", value)


def _int(value: object, limit: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < limit:
        told = value if isinstance(value, int) else f"a {type(value).__name__}"
        raise FormatError(f"{what}: {told} is no integer of at least 0, below {limit}")
    return value
