"""Values come back as they were, what only a pickle could store is named, and no stored bytes run code."""

from __future__ import annotations

import collections
import contextlib
import datetime
import io
import os
import pathlib
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sm_tiered.errors import CorruptPartError, MismatchError, UnsafeValueError
from sm_tiered_dcp import proofs
from sm_tiered_dcp.values import dump_value, fingerprint, load_value

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def returned(value: Any, *, allow_pickle: bool = False) -> Any:
    return load_value(dump_value("extra", value, allow_pickle=allow_pickle), allow_pickle=allow_pickle, what="extra")


def alike(a: Any, b: Any) -> bool:
    """Equal in value and in type, NaNs and all."""
    kind: type[Any] = type(a)
    if kind is not type(b):
        return False
    if issubclass(kind, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if issubclass(kind, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    if issubclass(kind, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if issubclass(kind, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return repr(a) == repr(b)


PLAIN: list[Any] = [
    *(None, True, False, 0, -1, 2**63, -(2**2000), 1.5, float("nan"), float("inf"), -0.0, 1 + 2j),
    *("", "text", "\ud800", "ü" * 300, b"", b"bytes\xff", bytearray(b""), bytearray(b"x")),
    *([], (), {}, set[int](), [1, [2, (3, {"a": {4, 5}})]], {1: "a", (2, "b"): None, None: 1.0, 2.5: b""}),
    *(OrderedDict([("b", 1), ("a", 2)]), Counter("aab"), torch.Size([1, 2]), torch.float32, torch.device("cpu")),
    *(torch.strided, torch.randn(3, 4), torch.tensor(True), torch.empty(0), torch.arange(5).to(torch.uint16)),
    random.getstate(),
    torch.get_rng_state(),
]
NUMPY: list[Any] = [
    *(np.float32(1.5), np.int64(-3), np.bool_(True), np.uint16(7), np.complex128(1j), np.float64("nan")),
    *(np.arange(12).reshape(3, 4), np.zeros((2, 0)), np.array(5.0), np.arange(6, dtype=">i4"), np.arange(9)[::2]),
    *(np.array(["text", "x"]), np.array([b"ab"]), np.str_("text"), np.str_(""), np.bytes_(b"b"), np.array([], "U3")),
    *(np.array(["2020-01-01", "NaT"], "datetime64[D]"), np.timedelta64(3, "s"), np.asfortranarray(np.eye(3)[:2])),
    *(np.arange(3, dtype=np.uint64), np.float16(2), np.array([[True]]), np.array([], bool)),
    np.random.RandomState(3).get_state(),  # what np.random.get_state() gives
    np.random.default_rng(1).bit_generator.state,
    np.random.Generator(np.random.MT19937(1)).bit_generator.state,
    {"deep": [({"x": np.float32(1)},)]},
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_come_back_as_they_were_and_stock_torch_loads_them(value: Any) -> None:
    data = dump_value("v", value, allow_pickle=False)
    assert alike(load_value(data, allow_pickle=False, what="v"), value)
    stock = torch.load(io.BytesIO(data), weights_only=True)
    if b"__sm_tiered__" not in data:
        assert alike(stock, value)


@pytest.mark.parametrize("value", NUMPY, ids=lambda value: type(value).__name__)
def test_numpy_values_come_back_as_they_were_and_stock_torch_loads_their_marks(value: Any) -> None:
    data = dump_value("v", value, allow_pickle=False)
    assert alike(load_value(data, allow_pickle=False, what="v"), value)
    torch.load(io.BytesIO(data), weights_only=True)


def test_a_numpy_array_comes_back_writable_and_is_not_the_same_memory() -> None:
    array = np.arange(4)
    back = returned(array)
    back[0] = 9
    assert array[0] == 0


def test_what_is_one_object_stays_one_object() -> None:
    shared, array = [1, 2], np.arange(3)
    back = returned([shared, shared, array, {"again": array}])
    assert back[0] is back[1]
    assert back[2] is back[3]["again"]


def test_a_list_of_lists_shared_a_billionfold_is_fast() -> None:
    value: list[Any] = [np.int64(1)]
    for _ in range(30):
        value = [value, value]
    back = returned(value)
    assert back[0] is back[1]


def test_tensors_inside_values_are_stored_at_their_own_size() -> None:
    base = torch.zeros(1_000_000)
    data = dump_value("v", [base[:3], base[::250_000]], allow_pickle=False)
    assert len(data) < 4096
    back = load_value(data, allow_pickle=False, what="v")
    assert torch.equal(back[1], base[::250_000])
    parameter = returned([torch.nn.Parameter(torch.randn(8)[2:5], requires_grad=False)])[0]
    assert type(parameter) is torch.nn.Parameter
    assert not parameter.requires_grad


class Opaque:
    """A user's class."""


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"fn": [1, 2, alike]}, r"extra\['fn'\]\[2\]: function can't be stored"),
        ({"fn": lambda: 0}, r"extra\['fn'\]: function"),
        ([Opaque()], r"extra\[0\]: .*Opaque can't be stored safely"),
        (pathlib.PurePosixPath("/x"), "extra: pathlib.*PurePosixPath"),
        ((datetime.timedelta(1),), r"extra\[0\]: datetime\.timedelta"),
        (collections.defaultdict(int), "collections.defaultdict"),
        (frozenset({1}), "frozenset"),
        ({"k": {1, frozenset({2})}}, r"extra\['k'\] key"),
        (Point(1, 2), "Point"),
        (range(3), "range"),
        (int, "type"),
        (2**3000, "extra: int can't be stored safely"),
        ({np.int64(3): 1}, r"key .*int64.*Use a plain int"),
        ({b"": 1}, "key b''"),
        (Counter({"a": Opaque()}), "Opaque"),
        (np.array([object()]), "dtype object"),
        (np.zeros(2, dtype=[("a", "i4")]), "dtype"),
        (np.longdouble(1.25), "longdouble|float128"),
        (np.ma.masked_array([1]), "MaskedArray"),
        ([torch.zeros(2, 2).to_sparse()], r"extra\[0\]: a torch\.sparse_coo tensor"),
        ([torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)], "quantized"),
        ([torch.zeros(2, device="meta")], "meta"),
        ([torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])], "nested"),
        ({"__sm_tiered__": "bytes"}, "reserved"),
        (random.Random(1), "random.Random"),
        (torch.Generator(), "Generator"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else type(value).__name__,
)
def test_what_only_a_pickle_could_store_is_refused_by_name(value: Any, words: str) -> None:
    with pytest.raises(UnsafeValueError, match=words):
        dump_value("extra", value, allow_pickle=False)


