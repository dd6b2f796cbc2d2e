"""An `Archive` is one stock file: written with one copy, readable without us, refused by name where it is unsafe."""

from __future__ import annotations

import io
import weakref
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from sm_tiered import sources
from sm_tiered.errors import (
    MismatchError,
    NothingRestorableError,
    StructureError,
    TierUnavailableError,
    UnsafeValueError,
)
from sm_tiered_dcp import Archive, TieredCheckpointer, archive, frames
from sm_tiered_dcp.archive import Packed, Packer
from sm_tiered_dcp.dcp_parts import TensorEntry, layout_tensors
from sm_tiered_dcp.marks import MARK
from sm_tiered_dcp.packed_part import PackedPart
from sm_tiered_dcp.tensor_reads import _DTYPES
from tests.distributed.dcp_jobs import bits, recipe, step_dir

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def written(packed: Packed, cache: dict[object, object] | None = None, buffer: bytearray | None = None) -> bytes:
    """Return the file, written as into a mapping."""
    part = PackedPart(name="__0_0.ckpt", fqn="checkpoint", path=("checkpoint",), packed=packed)
    buffer = bytearray(b"\xaa" * part.size) if buffer is None else buffer
    part.write(memoryview(buffer), {} if cache is None else cache)
    assert b"".join(bytes(piece) for piece in part.chunks()) == bytes(buffer), "streamed, it is another file"
    return bytes(buffer)


def pack(value: object, path: str, *, allow_pickle: bool) -> Packed:
    return Packer(path, allow_pickle=allow_pickle).pack(value)


def loaded(stored: bytes) -> Any:
    return torch.load(io.BytesIO(stored), weights_only=True)


