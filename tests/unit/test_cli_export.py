"""``sm-tiered export``: safetensors files that others load, bit for bit, or nothing at all."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from typer.testing import Result

from sm_tiered import layout
from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.settings import S3Settings
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from tests.unit.cli_checkpoints import NAMESPACE, checkpoint, file_of, flip, local_tier, memory_tier, write_recipe
from tests.unit.tensor_checkpoints import everything_below, raw, s3_yaml, write_tensors

pytestmark = pytest.mark.usefixtures("plain_terminal")

ROOT = Path(__file__).parents[2]


def zoo() -> dict[str, torch.Tensor]:
    """Tensors of many kinds, with numbers that a careless copy would change."""
    torch.manual_seed(1)
    return {
        "model.wide.weight": torch.randn(6, 10),
        "model.wide.bias": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45]),
        "model.half": torch.randn(5, 3).half(),
        "model.brain": torch.randn(4, 4, 4).bfloat16(),
        "model.count": torch.tensor(7),
        "model.long": torch.arange(9) - 2**62,
        "model.mask": torch.tensor([[True, False, True]]),
        "model.fp8": torch.randn(3, 8).to(torch.float8_e4m3fn),
        "model.fp8_5": torch.randn(3, 8).to(torch.float8_e5m2),
        "model.empty": torch.empty(0, 4),
        "model.bytes": torch.arange(5, dtype=torch.uint8),
        "model.double": torch.randn(2, 2, dtype=torch.float64),
        "model.complex": torch.randn(2, 2, dtype=torch.complex64),
        "model.layers.10.weight": torch.randn(8),
        "model.layers.2.weight": torch.randn(8),
    }


SPLIT = {"model.wide.weight": 1, "model.brain": 2, "model.fp8": 0, "model.long": 0, "model.layers.2.weight": 0}
MOMENTS = {"optimizer.state.w.exp_avg": torch.ones(6, 10), "optimizer.state.w.step": torch.tensor(3.0)}


def fill(tier: Tier, *, durable: bool) -> None:
    write_tensors(tier, checkpoint(20), {"model.w": torch.zeros(3)}, durable=durable)
    given = {**zoo(), **MOMENTS}
    ties = {"model.head.weight": "model.wide.weight"}
    write_tensors(tier, checkpoint(40), given, durable=durable, world=2, split=SPLIT, ties=ties, values={"lr": b"0.1"})


@pytest.fixture(params=["memory", "local", "s3"])
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A recipe whose only tier, of that kind and name, holds steps 20 and 40."""
    if request.param == "memory":
        fill(memory_tier(tmp_path / "memory"), durable=False)
        return write_recipe(tmp_path, memory=tmp_path / "memory")
    if request.param == "local":
        fill(local_tier(tmp_path / "local"), durable=True)
        return write_recipe(tmp_path, local=tmp_path / "local")
    settings: S3Settings = request.getfixturevalue("s3_settings")
    tier = open_tier(settings, NAMESPACE)
    fill(tier, durable=True)
    tier.close()
    return write_recipe(tmp_path, more=s3_yaml(settings))


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """A recipe with a local tier that holds steps 20 and 40."""
    fill(local_tier(tmp_path / "local"), durable=True)
    return write_recipe(tmp_path, local=tmp_path / "local")


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


def document(result: Result) -> Any:
    """The JSON document that is all of standard output."""
    return json.loads(result.stdout)


