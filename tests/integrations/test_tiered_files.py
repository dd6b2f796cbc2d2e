"""Whole files through the tiers: one copy, real names on every tier, each rank's own, handed out as a directory."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.testing._internal.two_tensor import TwoTensor

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.errors import MismatchError, NothingRestorableError, StructureError
from sm_tiered.handout import Handout
from sm_tiered_dcp.archive import Packed
from sm_tiered_dcp.files import BytesFile, DiskFile, FileSet, SafetensorsFile, TorchFile
from sm_tiered_dcp.packed_part import PackedPart
from sm_tiered_dcp.safetensors_frame import pack_safetensors
from sm_tiered_dcp.tiered_files import TieredFiles
from tests.distributed.dcp_jobs import recipe, run, start, step_dir, steps

LARGE = 1 << 20


def content(step: int) -> dict[str, Any]:
    return {"w": torch.full((LARGE,), float(step)), "b": torch.arange(3) + step}


def files(step: int, rank: int = 0, spare: str | None = None) -> FileSet:
    own: dict[str, Any] = {f"random_{rank}.pkl": BytesFile(f"{step}-{rank}".encode())}
    if rank:
        own[f"rank_{rank:05d}/loader.bin"] = BytesFile(f"loader {step} of {rank}".encode())
    if spare is not None:
        own[f"engine/deep/{rank}.bin"] = DiskFile(spare)
    shared = {
        "model.safetensors": SafetensorsFile(content(step), {"format": "pt"}),
        "optimizer.bin": TorchFile({"state": {0: content(step)}, "lr": 0.1}),
        "loader.bin": BytesFile(f"loader {step} of 0".encode()),
    }
    return FileSet(own=own, shared=shared)


def seen(path: Path) -> dict[str, bytes]:
    found = [Path(place) / name for place, _, names in os.walk(path, followlinks=True) for name in names]
    return {str(one.relative_to(path)): one.read_bytes() for one in found}


def restored(tiered: TieredFiles, step: int | None = None) -> tuple[int | None, dict[str, bytes]]:
    found: dict[str, bytes] = {}
    step = tiered.restore(lambda path: found.update(seen(path)), step)
    return step, found


def spare_file(folder: Path, size: int) -> str:
    path = folder / "spare"
    path.write_bytes(os.urandom(size))
    return str(path)


@pytest.mark.parametrize("wiped", [False, True])
def test_files_come_back_byte_for_byte(tmp_path: Path, memory_dir: Path, wiped: bool) -> None:
    which, spare = recipe(tmp_path, memory_dir), spare_file(tmp_path, LARGE + 5)
    with TieredFiles.from_recipe(which) as tiered:
        assert restored(tiered) == (None, {})
        for step in (1, 2, 3):
            tiered.save(step, lambda step: files(step, spare=spare)).wait("disk")
    if wiped:
        os.rename(memory_dir / "run-1", memory_dir / "gone")
    with TieredFiles.from_recipe(which) as tiered:
        step, found = restored(tiered)
        tier = tiered.restored
    assert tier is not None
    assert (step, tier.tier) == (3, "disk" if wiped else "memory")
    assert found.pop("random_0.pkl") == b"3-0"
    assert found.pop("loader.bin") == b"loader 3 of 0"
    assert found.pop("engine/deep/0.bin") == Path(spare).read_bytes()
    assert found.pop("model.safetensors") == save(content(3), {"format": "pt"})
    (tmp_path / "optimizer").write_bytes(found.pop("optimizer.bin"))
    optimizer = torch.load(tmp_path / "optimizer", weights_only=True)
    assert torch.equal(optimizer["state"][0]["w"], content(3)["w"])
    assert found.keys() <= {".metadata", "index.json"}


def test_a_directory_of_each_tier_is_what_a_stock_program_reads(tmp_path: Path, memory_dir: Path) -> None:
    with TieredFiles.from_recipe(recipe(tmp_path, memory_dir)) as tiered:
        tiered.save(7, files).wait("disk")
        for root in (memory_dir, tmp_path / "disk"):
            directory = step_dir(root, 7)
            assert torch.equal(load_file(directory / "model.safetensors")["w"], content(7)["w"])
            assert torch.load(directory / "optimizer.bin", weights_only=True)["lr"] == 0.1
            assert not FileSystemReader(directory).read_metadata().state_dict_metadata, "DCP would unpickle these files"


def test_small_files_alone_are_described_by_the_trainer_and_by_no_child(tmp_path: Path, memory_dir: Path) -> None:
    with TieredFiles.from_recipe(recipe(tmp_path, memory_dir)) as tiered:
        tiered.save(1, lambda step: FileSet(own={"x.bin": BytesFile(b"x")})).wait("disk")
        assert (step_dir(memory_dir, 1) / "index.json").read_bytes() == (
            step_dir(tmp_path / "disk", 1) / "index.json"
        ).read_bytes()


def test_files_in_memory_are_recycled_and_nothing_is_left(tmp_path: Path, memory_dir: Path) -> None:
    spare = spare_file(tmp_path, LARGE)
    inodes: set[int] = set()
    with TieredFiles.from_recipe(recipe(tmp_path, memory_dir, disk={"save": None})) as tiered:
        for step in range(1, 12):
            tiered.save(step, lambda step: files(step, spare=spare), ["memory"]).wait("memory")
            inodes.add((step_dir(memory_dir, step) / "model.safetensors").stat().st_ino)
    assert len(inodes) <= 4, "each save took a new file"
    assert max(steps(memory_dir)) == 11
    assert len(steps(memory_dir)) <= 4
    left = [path for path in (memory_dir / "run-1").rglob("*") if path.is_dir() and path.name == "engine"]
    assert len(left) == len(steps(memory_dir))
    assert not list((memory_dir / "run-1").glob(".restored/*"))


def test_a_restart_takes_over_the_files_that_it_finds(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk={"save": None})
    inodes: set[int] = set()
    for first in (1, 5, 9):
        with TieredFiles.from_recipe(which) as tiered:
            restored(tiered)
            for step in range(first, first + 4):
                tiered.save(step, files, ["memory"]).wait("memory")
                inodes.add((step_dir(memory_dir, step) / "model.safetensors").stat().st_ino)
    assert len(inodes) <= 5, "a restart did not recycle what the launch before had made"
    assert len(steps(memory_dir)) <= 4


def work(rank: int, which: dict[str, Any], first: int, last: int) -> list[Any]:
    found: list[Any] = []
    with TieredFiles.from_recipe(which) as tiered:
        found.append(restored(tiered))
        for step in range(first, last):
            tiers = None if step == last - 1 else ["memory"]
            tiered.save(step, lambda step: files(step, rank), tiers).wait("memory")
    return found


@pytest.mark.parametrize(
    ("nodes", "wiped"), [(1, False), (1, True), (2, False), pytest.param(2, True, marks=pytest.mark.long)]
)
def test_each_rank_sees_its_own(tmp_path: Path, memory_dir: Path, nodes: int, wiped: bool) -> None:
    whiches = [recipe(tmp_path, memory_dir / str(node) if nodes > 1 else memory_dir) for node in range(2)]
    run(2, work_on, whiches, 1, 4)
    if wiped:
        for root in {which["tiers"]["memory"]["path"] for which in whiches}:
            os.rename(Path(root) / "run-1", memory_dir / f"gone-{Path(root).name}")
    ends = run(2, work_on, whiches, 4, 4)
    for rank, ((step, found),) in enumerate(ends):
        assert step == 3
        assert found["loader.bin"] == f"loader 3 of {rank}".encode()
        assert found["model.safetensors"] == save(content(3), {"format": "pt"})
        assert not [name for name in found if name.startswith("rank_")]
    if nodes == 1:
        assert {"random_0.pkl", "random_1.pkl"} <= ends[0][0][1].keys()


def work_on(rank: int, whiches: list[dict[str, Any]], first: int, last: int) -> list[Any]:
    return work(rank, whiches[rank], first, last)


def collide(rank: int, which: dict[str, Any]) -> str:
    with TieredFiles.from_recipe(which) as tiered:
        with pytest.raises(StructureError, match=r"ranks 0 and 1 both bring a file 'x\.bin'") as refused:
            tiered.save(1, lambda step: FileSet(own={"x.bin": BytesFile(b"x")}))
        tiered.save(2, lambda step: files(step, rank)).wait("disk")
        return str(refused.value)


def test_two_ranks_with_one_name_are_told_and_go_on(tmp_path: Path, memory_dir: Path) -> None:
    run(2, collide, recipe(tmp_path, memory_dir))
    assert list(steps(tmp_path / "disk")) == [2]


def other_world(rank: int, which: dict[str, Any]) -> str:
    with TieredFiles.from_recipe(which) as tiered, pytest.raises(MismatchError) as refused:
        restored(tiered)
    return refused.value.message


def test_another_number_of_ranks_is_refused_unless_the_recipe_allows_it(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir)
    run(2, work, which, 1, 2)
    assert "of 2 ranks, this job has 1" in run(0, other_world, which)[0]
    (found,) = run(0, work, {**which, "allow_partial": True}, 2, 2)[0]
    assert found[1]["loader.bin"] == b"loader 1 of 0"


def test_a_flipped_bit_leads_to_the_next_tier_then_to_an_error(tmp_path: Path, memory_dir: Path) -> None:
    which, spare = recipe(tmp_path, memory_dir), spare_file(tmp_path, CHUNK_BYTES + LARGE)
    with TieredFiles.from_recipe(which) as tiered:
        tiered.save(1, lambda step: files(step, spare=spare)).wait("disk")
    damaged = "engine/deep/0.bin"
    flip_last(step_dir(memory_dir, 1) / damaged)
    with TieredFiles.from_recipe(which) as tiered:
        step, found = restored(tiered)
        assert tiered.restored is not None
        assert (step, tiered.restored.tier) == (1, "memory+disk")
        assert found["model.safetensors"] == save(content(1), {"format": "pt"})
        assert found[damaged] == Path(spare).read_bytes()
    flip_last(step_dir(tmp_path / "disk", 1) / damaged)
    with TieredFiles.from_recipe(which) as tiered, pytest.raises(NothingRestorableError, match=r"engine/deep/0\.bin"):
        restored(tiered)


def flip_last(path: Path) -> None:
    """Damage what is verified last."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_state_of_another_kind_is_refused(tmp_path: Path, memory_dir: Path) -> None:
    from sm_tiered_dcp import TieredCheckpointer

    which = recipe(tmp_path, memory_dir)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"x": torch.ones(3)}).wait("disk")
    with TieredFiles.from_recipe(which) as tiered, pytest.raises(MismatchError, match="holds a state"):
        restored(tiered)