def mixed() -> dict[str, Any]:
    """Tensors of many kinds, and what a training framework puts beside them."""
    base = torch.arange(40, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {
        "state_dict": model.state_dict(),
        "parameter": nn.Parameter(torch.randn(5)),
        "view": base[3:9],
        "strided": base.view(5, 8)[:, ::2],
        "transposed": torch.randn(3, 4).t(),
        "expanded": torch.randn(1, 3).expand(4, 3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(7),
        "none_in_it": torch.zeros(0, 3),
        "dtypes": [torch.ones(3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.bool, torch.uint8)],
        "special": torch.tensor([float("nan"), -0.0, float("inf")]),
        "loops": {"epoch": 3, "done": None, "log": [1.5, "text", b"bytes"], 7: (True, {1, 2})},
        "kept": OrderedDict(a=1),
        "counted": Counter("aab"),
    }


def test_stock_torch_reads_it_whole_and_mapped(tmp_path: Path) -> None:
    value = mixed()
    stored = written(pack(value, "checkpoint", allow_pickle=False))
    found = loaded(stored)
    assert bits(found) == bits(value)
    assert found["state_dict"]._metadata == value["state_dict"]._metadata
    assert isinstance(found["parameter"], nn.Parameter)
    (tmp_path / "it.ckpt").write_bytes(stored)
    assert bits(torch.load(tmp_path / "it.ckpt", weights_only=True, mmap=True)) == bits(value)


def test_of_a_view_only_its_own_numbers_are_stored_and_what_is_one_tensor_stays_one() -> None:
    base = torch.randn(1_000_000)
    first, model = base[:10], nn.Linear(3, 4, bias=False)
    model.tied = model.weight
    stored = written(pack({"a": first, "b": [first], "c": base[:10], "m": model.state_dict()}, "x", allow_pickle=False))
    found = loaded(stored)
    assert len(stored) < 10_000
    assert found["a"].data_ptr() == found["b"][0].data_ptr() == found["c"].data_ptr()
    assert found["m"]["weight"].data_ptr() == found["m"]["tied"].data_ptr()


def test_a_counter_that_grows_moves_nothing_and_a_kept_mapping_is_filled_anew() -> None:
    cache: dict[object, object] = {}
    tensor = torch.zeros(1000)
    first = pack({"w": tensor, "step": 9}, "x", allow_pickle=False)
    buffer = bytearray(first.frame.size)
    written(first, cache, buffer)
    views = list(cache.values())
    tensor.fill_(5.0)
    second = pack({"w": tensor, "step": 2**40, "more": "x" * 50}, "x", allow_pickle=False)
    assert second.frame.size == first.frame.size
    assert second.frame.holes == first.frame.holes
    found = loaded(written(second, cache, buffer))
    assert (found["step"], found["w"].sum()) == (2**40, 5000)
    assert list(cache.values()) == views
    other = pack({"w": torch.ones(500, 2).double()[:, :1]}, "x", allow_pickle=False)
    assert loaded(written(other, cache, bytearray(other.frame.size)))["w"].sum() == 500


def changed(value: dict[str, Any], random: Random) -> None:
    """Change *value* as a training may from save to save."""
    names = [name for name, held in value.items() if isinstance(held, torch.Tensor)]
    name = random.choice(names)
    tensor = value[name]
    choice = random.randrange(9)
    if choice < 3:
        with torch.no_grad():
            tensor.copy_(torch.rand(tensor.shape))
    elif choice == 3:
        value[name] = tensor.clone()  # what the old one leaves free is taken by the next
    elif choice == 4:
        value[f"n{random.randrange(9)}"] = torch.rand(random.randrange(5), 3)
    elif choice == 5 and len(names) > 2:
        del value[name]
    elif choice == 6:
        value[f"n{random.randrange(9)}"] = tensor if random.random() < 0.5 else tensor.detach()[: len(tensor) // 2]
    elif choice == 7:
        value["log"] = [*value.get("log", []), random.random()] * random.choice((1, 1, 1, 2))
    elif choice == 8:
        value[name] = nn.Parameter(tensor.detach(), requires_grad=random.random() < 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_packed_again_it_is_what_it_would_be_packed_anew(seed: int) -> None:
    random, packer = Random(seed), Packer("x", allow_pickle=False)
    value: dict[str, Any] = {f"n{i}": torch.rand(4, 3) for i in range(5)}
    again = 0
    for _ in range(150):
        changed(value, random)
        last = packer._last
        packed = packer.pack(value)
        again += last is not None and packer._last is not None and packer._last.entries is last.entries
        stored = written(packed)
        assert bits(loaded(stored)) == bits(value)
        assert len(stored) == len(written(pack(value, "x", allow_pickle=False)))
    assert 30 < again < 120


def test_nothing_is_kept_alive_from_save_to_save() -> None:
    packer, array = Packer("x", allow_pickle=False), np.zeros(10)
    tensor, seen = torch.from_numpy(array), weakref.ref(array)
    for _ in range(2):
        packer.pack({"w": tensor, "v": tensor[:3]})
    del array, tensor
    assert seen() is None, "its storage is still held"


def test_without_torch_s_help_it_is_the_same_file_for_a_second_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    value = mixed()
    monkeypatch.delattr(torch.serialization, "skip_data")
    packed = pack(value, "checkpoint", allow_pickle=False)
    assert packed.tensors == ()
    assert bits(loaded(written(packed))) == bits(value)
    with pytest.raises(UnsafeValueError, match=r"checkpoint\['x'\]: frozenset"):
        pack({"x": frozenset([1])}, "checkpoint", allow_pickle=False)


def test_a_stream_whose_holes_have_no_names_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "_record_name", lambda piece: None)
    value = {"w": torch.randn(10)}
    assert bits(loaded(written(pack(value, "x", allow_pickle=False)))) == bits(value)


UNSAFE: list[tuple[str, Callable[[], Any], str]] = [
    ("numpy scalar", lambda: {"a": [1, {"b": np.float64(1.0)}]}, r"checkpoint\['a'\]\[1\]\['b'\]: numpy.float64"),
    ("numpy array", lambda: {"a": np.zeros(3)}, r"checkpoint\['a'\]: numpy.ndarray"),
    ("frozenset", lambda: {"a": (frozenset([1]),)}, r"checkpoint\['a'\]\[0\]: frozenset"),
    ("namespace", lambda: {"hyper_parameters": Namespace(lr=1)}, r"\['hyper_parameters'\]: argparse.Namespace"),
    ("path", lambda: {"dirpath": Path("/tmp")}, r"\['dirpath'\]: pathlib\S*"),
    ("defaultdict", lambda: {"a": defaultdict(list, b=1)}, r"\['a'\]: collections.defaultdict"),
]


@pytest.mark.parametrize(("make", "words"), [row[1:] for row in UNSAFE], ids=[row[0] for row in UNSAFE])
def test_what_only_a_pickle_stores_is_refused_by_name_unless_it_is_allowed(make: Callable[[], Any], words: str) -> None:
    pack({"fine": 1}, "checkpoint", allow_pickle=False)
    for _ in range(2):  # the second time nothing is remembered as proven
        with pytest.raises(UnsafeValueError, match=f"{words} can't be stored safely. Remove it or set allow_pickle"):
            pack(make(), "checkpoint", allow_pickle=False)
    stored = written(pack(make(), "checkpoint", allow_pickle=True))
    torch.load(io.BytesIO(stored), weights_only=False)


class Sub(torch.Tensor):
    """A tensor of a class of its own."""


def marked_parameter() -> nn.Parameter:
    parameter: Any = nn.Parameter(torch.ones(3))
    parameter.meta = Namespace(lr=1)
    return parameter


def looped() -> list[Any]:
    value: list[Any] = [Namespace(lr=1)]
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (lambda: {"t": "cargparse\nNamespace\n"}, lambda: {"h": Namespace(lr=1)}, r"\['h'\]: argparse.Namespace"),
        (lambda: {"t": OrderedDict()}, lambda: {"s": torch.ones(3).as_subclass(Sub)}, r"\['s'\]: .*Sub can't"),
        (lambda: {"p": nn.Parameter(torch.ones(3))}, lambda: {"p": marked_parameter()}, r"\['p'\]: .*Parameter can't"),
        (lambda: {"n": 5}, lambda: {"n": [1 << 3000]}, r"\['n'\]\[0\]: int can't"),
        (lambda: {"n": {1}}, lambda: {"n": frozenset([1])}, r"\['n'\]: frozenset can't"),
        (lambda: {"n": 1}, lambda: {"n": looped()}, r"\['n'\]\[0\]: argparse.Namespace can't"),
    ],
)
def test_what_was_found_safe_lets_nothing_else_through(
    first: Callable[[], Any], then: Callable[[], Any], words: str
) -> None:
    packer = Packer("checkpoint", allow_pickle=False)
    assert bits(loaded(written(packer.pack(first())))) == bits(first())
    for _ in range(2):
        with pytest.raises(UnsafeValueError, match=words):
            packer.pack(then())
    packer.pack(first())


def test_what_the_user_calls_safe_is_so_only_as_long_as_he_does() -> None:
    packer = Packer("checkpoint", allow_pickle=False)
    with torch.serialization.safe_globals([Namespace]):
        packer.pack({"n": Namespace(lr=1)})
    with pytest.raises(UnsafeValueError, match="Namespace"):
        packer.pack({"n": Namespace(lr=1)})


def test_what_is_nested_too_deeply_is_said_to_be() -> None:
    value: list[Any] = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(UnsafeValueError, match="checkpoint: nested too deeply"):
        pack(value, "checkpoint", allow_pickle=False)


def test_every_dtype_goes_in() -> None:
    value = {name: torch.zeros(16, dtype=torch.uint8).view(dtype) for name, dtype in _DTYPES.items()}
    packed = pack(value, "checkpoint", allow_pickle=False)
    assert len(packed.tensors) == len(value)
    assert {name: tensor.dtype for name, tensor in loaded(written(packed)).items()} == _DTYPES
    value["quantized"] = torch.quantize_per_tensor(torch.arange(3.0), 0.5, 0, torch.qint8)
    found = loaded(written(pack(value, "checkpoint", allow_pickle=False)))
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in value.items()}


