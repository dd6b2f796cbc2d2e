"""``torch.save`` files looked into without torch: the bytes of each tensor, and nothing that is named is run."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sm_tiered.cli.app import app
from sm_tiered.pickled_tensors import pickled_tensors
from sm_tiered.stored_tensors import StoredValue
from sm_tiered.torch_files import TorchFile, look_into
from tests.unit.cli_checkpoints import checkpoint, local_tier, write_recipe
from tests.unit.tensor_checkpoints import raw, write_tensors

DTYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16"),
    *("float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"),
)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def inside(data: bytes) -> TorchFile | None:
    value = StoredValue(name="f", part="f", offset=0, length=len(data), is_file=True)
    return look_into(value, lambda offset, length: data[offset : offset + length])


def test_each_tensor_is_found_by_its_keys_with_its_own_bytes() -> None:
    weight, own = torch.randn(5, 4), torch.nn.Parameter(torch.randn(2))
    state: dict[str, Any] = {
        "state_dict": OrderedDict(a=weight, rows=weight[1:3], p=own, e=torch.empty(0, 3)),
        "kinds": [torch.arange(4).to(getattr(torch, name)) for name in DTYPES],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]},
        "rest": [{1, 2}, b"xx", torch.float32, torch.device("cpu"), torch.Size([1]), 2**70, None, 1 + 2j, True],
    }
    data = saved(state)
    found = inside(data)
    assert found is not None
    assert len(found.tensors) == 4 + len(DTYPES) + 1
    assert "f:optimizer.state.0.step" in found.tensors
    for tensor in found.tensors.values():
        there: Any = state
        for key in tensor.path[1:]:
            there = there[key]
        assert (tensor.dtype, tensor.shape) == (str(there.dtype).removeprefix("torch."), tuple(there.shape))
        start = tensor.chunks[0].start if tensor.chunks else 0
        assert data[start : start + tensor.bytes] == raw(there.detach())


def test_what_is_not_in_row_major_order_is_told_apart() -> None:
    found = inside(saved({"t": torch.randn(5, 4).t(), "w": torch.ones(2)}))
    assert found is not None
    assert (list(found.tensors), list(found.odd)) == (["f:w"], ["f:t"])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_that_a_pickle_names_is_run(tmp_path: Path) -> None:
    found = inside(saved({"evil": Evil(tmp_path / "ran"), "w": torch.ones(2)}))
    assert found is not None
    assert list(found.tensors) == ["f:w"]
    assert not (tmp_path / "ran").exists()


def hostile() -> list[bytes]:
    nested: list[Any] = [1, 2]
    for _ in range(40):
        nested = [nested, nested]
    own: list[Any] = []
    own.append(own)
    return [pickle.dumps(nested), pickle.dumps(own), b"", b"garbage", b"\x80\x02."]


@pytest.mark.parametrize("data", hostile(), ids=["bomb", "cycle", "empty", "garbage", "nothing"])
def test_a_pickle_that_is_none_of_ours_is_refused_in_time(data: bytes) -> None:
    with pytest.raises(ValueError, match="pickle|newline|opcode"):
        pickled_tensors(data)


def test_a_file_that_torch_did_not_write_is_opaque() -> None:
    data = saved({"w": torch.ones(1000)})
    assert inside(data[:-30]) is None
    assert inside(b"PK\x03\x04" + bytes(100)) is None
    assert inside(b"") is None


def test_a_lightning_checkpoint_is_exported_and_compared(tmp_path: Path) -> None:
    tier, recipe = local_tier(tmp_path / "local"), write_recipe(tmp_path, local=tmp_path / "local")
    weight = torch.randn(6, 4)
    for step in (20, 40):
        state = {"layers.0.weight": weight + step, "head.weight": weight + step, "odd": torch.ones(3)}
        state["head.weight"] = state["layers.0.weight"]
        optimizer = {"state": {0: {"exp_avg": weight, "step": torch.tensor(float(step))}}}
        file = saved({"state_dict": OrderedDict(state), "optimizer_states": [optimizer], "global_step": step})
        write_tensors(tier, checkpoint(step), {}, durable=True, files={"whole.ckpt": file})

    def run(*arguments: object) -> Any:
        done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    told = run("export", recipe, "--step", 40, "-o", tmp_path / "out", "--strip", "state_dict.")
    assert told["tied"] == {"head.weight": "layers.0.weight"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: raw(tensor) for name, tensor in found.items()} == {
        "layers.0.weight": raw(weight + 40),
        "odd": raw(torch.ones(3)),
    }
    told = run("diff", recipe, 20, 40)
    assert told["identical"] == ["whole.ckpt:optimizer_states.0.state.0.exp_avg", "whole.ckpt:state_dict.odd"]
    assert told["values"]["different"] == ["whole.ckpt:data.pkl"]
    assert [each["kind"] for each in told["warnings"]] == ["stale_optimizer"]


def test_an_export_refuses_what_it_can_not_put_in_order(tmp_path: Path) -> None:
    file = saved({"state_dict": {"conv": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}})
    write_tensors(local_tier(tmp_path / "local"), checkpoint(20), {}, durable=True, files={"whole.ckpt": file})
    recipe = write_recipe(tmp_path, local=tmp_path / "local")
    done = CliRunner().invoke(app, ["export", str(recipe), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "stored in another order than row-major" in done.stderr
    assert not (tmp_path / "out").exists()