def test_the_message_says_what_to_do() -> None:
    with pytest.raises(UnsafeValueError, match="Remove it or set allow_pickle: true"):
        dump_value("extra.fn", [Opaque()], allow_pickle=False)


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_cycles_and_bottomless_nesting_are_refused(allow_pickle: bool) -> None:
    cycle: list[Any] = [1]
    cycle.append({"again": cycle})
    with pytest.raises(UnsafeValueError, match=r"extra\[1\]\['again'\]: contains itself"):
        dump_value("extra", cycle, allow_pickle=allow_pickle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnsafeValueError, match="nested too deeply"):
        dump_value("extra", deep, allow_pickle=allow_pickle)


def test_with_allow_pickle_anything_that_pickles_is_stored_and_what_does_not_is_named() -> None:
    back = returned({"p": pathlib.PurePosixPath("/x"), "n": np.arange(3)}, allow_pickle=True)
    assert back["p"] == pathlib.PurePosixPath("/x")
    assert alike(back["n"], np.arange(3))
    with pytest.raises(UnsafeValueError, match=r"extra\['f'\]: function can't be stored, not even by a pickle"):
        dump_value("extra", {"f": lambda: 0}, allow_pickle=True)


def test_a_stored_pickle_is_refused_on_load_unless_allowed() -> None:
    data = dump_value("extra", pathlib.PurePosixPath("/x"), allow_pickle=True)
    with pytest.raises(MismatchError, match="allow_pickle: true"):
        load_value(data, allow_pickle=False, what="extra")
    assert load_value(data, allow_pickle=True, what="extra") == pathlib.PurePosixPath("/x")


def test_types_that_the_user_declared_safe_are_stored() -> None:
    with torch.serialization.safe_globals([datetime.timedelta]):
        assert returned([datetime.timedelta(3)]) == [datetime.timedelta(3)]
    with pytest.raises(UnsafeValueError):
        dump_value("extra", [datetime.timedelta(3)], allow_pickle=False)