def test_hooks_are_each_tensor_s_own_however_often_it_is_packed() -> None:
    packer, tensor, heard = Packer("x", allow_pickle=False), torch.zeros(3, requires_grad=True), list[str]()
    for _ in range(3):
        found = loaded(written(packer.pack({"a": tensor, "b": tensor.view(3)[:]})))
        found["a"].register_hook(lambda _: heard.append("a"))
        (found["b"] * 1.0).sum().backward()
    assert heard == []


def test_a_slot_that_held_tensors_by_name_or_an_archive_is_framed_anew_for_the_other() -> None:
    tensors = {"w": torch.randn(49984)}
    entry = TensorEntry(fqn="w", path=("w",), dtype=torch.float32, sizes=(49984,), offsets=(0,), shape=(49984,))
    layout = layout_tensors("__0_0.distcp", [entry])
    buffer, cache = bytearray(layout.size + 10_000), dict[object, object]()
    for _ in range(2):
        layout.source([tensors["w"]]).write(memoryview(buffer)[: layout.size], cache)
        assert torch.equal(torch.load(io.BytesIO(buffer[: layout.size]), weights_only=True), tensors["w"])
        packed = pack(tensors, "x", allow_pickle=False)
        part = PackedPart(name="__0_0.ckpt", fqn="x", path=("x",), packed=packed)
        part.write(memoryview(buffer)[: part.size], cache)
        assert torch.equal(loaded(bytes(buffer[: part.size]))["w"], tensors["w"])


