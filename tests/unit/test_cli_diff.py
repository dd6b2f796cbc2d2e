"""``sm-tiered diff``: what differs between two checkpoints and by how much, whoever saved them, read from any tier."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from typer.testing import Result

from sm_tiered.checksum import CHUNK_BYTES
from sm_tiered.settings import S3Settings
from sm_tiered.tensor_diff import measure
from sm_tiered.tiers import open_tier
from sm_tiered.tiers.base import Tier
from tests.unit.cli_checkpoints import (
    NAMESPACE,
    checkpoint,
    file_of,
    flip,
    local_tier,
    memory_tier,
    write_attempt,
    write_recipe,
)
from tests.unit.tensor_checkpoints import raw, s3_yaml, write_tensors

pytestmark = pytest.mark.usefixtures("plain_terminal")


def document(result: Result) -> Any:
    """The JSON document that is all of standard output; nothing went wrong."""
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def state(step: int) -> dict[str, torch.Tensor]:
    """A model and its optimizer at *step*."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 8), torch.randn(8)
    return {
        "model.weight": weight + step / 100,
        "model.bias": bias,
        "optimizer.state.weight.exp_avg": weight * step,
        "optimizer.state.weight.exp_avg_sq": weight.square() * step,
        "optimizer.state.weight.step": torch.tensor(float(step)),
    }


def write(tier: Tier, step: int, tensors: dict[str, torch.Tensor], **more: Any) -> None:
    write_tensors(tier, checkpoint(step), tensors, **{"durable": tier.name != "memory", **more})


@pytest.fixture
def local(tmp_path: Path) -> tuple[Tier, Path]:
    """An empty local tier, and its recipe."""
    return local_tier(tmp_path / "local"), write_recipe(tmp_path, local=tmp_path / "local")


