"""Boxes of stored tensors come back exactly, and nothing but the ranges told is read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sm_tiered.errors import FormatError, MismatchError, StructureError
from sm_tiered.records import Item
from sm_tiered_dcp import tensor_reads
from sm_tiered_dcp.tensor_reads import dtype_name, dtype_named, own_bytes, place, ranges, row_major

PAYLOAD = 704


def stored(tensor: torch.Tensor) -> tuple[Item, bytes]:
    """An item whose payload stands in a part of noise."""
    noise = bytes(range(256)) * 3
    data = noise[:PAYLOAD] + bytes(own_bytes(tensor.contiguous())) + noise[:100]
    sizes = tuple(tensor.shape)
    item = Item(
        fqn="model.weight",
        path=("model", "weight"),
        part="__0_0.distcp",
        offset=0,
        length=len(data),
        payload=PAYLOAD,
        dtype=dtype_name(tensor.dtype),
        sizes=sizes,
        offsets=(0,) * len(sizes),
        shape=sizes,
    )
    return item, data


class Reader:
    """Reads from bytes and remembers what."""

    def __init__(self, data: bytes) -> None:
        self.data, self.calls = data, list[tuple[int, int]]()

    def __call__(self, offset: int, buffer: memoryview) -> None:
        assert offset >= 0
        assert offset + len(buffer) <= len(self.data)
        self.calls.append((offset, len(buffer)))
        buffer[:] = self.data[offset : offset + len(buffer)]


def box_of(tensor: torch.Tensor, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(dim, offset, length)
    return tensor


def target_like(lengths: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    if kind == "contiguous":
        return torch.zeros(lengths, dtype=dtype)
    if kind == "transposed":
        return torch.zeros(tuple(reversed(lengths)), dtype=dtype).permute(tuple(reversed(range(len(lengths)))))
    return torch.zeros(tuple(2 * length + 1 for length in lengths), dtype=dtype)[
        tuple(slice(1, 2 * length, 2) if length else slice(0, 0) for length in lengths)
    ]


boxes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6)), max_size=4).map(
    lambda dims: [(size, min(offset, size), min(length, size - min(offset, size))) for size, offset, length in dims]
)


@settings(max_examples=300, deadline=None)
@given(
    dims=boxes,
    gap=st.sampled_from([0, 4, 16, 64, 1 << 20]),
    bounce=st.sampled_from([16, 48, 200, 1 << 20]),
    kind=st.sampled_from(["contiguous", "transposed", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.bool, torch.complex128]),
)
def test_any_box_is_placed_exactly_and_only_its_ranges_are_read(
    dims: list[tuple[int, int, int]], gap: int, bounce: int, kind: str, dtype: torch.dtype
) -> None:
    sizes, offsets, lengths = (tuple(dim[i] for dim in dims) for i in range(3))
    tensor = (torch.arange(1, math.prod(sizes) + 1).reshape(sizes) % (2 if dtype is torch.bool else 999)).to(dtype)
    item, data = stored(tensor)
    told, reader = ranges(item, offsets, lengths, gap_bytes=gap), Reader(data)
    target = target_like(lengths, dtype, kind)
    before = tensor_reads.BOUNCE_BYTES
    tensor_reads.BOUNCE_BYTES = bounce
    try:
        place(item, offsets, lengths, target, reader, gap_bytes=gap)
    finally:
        tensor_reads.BOUNCE_BYTES = before
    assert torch.equal(target, box_of(tensor, offsets, lengths))
    for offset, length in reader.calls:
        assert any(start <= offset and offset + length <= start + size for start, size in told)
    wanted = math.prod(lengths) * dtype.itemsize
    if gap == 0:
        assert sum(length for _, length in told) == wanted
    assert told == sorted(told)
    assert all(a[0] + a[1] + gap < b[0] for a, b in zip(told, told[1:], strict=False))


def test_a_tenth_of_the_rows_is_a_tenth_of_the_bytes_in_one_range() -> None:
    item, _ = stored(torch.zeros(1000, 10))
    assert ranges(item, (300, 0), (100, 10)) == [(PAYLOAD + 300 * 40, 100 * 40)]


def test_far_apart_columns_are_read_one_by_one_and_near_ones_together() -> None:
    item, data = stored(torch.arange(8 * 50_000, dtype=torch.float32).reshape(8, 50_000))
    assert len(ranges(item, (0, 0), (8, 10))) == 8
    assert len(ranges(item, (0, 0), (8, 49_000))) == 1
    reader, target = Reader(data), torch.zeros(8, 10)
    place(item, (0, 7), (8, 10), target, reader)
    assert len(reader.calls) == 8
    assert torch.equal(target[3], torch.arange(3 * 50_000 + 7, 3 * 50_000 + 17, dtype=torch.float32))


def test_a_contiguous_target_is_read_into_directly_in_one_call() -> None:
    tensor = torch.randn(64, 32)
    item, data = stored(tensor)
    reader, target = Reader(data), torch.nn.Parameter(torch.zeros(64, 32))
    place(item, (0, 0), (64, 32), target, reader)
    assert reader.calls == [(PAYLOAD, 64 * 32 * 4)]
    assert torch.equal(target, tensor)
    assert target.requires_grad


def test_a_large_strided_target_goes_through_a_bounded_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_reads, "BOUNCE_BYTES", 4096)
    tensor = torch.randn(300, 70)
    item, data = stored(tensor)
    reader, target = Reader(data), torch.zeros(70, 300).t()
    place(item, (0, 0), (300, 70), target, reader)
    assert torch.equal(target, tensor)
    assert max(length for _, length in reader.calls) <= 4096
    assert sum(length for _, length in reader.calls) == tensor.nbytes


@pytest.mark.parametrize(
    ("offsets", "lengths", "target"),
    [
        ((0, 0), (4, 4), torch.zeros(4, 3)),
        ((0, 0), (4, 4), torch.zeros(4, 4, dtype=torch.float64)),
        ((1, 0), (4, 4), torch.zeros(4, 4)),
        ((-1, 0), (2, 4), torch.zeros(2, 4)),
        ((0,), (4,), torch.zeros(4)),
    ],
)
def test_what_doesnt_fit_is_refused_before_anything_is_read(
    offsets: tuple[int, ...], lengths: tuple[int, ...], target: torch.Tensor
) -> None:
    item, data = stored(torch.zeros(4, 4))
    reader = Reader(data)
    with pytest.raises(MismatchError, match=r"model\.weight"):
        place(item, offsets, lengths, target, reader)
    assert not reader.calls


def test_a_payload_longer_than_its_item_is_refused() -> None:
    item, data = stored(torch.zeros(4, 4))
    lying = Item(
        fqn="w", path=("w",), part=item.part, offset=0, length=item.length, payload=PAYLOAD, dtype="float32",
        sizes=(4000, 4), offsets=(0, 0), shape=(4000, 4),
    )  # fmt: skip
    with pytest.raises(FormatError, match="doesn't fit"):
        place(lying, (0, 0), (1, 4), torch.zeros(1, 4), Reader(data))


def test_dtype_names_are_read_strictly() -> None:
    assert dtype_named("bfloat16") is torch.bfloat16
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
    for name in ("torch.float32", "nn", "float", "qint8", "", None):
        with pytest.raises(FormatError, match="no dtype"):
            dtype_named(name)
    with pytest.raises(StructureError, match="qint8"):
        dtype_name(torch.qint8)


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4), ends=st.tuples(st.integers(0, 700), st.integers(0, 700))
)
def test_pieces_in_row_major_order_are_the_elements_asked_for(shape: list[int], ends: tuple[int, int]) -> None:
    whole = torch.arange(math.prod(shape)).reshape(tuple(reversed(shape))).permute(*reversed(range(len(shape))))
    start, stop = sorted(min(end, whole.numel()) for end in ends)
    pieces = [piece.reshape(-1) for piece in row_major(whole, start, stop)]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *pieces]), whole.reshape(-1)[start:stop])
    assert len(pieces) <= 2 * len(shape) + 1