def test_what_no_pickle_stores_is_named_too() -> None:
    for allow_pickle in (False, True):
        with pytest.raises(UnsafeValueError, match=r"checkpoint\['a'\]\['f'\]: function can't be stored: .*Remove it"):
            pack({"a": {"f": lambda: 1}}, "checkpoint", allow_pickle=allow_pickle)


def test_tensors_without_data_are_refused() -> None:
    freed = torch.zeros(10)
    freed.untyped_storage().resize_(0)
    for value, error, words in (
        (torch.zeros(3, device="meta"), UnsafeValueError, "meta device"),
        (freed, StructureError, "larger than its storage"),
    ):
        with pytest.raises(error, match=words):
            pack({"a": value}, "checkpoint", allow_pickle=False)


# ---- in a state


@pytest.fixture
def which(tmp_path: Path, memory_dir: Path) -> dict[str, Any]:
    return recipe(tmp_path, memory_dir)


def test_a_checkpoint_of_one_file_goes_through_both_tiers_and_is_everybody_s(
    which: dict[str, Any], tmp_path: Path, memory_dir: Path
) -> None:
    value, state = mixed(), dict[str, Any]()
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in range(1, 6):
            value = {**value, "global_step": step}
            state = {"checkpoint": Archive(value), "per_rank": {"seed": step}, "w": torch.full((9,), float(step))}
            checkpointer.save(step, state, ["memory"]).wait("memory")
        checkpointer.save(5, state, ["disk"]).wait("disk")
    for root in (memory_dir, tmp_path / "disk"):
        path = step_dir(root, 5) / "__0_0.ckpt"
        assert bits(torch.load(path, weights_only=True)) == bits(value)
        stock: dict[str, Any] = {"checkpoint": None, "w": torch.zeros(9)}
        dcp.load(stock, checkpoint_id=str(path.parent))
        assert bits(stock) == bits({"checkpoint": value, "w": state["w"]})
    assert len(list(memory_dir.rglob("*.ckpt"))) == 4, "two that are kept, two more files in rotation"


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_restore_gives_it_back(which: dict[str, Any], memory_dir: Path, tier: str) -> None:
    value = mixed()
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"checkpoint": Archive(value)}).wait("disk")
    if tier == "disk":
        for path in memory_dir.rglob("*.ckpt"):
            path.unlink()
    target = {"checkpoint": Archive()}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(target) == 1
        assert checkpointer.restored is not None
        assert checkpointer.restored.tier == tier
    assert bits(target["checkpoint"].value) == bits(value)


