"""Reading a service without ranges: in order a share comes once, and memory never holds one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from sm_tiered import layout
from sm_tiered.errors import CorruptPartError
from sm_tiered.testing.daemon import DaemonFault, StandInDaemon
from sm_tiered.tiers.hyperpod import HyperPodTier
from sm_tiered.tiers.hyperpod_service import Slot
from tests.unit.children import in_child
from tests.unit.hyperpod_serving import daemon_in_child
from tests.unit.hyperpod_sharing import FIRST, MIB, WIRE, at, bare, data_of, read, save

NAME = "__0_0.distcp"
SIZE = 20 * MIB + 5
HERE = at(FIRST, 10)

_PUT = """
import sys
from sm_tiered.part_reading import open_verified
from sm_tiered.checksum import CHUNK_BYTES, digest
from sm_tiered.manifest import record_to_json
from sm_tiered.records import Part, Record
from sm_tiered.tiers.shares import Share
from tests.unit.hyperpod_sharing import FIRST, at, bare

piece = memoryview(bytearray(range(256)) * (CHUNK_BYTES // 256))
part = Part(name="__0_0.distcp", size=32 * CHUNK_BYTES, chunks=(digest(piece),) * 32)
record = record_to_json(Record(namespace="run", checkpoint=at(FIRST, 10), rank=0, world=1, saved_at=1.0, parts=(part,)))
share = Share(
    checkpoint=at(FIRST, 10), rank=0, world=1, record=record, parts=((part, lambda: (piece for _ in range(32))),)
)
"""
_GROWN = """
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
tier, before = bare(sys.argv[1]), held()
{act}
print(held() - before)
tier.close()
"""


@pytest.fixture
def tier(daemon: StandInDaemon) -> Iterator[HyperPodTier]:
    tier = bare(daemon.url)
    save(tier, HERE, 1, SIZE, 50)
    read(tier, HERE, NAME, 1)
    tier.close()
    daemon.restart()
    yield tier
    tier.close()


def asked(daemon: StandInDaemon) -> int:
    return sum(request.path.endswith("/0/10000000010") for request in daemon.requests)


def test_in_order_a_share_is_asked_for_once(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    whole, found = data_of(10, 0, 0, SIZE), bytearray()
    found += read(tier, HERE, "__0_1.distcp", 50)
    for offset in range(0, SIZE, 3 * MIB):
        found += read(tier, HERE, NAME, min(3 * MIB, SIZE - offset), offset)
    assert found == data_of(10, 0, 1, 50) + whole
    assert asked(daemon) == 1


@pytest.mark.parametrize("record_first", [True, False])
def test_who_looks_at_a_share_and_then_reads_it_asks_for_it_once(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier, record_first: bool
) -> None:
    """As a restore does: rank 0 reads the records first, the others their own shares at once."""
    if record_first:
        other.get(layout.in_dir(HERE, layout.record_name(0)))
    assert other.reach(layout.in_dir(HERE, NAME)) > SIZE
    assert read(other, HERE, "__0_1.distcp", 50) == data_of(10, 0, 1, 50)
    assert read(other, HERE, NAME, SIZE) == data_of(10, 0, 0, SIZE)
    assert asked(daemon) == 1


def test_what_was_looked_at_is_not_held_open_when_something_else_is_asked(
    tier: HyperPodTier, other: HyperPodTier
) -> None:
    """The service would hold a whole share for nobody."""
    for call in (
        lambda: other.list("attempts/"),
        lambda: other.list_dirs(""),
        lambda: other.confirm(HERE),
        lambda: other.drop(at(FIRST, 99)),
    ):
        other._index.slots.forget(Slot(namespace="run", rank=0, wire=WIRE + 10))
        other.get(layout.in_dir(HERE, layout.record_name(0)))
        cursors = [cursor for cursor in other._reader._cursors.values() if cursor._body is not None]
        call()
        assert len(cursors) == 1
        assert cursors[0]._body is None
    assert read(other, HERE, NAME, 9, 5) == data_of(10, 0, 0, SIZE)[5:14]
    (cursor,) = other._reader._cursors.values()
    assert cursor._file is None, "nothing was read of it before"


def test_what_is_being_read_goes_on_when_something_else_is_asked(
    daemon: StandInDaemon, tier: HyperPodTier, other: HyperPodTier
) -> None:
    assert read(other, HERE, NAME, 9, 5) == data_of(10, 0, 0, SIZE)[5:14]
    other.list("attempts/")
    (cursor,) = other._reader._cursors.values()
    before = cursor._body
    other._index.slots.forget(Slot(namespace="run", rank=0, wire=WIRE + 10))
    other.get(layout.in_dir(HERE, layout.record_name(0)))
    assert cursor._body is before is not None
    assert read(other, HERE, NAME, 9, 50) == data_of(10, 0, 0, SIZE)[50:59]
    assert asked(daemon) == 2


def test_forward_with_gaps_a_share_is_asked_for_once(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    whole = data_of(10, 0, 0, SIZE)
    for offset in (5, MIB, 8 * MIB - 1, 17 * MIB, SIZE - 9):
        assert read(tier, HERE, NAME, 9, offset) == whole[offset : offset + 9]
    assert asked(daemon) == 1


def test_back_and_forth_a_share_is_received_a_few_times_at_most(
    daemon: StandInDaemon, tier: HyperPodTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: made.append(given) or real(**given))
    whole = data_of(10, 0, 0, SIZE)
    for turn in range(40):
        offset = (SIZE - 9 - turn) if turn % 2 else turn
        assert read(tier, HERE, NAME, 9, offset) == whole[offset : offset + 9]
    assert len(made) == 1
    assert asked(daemon) < 10


def test_without_room_for_a_file_it_still_reads(
    daemon: StandInDaemon, tier: HyperPodTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    whole = data_of(10, 0, 0, SIZE)
    for turn in range(10):
        offset = (SIZE - 9 - turn) if turn % 2 else turn
        assert read(tier, HERE, NAME, 9, offset) == whole[offset : offset + 9]


def test_threads_share_a_cursor_and_do_not_mix(tier: HyperPodTier) -> None:
    whole = data_of(10, 0, 0, SIZE)

    def one(index: int) -> bool:
        offset = (index * 7_000_003) % (SIZE - 50_000)
        return read(tier, HERE, NAME, 50_000, offset) == whole[offset : offset + 50_000]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(24)))


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE + 1), (SIZE, 1), (SIZE + 5, 0), (SIZE - 1, 2)])
def test_reading_past_the_end_is_damage(tier: HyperPodTier, offset: int, length: int) -> None:
    with pytest.raises(CorruptPartError):
        read(tier, HERE, NAME, length, offset)


def test_a_share_that_shrank_is_found_while_it_is_read(daemon: StandInDaemon, tier: HyperPodTier) -> None:
    read(tier, HERE, "__0_1.distcp", 50)
    tier._reader.close()  # what was learnt of it stays
    daemon.restart(DaemonFault(kind="cut", path=r"/0/10000000010$", at=MIB))
    with pytest.raises(CorruptPartError, match="1048576 bytes long"):
        read(tier, HERE, NAME, 100, 5 * MIB)


def test_a_forked_child_has_connections_of_its_own(tier: HyperPodTier) -> None:
    whole = data_of(10, 0, 0, SIZE)
    assert read(tier, HERE, NAME, 100) == whole[:100]

    def child() -> None:
        assert read(tier, HERE, NAME, 9 * MIB, 100) == whole[100 : 100 + 9 * MIB]

    assert in_child(child) == 0
    assert read(tier, HERE, NAME, SIZE - 100, 100) == whole[100:]


@pytest.mark.parametrize("shares", [4, 5, 8])
def test_shares_read_in_turn_are_each_asked_for_twice_at_most(daemon: StandInDaemon, shares: int) -> None:
    """Only a few are received at once: what was left in the middle goes to a file when it is read again."""
    writer, reader = bare(daemon.url), bare(daemon.url)
    save(writer, HERE, shares, 6 * MIB)
    for rank in range(shares):
        read(reader, HERE, f"__{rank}_0.distcp", 1)
    reader.close()
    daemon.restart()
    for offset in range(0, 6 * MIB, MIB):
        for rank in range(shares):
            assert (
                read(reader, HERE, f"__{rank}_0.distcp", MIB, offset)
                == data_of(10, rank, 0, 6 * MIB)[offset : offset + MIB]
            )
    opened = [request.path for request in daemon.requests if request.path.endswith("/10000000010")]
    assert len(opened) <= (1 if shares <= 4 else 2) * shares
    writer.close()
    reader.close()


def test_a_share_that_was_read_to_its_end_leaves_no_connection(tier: HyperPodTier) -> None:
    read(tier, HERE, NAME, SIZE - 1)
    (cursor,) = tier._reader._cursors.values()
    assert cursor._body is not None
    assert read(tier, HERE, NAME, 1, SIZE - 1) == data_of(10, 0, 0, SIZE)[-1:]
    assert cursor._body is None


def _grown(url: str, act: str) -> int:
    """Return how many KiB a child's memory grew by."""
    program = _PUT + _GROWN.format(act=act)
    done = subprocess.run(
        [sys.executable, "-c", program, url], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_256_mib_are_sent_and_read_in_less_than_64_mib_of_memory() -> None:
    with daemon_in_child() as url:
        assert _grown(url, "tier.put_share(share)") < 64 * 1024
        reading = """
with open_verified(tier, at(FIRST, 10), part) as chunks:
    assert sum(map(len, chunks())) == part.size
"""
        assert _grown(url, reading) < 64 * 1024