def test_a_model_loads_with_stock_safetensors_from_every_tier(
    run: Callable[..., Result], recipe: Path, tmp_path: Path
) -> None:
    result = run("export", recipe, "--step", 40, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    told = document(result)
    assert sorted(everything_below(tmp_path / "out")) == ["model.safetensors"]
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), zoo())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "model.head.weight": "model.wide.weight"}
    assert told["checkpoint"]["step"] == 40
    assert told["checkpoint"]["world"] == 2
    assert told["tied"] == {"model.head.weight": "model.wide.weight"}
    assert told["left_out"] == 2
    assert told["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert [sorted(each["tensors"]) for each in told["files"]] == [sorted(zoo())]


def test_shards_hold_what_they_may_and_the_index_names_them(
    run: Callable[..., Result], local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    assert run("export", local, "-o", out, "--max-shard-size", "0.2KB", "--strip", "model.").exit_code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    count = len(names)
    assert count > 3
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert sorted(everything_below(out)) == [*names, "model.safetensors.index.json"]
    expected = {name.removeprefix("model."): tensor for name, tensor in zoo().items()}
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in expected.values())}
    found: dict[str, torch.Tensor] = {}
    for name in names:
        held = load_file(out / name)
        assert all(index["weight_map"][key] == name for key in held)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 200
        found |= held
    assert_same(found, expected)
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    # Layer 2 before layer 10.
    assert index["weight_map"]["layers.2.weight"] <= index["weight_map"]["layers.10.weight"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--all"], [*zoo(), *MOMENTS]),
        (["--only", "*wide*"], ["model.wide.weight", "model.wide.bias"]),
        (["--only", "*.half", "--only", "*.mask"], ["model.half", "model.mask"]),
        (["--prefix", "model.layers."], ["model.layers.2.weight", "model.layers.10.weight"]),
        (["--prefix", "optimizer.", "--all"], list(MOMENTS)),
        (["--only", "*head*"], ["model.head.weight"]),
    ],
)
def test_what_is_exported_can_be_chosen(
    run: Callable[..., Result], local: Path, tmp_path: Path, arguments: list[str], names: list[str]
) -> None:
    assert run("export", local, "-o", tmp_path / "out", *arguments).exit_code == 0
    given = {**zoo(), **MOMENTS, "model.head.weight": zoo()["model.wide.weight"]}
    assert_same(load_file(tmp_path / "out" / "model.safetensors"), {name: given[name] for name in names})


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--step", 30], 1, "step 30 is on no tier"),
        (["--step", -1], 2, "--step"),
        (["--tier", "nope"], 2, "no tier 'nope'"),
        (["--max-shard-size", "5"], 2, "'5' is no size"),
        (["--max-shard-size", "0GB"], 2, "is no size"),
        (["--only", "nothing*"], 2, "no tensor has such a name"),
        (["--only", "optimizer*"], 2, "--all"),
        (["--strip", "train."], 2, "no name begins with 'train.'"),
        (["--strip", "model.layers.10.weight"], 2, "would be called"),
    ],
)
def test_what_can_not_be_done_is_told_and_leaves_nothing(
    run: Callable[..., Result], local: Path, tmp_path: Path, arguments: list[Any], status: int, words: str
) -> None:
    result = run("export", local, "-o", tmp_path / "a" / "out", *arguments)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert not (tmp_path / "a").exists()


def test_names_that_would_be_the_same_are_refused(run: Callable[..., Result], tmp_path: Path) -> None:
    given = {"model.w": torch.ones(2), "w": torch.zeros(2)}
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), given, durable=True)
    result = run(
        "export", write_recipe(tmp_path, local=tmp_path / "local"), "-o", tmp_path / "out", "--strip", "model."
    )
    assert result.exit_code == 2
    assert "w would be called as model.w is" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_export_that_stands_there_is_replaced_only_when_asked(
    run: Callable[..., Result], local: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("export", local, "-o", out, "--max-shard-size", "0.2KB").exit_code == 0
    (out / "tokenizer.json").write_text("mine")
    before = everything_below(out)
    result = run("export", local, "-o", out)
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert everything_below(out) == before
    assert run("export", local, "-o", out, "--force").exit_code == 0
    assert sorted(everything_below(out)) == ["model.safetensors", "tokenizer.json"]
    assert_same(load_file(out / "model.safetensors"), zoo())


@pytest.mark.parametrize("existing", [False, True])
def test_damage_is_status_3_and_leaves_what_was_there(
    run: Callable[..., Result], recipe: Path, tmp_path: Path, existing: bool, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out"
    if existing:
        assert run("export", recipe, "-o", out, "--step", 20).exit_code == 0
    before = everything_below(out) if existing else None
    kind = request.node.callspec.params["recipe"]
    if kind == "s3":
        tier = open_tier(request.getfixturevalue("s3_settings"), NAMESPACE)
        key = layout.in_dir(checkpoint(40), "__1_0.distcp")
        data = bytearray(next(entry.size for entry in tier.list(key)))
        tier.read_into(key, 0, memoryview(data))
        data[3] ^= 1
        tier.put(key, bytes(data))
        tier.close()
    else:
        flip(file_of(tmp_path / kind, checkpoint(40), "__1_0.distcp"), 3)
    result = run("export", recipe, "-o", out, "--step", 40, "--force")
    assert result.exit_code == 3
    assert "__1_0.distcp: chunk 0 has XXH3-128" in result.stderr
    assert (everything_below(out) if out.exists() else None) == before


def test_a_damaged_record_is_status_3(run: Callable[..., Result], local: Path, tmp_path: Path) -> None:
    flip(file_of(tmp_path / "local", checkpoint(40), "record-00001.json"), 40)
    assert run("export", local, "-o", tmp_path / "out", "--step", 40).exit_code == 3
    assert run("export", local, "-o", tmp_path / "out").exit_code == 0
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"model.w"}


def test_an_incomplete_step_is_not_exported(run: Callable[..., Result], tmp_path: Path) -> None:
    fill(memory_tier(tmp_path / "memory"), durable=False)
    file_of(tmp_path / "memory", checkpoint(40), "record-00001.json").unlink()
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory")
    result = run("export", recipe, "-o", tmp_path / "out", "--step", 40)
    assert result.exit_code == 1
    assert "not complete" in result.stderr
    assert document(run("export", recipe, "-o", tmp_path / "out", "--json"))["checkpoint"]["step"] == 20


def test_safetensors_files_of_another_program_are_read_by_their_header(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    given = {name.removeprefix("model."): tensor for name, tensor in zoo().items()}
    files = {"model.safetensors": save(given, {"format": "pt"}), "optimizer.bin": b"opaque", "rng_0.pkl": b"\x80\x04."}
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), {}, durable=True, files=files)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    assert run("export", recipe, "-o", tmp_path / "out", "--max-shard-size", "1KB").exit_code == 0
    found: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert_same(found, given)