def test_a_new_launch_recycles_what_an_earlier_one_left(which: dict[str, Any], memory_dir: Path) -> None:
    inodes: list[set[int]] = []
    for launch in range(3):
        with TieredCheckpointer.from_recipe(which) as checkpointer:
            for step in range(1 + 10 * launch, 7 + 10 * launch):
                checkpointer.save(step, {"c": Archive({"w": torch.zeros(100_000)})}, ["memory"]).wait("memory")
        inodes.append(
            {path.stat().st_ino for path in memory_dir.rglob("*") if path.is_file() and path.stat().st_size > 1e5}
        )
    assert inodes[0] == inodes[1] == inodes[2]
    assert len(inodes[0]) <= 4


def test_what_grows_gets_room_and_a_flipped_bit_is_found(which: dict[str, Any], memory_dir: Path) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step, size in enumerate((1000, 1010, 50_000, 10), start=1):
            checkpointer.save(step, {"c": Archive({"w": torch.full((size,), float(step))})}, ["memory"]).wait("memory")
    newest = step_dir(memory_dir, 4) / "__0_0.ckpt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    target = {"c": Archive()}
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        assert checkpointer.restore(target) == 3
    assert target["c"].value["w"].shape == (50_000,)


def test_a_pickle_in_it_is_run_only_where_the_recipe_allows_it(tmp_path: Path, memory_dir: Path) -> None:
    allowing, careful = (recipe(tmp_path, memory_dir, allow_pickle=allow) for allow in (True, False))
    with TieredCheckpointer.from_recipe(allowing) as checkpointer:
        checkpointer.save(1, {"c": Archive({"n": Namespace(lr=1)})}, ["memory"]).wait("memory")
    target = {"c": Archive("as it was")}
    with TieredCheckpointer.from_recipe(careful) as checkpointer, pytest.raises(MismatchError, match="c: .*pickle"):
        checkpointer.restore(target)
    assert target["c"].value == "as it was"
    with TieredCheckpointer.from_recipe(allowing) as checkpointer:
        checkpointer.restore(target)
    assert target["c"].value == {"n": Namespace(lr=1)}


def test_a_file_that_is_no_archive_is_damage(which: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def squeezed(self: Packer, value: object) -> Packed:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
            new.writestr("archive/data.pkl", b"0" * 1_000_000)
        data = out.getvalue()
        return Packed(frame=frames.Frame(size=len(data), pieces=((0, data),), holes=()), tensors=())

    monkeypatch.setattr(Packer, "pack", squeezed)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"c": Archive({})}, ["memory"]).wait("memory")
        with pytest.raises(NothingRestorableError, match="a compressed entry"):
            checkpointer.restore({"c": Archive()})


def test_an_archive_may_stand_anywhere_but_in_a_tuple(which: dict[str, Any]) -> None:
    class Holder:
        def __init__(self, value: Any = None) -> None:
            self.archive = Archive(value)

        def state_dict(self) -> dict[str, Any]:
            return {"file": self.archive}

        def load_state_dict(self, found: dict[str, Any]) -> None:
            assert found == {"file": self.archive}

    def state(*values: Any) -> dict[str, Any]:
        return {"a": {"b": Archive(values[0])}, "l": [Archive(values[1]), Archive(values[2])], "h": Holder(values[3])}

    with TieredCheckpointer.from_recipe({**which, "allow_pickle": True}) as checkpointer:
        checkpointer.save(1, state(*map(str, range(4))), ["memory"]).wait("memory")
        target = state(*[None] * 4)
        archives = [target["a"]["b"], *target["l"], target["h"].archive]
        assert checkpointer.restore(target) == 1
        assert [archive.value for archive in archives] == list(map(str, range(4)))
        assert [target["a"]["b"], *target["l"], target["h"].archive] == archives
        with pytest.raises(
            UnsafeValueError, match=r"t\[0\]: .*Archive can't be stored.*it stands in dicts and lists only"
        ):
            checkpointer.save(2, {"t": (Archive(1),)})


