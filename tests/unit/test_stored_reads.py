"""Whole tensors read a window at a time: any cut over any ranks, any window, each byte verified, memory bounded."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sm_tiered import layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import CheckpointNotFoundError, CorruptPartError, FormatError
from sm_tiered.inventory import read_records
from sm_tiered.manifest import record_from_json
from sm_tiered.number_formats import decoded
from sm_tiered.records import Item, ItemTable, Record
from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_reads import TensorReader, runs_of, windows
from sm_tiered.stored_tensors import ITEM_BYTES, StoredChunk, StoredTensor, stored_in
from sm_tiered.tiers.local import LocalTier
from tests.unit.cli_checkpoints import checkpoint, file_of, flip, local_tier
from tests.unit.tensor_checkpoints import raw, write_tensors


def records_of(tier: LocalTier) -> list[Record]:
    return [record_from_json(data) for _, data in sorted(read_records(tier, checkpoint(7)).items())]


def chunks_of(tier: LocalTier, room: int = 4) -> VerifiedChunks:
    return VerifiedChunks(tier, checkpoint(7), records_of(tier), durable=True, room=room)


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[StoredChunk]:
    """Boxes between *cuts* of each dimension, one after the other in one part."""
    found: list[StoredChunk] = []
    start = 0
    for box in itertools.product(*(itertools.pairwise([0, *each, n]) for each, n in zip(cuts, shape, strict=True))):
        sizes = tuple(b - a for a, b in box)
        found.append(StoredChunk(part="p", start=start, offsets=tuple(a for a, _ in box), sizes=sizes))
        start += torch.Size(sizes).numel()
    return found


@pytest.mark.parametrize("seed", range(40))
def test_the_runs_of_any_window_are_what_is_there(seed: int) -> None:
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 6) for _ in range(chance.randint(0, 4)))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    cuts = [sorted(chance.sample(range(1, n), chance.randint(0, min(2, n - 1)))) for n in shape]
    boxes = grid(shape, cuts)
    stored = torch.cat(
        [whole[tuple(slice(o, o + n) for o, n in zip(b.offsets, b.sizes, strict=True))].reshape(-1) for b in boxes]
    )
    chunks = tuple(replace(box, start=2 * box.start) for box in boxes)
    tensor = StoredTensor(name="t", path=("t",), dtype="int16", shape=shape, chunks=chunks)
    first = chance.randint(0, tensor.elements - 1)
    end = chance.randint(first + 1, tensor.elements)
    window = torch.full((end - first,), -1, dtype=torch.int16)
    for run in runs_of(tensor, first, end):
        count = torch.Size(run.whole).numel()
        box = window[run.target // 2 : run.target // 2 + count].view(run.whole)
        place = tuple(slice(a, a + n) for a, n in zip(run.first, run.shape, strict=True))
        box[place] = stored[run.start // 2 : (run.start + run.length) // 2].view(run.shape)
    assert torch.equal(window, whole.reshape(-1)[first:end])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.complex64, torch.complex128])
def test_a_tensor_cut_along_any_dimension_comes_back_whole(tmp_path: Path, dim: int, dtype: torch.dtype) -> None:
    tier = local_tier(tmp_path)
    given = (torch.randn(7, 5, 6) * 3).to(dtype)
    write_tensors(tier, checkpoint(7), {"t": given}, durable=True, world=3, split={"t": dim}, lead=20)
    reader, tensor = TensorReader(chunks_of(tier)), stored_in(records_of(tier)).tensors["t"]
    found = bytearray()
    for first, end in windows(tensor, 100):
        piece = bytearray((end - first) * dtype.itemsize)
        reader.read_into(tensor, first, end, memoryview(piece))
        found += piece
    assert bytes(found) == raw(given)


def test_each_byte_is_read_once_and_only_a_few_chunks_are_kept(tmp_path: Path) -> None:
    tier = local_tier(tmp_path)
    given = torch.arange(10 * CHUNK_BYTES // 4, dtype=torch.int32).reshape(-1, 64)
    write_tensors(tier, checkpoint(7), {"t": given}, durable=True, world=2, split={"t": 1})
    chunks = chunks_of(tier, room=3)
    reader, tensor = TensorReader(chunks), stored_in(records_of(tier)).tensors["t"]
    for first, end in windows(tensor, 1 << 20):
        piece = bytearray((end - first) * 4)
        reader.read_into(tensor, first, end, memoryview(piece))
        assert bytes(piece) == raw(given.reshape(-1)[first:end])
        assert len(chunks._held) <= 3
    assert chunks.bytes_read == 10 * CHUNK_BYTES


def test_many_threads_ask_for_one_chunk_once(tmp_path: Path) -> None:
    tier = local_tier(tmp_path)
    write_tensors(tier, checkpoint(7), {"t": torch.arange(CHUNK_BYTES // 4)}, durable=True)
    chunks = chunks_of(tier)
    found: list[bytes] = []

    def ask() -> None:
        piece = bytearray(8)
        chunks.read_into("__0_0.distcp", 8, memoryview(piece))
        found.append(bytes(piece))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [raw(torch.tensor([1]))] * 8
    assert chunks.bytes_read == CHUNK_BYTES


def test_damage_is_an_error_and_a_deleted_checkpoint_another(tmp_path: Path) -> None:
    tier = local_tier(tmp_path)
    write_tensors(tier, checkpoint(7), {"t": torch.arange(100)}, durable=True)
    chunks = chunks_of(tier)
    flip(file_of(tmp_path, checkpoint(7), "__0_0.distcp"), 50)
    with pytest.raises(CorruptPartError, match="chunk 0 has XXH3-128"):
        chunks.read_into("__0_0.distcp", 0, memoryview(bytearray(8)))
    file_of(tmp_path, checkpoint(7), "__0_0.distcp").unlink()
    with pytest.raises(CorruptPartError, match="__0_0"):
        chunks_of(tier).read_into("__0_0.distcp", 0, memoryview(bytearray(8)))
    chunks = chunks_of(tier)
    tier.delete([layout.in_dir(checkpoint(7), layout.MANIFEST)])
    with pytest.raises(CheckpointNotFoundError, match="deleted while it was being read"):
        chunks.read_into("__0_0.distcp", 0, memoryview(bytearray(8)))


def item(offsets: tuple[int, ...], sizes: tuple[int, ...], **changes: object) -> Item:
    facts: dict[str, object] = {
        **{"fqn": "t", "path": ("t",), "part": "p", "offset": 0, "length": 400, "payload": 0, "dtype": "float32"},
        **{"sizes": sizes, "offsets": offsets, "shape": (4, 4)},
    }
    return Item(**{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([item((0, 0), (2, 4))], "8 of 16 elements"),
        ([item((0, 0), (3, 4)), item((2, 0), (1, 4))], "the same elements"),
        ([item((0, 0), (2, 4)), item((1, 2), (2, 2)), item((2, 0), (2, 2))], "the same elements"),
        ([item((0, 0), (4, 4), length=40)], "does not fit"),
        ([item((0, 0), (4, 4), dtype="quint8")], "not known"),
        ([item((0, 0), (2, 4)), item((2, 0), (2, 4), dtype="int32")], "different dtypes"),
    ],
)
def test_chunks_that_are_no_whole_tensor_are_refused(items: list[Item], words: str) -> None:
    record = Record(
        namespace="n", checkpoint=checkpoint(1), rank=0, world=1, saved_at=0.0, tables=(ItemTable(items=tuple(items)),)
    )
    with pytest.raises(FormatError, match=words):
        stored_in([record])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(ITEM_BYTES.keys() - {"float4_e2m1fn_x2"}))
def test_numbers_mean_what_torch_says(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    width = ITEM_BYTES[name]
    assert dtype.itemsize == width
    # Every code of the narrow ones, whatever bits of the wide ones.
    if width <= 2:
        data = b"".join(code.to_bytes(width, "little") for code in range(2 if name == "bool" else 256**width))
    else:
        data = random.Random(name).randbytes(width * 1000)
    there = torch.frombuffer(bytearray(data), dtype=dtype)
    found = torch.from_numpy(decoded(name, bytearray(data)).copy())
    if dtype.is_complex:
        expected = torch.view_as_real(there.to(torch.complex128))
        assert torch.allclose(torch.view_as_real(found), expected, rtol=0, atol=0, equal_nan=True)
    elif dtype.is_floating_point:
        assert torch.allclose(found, there.to(torch.float64), rtol=0, atol=0, equal_nan=True)
    else:
        assert found.tolist() == [int(value) for value in there.tolist()]


def test_four_bit_numbers_come_two_in_a_byte() -> None:
    found = decoded("float4_e2m1fn_x2", bytearray([0x10, 0xF7, 0x8A]))
    assert found.tolist() == [0.0, 0.5, 6.0, -6.0, -1.0, -0.0]