@pytest.mark.parametrize("kind", ["memory", "local", "s3"])
def test_two_steps_are_compared_on_every_tier(
    run: Callable[..., Result], tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    if kind == "s3":
        settings: S3Settings = request.getfixturevalue("s3_settings")
        tier: Tier = open_tier(settings, NAMESPACE)
        recipe = write_recipe(tmp_path, more=s3_yaml(settings))
    else:
        make = memory_tier if kind == "memory" else local_tier
        places: dict[str, Any] = {kind: tmp_path / kind}
        tier, recipe = make(tmp_path / kind), write_recipe(tmp_path, **places)
    for step in (20, 40):
        write(tier, step, state(step), values={"lr": b"0.1", "losses": str(step).encode()})
    tier.close()
    told = document(run("diff", recipe, 20, f"{kind}:40", "--json"))
    assert [told[side]["tier"] for side in "ab"] == [kind, kind]
    assert [told[side]["step"] for side in "ab"] == [20, 40]
    assert told["same"] is False
    assert told["identical"] == ["model.bias"]
    found = {entry["fqn"]: entry for entry in told["different"]}
    assert found.keys() == state(0).keys() - {"model.bias"}
    a, b = state(20)["model.weight"].double(), state(40)["model.weight"].double()
    weight = found["model.weight"]
    assert (weight["elements"], weight["different"], weight["dtype"], weight["shape"]) == (48, 48, "float32", [6, 8])
    assert weight["max_abs"] == float((a - b).abs().max())
    assert weight["relative_l2"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)
    assert weight["nan"] == weight["inf"] == {"a": 0, "b": 0}
    assert found["optimizer.state.weight.step"]["max_abs"] == 20.0
    assert told["values"] == {"identical": ["lr"], "different": ["losses"]}
    assert told["warnings"] == []
    # Those that differ most come first.
    sizes = [entry["relative_l2"] for entry in told["different"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_on_two_tiers_is_not_read(run: Callable[..., Result], tmp_path: Path) -> None:
    for tier in (memory_tier(tmp_path / "memory"), local_tier(tmp_path / "local")):
        write(tier, 40, state(40), values={"lr": b"0.1"})
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")
    told = document(run("diff", recipe, "memory:40", "local:40", "--json"))
    assert told["same"] is True
    assert told["different"] == told["unlike"] == told["only_a"] == told["only_b"] == told["warnings"] == []
    assert told["bytes_read"] == 0
    assert told["bytes_skipped"] == sum(tensor.nbytes for tensor in state(40).values())
    # Nothing of it is read: so damage is not found here, but by `verify`.
    flip(file_of(tmp_path / "memory", checkpoint(40), "__0_0.distcp"), 3)
    assert document(run("diff", recipe, "memory:40", "local:40", "--json"))["bytes_read"] == 0


def test_a_stale_optimizer_is_warned_of(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    write(tier, 20, state(20))
    stale = {**state(40), **{name: each for name, each in state(20).items() if ".exp_avg" in name}}
    write(tier, 40, stale)
    told = document(run("diff", recipe, 20, 40, "--json"))
    names = ["optimizer.state.weight.exp_avg", "optimizer.state.weight.exp_avg_sq"]
    assert [(each["kind"], each["names"]) for each in told["warnings"]] == [("stale_optimizer", names)]
    assert "2 of 2 pieces of optimizer state are bit-identical at steps 20 and 40" in told["warnings"][0]["message"]
    assert {entry["fqn"] for entry in told["different"]} == {"model.weight", "optimizer.state.weight.step"}
    assert "warning: 2 of 2 pieces of optimizer state" in run("diff", recipe, 20, 40).stdout


def test_one_stale_shard_is_warned_of(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    name = "optimizer.state.weight.exp_avg"
    stale = state(40)
    stale[name] = torch.cat([state(20)[name][:3], state(40)[name][3:]])
    for step, given in ((20, state(20)), (40, stale)):
        write(tier, step, given, world=2, split=dict.fromkeys(("model.weight", name, f"{name}_sq"), 0))
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert [(each["kind"], each["names"]) for each in told["warnings"]] == [("stale_optimizer", [name])]
    assert told["warnings"][0]["message"].startswith("1 of 4 pieces")
    entry = next(entry for entry in told["different"] if entry["fqn"] == name)
    assert (entry["different"], entry["elements"], entry["shards"]) == (24, 48, 2)
    # The norm is that of the whole tensor, also where nothing differs.
    a, b = state(20)[name].double(), stale[name].double()
    assert entry["relative_l2"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-12)


def test_no_warning_of_zeros_or_of_one_step(run: Callable[..., Result], tmp_path: Path) -> None:
    tier, recipe = local_tier(tmp_path / "local"), write_recipe(tmp_path, local=tmp_path / "local")
    zeros = {name: torch.zeros_like(each) for name, each in state(0).items() if ".exp_avg" in name}
    for step in (20, 40):
        write(tier, step, {**state(step), **zeros})
    assert document(run("diff", recipe, 20, 40, "--json"))["warnings"] == []
    write_tensors(tier, checkpoint(40, 2), {**state(40), **zeros}, durable=True)
    told = document(run("diff", recipe, "40@1", "40@2", "--json"))
    assert (told["same"], told["warnings"]) == (True, [])


def test_two_steps_that_are_the_same_are_warned_of(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    for step in (20, 40):
        write(tier, step, state(20))
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert [each["kind"] for each in told["warnings"]] == ["stale_optimizer", "all_identical"]
    assert told["same"] is True
    assert "every tensor is bit-identical at steps 20 and 40" in told["warnings"][1]["message"]


@pytest.mark.parametrize("dims", [(0, 0), (0, 1), (1, 0), (1, 2)])
def test_other_numbers_of_ranks_are_compared_by_whole_tensors(
    run: Callable[..., Result], local: tuple[Tier, Path], dims: tuple[int, int]
) -> None:
    tier, recipe = local
    torch.manual_seed(0)
    a = torch.randn(7, 10, 5).bfloat16()
    b = a.clone()
    b[6, 9, 4] += 1
    b[0, 3, 2] = float("nan")
    write(tier, 20, {"w": a, "same": a}, world=3, split={"w": dims[0], "same": dims[0]})
    write(tier, 40, {"same": a, "w": b}, world=2, split={"w": dims[1], "same": dims[1]}, lead=33)
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert told["identical"] == ["same"]
    [entry] = told["different"]
    assert (entry["different"], entry["nan"], entry["shards"]) == (2, {"a": 0, "b": 1}, 1)
    assert entry["max_abs"] == float((b[6, 9, 4].double() - a[6, 9, 4].double()).abs())
    assert [told[side]["world"] for side in "ab"] == [3, 2]


def test_what_only_one_has_and_what_is_of_another_kind(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    a = {"gone": torch.ones(2), "cast": torch.ones(2), "grown": torch.ones(2), "same": torch.ones(2)}
    b = {"cast": torch.ones(2).half(), "grown": torch.ones(3), "same": torch.ones(2), "new.2": torch.ones(1)}
    write(tier, 20, a, values={"old": b"1"})
    write(tier, 40, {**b, "new.10": torch.ones(1)}, values={"young": b"1"})
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert (told["only_a"], told["only_b"]) == (["gone", "old"], ["new.2", "new.10", "young"])
    assert told["unlike"] == [
        {"fqn": "cast", "a": {"dtype": "float32", "shape": [2]}, "b": {"dtype": "float16", "shape": [2]}},
        {"fqn": "grown", "a": {"dtype": "float32", "shape": [2]}, "b": {"dtype": "float32", "shape": [3]}},
    ]
    assert (told["identical"], told["different"], told["same"], told["warnings"]) == (["same"], [], False, [])


def test_the_exit_status_tells_only_when_asked(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    for step in (20, 40):
        write(tier, step, state(step))
    assert run("diff", recipe, 20, 40).exit_code == 0
    assert run("diff", recipe, 20, 40, "--exit-code").exit_code == 1
    assert run("diff", recipe, 20, 20, "--exit-code").exit_code == 0
    assert run("diff", recipe, 20, 40, "--only", "*.bias", "--exit-code").exit_code == 0


def test_only_what_differs_is_read_of_large_tensors(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    big = torch.arange(6 * CHUNK_BYTES // 4, dtype=torch.int32)
    changed = big.clone()
    changed[5] += 3
    for step, given in ((20, big), (40, changed)):
        write(tier, step, {"w": given, "same": big})
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert told["identical"] == ["same"]
    [entry] = told["different"]
    assert (entry["different"], entry["max_abs"]) == (1, 3)
    assert entry["relative_l2"] == pytest.approx(3 / float(big.double().norm()), rel=1e-12)
    # `same` is not read, `w` wholly on one side and where it differs on the other.
    assert told["bytes_read"] == 7 * CHUNK_BYTES
    assert told["bytes_skipped"] == big.nbytes


@pytest.mark.parametrize("side", ["a", "b"])
def test_damage_in_what_is_read_is_status_3(run: Callable[..., Result], local: tuple[Tier, Path], side: str) -> None:
    tier, recipe = local
    for step in (20, 40):
        write(tier, step, state(step))
    flip(file_of(recipe.parent / "local", checkpoint(20 if side == "a" else 40), "__0_0.distcp"), 3)
    result = run("diff", recipe, 20, 40, "--exit-code")
    assert result.exit_code == 3
    assert "chunk 0 has XXH3-128" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("one", "other", "status", "words"),
    [
        ("twenty", 20, 2, "A: 'twenty' names no checkpoint"),
        (20, "local:", 2, "B: 'local:' names no checkpoint"),
        ("20@x", 20, 2, "names no checkpoint"),
        (20, 10**10, 2, "B"),
        ("nope:20", 20, 2, "no tier 'nope'"),
        (20, 30, 1, "step 30 is on no tier"),
        ("20@7", 20, 1, "step 20 of a7 is on no tier"),
        ("\x1b[31m", 20, 2, "names no checkpoint"),
    ],
)
def test_what_names_no_checkpoint_is_told(
    run: Callable[..., Result], local: tuple[Tier, Path], one: object, other: object, status: int, words: str
) -> None:
    write(local[0], 20, state(20))
    result = run("diff", local[1], one, other)
    assert result.exit_code == status
    assert words in result.stderr
    assert "\x1b" not in result.output


def test_a_checkpoint_is_named_by_step_tier_and_attempt(run: Callable[..., Result], tmp_path: Path) -> None:
    fast, slow = memory_tier(tmp_path / "memory"), local_tier(tmp_path / "local")
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")
    for tier in (fast, slow):
        write_attempt(tier, 1)
        write_attempt(tier, 2, checkpoint(20, 1), chosen=True)
    for ordinal in (1, 2):
        write_tensors(slow, checkpoint(40, ordinal), {"w": torch.tensor(ordinal)}, durable=True)
    write_tensors(fast, checkpoint(40, 1), {"w": torch.tensor(1)}, durable=False)
    write_tensors(fast, checkpoint(60, 2), {"w": torch.tensor(2)}, durable=False)

    def meant(name: str) -> tuple[str, int, int]:
        told = document(run("diff", recipe, name, name, "--json"))["a"]
        return told["tier"], told["step"], int(told["attempt"][1:7])

    assert meant("60") == ("memory", 60, 2)
    assert meant("40") == ("local", 40, 2)  # of the newest attempt, wherever it is
    assert meant("40@1") == ("memory", 40, 1)
    assert meant("local:40@1") == ("local", 40, 1)
    assert meant("memory:40") == ("memory", 40, 1)
    assert meant("local:40@a2") == ("local", 40, 2)
    assert meant(f"40@{checkpoint(40, 1).attempt}") == ("memory", 40, 1)


def test_a_tier_that_does_not_answer_is_gone_without_only_when_named(
    run: Callable[..., Result], tmp_path: Path, make_s3_settings: Callable[..., S3Settings]
) -> None:
    write(local_tier(tmp_path / "local"), 20, state(20))
    settings = make_s3_settings()
    more = s3_yaml(settings).replace(settings.bucket, "no-such-bucket")
    recipe = write_recipe(tmp_path, local=tmp_path / "local", more=more)
    result = run("diff", recipe, 20, 20)
    assert result.exit_code == 1
    assert "no-such-bucket" in result.stderr
    assert run("diff", recipe, "local:20", "local:20").exit_code == 0


def test_tensors_inside_safetensors_files_are_compared(run: Callable[..., Result], local: tuple[Tier, Path]) -> None:
    tier, recipe = local
    for step in (20, 40):
        files = {"model.safetensors": save({"w": torch.arange(4.0) + step, "b": torch.ones(2)}), "a.bin": b"%d" % step}
        write(tier, step, {}, files=files)
    told = document(run("diff", recipe, 20, 40, "--json"))
    assert told["identical"] == ["model.safetensors:b"]
    assert [(entry["fqn"], entry["max_abs"]) for entry in told["different"]] == [("model.safetensors:w", 20.0)]
    assert told["values"]["different"] == ["a.bin"]


@pytest.mark.parametrize("columns", [80, 120])
def test_what_is_told_fits_its_window(
    run: Callable[..., Result], local: tuple[Tier, Path], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    tier, recipe = local
    long = {f"model.layers.{n}.self_attention.query_projection.weight": torch.ones(4) for n in range(25)}
    nan = torch.tensor([1.0, float("nan"), float("-inf")])
    write(tier, 20, {**long, "only.a": torch.ones(1), "cast": torch.ones(1), "nan": torch.ones(3)}, values={"v": b"1"})
    many = {name: each * (n + 2) for n, (name, each) in enumerate(long.items())}
    write(tier, 40, {**many, "cast": torch.ones(1).half(), "nan": nan, "evil\x1b[2J": nan}, values={"v": b"2"})
    result = run("diff", recipe, 20, 40)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= columns
    assert all(line == line.rstrip() for line in lines)
    assert "\x1b" not in result.stdout
    heading = next(line for line in lines if line.startswith("differ"))
    assert heading.split() == ["differ", "max", "|a-b|", "rel.", "L2", "NaN", "Inf", "tensor", "(26)"]
    # The largest difference first: 26 ones against ones, all elements, relative 25.
    first = lines[lines.index(heading) + 1].split()
    assert first[:5] == ["all", "25", "25", "0", "0"]
    told = " ".join(result.stdout.split())
    assert "… and 6 more: --all shows them" in told
    assert "only in A (1) only.a" in told
    assert "only in B (1) evil\\x1b[2J" in told
    assert "float32 1 float16 1 cast" in told
    assert "values that differ (1) v" in told
    assert "26 tensors differ, 0 are identical, 1 are of another dtype or shape, 2 are only on one side" in told
    every = run("diff", recipe, 20, 40, "--all").stdout
    assert "more: --all" not in every
    assert " ".join(every.split()).count("0, 1") == 2  # NaN and Inf in B


# ---- the measure itself


@pytest.mark.parametrize(
    ("dtype", "a", "b", "different", "largest"),
    [
        (torch.int64, [2**62, -(2**63), 5], [2**62 + 1, 2**63 - 1, 5], 2, 2**64 - 1),
        (torch.int64, [2**62], [2**62 + 1], 1, 1),
        (torch.uint8, [0, 255], [255, 0], 2, 255),
        (torch.int8, [-128], [127], 1, 255),
        (torch.bool, [True, False], [True, True], 1, 1),
        (torch.float32, [0.0, 1.0], [-0.0, 1.0], 1, 0.0),
        (torch.float32, [math.nan, 1.0], [math.nan, math.nan], 1, 0.0),
        (torch.float32, [math.inf, 1.0], [-math.inf, 3.0], 2, 2.0),
        (torch.bfloat16, [1.0, 2.0], [1.0, 2.5], 1, 0.5),
        (torch.float8_e4m3fn, [448.0, 1.0], [-448.0, 1.0], 1, 896.0),
        (torch.float8_e5m2, [1.0, math.inf], [1.25, math.nan], 2, 0.25),
        (torch.float64, [1e308], [-1e308], 1, math.inf),
        (torch.complex64, [3 + 4j], [0j], 1, 5.0),
        (torch.complex128, [3 + 4j, 1j], [0j, 1j], 1, 5.0),
    ],
)
@pytest.mark.filterwarnings("error")
def test_the_measure(dtype: torch.dtype, a: list[Any], b: list[Any], different: int, largest: float) -> None:
    given = [torch.tensor(side, dtype=torch.float32 if dtype.itemsize == 1 and dtype.is_floating_point else dtype)
             for side in (a, b)]  # fmt: skip
    found = measure(str(dtype).removeprefix("torch."), *(bytearray(raw(each.to(dtype))) for each in given))
    assert (found.elements, found.different, found.max_abs) == (len(a), different, largest)


def test_counts_and_norms() -> None:
    a = torch.tensor([3.0, 4.0, math.nan, math.inf, 1.0])
    b = torch.tensor([3.0, 4.5, 1.0, math.nan, math.inf])
    found = measure("float32", bytearray(raw(a)), bytearray(raw(b)))
    assert (found.nans, found.infinities, found.different) == ((1, 1), (1, 1), 4)
    # Only where both are finite: 3, 4 against 3, 4.5.
    assert found.relative == pytest.approx(0.5 / 5.0, rel=1e-12)
    zero = measure("float32", bytearray(8), bytearray(raw(torch.ones(2))))
    assert zero.relative == math.inf
    assert measure("float32", bytearray(0), bytearray(0)).same
