"""Bad input to saves and loads: one table. Every row names the class and the words that tell field, value and remedy;
for every row nothing is written, nothing of the state is changed, and no secret is told.
"""

from __future__ import annotations

import json
import random
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from sm_tiered import checksum
from sm_tiered.errors import (
    CheckpointNotFoundError,
    ConfigError,
    MismatchError,
    NamespaceInUseError,
    NothingRestorableError,
    PolicyError,
    RecipeError,
    RestoreError,
    StructureError,
    TieredError,
    UnsafeValueError,
)
from sm_tiered_dcp import TieredCheckpointer, TieredStorageReader, TieredStorageWriter
from sm_tiered_dcp.engine import _engines
from tests.distributed.dcp_jobs import bits, recipe, step_dir
from tests.waiting import wait_until

SECRET = "SENTINELvalue7f3a"
STEP = 10
"""The step that is there before every row."""


class Place(NamedTuple):
    """A job with one checkpoint, for all rows."""

    checkpointer: TieredCheckpointer
    which: dict[str, Any]
    memory: Path
    disk: Path


class Row(NamedTuple):
    id: str
    call: Callable[[Place], object]
    error: type[Exception]
    words: tuple[str, ...]


def state() -> dict[str, Any]:
    return {
        "w": torch.arange(12.0).view(3, 4),
        "nested": {"list": [torch.ones(2), {"lr": 0.1}], "epoch": 3},
        "names": ["a", "b"],
        "per_rank": {"seed": 7},
    }


