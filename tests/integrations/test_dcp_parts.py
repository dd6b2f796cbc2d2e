"""Parts hold stock DCP streams: written once in full, then only the data, and the same bytes when streamed."""

from __future__ import annotations

import io
import mmap
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import StructureError
from sm_tiered.parts import PartSource
from sm_tiered.records import Item, ItemTable
from sm_tiered_dcp.dcp_parts import BytesPart, TensorEntry, TensorLayout, ValueEntry, layout_tensors
from sm_tiered_dcp.tensor_reads import own_bytes

NAME = "__0_0.distcp"


def entry(fqn: str, tensor: torch.Tensor) -> TensorEntry:
    shape = tuple(tensor.shape)
    return TensorEntry(fqn=fqn, path=(fqn,), dtype=tensor.dtype, sizes=shape, offsets=(0,) * len(shape), shape=shape)


def laid_out(tensors: Sequence[torch.Tensor]) -> TensorLayout:
    return layout_tensors(NAME, [entry(f"t{index}", tensor) for index, tensor in enumerate(tensors)])


def written(part: PartSource, cache: dict[object, object] | None = None, fill: int = 0xAB) -> bytearray:
    buffer = bytearray([fill]) * part.size
    part.write(memoryview(buffer), {} if cache is None else cache)
    return buffer


def loaded(data: bytes | bytearray, item: Item) -> Any:
    stream = io.BytesIO(bytes(data[item.offset : item.offset + item.length]))
    return torch.load(stream, weights_only=True)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.resolve_conj().resolve_neg().contiguous(), b.resolve_conj().resolve_neg().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and bytes(own_bytes(a)) == bytes(own_bytes(b))


def zoo() -> list[torch.Tensor]:
    base = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    whole = torch.randn(6, 4, dtype=torch.complex64)
    return [
        base,
        base[3:5, ::2],
        base.t(),
        base[0, 0],
        torch.ones(1).expand(40, 3),
        torch.empty(0),
        torch.empty(4, 0, 2, dtype=torch.int64),
        torch.tensor(7, dtype=torch.int16),
        torch.tensor([True, False, True]),
        torch.randn(5).bfloat16(),
        torch.randn(9).to(torch.float8_e4m3fn),
        torch.randn(9).to(torch.float8_e5m2)[::2],
        whole.conj(),
        whole.conj().imag,
        whole[1:, :3].conj().t(),
        torch.nn.Parameter(torch.randn(3, 3)),
        torch.randn(3, requires_grad=True) * 2,
        torch.tensor([float("nan"), -0.0]),
        torch.arange(5).to(torch.uint16),
    ]


def test_every_kind_of_tensor_loads_with_stock_torch_bit_by_bit() -> None:
    tensors = zoo()
    part = laid_out(tensors).source(tensors)
    data = written(part)
    for item, tensor in zip(part.table.items, tensors, strict=True):
        found = loaded(data, item)
        assert same(found, tensor.detach()), item
        assert found.untyped_storage().nbytes() == found.nbytes
        assert item.payload is not None
        assert item.payload % 64 == 0
        raw = data[item.payload : item.payload + tensor.numel() * tensor.dtype.itemsize]
        assert bytes(raw) == bytes(own_bytes(tensor.detach().resolve_conj().resolve_neg().contiguous()))


def test_the_bytes_depend_on_the_values_alone() -> None:
    tensors = zoo()
    part = laid_out(tensors).source(tensors)
    first = written(part, fill=0x00)
    assert first == written(laid_out(tensors).source(tensors), fill=0xFF)
    assert first == b"".join(bytes(piece) for piece in part.chunks())


def test_later_saves_into_the_same_bytes_change_nothing_but_the_data() -> None:
    tensors = zoo()
    layout = laid_out(tensors)
    buffer, cache = bytearray(layout.size), dict[object, object]()
    layout.source(tensors).write(memoryview(buffer), cache)
    changed = [torch.zeros_like(tensor.detach()) for tensor in tensors]
    layout.source(changed).write(memoryview(buffer), cache)
    assert buffer == written(layout.source(changed))
    # The frame isn't written again: damage outside the data would stay.
    item = layout.table.items[0]
    buffer[item.offset] ^= 0xFF
    layout.source(tensors).write(memoryview(buffer), cache)
    buffer[item.offset] ^= 0xFF
    assert buffer == written(layout.source(tensors))


def test_another_layout_into_the_same_bytes_writes_all_of_itself() -> None:
    size = 4096
    buffer, cache = bytearray(b"\xee" * size), dict[object, object]()
    one, two = torch.randn(10), torch.arange(30, dtype=torch.int64)
    for tensor in (one, two, one):
        layout = laid_out([tensor])
        part = layout.source([tensor])
        part.write(memoryview(buffer)[: part.size], cache)
        assert buffer[: part.size] == written(part)


def test_a_write_that_failed_in_the_frame_is_no_known_frame() -> None:
    tensors = [torch.randn(10)]
    first, second = laid_out(tensors), laid_out([torch.randn(500)])
    buffer, cache = bytearray(first.size), dict[object, object]()
    first.source(tensors).write(memoryview(buffer), cache)
    with pytest.raises((ValueError, RuntimeError)):  # the buffer is too short for it
        second.source([torch.randn(500)]).write(memoryview(buffer), cache)
    first.source(tensors).write(memoryview(buffer), cache)
    assert buffer == written(first.source(tensors))


