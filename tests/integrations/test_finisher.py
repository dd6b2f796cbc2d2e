"""What two ranks stored loads with stock readers, and whoever composes the metadata gets the same bytes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from s3torchconnector import S3ClientConfig
from s3torchconnector.dcp import S3StorageReader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sm_tiered import layout
from sm_tiered.checksum import digest_chunks
from sm_tiered.errors import FormatError
from sm_tiered.manifest import record_from_json, record_to_json
from sm_tiered.parts import PartSource
from sm_tiered.records import Attempt, CheckpointId, ItemTable, Part, Record
from sm_tiered.settings import S3Settings
from sm_tiered_dcp import finisher
from sm_tiered_dcp.dcp_parts import BytesPart, TensorEntry, ValueEntry, layout_tensors
from sm_tiered_dcp.tensor_reads import own_bytes
from sm_tiered_dcp.values import dump_value

CHECKPOINT = CheckpointId(attempt=Attempt(ordinal=3, utc_secs=1_700_000_000, nonce="0123abcd"), step=20)
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128),
)
Path_ = tuple[str | int, ...]


def some(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype is torch.bool else 100, (torch.Size(shape).numel() * dtype.itemsize,))
    return raw.to(torch.uint8).view(dtype).view(shape)


class State:
    """A state as two ranks hold it: every tensor in rows 0-2 and 3-4, and what only one rank stores."""

    def __init__(self) -> None:
        self.whole = {f"model.{str(dtype)[6:]}": some(dtype, 5, 3) for dtype in DTYPES}
        self.single = {
            "model.scalar": torch.tensor(3.5),
            "model.empty": torch.empty(0, 4),
            "model.view": torch.arange(40.0).reshape(8, 5).t()[1:3],
            "model.list.0": torch.ones(2),
            "model.list.1": torch.zeros(2),
        }
        self.values: dict[str, Any] = {"step": 20, "sched.lrs": [0.1, 0.2], "sched.name": "cosine"}

    def path(self, fqn: str) -> Path_:
        keys: list[str | int] = list(fqn.split(".", 1) if fqn.startswith(("model.f", "model.b")) else fqn.split("."))
        return tuple(int(key) if isinstance(key, str) and key.isdigit() else key for key in keys)

    def expected(self) -> dict[str, torch.Tensor]:
        return {**self.whole, **self.single}

    def parts(self, rank: int) -> list[PartSource]:
        first, last = ((0, 3), (3, 5))[rank]
        chunks = {fqn: tensor[first:last] for fqn, tensor in self.whole.items()}
        entries = [self._entry(fqn, chunk, (first, 0), (5, 3)) for fqn, chunk in chunks.items()]
        own = self.single if rank == 1 else {}
        entries += [self._entry(fqn, t, (0,) * t.dim(), tuple(t.shape)) for fqn, t in own.items()]
        made = layout_tensors(layout.part_name(rank, 0), entries)
        parts: list[PartSource] = [made.source([*chunks.values(), *own.values()])]
        stored = tuple(
            ValueEntry(fqn=fqn, path=self.path(fqn), data=dump_value(fqn, value, allow_pickle=False))
            for fqn, value in self.values.items()
        )
        parts.append(BytesPart(name=layout.part_name(rank, 1), entries=stored))
        if rank == 0:
            tensor = self.single["model.scalar"]
            kept = layout_tensors(layout.part_name(0, 2), [self._entry("model.scalar", tensor, (), ())], replica=True)
            parts.append(kept.source([tensor + 1]))
        return parts

    def _entry(self, fqn: str, t: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> TensorEntry:
        return TensorEntry(
            fqn=fqn, path=self.path(fqn), dtype=t.dtype, sizes=tuple(t.shape), offsets=offsets, shape=shape
        )


def stored(parts: Sequence[PartSource], rank: int, directory: Path | None = None) -> Record:
    described: list[Part] = []
    for part in parts:
        buffer = bytearray(part.size)
        part.write(memoryview(buffer), {})
        chunks = digest_chunks(memoryview(buffer))
        described.append(Part(name=part.name, size=part.size, chunks=chunks, replica=part.replica))
        if directory is not None:
            (directory / part.name).write_bytes(buffer)
    return Record(
        namespace="run",
        checkpoint=CHECKPOINT,
        rank=rank,
        world=2,
        saved_at=1_700_000_001.5,
        parts=tuple(described),
        tables=tuple(part.table for part in parts),
    )


@pytest.fixture
def state() -> State:
    torch.manual_seed(1)
    return State()


@pytest.fixture
def records(state: State) -> list[Record]:
    return [stored(state.parts(rank), rank) for rank in (0, 1)]


@pytest.fixture
def directory(state: State, tmp_path: Path) -> Path:
    """A complete checkpoint, as it stands on a tier."""
    records = [stored(state.parts(rank), rank, tmp_path) for rank in (0, 1)]
    for name, data in finisher.compose_files(records).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), bytes(own_bytes(tensor.contiguous()))


def nested(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_stock_load_fills_a_state_bit_by_bit(state: State, directory: Path) -> None:
    wanted: dict[str, Any] = {fqn: torch.zeros_like(t).contiguous() for fqn, t in state.expected().items()}
    wanted |= dict.fromkeys(state.values)
    load(wanted, checkpoint_id=str(directory), no_dist=True)
    for fqn, tensor in state.expected().items():
        assert bits(wanted[fqn]) == bits(tensor), fqn
    assert {fqn: wanted[fqn] for fqn in state.values} == state.values


def test_stock_conversion_gives_the_nested_state_and_loads_safely(state: State, directory: Path) -> None:
    target = directory / "whole.pt"
    dcp_to_torch_save(str(directory), str(target))
    tree: Any = torch.load(target, weights_only=True)
    for fqn, tensor in state.expected().items():
        assert bits(nested(tree, state.path(fqn))) == bits(tensor), fqn
    assert tree["sched"] == {"lrs": [0.1, 0.2], "name": "cosine"}
    assert isinstance(tree["model"]["list"], list)


def test_the_stock_s3_reader_fills_a_state_bit_by_bit(
    state: State, directory: Path, s3_settings: S3Settings, s3_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in directory.iterdir():
        s3_client.upload_file(str(path), s3_settings.bucket, f"some/step/{path.name}")
    assert s3_settings.endpoint_url is not None
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_settings.endpoint_url)
    reader = S3StorageReader(
        "us-east-1", f"s3://{s3_settings.bucket}/some/step/", s3client_config=S3ClientConfig(force_path_style=True)
    )
    wanted = {fqn: torch.zeros_like(t).contiguous() for fqn, t in state.expected().items()}
    load(wanted, storage_reader=reader, no_dist=True)
    for fqn, tensor in state.expected().items():
        assert bits(wanted[fqn]) == bits(tensor), fqn


def test_metadata_names_every_stored_range(state: State, directory: Path) -> None:
    metadata = FileSystemReader(directory).read_metadata()
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.save_id == layout.checkpoint_dir(CHECKPOINT)
    assert set(metadata.state_dict_metadata) == set(state.expected()) | set(state.values)
    for index, info in metadata.storage_data.items():
        assert info.offset + info.length <= (directory / info.relative_path).stat().st_size
        assert info.transform_descriptors is None
        assert index.fqn in metadata.state_dict_metadata


def test_metadata_is_what_stock_planning_makes(state: State, records: list[Record], tmp_path: Path) -> None:
    ours = finisher.metadata_from_records(records)
    flat: dict[str, Any] = {fqn: t.contiguous() for fqn, t in state.expected().items()} | state.values
    stock = save(flat, checkpoint_id=str(tmp_path / "stock"), no_dist=True)
    assert set(ours.state_dict_metadata) == set(stock.state_dict_metadata)
    for fqn, theirs in stock.state_dict_metadata.items():
        found = ours.state_dict_metadata[fqn]
        assert type(found) is type(theirs)
        if isinstance(theirs, TensorStorageMetadata):
            assert isinstance(found, TensorStorageMetadata)
            assert (found.properties, found.size) == (theirs.properties, theirs.size)
    assert ours.version == stock.version
    assert len(cast("TensorStorageMetadata", ours.state_dict_metadata["model.float32"]).chunks) == 2


def test_replicas_are_left_out_and_the_lowest_rank_wins(records: list[Record]) -> None:
    metadata, index = finisher.compose(records)
    assert {info.relative_path for info in metadata.storage_data.values()} == {
        "__0_0.distcp", "__0_1.distcp", "__1_0.distcp",
    }  # fmt: skip
    values = cast("dict[str, Any]", index["values"])
    assert values["step"]["bytes"]["part"] == "__0_1.distcp"
    assert values["model.scalar"]["chunks"][0]["part"] == "__1_0.distcp"


def test_the_index_tells_the_same_as_the_records(records: list[Record]) -> None:
    index = json.loads(finisher.index_bytes(finisher.compose(records)[1]))
    facts = (index["format"], index["kind"], index["namespace"], index["step"], index["attempt"], index["world"])
    assert facts == (1, "index", "run", 20, "a000003-1700000000-0123abcd", 2)
    entry = index["values"]["model.bfloat16"]
    assert (entry["path"], entry["dtype"], entry["shape"]) == (["model", "bfloat16"], "bfloat16", [5, 3])
    items = [item for record in records for item in record.items if item.fqn == "model.bfloat16"]
    assert entry["chunks"] == [
        {
            "offsets": list(item.offsets),
            "sizes": list(item.sizes),
            "part": item.part,
            "offset": item.offset,
            "length": item.length,
            "payload": item.payload,
        }
        for item in items
    ]


def test_the_same_records_give_the_same_bytes_whatever_objects_they_are_made_of(records: list[Record]) -> None:
    files = finisher.compose_files(records)
    read_back = [record_from_json(record_to_json(record)) for record in records]
    assert finisher.compose_files(read_back) == files
    assert finisher.compose_files(list(reversed(read_back))) == files


def test_names_that_torch_uses_itself_change_nothing(records: list[Record]) -> None:
    """Attribute names stand in a pickle too, as objects that are shared or not."""
    names = iter(["offset", "index", "fqn", "relative_path", "torch", "chunks", "model", "sizes", "__0_0.distcp"])
    renamed = {item.fqn: next(names, item.fqn) for item in records[0].items}

    def rename(record: Record) -> Record:
        items = tuple(
            replace(item, fqn=renamed.get(item.fqn, item.fqn), path=(renamed.get(item.fqn, item.fqn),))
            for item in record.items
        )
        return replace(record, tables=(ItemTable(items=items),))

    made = [rename(record) for record in records]
    read_back = [record_from_json(record_to_json(record)) for record in made]
    assert finisher.compose_files(read_back) == finisher.compose_files(made)


def run_finisher(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sm_tiered_dcp.finisher", str(directory)],
        capture_output=True, text=True, check=False, timeout=100, env=ENVIRONMENT,
    )  # fmt: skip


def test_another_process_composes_the_same_bytes(records: list[Record], tmp_path: Path) -> None:
    for record in records:
        (tmp_path / layout.record_name(record.rank)).write_bytes(record_to_json(record))
    (tmp_path / "something-else").write_bytes(b"left alone")
    done = run_finisher(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name, data in finisher.compose_files(records).items():
        assert (tmp_path / name).read_bytes() == data
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_records_that_make_no_checkpoint_are_told_in_a_sentence(records: list[Record], tmp_path: Path) -> None:
    (tmp_path / layout.record_name(0)).write_bytes(record_to_json(records[0]))
    assert finisher.main([str(tmp_path)]) == 1
    assert not (tmp_path / layout.METADATA).exists()
    assert not (tmp_path / layout.INDEX).exists()
    done = run_finisher(tmp_path)
    assert done.returncode == 1
    assert "has 2 ranks, records are of ranks [0]" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_record_under_another_ranks_name_and_no_directory_are_refused(
    records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finisher.main([]) == 2
    assert finisher.main([str(tmp_path / "nowhere")]) == 1
    (tmp_path / layout.record_name(1)).write_bytes(record_to_json(records[0]))
    assert finisher.main([str(tmp_path)]) == 1
    assert "record-00001.json is the record of rank 0" in capsys.readouterr().err


def changed(record: Record, name: str, **facts: Any) -> Record:
    items = tuple(replace(item, **facts) if item.fqn == name else item for item in record.items)
    return replace(record, tables=(ItemTable(items=items),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b: [], "no records"),
        (lambda a, b: [a], r"2 ranks, records are of ranks \[0\]"),
        (lambda a, b: [a, a], r"records are of ranks \[0, 0\]"),
        (lambda a, b: [a, replace(b, namespace="other")], "rank 1 tells of"),
        (lambda a, b: [a, replace(b, checkpoint=replace(CHECKPOINT, step=21))], "rank 1 tells of step 21"),
        (lambda a, b: [a, replace(b, failed="disk")], "rank 1 failed to write .*: disk"),
        (lambda a, b: [a, changed(b, "model.int8", dtype="uint8")], r"model\.int8 is uint8 .* on rank 1, int8"),
        (lambda a, b: [a, changed(b, "model.int8", shape=(6, 3))], r"model\.int8 is int8 \[6, 3\]"),
        (lambda a, b: [a, changed(b, "model.int8", fqn="model.other")], r"model\.(int8|other): chunks hold"),
        (lambda a, b: [a, changed(b, "model.int8", offsets=(0, 0))], r"model\.int8: chunks of \[3, 3\] and \[2, 3\]"),
        (lambda a, b: [a, changed(b, "step", dtype="int8", shape=(1,))], "step is int8"),
        (lambda a, b: [changed(a, "model.int8", dtype="qint8"), changed(b, "model.int8", dtype="qint8")], "qint8"),
    ],
)
def test_contradictions_and_holes_are_named(records: list[Record], change: Any, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        finisher.compose_files(change(*records))


def test_empty_shards_at_the_same_place_do_no_harm() -> None:
    """A rank whose share of an uneven tensor is empty stores a chunk without elements."""

    def record(rank: int, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> Record:
        entry = TensorEntry(fqn="w", path=("w",), dtype=torch.float32, sizes=sizes, offsets=offsets, shape=(2, 2))
        return stored([layout_tensors(layout.part_name(rank, 0), [entry]).source([torch.ones(sizes)])], rank)

    for empty, full in [((0, 2), (2, 2)), ((2, 2), (0, 2))]:
        metadata = finisher.metadata_from_records([record(0, empty, (0, 0)), record(1, full, (0, 0))])
        tensor = cast("TensorStorageMetadata", metadata.state_dict_metadata["w"])
        assert [tuple(chunk.sizes) for chunk in tensor.chunks] == [(2, 2)]


def test_tied_names_load_the_same_bytes(tmp_path: Path) -> None:
    tensor = torch.randn(3)
    entry = TensorEntry(fqn="a", path=("a",), dtype=tensor.dtype, sizes=(3,), offsets=(0,), shape=(3,))
    made = layout_tensors("__0_0.distcp", [entry])
    tied = replace(made.table.items[0], fqn="b", path=("b",))
    part = replace(made, table=ItemTable(items=(*made.table.items, tied))).source([tensor])
    record = replace(stored([part], 0, tmp_path), world=1)
    for name, data in finisher.compose_files([record]).items():
        (tmp_path / name).write_bytes(data)
    wanted = {"a": torch.zeros(3), "b": torch.zeros(3)}
    load(wanted, checkpoint_id=str(tmp_path), no_dist=True)
    assert torch.equal(wanted["a"], tensor)
    assert torch.equal(wanted["b"], tensor)


def test_a_value_alone_is_a_checkpoint() -> None:
    part = BytesPart(name="__0_1.distcp", entries=(ValueEntry(fqn="x", path=("x",), data=b"123"),))
    metadata: Metadata = finisher.metadata_from_records([replace(stored([part], 0), world=1)])
    assert isinstance(metadata.state_dict_metadata["x"], BytesStorageMetadata)