class Broken:
    """A Stateful object that fails, with a secret at hand."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def state_dict(self) -> Any:
        return self.fail()

    def load_state_dict(self, found: Any) -> None:
        self.fail()


class Itself:
    def state_dict(self) -> Any:
        return self

    def load_state_dict(self, found: Any) -> None: ...


class Custom:
    """Nothing that safe loading knows."""


def _raise(error: Exception) -> Any:
    raise error


def save(row: str, more: dict[Any, Any] | Callable[[], dict[Any, Any]], error: type[Exception], *words: str) -> Row:
    """A state that is good but for *more*."""

    def call(place: Place) -> object:
        return place.checkpointer.save(STEP + 1, {**state(), **(more() if callable(more) else more)})

    return Row(f"save {row}", call, error, words)


def save_all(row: str, given: Any, error: type[Exception], *words: str) -> Row:
    """Something else than a state."""
    return Row(f"save {row}", lambda place: place.checkpointer.save(STEP + 1, given), error, words)


def step(row: str, value: Any, *words: str) -> list[Row]:
    """A step that is none, everywhere one is asked for."""
    calls: dict[str, Callable[[Place], object]] = {
        "save": lambda place: place.checkpointer.save(value, state()),
        "maybe_save": lambda place: place.checkpointer.maybe_save(value, state()),
        "writer": lambda place: TieredStorageWriter(place.which, step=value),
    }
    if value is not None:
        calls["restore"] = lambda place: place.checkpointer.restore(blank(), step=value)
        calls["reader"] = lambda place: TieredStorageReader(place.which, step=value)
    else:
        del calls["writer"]
    return [Row(f"{name}: step {row}", call, ConfigError, ("step", *words)) for name, call in calls.items()]


def option(row: str, error: type[Exception], *words: str, **options: Any) -> Row:
    return Row(f"save {row}", lambda place: place.checkpointer.save(STEP + 1, state(), **options), error, words)


def blank() -> dict[str, Any]:
    """A state that fits the checkpoint, with nothing of it inside."""
    return {
        "w": torch.full((3, 4), -1.0),
        "nested": {"list": [torch.full((2,), -1.0), {"lr": -1}], "epoch": -1},
        "names": [],
        "per_rank": {"seed": -1},
    }


def load(
    row: str, change: Callable[[dict[str, Any]], object], error: type[Exception], *words: str, **options: Any
) -> Row:
    """A state that fits but for *change*."""

    def call(place: Place) -> object:
        target = blank()
        change(target)
        before = _shown(target)
        try:
            return place.checkpointer.restore(target, **options)
        finally:
            assert _shown(target) == before, "the state was changed"

    return Row(f"load {row}", call, error, words)


def _shown(target: dict[str, Any]) -> str:
    return repr({name: value for name, value in target.items() if not isinstance(value, (Broken, Itself))})


def load_all(row: str, given: Any, error: type[Exception], *words: str) -> Row:
    return Row(f"load {row}", lambda place: place.checkpointer.restore(given), error, words)


def writer(row: str, error: type[Exception], *words: str, recipe: Any = None, **options: Any) -> Row:
    def call(place: Place) -> object:
        with closing(TieredStorageWriter(recipe or place.which, **options)) as opened:
            return opened.stage({"a": Custom()} if row.startswith("85") else state())

    return Row(f"writer {row}", call, error, words)


def read_metadata(place: Place) -> object:
    with closing(TieredStorageReader(place.which, step=500)) as opened:
        return opened.read_metadata()


def sealed(fields: dict[str, Any]) -> bytes:
    """The bytes of a record or manifest, with the digest of what stands before it as the last field."""
    del fields["xxh3_128"]
    body = json.dumps(fields).encode()[:-1]
    return body + f',"xxh3_128":"{checksum.digest(body)}"}}'.encode()


def record(row: str, change: dict[str, Any], *words: str) -> Row:
    """A record, with digests made anew, that says something else."""

    def call(place: Place) -> object:
        kept: list[tuple[Path, bytes]] = []
        try:
            for root in (place.memory, place.disk):
                directory = step_dir(root, STEP)
                for name in ("record-00000.json", "manifest.json"):
                    if not (directory / name).exists():
                        continue
                    data = (directory / name).read_bytes()
                    kept.append((directory / name, data))
                    fields = json.loads(data)
                    if name == "manifest.json":
                        fields["records"] = {
                            k: checksum.digest((directory / k).read_bytes()) for k in fields["records"]
                        }
                    else:
                        fields |= change
                    (directory / name).write_bytes(sealed(fields))
            return place.checkpointer.restore(blank())
        finally:
            for path, data in kept:
                path.write_bytes(data)

    return Row(f"load {row}", call, NothingRestorableError, ("none can be restored", *words))


def nested_deep(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"x": 1}
    for _ in range(depth):
        found = {"x": found}
    return found


def cyclic_list() -> list[Any]:
    found: list[Any] = [1]
    found.append(found)
    return found


def cyclic_dict() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["me"] = found
    return found


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def freed(start: int = 0) -> torch.Tensor:
    found = torch.ones(100_000)[start:]
    found.untyped_storage().resize_(0)
    return found


def many(count: int) -> dict[str, Any]:
    return {f"extra{number:03d}": torch.zeros(1) for number in range(count)}


DOWN = "Did you mean 7?"
RANGE = "Allowed: 0 <= step < 10**10"
STEPS = [
    *step("73 -1", -1, "step -1 is out of range", RANGE),
    *step("74 1.5", 1.5, "must be an int, got float 1.5", "training counter"),
    *step("75 True", True, "must be an int, got bool True"),
    *step("76 text", "7", "got str '7'", DOWN),
    *step("76 bytes", b"7", "got bytes b'7'"),
    *step("77 2**63", 2**63, "step 9223372036854775808 is out of range", RANGE),
    *step("77 10**10", 10**10, "step 10000000000 is out of range"),
    *step("None", None, "must be an int, got NoneType None"),
    *step("nan", float("nan"), "got float nan"),
    *step("78 float tensor", torch.tensor(1.5), "must be an int, got Tensor"),
    *step("78 several", torch.tensor([1, 2]), "must be an int, got Tensor"),
    *step("78 bool tensor", torch.tensor(True), "must be an int, got Tensor"),
    *step("78 array", np.array([1, 2]), "must be an int, got ndarray"),
    *step("78 np.float64", np.float64(3.0), "must be an int, got float64"),
    *step("list", [7], "must be an int, got list"),
]
SAVES = [
    Row(
        "save 80 lower",
        lambda p: p.checkpointer.save(9, state()),
        StructureError,
        ("step 9 is below step 10", "restore("),
    ),
    save_all("81 empty", {}, StructureError, "the state is empty", "{'model': model}"),
    save_all("82 module", nn.Linear(1, 1), StructureError, "is a Linear, not a mapping", "{'model': model}"),
    save_all("82 list", [torch.ones(1)], StructureError, "is a list, not a mapping", "Pass a dict"),
    save_all("82 None", None, StructureError, "is a NoneType, not a mapping"),
    save_all("82 tensor", torch.ones(1), StructureError, "is a Tensor, not a mapping"),
    save("83 int key", {5: 1}, StructureError, "the key 5 of type int, not str", "Use '5'"),
    save("83 None key", {None: 1}, StructureError, "the key None of type NoneType"),
    save("83 NUL", {"a\0b": 1}, StructureError, r"'a\x00b'", "NUL", "Rename"),
    save("83 NUL deep", {"a": {"b\0": torch.ones(1)}}, StructureError, r"'a.b\x00'", "NUL"),
    save("83 reserved", {"per_rank.x": 1}, StructureError, "'per_rank.x'", "reserved", "state['per_rank']"),
    save("83 one name twice", {"a.b": 1, "a": {"b": 2}}, StructureError, "'a.b'", "state['a']['b']", "Rename"),
    save("83 tensor and value", {"a.b": torch.ones(1), "a": {"b": 2}}, StructureError, "'a.b'", "Rename"),
    save("83 int and text key", {"a": {1: 1, "1": 2}}, StructureError, "'a.1'", "Rename"),
    save("85 lambda", {"fn": lambda: 1}, UnsafeValueError, "fn: function", "can't be stored", "Remove it"),
    save("85 class", {"a": {"b": Custom}}, UnsafeValueError, "a.b: type can't be stored safely", "allow_pickle: true"),
    save("85 object", {"a": [1, {"b": Custom()}]}, UnsafeValueError, "a.1.b: ", "Custom", "allow_pickle: true"),
    save("85 in a tuple", {"a": (1, {"b": Custom()})}, UnsafeValueError, "a[1]['b']: ", "Custom"),
    save("85 in a set", {"a": {Custom}}, UnsafeValueError, "a key ", "Custom"),
    save("85 per rank", {"per_rank": {"x": Custom()}}, UnsafeValueError, "per_rank.00000.x: ", "Custom"),
    save("85 generator", {"a": (i for i in ())}, UnsafeValueError, "a: generator", "Remove it"),
    save("85 random", {"a": random.Random()}, UnsafeValueError, "a: random.Random"),
    save("85 file", lambda: {"a": open("/dev/null")}, UnsafeValueError, "a: ", "TextIOWrapper"),  # noqa: SIM115
    save("85 object array", {"a": np.array([object()])}, UnsafeValueError, "a: a NumPy value of dtype object"),
    save("85 records", {"a": np.zeros(1, "i4,i4")}, UnsafeValueError, "a: a NumPy value of dtype", "Use numbers"),
    save("85 long double", {"a": np.longdouble(1)}, UnsafeValueError, "a: a NumPy value of dtype"),
    save(
        "85 mark",
        {"a": ({"__sm_tiered__": 1},)},
        UnsafeValueError,
        "a[0]: the key '__sm_tiered__' is reserved",
        "Rename",
    ),
    save("85 OrderedDict with more", lambda: {"a": (_dressed(),)}, UnsafeValueError, "a[0]: ", "can't be stored"),
    save("85 cycle in a list", {"a": cyclic_list()}, TieredError, "a", "itself"),
    save("85 cycle in a dict", {"a": cyclic_dict()}, StructureError, "nested too deeply", "hold itself"),
    save("85 too deep", {"a": nested_deep(5000)}, StructureError, "nested too deeply"),
    save(
        "85 deep in a tuple", lambda: {"a": (_deep_list(100_000),)}, UnsafeValueError, "a: nested too deeply", "Flatten"
    ),
    save(
        "86 meta",
        {"m": torch.ones(2, device="meta")},
        StructureError,
        "m, a Tensor, is on the meta device",
        "to_empty()",
    ),
    save("86 meta in a value", {"m": (torch.ones(2, device="meta"),)}, UnsafeValueError, "m[0]: a tensor without data"),
    save(
        "87 sparse", {"m": {"s": torch.eye(3).to_sparse()}}, StructureError, "m.s, a Tensor, has the layout", "indices"
    ),
    save(
        "87 csr",
        lambda: {"s": torch.eye(3).to_sparse_csr()},
        StructureError,
        "s, a Tensor, has the layout torch.sparse_csr",
    ),
    save("87 quantized", lambda: {"q": quantized()}, StructureError, "q, a Tensor, is quantized", "int_repr()"),
    save(
        "87 nested",
        lambda: {"n": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])},
        StructureError,
        "n, a Tensor, is nested",
    ),
    save("88 freed", lambda: {"f": freed()}, StructureError, "f, a Tensor, is larger than its storage", "FSDP frees"),
    save("88 freed below", lambda: {"m": {"f": freed()}}, StructureError, "m.f, a Tensor, is larger than its storage"),
    save("88 view of it", lambda: {"m": {"f": freed(5)}}, StructureError, "m.f, a Tensor, is larger"),
    save("88 in a value", lambda: {"m": (freed(),)}, UnsafeValueError, "m[0]: a tensor whose storage was freed"),
    save("87 lazy", lambda: {"l": nn.LazyLinear(2).weight}, StructureError, "has no storage yet", "Run the model once"),
    save(
        "state_dict raises", {"o": Broken(lambda: _raise(LookupError("no state today")))}, LookupError, "no state today"
    ),
    save(
        "state_dict is itself",
        {"o": Itself()},
        StructureError,
        "state_dict() of o, a Itself, returns",
    ),
    save("state_dict gives an object", {"o": Broken(Custom)}, UnsafeValueError, "o: ", "Custom"),
    option(
        "68 metric missing", PolicyError, "metric 'loss' not in metrics; have ['los']", "keep: best", metrics={"los": 1}
    ),
    option("68 metric text", PolicyError, "metric 'loss' must be a number, got str 'low'", metrics={"loss": "low"}),
    option("68 metric None", PolicyError, "metric 'loss' must be a number, got None", metrics={"loss": None}),
    option("68 metric bool", PolicyError, "metric 'loss' must be a number, got bool", metrics={"loss": True}),
    option(
        "68 metric vector", PolicyError, "metric 'loss' must be a number, got Tensor", metrics={"loss": torch.ones(2)}
    ),
    option("68 metrics a list", PolicyError, "metrics must be a mapping", "list", metrics=[("loss", 1)]),
    option(
        "68 metric name", PolicyError, "the name of a metric must be text, got int 5", metrics={5: 1.0, "loss": 1.0}
    ),
    option("tier unknown", ConfigError, "no tier 's3'", "['memory', 'disk']", tiers=["memory", "s3"]),
    option("tier text", ConfigError, "tiers must be a list of names, got 'disk'", "['memory', 'disk']", tiers="disk"),
    option("tier int", ConfigError, "no tier 5", "['memory', 'disk']", tiers=[5]),
    option("tier none at all", ConfigError, "tiers is empty", "['memory', 'disk']", tiers=[]),
    writer("tier unknown", ConfigError, "no tier 's3'", step=11, tiers=("s3",)),
    writer("metric missing", PolicyError, "metric 'loss' not in metrics", step=11, metrics={"los": 1.0}),
    writer("metric text", PolicyError, "must be a number, got str", step=11, metrics={"loss": "low"}),
    writer("85 object", UnsafeValueError, "allow_pickle: true", step=11),
    writer(
        "45 recipe missing", RecipeError, "recipe not found: nowhere.yaml", "Looked from", recipe="nowhere.yaml", step=1
    ),
    writer("46 recipe directory", RecipeError, "recipe '/' is a directory", recipe="/", step=1),
    writer("recipe text", RecipeError, "a path was expected, got text", "Recipe.parse", recipe="a: 1\nb: 2\n", step=1),
    writer("recipe int", RecipeError, "a recipe is a path, a mapping or a Recipe, got 5", recipe=5, step=1),
]
LOADS = [
    Row(
        "load 96",
        lambda p: p.checkpointer.restore(blank(), step=500),
        CheckpointNotFoundError,
        ("step 500 is on no tier", "memory: [10]", "disk: [10]", "Leave step out"),
    ),
    load_all("empty", {}, MismatchError, "the state is empty"),
    load_all("module", nn.Linear(1, 1), MismatchError, "is a Linear, not a mapping", "{'model': model}"),
    load_all("list", [1], MismatchError, "is a list, not a mapping"),
    load(
        "98 shape",
        lambda s: s.update(w=torch.zeros(3, 5)),
        MismatchError,
        "w: saved (3, 4) float32, state has (3, 5) float32",
    ),
    load(
        "98 scalar",
        lambda s: s.update(w=torch.tensor(0.0)),
        MismatchError,
        "w: saved (3, 4) float32, state has () float32",
    ),
    load(
        "99 dtype",
        lambda s: s.update(w=torch.zeros(3, 4, dtype=torch.bfloat16)),
        MismatchError,
        "w: saved (3, 4) float32, state has (3, 4) bfloat16",
    ),
    load(
        "100 missing",
        lambda s: s.update(many(30)),
        MismatchError,
        "30 not in the checkpoint: extra000",
        "extra009, …",
        "allow_partial",
    ),
    load("100 unexpected", lambda s: s.pop("w"), MismatchError, "1 not in the state: w", "allow_partial"),
    load("100 unexpected value", lambda s: s.pop("names"), MismatchError, "1 not in the state: names"),
    load(
        "100 both",
        lambda s: (s.pop("w"), s.update(v=torch.zeros(1))),
        MismatchError,
        "1 not in the checkpoint: v",
        "1 not in the state: w",
    ),
    load("100 missing value", lambda s: s.update(extra=1), MismatchError, "1 not in the checkpoint: extra"),
    load(
        "value where a tensor was", lambda s: s.update(w=5), MismatchError, "w: a tensor was saved, the state has a int"
    ),
    load(
        "tensor where a value was",
        lambda s: s["nested"].update(epoch=torch.ones(1)),
        MismatchError,
        "nested.epoch: a Python value was saved, the state has a Tensor",
    ),
    load(
        "86 meta",
        lambda s: s.update(w=torch.zeros(3, 4, device="meta")),
        MismatchError,
        "w, a Tensor, is on the meta device",
        "to_empty()",
    ),
    load(
        "87 sparse", lambda s: s.update(w=torch.zeros(3, 4).to_sparse()), MismatchError, "w, a Tensor, has the layout"
    ),
    load(
        "in a tuple",
        lambda s: s.update(nested={"list": (torch.zeros(2), {"lr": 0}), "epoch": 0}),
        MismatchError,
        "nested.list",
    ),
    load(
        "state_dict raises",
        lambda s: s.update(nested=Broken(lambda: _raise(LookupError("no state today")))),
        RestoreError,
        "LookupError: no state today",
    ),
    load("state_dict is itself", lambda s: s.update(nested=Itself()), MismatchError, "returns the object itself"),
    load(
        "101 rule above",
        lambda s: None,
        MismatchError,
        "the per_rank rule gave 7 for rank 0",
        "0 to 0, or None",
        per_rank=lambda *_: 7,
    ),
    load(
        "101 rule below", lambda s: None, MismatchError, "the per_rank rule gave -1 for rank 0", per_rank=lambda *_: -1
    ),
    load(
        "101 rule text", lambda s: None, MismatchError, "the per_rank rule gave '0' for rank 0", per_rank=lambda *_: "0"
    ),
    load("101 rule raises", lambda s: None, RestoreError, "KeyError: 'node'", per_rank=lambda *_: {}["node"]),
    record("102 newer", {"format": 2}, "format 2 is newer than this release reads (1)"),
    record("102 another kind", {"kind": "index"}, "kind is 'index', expected record"),
    record("102 another step", {"step": 11}, "step 11"),
    record(
        "102 negative size",
        {"parts": [{"name": "__0_0.distcp", "size": -1, "chunks": [], "replica": False}]},
        "size must be an integer of at least 0",
    ),
    record("102 a path out", {"parts": [{"name": "../x", "size": 0, "chunks": [], "replica": False}]}, "'../x'"),
    record("102 no items", {"items": 5}, "items must be a list"),
    Row(
        "open in use",
        lambda p: TieredCheckpointer.from_recipe({**p.which, "on_error": "raise", "in_use_wait_secs": 0.1}),
        NamespaceInUseError,
        ("namespace 'run-1' is in use by trainers with pids [", "a namespace of its own"),
    ),
    Row(
        "reader step",
        read_metadata,
        CheckpointNotFoundError,
        ("step 500 is on no tier", "disk: [10]"),
    ),
]
ROWS = [*STEPS, *SAVES, *LOADS]


def _dressed() -> OrderedDict[str, int]:
    found: OrderedDict[str, int] = OrderedDict(a=1)
    found.extra = Custom()  # type: ignore[attr-defined]
    return found


def _deep_list(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("bad")
    memory = folder / "memory"
    keep = {"any": [{"best": {"metric": "loss", "mode": "min"}}, {"latest": 3}]}
    which = recipe(folder, memory, disk={"keep": keep})
    with TieredCheckpointer.from_recipe(which) as checkpointer:
        checkpointer.save(STEP, state()).wait("disk")
        queue = memory / "run-1" / ".queue"
        wait_until(lambda: not list(queue.glob("*-step_*-00000-*")), "the drainer still has the save in its queue")
        yield Place(checkpointer, which, memory, folder / "disk")


def _written(place: Place) -> dict[str, Any]:
    """What stands in both tiers; restores leave attempt records, and events tell of everything."""
    found: dict[str, Any] = {}
    for root in (place.memory, place.disk):
        for path in root.rglob("*"):
            if path.is_file() and path.parent.name not in ("events", "attempts", ".locks", ".arena"):
                found[str(path)] = path.read_bytes()
    return found


def test_the_state_that_rows_are_variations_of_is_good(place: Place) -> None:
    target = blank()
    assert place.checkpointer.restore(target) == STEP
    assert bits(target) == bits(state())
    for value in (torch.tensor(10), np.int64(10), np.array(10)):
        assert place.checkpointer.restore(target, step=value) == STEP  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_bad_input_is_refused_with_words_that_help(row: Row, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    before, users = _written(place), {key: engine.users for key, engine in _engines.items()}
    with pytest.raises(row.error) as caught:
        row.call(place)
    text = str(caught.value)
    for word in row.words:
        assert word in text, text
    if isinstance(caught.value, TieredError):
        assert len(text) < 2000
        assert "\n" not in text
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert _written(place) == before, "something was written"
    assert {key: engine.users for key, engine in _engines.items()} == users


def test_rows_have_ids_of_their_own_and_are_many() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS) >= 130