def test_a_module_state_dict_with_its_metadata_is_plain() -> None:
    state: Any = torch.nn.BatchNorm1d(2).state_dict()
    assert alike(dict(returned(state)), dict(state))


class Bomb:
    def __init__(self, call: Callable[..., object], *args: object) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.args


class Builder(dict[str, object]):
    def __reduce__(self) -> Any:
        return dict, (), None, None, iter([("x", Bomb(exec, "raise SystemExit"))])


def zipped(pickled: bytes) -> bytes:
    """The pickle in the place of that of a stream of torch's."""
    stream, out = io.BytesIO(), io.BytesIO()
    torch.save([1], stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))
    return out.getvalue()


def hostile(sentinel: pathlib.Path) -> dict[str, bytes]:
    touch = f"open({str(sentinel)!r}, 'w').close()"
    raw = b"cos\nsystem\n(S'touch " + str(sentinel).encode() + b"'\ntR."
    return {
        "os.system": zipped(pickle.dumps(Bomb(os.system, f"touch {sentinel}"), protocol=2)),
        "exec nested": zipped(pickle.dumps({"a": [Bomb(exec, touch)]}, protocol=2)),
        "eval, protocol 4": zipped(pickle.dumps(Bomb(eval, touch), protocol=4)),
        "subprocess": zipped(pickle.dumps(Bomb(subprocess.call, ["touch", str(sentinel)]), protocol=2)),
        "dict items": zipped(pickle.dumps(Builder(), protocol=2)),
        "getattr chain": zipped(pickle.dumps(Bomb(getattr, "x", "upper"), protocol=2)),
        "bare pickle": raw,
        "torch legacy": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + raw,
        "opcode by hand": zipped(raw),
        "numpy reconstruct": zipped(pickle.dumps(np.array([Bomb(exec, touch)], dtype=object), protocol=2)),
    }


def test_hostile_bytes_never_run(tmp_path: pathlib.Path) -> None:
    sentinel = tmp_path / "ran"
    for name, data in hostile(sentinel).items():
        with pytest.raises((MismatchError, CorruptPartError)):
            load_value(data, allow_pickle=False, what=name)
        assert not sentinel.exists(), name


def test_the_hostile_bytes_would_have_run_with_a_plain_pickle(tmp_path: pathlib.Path) -> None:
    sentinel = tmp_path / "ran"
    load_value(hostile(sentinel)["exec nested"], allow_pickle=True, what="v")
    assert sentinel.exists()


@pytest.mark.parametrize(
    "mark",
    [
        {"__sm_tiered__": "array", "dtype": "O", "shape": [1], "data": torch.zeros(8, dtype=torch.uint8)},
        {"__sm_tiered__": "array", "dtype": "<i8", "shape": [1 << 40], "data": torch.zeros(8, dtype=torch.uint8)},
        {"__sm_tiered__": "array", "dtype": "<i8", "shape": [-1, -1], "data": torch.zeros(8, dtype=torch.uint8)},
        {"__sm_tiered__": "array", "dtype": "i4,O", "shape": [1], "data": torch.zeros(12, dtype=torch.uint8)},
        {"__sm_tiered__": "array", "dtype": "nonsense", "shape": [1], "data": torch.zeros(8)},
        {"__sm_tiered__": "array", "dtype": "<i8", "shape": 3, "data": torch.zeros(8)},
        {"__sm_tiered__": "array", "dtype": "<i8", "shape": [1], "data": "text"},
        {"__sm_tiered__": "array"},
        {"__sm_tiered__": "other", "dtype": "<i8", "shape": [1], "data": torch.zeros(1, dtype=torch.int64)},
        {"__sm_tiered__": ["list"]},
        {"__sm_tiered__": "array", "dtype": "<i8", "shape": [1 << 50], "data": torch.zeros(1).long().expand(1 << 50)},
        {"__sm_tiered__": "array", "dtype": "<f4", "shape": [2], "data": torch.zeros(2, device="meta")},
    ],
)
def test_a_forged_mark_is_damage(mark: dict[str, Any]) -> None:
    stream = io.BytesIO()
    torch.save([mark], stream)
    with pytest.raises(CorruptPartError):
        load_value(stream.getvalue(), allow_pickle=False, what="v")


