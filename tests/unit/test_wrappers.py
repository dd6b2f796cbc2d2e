"""Retries by type and within a budget, lost answers found out, deadlines that hold, faults where they were planned."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sm_tiered import deadline
from sm_tiered.errors import CorruptPartError, KeyExistsError, KeyNotFoundError, TierRefusedError, TierUnavailableError
from sm_tiered.manifest import MAX_BYTES
from sm_tiered.testing.contract import TierContract, chunked, payload
from sm_tiered.testing.faults import Fault, FaultPlan, FaultyTier, Kind
from sm_tiered.tiers import Blob, Chunks, Entry, Tier, wrappers
from sm_tiered.tiers.wrappers import MeteredTier, Retry, RetryingTier


class DictTier:
    """The smallest tier there is."""

    name = "dict"

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._lock, self._serial = threading.Lock(), 0

    def list(self, prefix: str) -> list[Entry]:
        found = sorted(key for key in self.objects if key.startswith(prefix))
        return [Entry(key=key, size=len(self.objects[key][0]), modified_at=time.time()) for key in found]

    def list_dirs(self, prefix: str) -> list[str]:
        return sorted(
            {k[len(prefix) :].split("/")[0] for k in self.objects if k.startswith(prefix) and "/" in k[len(prefix) :]}
        )

    def get(self, key: str, *, max_bytes: int = MAX_BYTES) -> Blob:
        if key not in self.objects:
            raise KeyNotFoundError("missing", key=key)
        data, version = self.objects[key]
        if len(data) > max_bytes:
            raise CorruptPartError("too long", key=key)
        return Blob(data=data, version=version)

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        data = self.get(key).data
        if offset + len(buffer) > len(data):
            raise CorruptPartError("too short", key=key)
        buffer[:] = data[offset : offset + len(buffer)]

    def put(self, key: str, data: bytes) -> None:
        self._serial += 1
        self.objects[key] = data, str(self._serial)

    def put_if_absent(self, key: str, data: bytes) -> None:
        with self._lock:
            if key in self.objects:
                raise KeyExistsError("second", key=key)
            self.put(key, data)

    def replace(self, key: str, data: bytes, *, version: str) -> None:
        if self.get(key).version != version:
            raise KeyExistsError("another version", key=key)
        self.put(key, data)

    def put_part(self, key: str, chunks: Chunks, size: int) -> None:
        data = b"".join(bytes(chunk) for chunk in chunks())
        if len(data) != size:
            raise CorruptPartError("another length", key=key)
        self.put(key, data)

    def delete(self, keys: Iterator[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def probe(self) -> None:
        self.put(".probe", b"")
        self.delete(iter([".probe"]))

    def close(self) -> None:
        return


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_FIRST_WAIT_SECS", 0.001)


def rig(*faults: Fault, attempts: int = 4, deadline_secs: float = 5.0) -> tuple[RetryingTier, DictTier, FaultPlan]:
    inner, plan = DictTier(), FaultPlan(faults=faults)
    tier: Tier = FaultyTier(inner, plan)  # type: ignore[arg-type]
    return RetryingTier(tier, attempts=attempts, deadline_secs=deadline_secs), inner, plan


class TestWrappedDictTier(TierContract):
    """Wrappers that have nothing to do change nothing."""

    @pytest.fixture
    def tier(self) -> Tier:
        return RetryingTier(MeteredTier(FaultyTier(DictTier())))  # type: ignore[arg-type]


OPERATIONS: dict[str, Callable[[Tier], object]] = {
    "list": lambda tier: tier.list(""),
    "list_dirs": lambda tier: tier.list_dirs(""),
    "get": lambda tier: tier.get("k"),
    "read_into": lambda tier: tier.read_into("k", 0, memoryview(bytearray(3))),
    "put": lambda tier: tier.put("new", b"x"),
    "put_if_absent": lambda tier: tier.put_if_absent("new", b"x"),
    "replace": lambda tier: tier.replace("k", b"y", version="1"),
    "put_part": lambda tier: tier.put_part("new", chunked(b"abc"), 3),
    "delete": lambda tier: tier.delete(iter(["k"])),
    "probe": lambda tier: tier.probe(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("kind", "times"), [("fail", 2), ("ack_lost", 1)])
def test_every_operation_is_repeated_until_it_is_done(operation: str, kind: Kind, times: int) -> None:
    told: list[Retry] = []
    tier, inner, plan = rig(Fault(kind=kind, operations=frozenset({operation}), times=times))
    inner.put("k", b"old")
    tier = RetryingTier(tier.inner, attempts=3, deadline_secs=5.0, on_retry=told.append)
    OPERATIONS[operation](tier)
    assert len(plan.fired) == times
    assert [(retry.operation, retry.tries) for retry in told] == [(operation, n + 1) for n in range(times)]
    expected = {"put": b"x", "put_if_absent": b"x", "put_part": b"abc"}
    assert inner.objects.get("new", (None,))[0] == expected.get(operation)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("error", [TierRefusedError, CorruptPartError, KeyNotFoundError, ZeroDivisionError])
def test_what_a_retry_would_not_change_is_not_repeated(operation: str, error: type[Exception]) -> None:
    tier, inner, plan = rig(Fault(operations=frozenset({operation}), times=99, error=lambda: error("no")))
    inner.put("k", b"old")
    with pytest.raises(error):
        OPERATIONS[operation](tier)
    assert len(plan.calls) == 1


def test_it_gives_up_after_so_many_tries_and_says_so() -> None:
    tier, _, plan = rig(Fault(times=99), attempts=3)
    with pytest.raises(TierUnavailableError, match=r"injected fault; gave up after 3 tries in 0\.\d s") as caught:
        tier.put("k", b"x")
    assert len(plan.calls) == 3
    assert isinstance(caught.value.__cause__, TierUnavailableError)


def test_no_try_begins_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrappers, "_FIRST_WAIT_SECS", 0.2)
    tier, _, _ = rig(Fault(times=10_000), attempts=10_000, deadline_secs=0.5)
    began = time.monotonic()
    with pytest.raises(TierUnavailableError):
        tier.put("k", b"x")
    assert time.monotonic() - began < 0.7


def test_a_lost_answer_to_a_commit_that_another_made_is_no_success() -> None:
    tier, inner, _ = rig(Fault(kind="fail", operations=frozenset({"put_if_absent"})))
    inner.put("manifest", b"theirs")
    with pytest.raises(KeyExistsError):
        tier.put_if_absent("manifest", b"mine")
    assert inner.get("manifest").data == b"theirs"


def test_the_same_bytes_without_a_lost_answer_are_no_success() -> None:
    tier, inner, _ = rig()
    inner.put("manifest", b"same")
    with pytest.raises(KeyExistsError):
        tier.put_if_absent("manifest", b"same")


def test_a_longer_object_after_a_lost_answer_is_another() -> None:
    tier, inner, _ = rig(Fault(operations=frozenset({"put_if_absent"})))
    inner.put("manifest", b"mine and more")
    with pytest.raises(KeyExistsError):
        tier.put_if_absent("manifest", b"mine")


def test_a_source_is_begun_again_for_each_try() -> None:
    tier, inner, _ = rig(Fault(kind="midway", times=2))
    data = payload(100_000)
    tier.put_part("p", chunked(data, 1000), len(data))
    assert inner.get("p").data == data


def test_metering_counts_calls_bytes_and_errors() -> None:
    tier = MeteredTier(DictTier())  # type: ignore[arg-type]
    tier.put("k", b"12345")
    tier.get("k")
    tier.read_into("k", 0, memoryview(bytearray(2)))
    tier.put_part("p", chunked(b"abc"), 3)
    with pytest.raises(KeyNotFoundError):
        tier.get("missing")
    counts = tier.counts
    assert {name: (c.calls, c.bytes, c.errors) for name, c in counts.items()} == {
        "put": (1, 5, 0),
        "get": (2, 5, 1),
        "read_into": (1, 2, 0),
        "put_part": (1, 3, 0),
    }
    assert all(count.secs >= 0 for count in counts.values())


@pytest.mark.parametrize(("kind", "expected"), [("flip", b"12\x32"), ("truncate", b"12"), ("silent", b"")])
def test_a_planned_read_fault_changes_what_is_got(kind: Kind, expected: bytes) -> None:
    tier = FaultyTier(DictTier(), FaultPlan.at_call(2, kind, "get"))  # type: ignore[arg-type]
    tier.put("k", b"123")
    assert tier.get("k").data == b"123"
    assert tier.get("k").data == expected
    assert tier.get("k").data == b"123"
    assert tier.plan.fired == [("get", "k")]


def test_a_planned_fault_changes_what_is_read_into_memory() -> None:
    tier = FaultyTier(DictTier(), FaultPlan(faults=(Fault(kind="flip"), Fault(kind="truncate", first=2))))  # type: ignore[arg-type]
    tier.put("k", b"123")
    buffer = bytearray(3)
    tier.read_into("k", 0, memoryview(buffer))
    assert buffer == b"122"
    with pytest.raises(CorruptPartError):
        tier.read_into("k", 0, memoryview(buffer))


@pytest.mark.parametrize("operation", ["put", "put_if_absent", "put_part"])
def test_a_silent_fault_writes_nothing(operation: str) -> None:
    inner = DictTier()
    OPERATIONS[operation](FaultyTier(inner, FaultPlan.at_call(1, "silent")))  # type: ignore[arg-type]
    assert inner.objects == {}


def test_a_plan_loops_until_nothing_fires() -> None:
    for number in range(1, 10):
        tier = FaultyTier(DictTier(), FaultPlan.at_call(number))  # type: ignore[arg-type]
        try:
            tier.put("a", b"")
            tier.put("b", b"")
            tier.list("")
        except TierUnavailableError:
            continue
        assert number == 4
        return


def test_a_call_that_never_ends_is_waited_for_no_longer_than_allowed() -> None:
    hold = threading.Event()
    task = deadline.Task(lambda: hold.wait(20))
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        task.result(0.1)
    assert time.monotonic() - began < 1
    hold.set()
    assert task.wait(5)


def test_a_process_waits_a_moment_for_calls_under_way_before_it_ends() -> None:
    code = (
        "import os, time; from sm_tiered import deadline; "
        "deadline.Task(lambda: (time.sleep(0.5), os.write(1, b'ended')))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=30, check=True)
    assert ended.stdout == b"ended"


def test_deadlines_nest_and_the_earlier_one_holds() -> None:
    assert deadline.remaining(7.0) == 7.0
    with deadline.within(5.0):
        with deadline.within(1.0):
            assert 0.5 < deadline.remaining(7.0) <= 1.0
        with deadline.within(50.0):
            assert 4.0 < deadline.remaining(7.0) <= 5.0
        assert deadline.remaining(2.0) == 2.0
    assert deadline.remaining(7.0) == 7.0


def test_a_task_keeps_nothing_alive() -> None:
    import gc
    import weakref

    class Thing:
        pass

    thing = Thing()
    watched = weakref.ref(thing)

    def fail(held: Thing) -> None:
        raise ValueError(held.__class__.__name__)

    with pytest.raises(ValueError, match="Thing"):
        deadline.run(lambda held=thing: fail(held), 5.0)
    del thing
    gc.collect()
    assert watched() is None