def small_files(rank: int, which: dict[str, Any], first: int) -> None:
    with TieredFiles.from_recipe(which) as tiered:
        for step in range(first, first + 4):
            tiered.save(step, lambda step: FileSet(own={f"small/{rank}.bin": BytesFile(b"x")}), ["memory"]).wait(
                "memory"
            )


def test_small_files_of_ranks_that_are_no_more_are_taken_back(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None, allow_partial=True)
    run(3, small_files, which, 1)
    for first in (11, 21):
        run(2, small_files, which, first)
    assert min(steps(memory_dir)) > 20, steps(memory_dir)


def test_small_files_that_were_never_recorded_are_taken_back(tmp_path: Path, memory_dir: Path) -> None:
    which = recipe(tmp_path, memory_dir, disk=None)
    run(0, small_files, which, 1)
    newest = step_dir(memory_dir, 4)
    (newest / "record-00000.json").unlink()
    (newest / "small" / ".tmp-01234567").touch()
    run(0, small_files, which, 11)
    assert not newest.exists()


@pytest.mark.parametrize("memory", [True, False])
def test_what_a_killed_restore_left_is_removed(
    tmp_path: Path, memory_dir: Path, memory: bool, monkeypatch: Any
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    which = recipe(tmp_path, memory_dir if memory else None)
    with TieredFiles.from_recipe(which) as tiered:
        tiered.save(1, files).wait("disk")
    ends = start(0, killed_in_restore, which, env={"TMPDIR": str(tmp_path / "tmp")}).wait()
    assert ends[0].status == -signal.SIGKILL
    base = memory_dir / "run-1" / ".restored" if memory else tmp_path / "tmp"
    assert list(base.iterdir())
    with TieredFiles.from_recipe(which) as tiered:
        assert restored(tiered)[0] == 1
        left = list(base.iterdir()) if base.exists() else []
    assert not left


def test_what_does_not_fit_into_memory_is_handed_out_on_the_disk(
    tmp_path: Path, make_tmpfs: Callable[[str, int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    small = make_tmpfs("small", 4)
    handout = Handout(small, 0, "token")
    handout.open()
    for size, where in ((1 << 20, small), (8 << 20, tmp_path)):
        place = handout.room(size)
        assert place is not None
        assert place.path is not None
        assert Path(place.path).is_relative_to(where)
        assert os.path.getsize(place.path) == size
    assert not Path(place.path).is_relative_to(small)
    handout.close()
    assert not list(small.rglob("*-*"))
    assert not list(tmp_path.glob("sm_tiered-restored-*"))


def killed_in_restore(rank: int, which: dict[str, Any]) -> None:
    with TieredFiles.from_recipe(which) as tiered:
        tiered.restore(lambda path: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (FileSet(own={"a": BytesFile(b"")}, shared={"a": BytesFile(b"")}), "'a' is brought as this rank's own and as"),
        (FileSet(own={"a/b/c": BytesFile(b""), "a": BytesFile(b"")}), "'a' is a file, and the directory of 'a/b/c'"),
    ],
)
def test_names_that_do_not_go_together(tmp_path: Path, memory_dir: Path, found: FileSet, match: str) -> None:
    with TieredFiles.from_recipe(recipe(tmp_path, memory_dir, disk=None)) as tiered:
        with pytest.raises(StructureError, match=match):
            tiered.save(1, lambda step: found)
        tiered.save(2, files).wait("memory")


@pytest.mark.parametrize("name", ["../x", ".x", "a/.b", "manifest.json", "files-00000.json", "__0_0.distcp", "a b", ""])
def test_names_that_can_not_be(tmp_path: Path, memory_dir: Path, name: str) -> None:
    with TieredFiles.from_recipe(recipe(tmp_path, memory_dir)) as tiered:
        with pytest.raises(StructureError, match="can't be"):
            tiered.save(1, lambda step: FileSet(own={name: BytesFile(b"x")}))
        tiered.save(2, files).wait("disk")


def test_safetensors_are_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {
        "ä.scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty((0, 3)),
        "bits": torch.tensor([True, False, True]),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "strided": torch.arange(12, dtype=torch.int16).reshape(3, 4).t(),
        **{f"w{i}": torch.randn(7, i) for i in range(1, 5)},
    }
    one = {"a": torch.ones(1)}
    assert bytes(filled(pack_safetensors("m", one, {}))) == save(one, {})
    packed = pack_safetensors("m", tensors, {"format": "pt"})
    part = PackedPart(name="m", fqn="m", path=("m",), packed=packed)
    written = bytearray(part.size)
    part.write(memoryview(written), {})
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(plain, tmp_path / "stock", {"format": "pt"})
    assert bytes(written) == (tmp_path / "stock").read_bytes()
    assert b"".join(bytes(chunk) for chunk in part.chunks()) == bytes(written)


def filled(packed: Packed) -> bytearray:
    written = bytearray(packed.frame.size)
    PackedPart(name="m", fqn="m", path=("m",), packed=packed).write(memoryview(written), {})
    return written


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"a": torch.ones(2, device="meta")}, "a has no data"),
        ({"a": torch.ones(2).to_sparse()}, "can't stand in a safetensors file"),
        ({"a": "text"}, r"a \(str\) can't stand"),
        ({"a": (x := torch.ones(4)), "b": x}, "a and b share memory"),
        ({"a": x[:3], "b": x[2:]}, "a and b share memory"),
        ({"a": TwoTensor(x, x)}, "a is a TwoTensor, which wraps other tensors"),
    ],
)
def test_what_safetensors_can_not_hold(tensors: dict[str, Any], match: str) -> None:
    with pytest.raises(StructureError, match=match):
        pack_safetensors("m", tensors, None)