def test_a_mapping_can_be_closed_once_the_cache_is_dropped() -> None:
    tensors = [torch.randn(100)]
    part = laid_out(tensors).source(tensors)
    mapping, cache = mmap.mmap(-1, part.size), dict[object, object]()
    view = memoryview(mapping)
    part.write(view, cache)
    assert mapping[:] == bytes(written(part))
    cache.clear()
    view.release()
    mapping.close()


def test_nothing_keeps_the_live_tensors_after_a_write() -> None:
    tensor = torch.randn(100)
    layout = laid_out([tensor])
    buffer, cache = bytearray(layout.size), dict[object, object]()
    layout.source([tensor]).write(memoryview(buffer), cache)
    before = bytes(buffer)
    tensor.fill_(float("nan"))
    assert bytes(buffer) == before


def test_streaming_gives_pieces_of_a_chunk_each_and_copes_with_large_strided_tensors() -> None:
    tensors = [
        torch.randn(1500, 2100).t(),
        torch.randn(2_500_000).double()[::2],
        torch.randn(3, 700, 700).permute(2, 0, 1),
        torch.ones(1).expand(3_000_001),
        torch.randn(2_100_000),
    ]
    part = laid_out(tensors).source(tensors)
    pieces = [bytes(piece) for piece in part.chunks()]
    assert {len(piece) for piece in pieces[:-1]} == {CHUNK_BYTES}
    assert b"".join(pieces) == written(part)


def test_what_isnt_as_planned_is_named() -> None:
    tensors = [torch.zeros(3), torch.zeros(2, 2)]
    layout = laid_out(tensors)
    for given, words in [
        ([torch.zeros(3)], "holds 2 tensors, 1"),
        ([torch.zeros(3), torch.zeros(2, 1)], r"t1: .*\[2, 2\] was planned"),
        ([torch.zeros(1), torch.zeros(2, 2)], r"t0: .*\[3\] was planned"),
        ([torch.zeros(3).double(), torch.zeros(2, 2)], "t0: .*float64"),
        ([torch.zeros(3), torch.zeros(2, 2).to_sparse()], "t1: .*sparse"),
        ([torch.zeros(3), torch.zeros(2, 2, device="meta")], "t1: .*meta"),
    ]:
        with pytest.raises(StructureError, match=words):
            layout.source(given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sizes": (3,), "offsets": (2,), "shape": (4,)}, "is no part of"),
        ({"sizes": (3, 1)}, "is no part of"),
        ({"offsets": (-1,)}, "is no part of"),
        ({"dtype": torch.qint8}, "qint8"),
    ],
)
def test_an_impossible_entry_is_refused(change: dict[str, Any], words: str) -> None:
    facts: dict[str, Any] = {
        "fqn": "w", "path": ("w",), "dtype": torch.float32, "sizes": (3,), "offsets": (0,), "shape": (3,),
    }  # fmt: skip
    with pytest.raises(StructureError, match=words):
        layout_tensors(NAME, [TensorEntry(**(facts | change))])


def test_one_chunk_twice_is_refused() -> None:
    with pytest.raises(StructureError, match="stands twice"):
        layout_tensors(NAME, [entry("w", torch.zeros(2)), entry("w", torch.zeros(2))])


def test_names_for_the_same_bytes_may_follow_the_tensors_items() -> None:
    from dataclasses import replace

    tensor = torch.randn(4)
    made = laid_out([tensor])
    tied = replace(made, table=ItemTable(items=(*made.table.items, replace(made.table.items[0], fqn="tied"))))
    part = tied.source([tensor])
    assert written(part) == written(made.source([tensor])) == bytearray(b"".join(map(bytes, part.chunks())))


def test_an_empty_layout_is_an_empty_part() -> None:
    part = layout_tensors(NAME, []).source([])
    assert part.size == 0
    part.write(memoryview(bytearray()), {})
    assert list(part.chunks()) == []


def test_values_stand_one_after_the_other() -> None:
    entries = (
        ValueEntry(fqn="a", path=("a",), data=b"12345"),
        ValueEntry(fqn="e", path=("e",), data=b""),
        ValueEntry(fqn="b", path=("b", 0), data=b"678"),
    )
    part: PartSource = BytesPart(name="__0_1.distcp", entries=entries)
    assert (part.size, part.recycled, part.replica) == (8, False, False)
    assert written(part) == b"12345678" == b"".join(map(bytes, part.chunks()))
    assert [(item.fqn, item.offset, item.length, item.payload) for item in part.table.items] == [
        ("a", 0, 5, None),
        ("e", 5, 0, None),
        ("b", 5, 3, None),
    ]


def test_a_tensor_part_is_a_part_source() -> None:
    part: PartSource = layout_tensors(NAME, [entry("t", torch.zeros(2))], replica=True).source([torch.zeros(2)])
    assert (part.name, part.recycled, part.replica) == (NAME, True, True)
    assert cast("Any", part).table is part.table


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_have_arrived_when_write_returns() -> None:
    base = torch.randn(2000, 3000, device="cuda")
    tensors = [base, base.t(), torch.tensor(3.0), base[0, 0], torch.empty(0, device="cuda"), torch.ones(3)]
    part = laid_out(tensors).source(tensors)
    expected = [tensor.cpu().clone() for tensor in tensors]
    data = written(part)
    assert b"".join(bytes(piece) for piece in part.chunks()) == data
    base.fill_(float("nan"))
    for item, tensor in zip(part.table.items, expected, strict=True):
        assert same(loaded(data, item), tensor)