def test_torchs_old_format_is_not_even_tried() -> None:
    stream = io.BytesIO()
    torch.save([1], stream, _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptPartError, match="no stored value"):
        load_value(stream.getvalue(), allow_pickle=True, what="v")


def test_a_forged_cycle_is_damage() -> None:
    cycle: list[Any] = [{"__sm_tiered__": "bytes"}]
    cycle.append(cycle)
    stream = io.BytesIO()
    torch.save(cycle, stream)
    with pytest.raises(CorruptPartError):
        load_value(stream.getvalue(), allow_pickle=False, what="v")


def test_damaged_bytes_end_in_a_typed_error_or_a_value() -> None:
    data = dump_value("v", {"a": [1, "x", torch.arange(4)], "n": np.arange(3)}, allow_pickle=False)
    shuffle = random.Random(1)
    for _ in range(300):
        bad = bytearray(data)
        bad[shuffle.randrange(len(bad))] ^= 1 << shuffle.randrange(8)
        del bad[shuffle.choice([len(bad), shuffle.randrange(len(bad))]) :]
        with contextlib.suppress(CorruptPartError, MismatchError):
            load_value(bad, allow_pickle=False, what="v")


def test_equal_values_have_equal_fingerprints_whatever_they_are_made_of() -> None:
    shared = [1.5, "x"]
    a: dict[str, Any] = {
        "a": [shared, shared],
        "b": np.arange(3),
        "t": torch.ones(2, 2),
        "s": {1, 2, "x"},
        "p": pathlib.PurePath("x"),
    }
    b: dict[str, Any] = {
        "p": pathlib.PurePath("x"),
        "s": {"x", 2, 1},
        "t": torch.ones(4, 1).reshape(2, 2),
        "b": np.arange(6)[:3],
    }
    b["a"] = [[1.5, "".join(["x"])], [1.5, "x"]]
    a["q"], b["q"] = collections.deque([shared, shared]), collections.deque([[1.5, "x"], [1.5, "x"]])
    assert fingerprint(a) == fingerprint(b)
    assert 0 <= fingerprint(a) < 2**63


def test_different_values_have_different_fingerprints() -> None:
    different: list[Any] = [
        *(None, True, False, 1, 0, 1.0, 0.0, -0.0, float("nan"), "1", b"1", bytearray(b"1"), [], (), {}, set[int]()),
        *([1], [[1]], [1, 2], [2, 1], (1, 2), [1, [2]], [[1], 2], ["12"], ["1", "2"], {"a": 1}, {"a": "1"}, {1: "a"}),
        *(torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).double(), torch.tensor([0.0, -0.0]), 2**70, -(2**70)),
        *(np.zeros(2), np.zeros(2, "f4"), np.float64(0), np.array(0.0), np.array([0.0]), Point(1, 2), {1, 2}),
        *(frozenset({1, 2}), OrderedDict(a=1), Counter("a"), 10**5000, pathlib.PurePath("x"), "\ud800"),
        *(OrderedDict([("a", 1), ("b", 2)]), OrderedDict([("b", 2), ("a", 1)])),
    ]
    assert len({fingerprint(value) for value in different}) == len(different)


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    value = {"b": {"x", "yy", "zzz"}, "a": [1, 2.5, None, b"x", (True,)], "p": pathlib.PurePosixPath("/x")}
    code = (
        "import pathlib; from sm_tiered_dcp.values import fingerprint; print(fingerprint("
        "{'a': [1, 2.5, None, b'x', (True,)], 'b': {'zzz', 'x', 'yy'}, 'p': pathlib.PurePosixPath('/x')}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50, env=ENVIRONMENT
    )
    assert int(done.stdout) == fingerprint(value)


def test_a_fingerprint_of_a_cycle_ends() -> None:
    def cycle() -> list[Any]:
        made: list[Any] = [1]
        made.append(made)
        return made

    assert fingerprint(cycle()) == fingerprint(cycle())


def test_the_longest_int_is_where_safe_loading_ends() -> None:
    longest = (1 << proofs.LONGEST_INT_BITS) - 1
    assert returned([longest, -longest]) == [longest, -longest]
    with pytest.raises(UnsafeValueError):
        dump_value("v", longest + 1, allow_pickle=False)