def test_values_and_archives_are_not_taken_for_each_other(which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(1, {"c": np.arange(3), "d": Archive({MARK: "x"})}, ["memory"]).wait("memory")
        with pytest.raises(MismatchError, match="c: a Python value was saved, the state has an Archive"):
            checkpointer.restore({"c": Archive(), "d": Archive()})
        target: dict[str, Any] = {"c": None, "d": None}
        assert checkpointer.restore(target) == 1
        assert target["d"] == {MARK: "x"}


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_a_tier_that_falls_silent_in_the_middle_of_a_file_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allow_pickle: bool
) -> None:
    which = recipe(tmp_path, None, allow_pickle=allow_pickle)
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for step in (1, 2):
            value = {"w": torch.rand(6 * 1024 * 1024), "n": Namespace() if allow_pickle else 1}
            checkpointer.save(step, {"c": Archive(value)}).wait("disk")
    load = sources.InPlacePart._load

    def failing(self: sources.InPlacePart, index: int) -> memoryview:
        if index == 1 and "step_0000000002" in self._key:
            raise TierUnavailableError("no answer", tier="disk")
        return load(self, index)

    monkeypatch.setattr(sources.InPlacePart, "_load", failing)
    with TieredCheckpointer.from_recipe(which) as checkpointer, pytest.raises(TierUnavailableError, match="no answer"):
        checkpointer.restore({"c": Archive()})


def test_room_is_made_again_when_an_archive_outgrows_it(memory_dir: Path, tmp_path: Path) -> None:
    which = recipe(tmp_path, memory_dir, memory={"budget": "24MiB"})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        state = {"w": torch.zeros(1_000_000), "c": Archive({"w": torch.zeros(1000)})}
        checkpointer.save(1, state, ["memory"]).wait("memory")
        state["c"] = Archive({"w": torch.zeros(1_000_000)})
        handle = checkpointer.save(2, state, ["memory"])
        assert handle.skipped("memory")
        events = list((memory_dir / "run-1" / "events").glob("*.jsonl"))
        assert "an archive outgrew its room" in "".join(path.read_text() for path in events)


def test_where_an_archive_can_not_stand(which: dict[str, Any]) -> None:
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        for state, words in (
            ({"per_rank": {"c": Archive({})}}, "per_rank.00000.c is an Archive"),
            ({"a": {"b": Archive({})}, "a.b": 1}, "two values have the name 'a.b'"),
            ({"a": {"b": Archive({})}, "a.b": Archive({})}, "two values have the name 'a.b'"),
            ({"a": {"b": Archive({})}, "a.b": torch.zeros(3)}, "two values have the name 'a.b'"),
        ):
            with pytest.raises(StructureError, match=words):
                checkpointer.save(1, state)
        checkpointer.save(2, {"w": torch.zeros(3), "v": 1}, ["memory"]).wait("memory")
        for name, words in (
            ("x", "1 not in the checkpoint: x"),
            ("w", "w: a tensor was saved, the state has an Archive"),
        ):
            with pytest.raises(MismatchError, match=words):
                checkpointer.restore({"w": torch.zeros(3), "v": 0, name: Archive()})


def test_what_was_proven_safe_is_not_proven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pack({"a": torch.zeros(3), "o": OrderedDict(x=1)}, "x", allow_pickle=False)
    monkeypatch.setattr(archive, "loads_safely", lambda value: pytest.fail("proven twice"))
    pack({"b": [torch.ones(2)], "o": OrderedDict(y=[2])}, "x", allow_pickle=False)
