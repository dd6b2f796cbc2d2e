"""What is saved is the state at the moment of the call, at its own size, and anybody's reader finds it there."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from sm_tiered.settings import S3Settings
from sm_tiered_dcp import TieredCheckpointer, TieredStorageWriter
from tests.distributed.dcp_jobs import async_save, bits, recipe, run, step_dir

if TYPE_CHECKING:
    pass

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)


def random_bits(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of every bit pattern that *dtype* has, NaNs with a payload and negative zeros among them."""
    made = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=made).bool()
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=made).view(dtype).view(shape)


TIED = ("tied again", "alias of a view")
"""Names of the very bytes that other names stand for."""
OURS = ("empty dict", "array", "number", "no bytes", "by int")
"""Values that stock DCP has no word for: dicts with a mark for other readers, or with text for int keys."""


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every kind that DCP takes."""
    found = {name: random_bits(3, 5, dtype=getattr(torch, name)) for name in DTYPES}
    base, tied = random_bits(64, 64, dtype=torch.float32, seed=1), torch.nn.Parameter(torch.randn(6, 2))
    return found | {
        "scalar": torch.tensor(-0.0),
        "bf16 scalar": torch.tensor(float("nan"), dtype=torch.bfloat16),
        "empty": torch.empty(0),
        "no rows": torch.empty(0, 4, dtype=torch.bfloat16),
        "view": base[3:5, 10:20],
        "column": base[:, 7],
        "stepped": base[::3, ::5],
        "transposed": base[:6, :9].t(),
        "permuted": random_bits(2, 3, 4, dtype=torch.int32).permute(2, 0, 1),
        "expanded": torch.arange(4.0)[:, None].expand(4, 7),
        "scalar expanded": torch.tensor(2.5).expand(3, 3),
        "conjugate": torch.randn(3, 3, dtype=torch.complex64).conj(),
        "negative": torch.randn(3, dtype=torch.complex64).conj().imag,
        "channels last": torch.randn(1, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "tied": tied,
        "tied again": tied,
        "alias of a view": base[3:5, 10:20],
        "row of a view": base[3, 10:20],
    }


def values() -> dict[str, Any]:
    """Python values of every kind that is stored without a pickle."""
    return {
        "int": 7,
        "big": 2**1000,
        "float": float("inf"),
        "none": None,
        "text": "ü\n",
        "bytes": b"\0\xff",
        "no bytes": b"",
        "complex": 1 - 2j,
        "tuple": (1, (2, [3, {"four": 4}])),
        "set": {1, 2},
        "list": [1, [2, 3], []],
        "empty dict": {},
        "by int": {0: "a", 7: {"b": 1}},
        "ordered": OrderedDict(b=1, a=2),
        "dtype": torch.bfloat16,
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "number": np.float32(1.5),
        "tensor in a tuple": (torch.arange(3), "x"),
    }


def spoil(state: dict[str, Any]) -> None:
    """Change every bit that a save could still read."""
    for tensor in state["tensors"].values():
        tensor.untyped_storage().fill_(0xFF)
    kept = state["values"]
    kept["array"].fill(-1)
    kept["tensor in a tuple"][0].fill_(-1)
    kept["list"][1].append(99)
    kept["tuple"][1][1].append(99)
    kept["by int"][7]["b"] = 99
    kept["set"].add(99)
    kept["ordered"]["a"] = 99
    kept["new"] = 1
    del kept["text"]


def blank() -> dict[str, Any]:
    """A state to restore into: the same names, dense tensors, nothing in the values."""
    made = {name: torch.zeros(t.shape, dtype=torch.uint8).to(t.dtype) for name, t in tensors().items()}
    return {"tensors": made, "values": {}}


def known(state: dict[str, Any]) -> Any:
    """The state as what can be compared with ==."""

    def plain(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            return type(value).__name__, str(value.dtype), value.shape, value.tobytes()
        if isinstance(value, dict):
            return [(key, plain(entry)) for key, entry in value.items()]
        if isinstance(value, (list, tuple)):
            return type(value).__name__, [plain(entry) for entry in value]
        return bits(value) if isinstance(value, torch.Tensor) else (type(value).__name__, repr(value))

    return bits(state["tensors"]), dict(plain(state["values"]))


@pytest.fixture(scope="module")
def wanted() -> Any:
    torch.manual_seed(5)
    return known({"tensors": tensors(), "values": values()})


def fresh() -> dict[str, Any]:
    torch.manual_seed(5)
    return {"tensors": tensors(), "values": values()}


@pytest.mark.parametrize("way", ["save", "maybe_save", "async_save", "disk only"])
def test_what_changes_after_the_call_is_not_saved(way: str, tmp_path: Path, memory_dir: Path, wanted: Any) -> None:
    which = recipe(tmp_path, None if way == "disk only" else memory_dir)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (1, 2, 3, 4):  # the later ones go into recycled files
            state = fresh()
            if way == "async_save":
                writer = TieredStorageWriter(which, step=step)
                future = async_save(state, writer)
                spoil(state)
                future.result()
                writer.close()
            else:
                saved = checkpointer.maybe_save if way == "maybe_save" else checkpointer.save
                handle = saved(step, state)
                spoil(state)
                assert handle is not None
                handle.wait("disk" if way == "disk only" else "memory")
        for step in (4, 3):
            restored = blank()
            assert checkpointer.restore(restored, step) == step
            assert known(restored) == wanted


def check_stock(loaded: dict[str, Any], wanted: Any) -> None:
    """Compare what another reader made of the state; what it has no word for is a dict there, or left out."""
    given_tensors, given_values = known({"tensors": loaded["tensors"], "values": loaded["values"]})
    assert given_tensors == wanted[0]
    assert {name: value for name, value in given_values.items() if name not in OURS} == {
        name: value for name, value in wanted[1].items() if name not in OURS
    }


def stock_load(reader: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Load with ``dcp.load`` alone, into a state of the same structure."""
    state = {
        "tensors": {name: tensor for name, tensor in blank()["tensors"].items() if name not in without},
        "values": {name: value for name, value in values().items() if name not in OURS},
    }
    state["values"] |= {"int": 0, "text": "", "tuple": (), "list": [0], "float": 0.0}
    dcp.load(state, storage_reader=reader)
    return state