def test_files_that_hold_no_tensors_for_us_are_named(run: Callable[..., Result], tmp_path: Path) -> None:
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), {}, durable=True, files={"state.pkl": b"\x80\x04."})
    result = run("export", write_recipe(tmp_path, local=tmp_path / "local"), "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "state.pkl" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_safetensors_file_that_is_none_is_status_3(run: Callable[..., Result], tmp_path: Path) -> None:
    tier, recipe = local_tier(tmp_path / "local"), write_recipe(tmp_path, local=tmp_path / "local")
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}'
    cases = [b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"[]", len(header).to_bytes(8, "little") + header]
    for step, data in enumerate(cases):
        write_tensors(tier, checkpoint(step), {}, durable=True, files={"model.safetensors": data})
        result = run("export", recipe, "-o", tmp_path / "out", "--step", step)
        assert result.exit_code == 3, data
        assert "model.safetensors" in result.stderr


@pytest.mark.parametrize("columns", [80, 120])
def test_what_is_told_fits_its_window(
    run: Callable[..., Result], local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(tmp_path)
    result = run("export", local, "-o", "out")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    told = " ".join(result.stdout.split())
    assert lines[0].split() == ["tensors", "size", "file"]
    assert "15 1.8 KiB" in told
    assert "out/model.safetensors" in told
    assert "model.head.weight is model.wide.weight: written once" in told
    assert "left out: 2 tensors that are no model's (--all takes them)" in told
    assert "all names begin with model.: --strip model. takes that away" in told
    assert "local step 40 exported, every byte verified: 15 tensors" in told


def test_names_from_outside_are_made_harmless(run: Callable[..., Result], tmp_path: Path) -> None:
    evil = "model.\x1b[31m\x07\n"
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), {evil: torch.ones(1)}, durable=True)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    result = run("export", recipe, "-o", tmp_path / "out", "--only", "zzz*")
    assert result.exit_code == 2
    assert "\x1b" not in result.output
    assert run("export", recipe, "-o", tmp_path / "out").exit_code == 0
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [evil]


_MEASURED = """
import resource, sys
from sm_tiered.cli.app import main
try:
    main()
finally:
    assert "torch" not in sys.modules and "safetensors" not in sys.modules
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def test_memory_is_bounded_however_large_a_tensor_is(tmp_path: Path) -> None:
    rows = 48 * CHUNK_BYTES // 4096
    big = torch.arange(rows * 1024, dtype=torch.int32).reshape(rows, 1024)
    tier = local_tier(tmp_path / "local")
    write_tensors(tier, checkpoint(20), {"model.w": torch.zeros(8)}, durable=True)
    write_tensors(tier, checkpoint(40), {"model.w": big}, durable=True, world=2, split={"model.w": 1})
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    peaks: list[int] = []
    for step in (20, 40):
        done = subprocess.run(
            [sys.executable, "-c", _MEASURED, "export", recipe, "--step", str(step), "-o", tmp_path / str(step)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.splitlines()[-1]) * 1024)
    assert torch.equal(load_file(tmp_path / "40" / "model.safetensors")["model.w"], big)
    assert big.nbytes == 48 * CHUNK_BYTES
    assert peaks[1] - peaks[0] < 14 * CHUNK_BYTES


def test_no_room_is_told_and_leaves_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    given = {"model.w": torch.zeros(1 << 18)}
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), given, durable=True)
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, before[1]))
    try:
        result = run("export", recipe, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 1
    assert "can't be written" in result.stderr
    assert not (tmp_path / "out").exists()
