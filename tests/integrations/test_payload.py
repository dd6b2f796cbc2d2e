"""The stream that a skeleton frames is what torch.save would have written."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sm_tiered_dcp import payload
from sm_tiered_dcp.payload import Skeleton, skeleton
from sm_tiered_dcp.tensor_reads import dtype_name, dtype_named, own_bytes

DTYPES = [
    dtype_named(name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16"),
        *("float32", "float64", "complex32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
        *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
]
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (7,), (3, 5), (2, 1, 4), (130, 17)]

Make = Callable[[torch.dtype, tuple[int, ...]], Skeleton]


@pytest.fixture(params=["skip_data", "plain torch.save"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Both ways to a skeleton."""
    if request.param == "plain torch.save":
        monkeypatch.delattr(torch.serialization, "skip_data")
    payload._can_skip.cache_clear()
    yield skeleton.__wrapped__
    payload._can_skip.cache_clear()


def filled(found: Skeleton, tensor: torch.Tensor) -> bytes:
    data = bytes(own_bytes(tensor))
    assert len(data) == found.payload_bytes
    return found.header + data + found.trailer


def some(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Arbitrary bits, NaNs among them; a bool has only two."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_filled_skeleton_loads_as_the_tensor_bit_by_bit(make: Make, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        tensor = some(dtype, shape)
        data = filled(make(dtype, shape), tensor)
        loaded: Any = torch.load(io.BytesIO(data), weights_only=True)
        assert (loaded.dtype, loaded.shape) == (dtype, tensor.shape)
        assert bytes(own_bytes(loaded)) == bytes(own_bytes(tensor))


def test_a_filled_skeleton_is_what_torch_save_writes_without_crc() -> None:
    tensor = some(torch.float32, (33, 7))
    stock = io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, stock)
    finally:
        torch.serialization.set_crc32_options(True)
    assert filled(skeleton(torch.float32, (33, 7)), tensor) == stock.getvalue()


def test_the_skeleton_of_a_huge_tensor_takes_no_memory() -> None:
    found = skeleton(torch.float32, (1 << 31, 2))
    assert found.payload_bytes == 16 << 30
    assert found.length < (16 << 30) + 4096


def test_making_a_skeleton_leaves_torch_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for before in (True, False):
        torch.serialization.set_crc32_options(before)
        skeleton.__wrapped__(torch.float32, (5,))
        assert torch.serialization.get_crc32_options() is before
    torch.serialization.set_crc32_options(True)


def test_a_default_device_doesnt_get_into_the_stream() -> None:
    with torch.device("meta"):
        assert skeleton.__wrapped__(torch.float32, (5,)) == skeleton.__wrapped__(torch.float32, (5,))
        found = skeleton.__wrapped__(torch.float32, (5, 3))
    assert found == skeleton.__wrapped__(torch.float32, (5, 3))


def test_a_torch_that_skips_otherwise_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should skip_data ever write the payload after all, or leave a hole of another size, nothing breaks."""

    class NoSkip:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.serialization, "skip_data", NoSkip)
    payload._can_skip.cache_clear()
    try:
        tensor = some(torch.float64, (9,))
        loaded: Any = torch.load(
            io.BytesIO(filled(skeleton.__wrapped__(torch.float64, (9,)), tensor)), weights_only=True
        )
    finally:
        payload._can_skip.cache_clear()
    assert bytes(own_bytes(loaded)) == bytes(own_bytes(tensor))


def test_threads_that_make_skeletons_at_once_dont_switch_crc_off_for_good() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda length: skeleton.__wrapped__(torch.int8, (length,)), range(400)))
    assert torch.serialization.get_crc32_options() is True