def _save_to_s3(rank: int, which: dict[str, Any], folder: str, uri: str) -> list[Any]:
    """Save with tied tensors and without, and load both with the connector's own reader."""
    import s3torchconnector.dcp as connector
    from s3torchconnector.s3reader import S3ReaderConstructor

    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (9, 10):
            state = fresh()
            for name in TIED if step == 10 else ():
                del state["tensors"][name]
            handle = checkpointer.save(step, state, ["s3"])
            spoil(state)
            handle.wait("s3")
    found: list[Any] = []
    for step in (9, 10):
        # The connector's default reader refuses two names for the same bytes, and so needs a state without ties.
        options: dict[str, Any] = {"reader_constructor": S3ReaderConstructor.range_based()} if step == 9 else {}
        prefix = f"{uri}/{which['namespace']}/{step_dir(Path(folder), step).name}/"
        reader = connector.S3StorageReader("us-east-1", prefix, **options)
        found.append(known(stock_load(reader, without=TIED if step == 10 else ())))
    return found


def test_stock_readers_load_what_is_in_memory_and_on_disk(tmp_path: Path, memory_dir: Path, wanted: Any) -> None:
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir)) as checkpointer:
        state = fresh()
        handle = checkpointer.save(9, state)
        spoil(state)
        handle.wait("disk")
    for number, root in enumerate((memory_dir, tmp_path / "disk")):
        directory = step_dir(root, 9)
        check_stock(stock_load(dcp.FileSystemReader(directory)), wanted)
        dcp_to_torch_save(directory, tmp_path / f"{number}.pt")
        loaded = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        check_stock({"tensors": loaded["tensors"], "values": loaded["values"]}, wanted)


def test_the_connectors_own_reader_loads_what_is_on_s3(
    tmp_path: Path, memory_dir: Path, s3_settings: S3Settings, s3_endpoint: str, wanted: Any
) -> None:
    pytest.importorskip("s3torchconnector")
    uri = f"s3://{s3_settings.bucket}/{s3_settings.prefix}"
    s3 = {"kind": "s3", "uri": uri, "endpoint_url": s3_endpoint, "force_path_style": True, "region": "us-east-1"}
    which = recipe(tmp_path, memory_dir, disk=None, tiers={"s3": s3})
    (found,) = run(0, _save_to_s3, which, str(memory_dir), uri, env={"AWS_ENDPOINT_URL": s3_endpoint})
    for (loaded, plain), without in zip(found, ((), TIED), strict=True):
        assert loaded == {name: value for name, value in wanted[0].items() if name not in without}
        assert plain == {name: value for name, value in wanted[1].items() if name not in OURS}


def test_a_state_takes_no_more_room_than_its_bytes(tmp_path: Path, memory_dir: Path) -> None:
    base, mebi = torch.zeros(48 * 2**20, dtype=torch.uint8), 2**20
    tied = torch.randn(4, 2**20)
    state = {
        "large": {str(number): torch.full((mebi // 4,), float(number)) for number in range(32)},
        "views": {str(number): base[number * mebi : (number + 1) * mebi] for number in range(0, 48, 3)},
        "strided": base.view(-1, 16)[: mebi // 2, 3],
        "small": {str(number): torch.tensor(number) for number in range(20)},
        "one": tied,
        "other": tied,
        "step": 1,
        "tensor in a value": (base[:1000], base[5:7]),
    }
    size = 32 * mebi + 16 * mebi + mebi // 2 + 16 * mebi
    assert size >= 64 * 10**6
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir)) as checkpointer:
        checkpointer.save(1, state).wait("disk")
        for root in (memory_dir, tmp_path / "disk"):
            files = list(step_dir(root, 1).iterdir())
            stored = sum(path.stat().st_size for path in files)
            assert len(files) >= 5
            assert size <= stored <= 1.02 * size, [(path.name, path.stat().st_size) for path in files]


def test_a_state_that_shrinks_leaves_nothing_of_the_larger_one_in_its_files(tmp_path: Path, memory_dir: Path) -> None:
    with TieredCheckpointer.from_recipe(recipe(tmp_path, memory_dir, disk=None)) as checkpointer:
        for step, rows in enumerate((4000, 4000, 4000, 4000, 1000, 3999, 1), start=1):
            checkpointer.save(step, {"w": torch.full((rows, 10), float(step))}).wait("memory")
            part = step_dir(memory_dir, step) / "__0_0.distcp"
            assert 40 * rows < part.stat().st_size < 40 * rows + 2048
            target = {"w": torch.zeros(rows, 10)}
            assert checkpointer.restore(target) == step
            assert target["w"].eq(step).all()
