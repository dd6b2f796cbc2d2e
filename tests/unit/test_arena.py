"""The arena: files stay mapped and are recycled, and nothing that somebody still needs is ever overwritten."""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import shutil
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sm_tiered import crashpoints, layout
from sm_tiered.errors import KeyNotFoundError, TierError, TierFullError, TierRefusedError, TierUnavailableError
from sm_tiered.policies.keep import Latest
from sm_tiered.records import Attempt, CheckpointId
from sm_tiered.settings import MemorySettings
from sm_tiered.tiers.arena import Arena, Slot
from sm_tiered.tiers.memory import MemoryTier
from tests.unit.children import in_child

ATTEMPT = Attempt(ordinal=1, utc_secs=1700000000, nonce="0123abcd")
SIZE = 256 * 1024
PART = "__0_0.distcp"


def at(step: int) -> CheckpointId:
    return CheckpointId(attempt=ATTEMPT, step=step)


def open_memory(path: Path) -> MemoryTier:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=2), path=str(path), budget_bytes=None, allow_disk=True
    )
    return MemoryTier(settings, "run")


@pytest.fixture
def memory(memory_dir: Path) -> MemoryTier:
    return open_memory(memory_dir)


@pytest.fixture
def arena(memory: MemoryTier) -> Iterator[Arena]:
    arena = Arena(memory, rank=0)
    yield arena
    arena.close()


@pytest.fixture
def small(make_tmpfs: Callable[[str, int], Path]) -> MemoryTier:
    """A tier on a tmpfs of 4 MiB."""
    return open_memory(make_tmpfs("small", 4) / "private")


def take(arena: Arena, size: int = SIZE, releasable: tuple[int, ...] = (), limit: int = 4) -> Slot:
    slot = arena.take(size, [at(step) for step in releasable], limit)
    assert slot is not None
    return slot


def fill(slot: Slot, value: int) -> None:
    slot.buffer[:] = bytes([value]) * slot.size


def save(
    memory: MemoryTier,
    arena: Arena,
    step: int,
    releasable: tuple[int, ...] = (),
    *,
    size: int = SIZE,
    limit: int = 4,
    rank: int = 0,
) -> Slot:
    """What a trainer does: take, fill with the step's number, publish, record."""
    slot = take(arena, size, releasable, limit)
    fill(slot, step % 251)
    arena.publish(slot, at(step), layout.part_name(rank, 0))
    memory.put(layout.in_dir(at(step), layout.part_name(rank, 1)), b"small")
    memory.put(layout.in_dir(at(step), layout.record_name(rank)), b"{}")
    return slot


def part_of(memory: MemoryTier, step: int, rank: int = 0) -> Path:
    return memory.root / layout.in_dir(at(step), layout.part_name(rank, 0))


def is_whole(memory: MemoryTier, step: int, size: int = SIZE) -> bool:
    return part_of(memory, step).read_bytes() == bytes([step % 251]) * size


def steps_with_record(memory: MemoryTier) -> list[int]:
    return [step for step in range(50) if (part_of(memory, step).parent / layout.record_name(0)).exists()]


def hidden(memory: MemoryTier) -> list[str]:
    return os.listdir(memory.root / layout.ARENA)


# ---- the life of a file


def test_a_published_part_stands_in_the_steps_directory_with_its_bytes(memory: MemoryTier, arena: Arena) -> None:
    slot = save(memory, arena, 7)
    assert slot.size == len(slot.buffer) == SIZE
    assert is_whole(memory, 7)
    assert arena.published() == [at(7)]
    assert hidden(memory) == []
    assert stat.S_IMODE(part_of(memory, 7).stat().st_mode) == 0o600
    assert stat.S_IMODE(part_of(memory, 7).parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_modes_do_not_depend_on_the_umask(memory: MemoryTier, arena: Arena, umask: int) -> None:
    old = os.umask(umask)
    try:
        save(memory, arena, 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE(part_of(memory, 1).stat().st_mode) == 0o600
    assert stat.S_IMODE(part_of(memory, 1).parent.stat().st_mode) == 0o700


def test_a_recycled_file_keeps_mapping_cache_and_inode(memory: MemoryTier, arena: Arena) -> None:
    first = save(memory, arena, 1, limit=1)
    first.cache["headers"] = "stand"
    buffer, inode = first.buffer, part_of(memory, 1).stat().st_ino
    again = save(memory, arena, 2, releasable=(1,), limit=1)
    assert again is first
    assert again.buffer is buffer
    assert again.cache == {"headers": "stand"}
    assert part_of(memory, 2).stat().st_ino == inode
    assert is_whole(memory, 2)


def test_recycling_takes_the_whole_share_of_the_rank_away_and_nothing_of_others(
    memory: MemoryTier, arena: Arena
) -> None:
    save(memory, arena, 1)
    for name in (".metadata", "index.json", "__1_0.distcp", "__10_1.distcp", "record-00001.json", "users.txt"):
        memory.put(layout.in_dir(at(1), name), b"x")
    save(memory, arena, 2, releasable=(1,), limit=1)
    left = sorted(os.listdir(part_of(memory, 1).parent))
    assert left == ["__10_1.distcp", "__1_0.distcp", "record-00001.json", "users.txt"]


def test_the_directory_of_a_recycled_step_disappears_when_it_is_empty(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1)
    save(memory, arena, 2, releasable=(1,), limit=1)
    assert not part_of(memory, 1).parent.exists()


def test_free_files_come_first_then_new_ones_then_the_oldest_releasable(memory: MemoryTier, arena: Arena) -> None:
    spare = take(arena)
    other = take(arena)
    arena.release(spare)
    assert take(arena, releasable=()) is spare
    arena.release(spare)
    arena.release(other)
    for step in (1, 2, 3):
        save(memory, arena, step)
    assert len(hidden(memory)) == 0
    assert save(memory, arena, 4, releasable=(1, 2, 3)) is not spare  # the fourth of four is new
    save(memory, arena, 5, releasable=(3, 1, 2))
    assert steps_with_record(memory) == [2, 3, 4, 5]


def test_without_a_free_or_releasable_file_there_is_none(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2):
        save(memory, arena, step, limit=2)
    assert not arena.can_take(SIZE, [], 2)
    assert arena.take(SIZE, [], 2) is None
    assert arena.can_take(SIZE, [at(1)], 2)
    assert is_whole(memory, 1)
    assert steps_with_record(memory) == [1, 2]


def test_a_released_file_is_free_and_never_appears(memory: MemoryTier, arena: Arena) -> None:
    slot = take(arena, limit=1)
    fill(slot, 9)
    assert not arena.can_take(SIZE, [], 1)
    arena.release(slot)
    arena.release(slot)  # harmless
    assert arena.can_take(SIZE, [], 1)
    assert take(arena, limit=1) is slot
    assert memory.list("") == []


def test_dropped_checkpoints_are_gone_and_their_files_used_next(memory: MemoryTier, arena: Arena) -> None:
    slots = [save(memory, arena, step) for step in (1, 2)]
    arena.drop([at(1)])
    assert arena.published() == [at(2)]
    assert steps_with_record(memory) == [2]
    assert take(arena) is slots[0]
    arena.drop([at(40)])  # never there


def test_a_part_name_builds_no_path(arena: Arena) -> None:
    with pytest.raises(Exception, match="can't be the name of a part"):
        arena.publish(take(arena), at(1), "../../escape")


def test_files_of_no_bytes_work(memory: MemoryTier, arena: Arena) -> None:
    slot = take(arena, 0)
    assert len(slot.buffer) == 0
    arena.publish(slot, at(1), PART)
    assert part_of(memory, 1).read_bytes() == b""


# ---- sizes


def test_a_size_that_changes_a_little_keeps_address_and_count_but_not_the_cache(
    memory: MemoryTier, arena: Arena
) -> None:
    slot = save(memory, arena, 1, limit=1)
    slot.cache["x"] = 1
    address = address_of(slot)
    for step, size in ((2, SIZE - 100), (3, SIZE + 5000), (4, SIZE + 9)):
        assert save(memory, arena, step, releasable=(step - 1,), size=size, limit=1) is slot
        assert slot.cache == {}
        assert slot.size == len(slot.buffer) == size
        assert is_whole(memory, step, size)
        assert address_of(slot) == address


def address_of(slot: Slot) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(slot.buffer))


def test_sizes_are_pools_of_their_own(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2):
        save(memory, arena, step, limit=2)
    replica = take(arena, 4 * SIZE, limit=2)
    arena.publish(replica, at(2), "__0_2.distcp")
    assert arena.take(SIZE, [], 2) is None
    assert arena.can_take(4 * SIZE, [], 2)


def test_two_parts_of_one_size_in_each_checkpoint_do_not_starve_each_other(memory: MemoryTier, arena: Arena) -> None:
    for step in range(1, 9):
        releasable = tuple(range(1, step - 1))
        for name in (PART, "__0_2.distcp"):
            slot = take(arena, SIZE, releasable, 3)
            fill(slot, step)
            arena.publish(slot, at(step), name)
    assert arena.allocated_bytes <= 6 * SIZE


def test_free_files_of_a_size_that_is_asked_for_no_more_are_used_up(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2):
        save(memory, arena, step)
    arena.drop([at(1), at(2)])
    for step in range(3, 20):
        save(memory, arena, step, releasable=(step - 1,), size=4 * SIZE, limit=2)
    save(memory, arena, 20, size=4 * SIZE, limit=8)
    save(memory, arena, 21, size=4 * SIZE, limit=8)
    assert hidden(memory) == []
    assert arena.allocated_bytes == 4 * 4 * SIZE


# ---- somebody reads


def test_a_part_that_is_being_read_is_left_alone_and_another_taken(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2, 3):
        save(memory, arena, step, limit=3)
    with memory.open_part(layout.in_dir(at(1), PART)) as reader:
        save(memory, arena, 4, releasable=(1, 2), limit=3)
        assert steps_with_record(memory) == [1, 3, 4]
        assert not arena.can_take(SIZE, [at(1)], 3)
        assert arena.take(SIZE, [at(1)], 3) is None
        buffer = bytearray(SIZE)
        reader.pread_into(0, memoryview(buffer))
        assert buffer == bytes([1]) * SIZE
    assert steps_with_record(memory) == [1, 3, 4]
    assert arena.can_take(SIZE, [at(1)], 3)
    save(memory, arena, 5, releasable=(1,), limit=3)


@pytest.mark.parametrize("how", ["open", "mmap"])
def test_a_stock_reader_that_knows_no_locks_is_respected_too(memory: MemoryTier, arena: Arena, how: str) -> None:
    for step in (1, 2):
        save(memory, arena, step, limit=2)
    with part_of(memory, 1).open("rb") as file:
        view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if how == "mmap" else None
        if view is not None:
            file.close()
        assert arena.take(SIZE, [at(1)], 2) is None
        save(memory, arena, 3, releasable=(1, 2), limit=2)
        assert (view[:] if view is not None else file.read()) == bytes([1]) * SIZE
        assert steps_with_record(memory) == [1, 3]
    if view is not None:
        view.close()
    assert arena.take(SIZE, [at(1)], 2) is not None


def test_a_reader_in_another_process_is_respected(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2):
        save(memory, arena, step, limit=2)
    reader = subprocess.Popen(
        ["sh", "-c", 'exec 3<"$0"; echo; read x; cat <&3', str(part_of(memory, 1))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    for step in (3, 4, 5):
        save(memory, arena, step, releasable=(1, step - 1), limit=2)
    out, _ = reader.communicate(b"\n")
    assert out == bytes([1]) * SIZE


def test_a_file_that_is_caught_by_a_reader_only_after_it_was_withdrawn_waits(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1, limit=1)
    with part_of(memory, 1).open("rb") as file:
        arena.drop([at(1)])
        assert arena.take(SIZE, [], 1) is None
        assert file.read() == bytes([1]) * SIZE
    assert arena.can_take(SIZE, [], 1)
    assert arena.take(SIZE, [], 1) is not None


def test_readers_racing_with_saves_see_whole_parts_or_none(memory: MemoryTier, arena: Arena) -> None:
    """Bytes that were read while the part is open are never those of another step."""
    stop, wrong, reads = threading.Event(), list[int](), list[int]()
    newest = [0]

    def read() -> None:
        buffer = bytearray(SIZE)
        while not stop.is_set():
            step = max(0, newest[0] - 1)
            try:
                with memory.open_part(layout.in_dir(at(step), PART)) as part:
                    part.pread_into(0, memoryview(buffer))
            except KeyNotFoundError:
                continue
            reads.append(step)
            if buffer != bytes([step % 251]) * SIZE:
                wrong.append(step)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(1, 400):
            slot = arena.take(SIZE, [at(old) for old in range(step)], 3)
            if slot is None:
                continue
            fill(slot, step % 251)
            arena.publish(slot, at(step), PART)
            newest[0] = step
            if step > 150 and len(reads) > 20:
                break
    finally:
        stop.set()
        reader.join()
    assert reads
    assert not wrong


def test_a_hard_link_of_the_user_keeps_its_bytes(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1, limit=1)
    mine = memory.root.parent / "mine"
    os.link(part_of(memory, 1), mine)
    assert arena.can_take(SIZE, [at(1)], 1)
    for step in (2, 3):
        save(memory, arena, step, releasable=(step - 1,), limit=1)
    assert mine.read_bytes() == bytes([1]) * SIZE
    assert mine.stat().st_nlink == 1
    assert steps_with_record(memory) == [3]
    assert not part_of(memory, 1).parent.exists()
    assert hidden(memory) == []


def test_asking_changes_nothing(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1, limit=1)
    for _ in range(3):
        assert arena.can_take(SIZE, [at(1)], 1)
        assert is_whole(memory, 1)
        assert steps_with_record(memory) == [1]
        with memory.open_part(layout.in_dir(at(1), PART)):
            pass


def test_a_lease_that_is_broken_by_a_reader_does_not_end_the_process(memory: MemoryTier) -> None:
    """Without F_SETSIG the kernel would send SIGIO, and that kills."""

    def race() -> None:
        arena = Arena(memory, rank=0)
        save(memory, arena, 1, limit=1)
        stop = threading.Event()

        def read() -> None:
            while not stop.is_set():
                part_of(memory, 1).read_bytes()

        reader = threading.Thread(target=read)
        reader.start()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            arena.can_take(SIZE, [at(1)], 1)
        stop.set()
        reader.join()

    assert in_child(race) == 0


# ---- another process


def test_the_next_process_takes_over_what_the_last_one_left(memory: MemoryTier) -> None:
    def first() -> None:
        arena = Arena(memory, rank=0)
        for step in (1, 2):
            save(memory, arena, step)
        take(arena)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(first) == -signal.SIGKILL
    arena = Arena(memory, rank=0)
    arena.adopt()
    assert arena.published() == [at(1), at(2)]
    assert is_whole(memory, 1)
    assert is_whole(memory, 2)
    assert len(hidden(memory)) == 1
    save(memory, arena, 3, limit=3)
    assert hidden(memory) == []
    assert arena.take(SIZE, [], 3) is None
    save(memory, arena, 4, releasable=(1,), limit=3)
    assert steps_with_record(memory) == [2, 3, 4]
    arena.close()


def test_a_rank_adopts_only_its_own_files_unless_told_otherwise(memory: MemoryTier) -> None:
    for rank in (0, 1):
        other = Arena(memory, rank=rank)
        save(memory, other, 1, rank=rank)
        other.release(take(other))
        other.close()
    arena = Arena(memory, rank=0)
    arena.adopt()
    assert arena.allocated_bytes == 2 * SIZE
    arena.close()
    arena = Arena(memory, rank=0)
    arena.adopt(also=[1])
    assert arena.allocated_bytes == 4 * SIZE
    arena.drop([at(1)])
    assert memory.list_dirs("") == []
    arena.close()


def test_a_published_part_without_a_record_is_free_for_the_next_process(memory: MemoryTier) -> None:
    first = Arena(memory, rank=0)
    fill(slot := take(first), 1)
    first.publish(slot, at(1), PART)
    first.close()
    arena = Arena(memory, rank=0)
    arena.adopt()
    assert arena.published() == []
    assert len(hidden(memory)) == 1
    arena.close()


def test_a_file_that_a_living_process_writes_is_not_adopted(memory: MemoryTier, arena: Arena) -> None:
    writing = take(arena)
    second = Arena(memory, rank=0)
    second.adopt()
    assert second.allocated_bytes == 0
    second.close()
    arena.publish(writing, at(1), PART)


def test_a_file_that_a_living_process_maps_is_not_recycled_by_another(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1, limit=1)
    second = Arena(memory, rank=0)
    second.adopt()
    assert second.published() == [at(1)]
    assert second.take(SIZE, [at(1)], 1) is None
    assert is_whole(memory, 1)
    second.close()
    assert arena.take(SIZE, [at(1)], 1) is not None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: foreign owners")
def test_links_and_foreign_files_are_not_adopted(memory: MemoryTier, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    free = memory.root / layout.ARENA
    (free / "0-00000000").symlink_to(victim)
    (free / "0-00000001").write_bytes(b"x")
    os.chown(free / "0-00000001", 65534, 65534)
    os.mkfifo(free / "0-00000002")
    (free / "0-00000003").mkdir()
    arena = Arena(memory, rank=0)
    arena.adopt()
    assert arena.allocated_bytes == 0
    save(memory, arena, 1)
    assert victim.read_bytes() == b"precious"
    arena.close()


def test_a_forked_child_can_neither_use_nor_disturb_the_arena(memory: MemoryTier, arena: Arena) -> None:
    slot = save(memory, arena, 1, limit=1)

    def child() -> None:
        assert len(slot.buffer) == 0
        for call in (
            lambda: arena.take(SIZE, [at(1)], 4),
            lambda: arena.can_take(SIZE, [at(1)], 4),
            lambda: arena.publish(slot, at(2), PART),
            lambda: arena.drop([at(1)]),
            lambda: arena.prepare(SIZE, 2),
            arena.adopt,
        ):
            with pytest.raises(TierRefusedError, match="process"):
                call()
        arena.release(slot)
        arena.close()
        gc.collect()

    assert in_child(child) == 0
    assert is_whole(memory, 1)
    assert bytes(slot.buffer) == bytes([1]) * SIZE
    with open(part_of(memory, 1), "rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    save(memory, arena, 2, releasable=(1,), limit=1)


def test_a_child_that_outlives_the_trainer_does_not_keep_its_files(memory: MemoryTier) -> None:
    """A data loader's workers live on for seconds after the trainer was killed."""
    read_end, write_end = os.pipe()

    def trainer() -> None:
        arena = Arena(memory, rank=0)
        save(memory, arena, 1)
        ready_read, ready_write = os.pipe()
        if os.fork() == 0:
            os.close(write_end)
            os.write(ready_write, b"x")
            os.read(read_end, 1)
            os._exit(0)
        os.read(ready_read, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        assert in_child(trainer) == -signal.SIGKILL
        arena = Arena(memory, rank=0)
        arena.adopt()
        assert arena.take(SIZE, [at(1)], 1) is not None
        arena.close()
    finally:
        os.close(write_end)
        os.close(read_end)


# ---- crashes


@pytest.mark.parametrize(
    "point",
    ["publish.before_rename", "publish.after_rename", "recycle.after_unpublish", "recycle.after_rename"],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_crash_at_any_point_leaves_the_kept_checkpoints_whole(memory: MemoryTier, point: str, times: int) -> None:
    def trainer() -> None:
        arena = Arena(memory, rank=0)
        for step in (1, 2):
            save(memory, arena, step, limit=3)
        crashpoints.arm(f"{point}:{times}")
        for step in range(3, 9):
            save(memory, arena, step, releasable=tuple(range(1, step - 1)), limit=3)

    assert in_child(trainer) == -signal.SIGKILL
    recorded = steps_with_record(memory)
    assert len(recorded) >= 2 - (point.startswith("recycle") and times == 0)
    for step in recorded:
        assert is_whole(memory, step)
    check_next_process(memory, recorded)


def test_a_crash_at_any_system_call_leaves_the_kept_checkpoints_whole(memory: MemoryTier) -> None:
    """Kill at the 1st, 2nd, ... audited call of three saves until they get through."""
    import sys

    for limit in range(1, 400):
        shutil.rmtree(memory.root)
        memory.make_dirs()

        def trainer(limit: int = limit) -> None:
            arena = Arena(memory, rank=0)
            for step in (1, 2, 3):
                save(memory, arena, step, limit=3)
            left = limit

            def hook(event: str, _arguments: object) -> None:
                nonlocal left
                if event.startswith(("open", "os.", "fcntl.")):
                    left -= 1
                    if left == 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            for step in (4, 5):
                save(memory, arena, step, releasable=(step - 3, step - 2), limit=3)

        ended = in_child(trainer)
        recorded = steps_with_record(memory)
        assert len(recorded) >= 2, (limit, recorded)
        assert all(is_whole(memory, step) for step in recorded), (limit, recorded)
        if limit % 5 == 0:
            check_next_process(memory, recorded)
        if ended == 0:
            assert limit > 20
            return
        assert ended == -signal.SIGKILL
    pytest.fail("never got through")


def check_next_process(memory: MemoryTier, recorded: list[int]) -> None:
    """The next process finds those checkpoints, and loses no file of the last one."""
    arena = Arena(memory, rank=0)
    arena.adopt()
    assert arena.published() == [at(step) for step in recorded]
    save(memory, arena, 40, releasable=tuple(recorded[:1]), limit=3)
    for step in [*recorded[1:], 40]:
        assert is_whole(memory, step)
    assert arena.allocated_bytes <= 4 * SIZE
    arena.close()


# ---- no room


@pytest.mark.parametrize("size", [5 * 1024 * 1024, 100 * 1024 * 1024])
def test_a_full_tmpfs_is_an_error_and_never_a_sigbus(small: MemoryTier, size: int) -> None:
    def trainer() -> None:
        arena = Arena(small, rank=0)
        save(small, arena, 1)
        assert not arena.can_take(size, [], 4)
        with pytest.raises(TierFullError, match=f"no room for {size} bytes") as caught:
            arena.take(size, [], 4)
        assert "--shm-size" in str(caught.value)
        assert is_whole(small, 1)
        assert hidden(small) == []
        save(small, arena, 2)

    assert in_child(trainer) == 0


def test_when_memory_runs_out_before_the_limit_what_is_releasable_is_recycled(small: MemoryTier) -> None:
    arena = Arena(small, rank=0)
    mib = 1024 * 1024
    for step in (1, 2, 3):
        save(small, arena, step, size=mib, limit=9)
    save(small, arena, 4, releasable=(1,), size=mib, limit=9)
    assert steps_with_record(small) == [2, 3, 4]
    with pytest.raises(TierFullError):
        arena.take(mib, [], 9)
    assert all(is_whole(small, step, mib) for step in (2, 3, 4))
    arena.close()


def test_when_memory_runs_out_what_other_sizes_have_to_spare_makes_room(small: MemoryTier) -> None:
    arena = Arena(small, rank=0)
    mib = 1024 * 1024
    for _ in range(3):
        slot = take(arena, mib)
        arena.publish(slot, at(1 + _), PART)
    arena.drop([at(1), at(2)])
    big = take(arena, 5 * mib // 2, limit=2)
    big.buffer[:] = bytes(big.size)
    assert arena.published() == [at(3)]
    arena.close()


def test_a_size_that_grows_beyond_the_room_leaves_the_file_usable(small: MemoryTier) -> None:
    arena = Arena(small, rank=0)
    size = 3500 * 1024
    arena.release(take(arena, size, limit=1))
    (small.root / "filler").write_bytes(bytes(450 * 1024))
    with pytest.raises(TierFullError):
        arena.take(size + 180 * 1024, [], 1)
    fill(take(arena, size, limit=1), 7)
    arena.close()


def test_a_directory_that_was_wiped_is_no_end(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1, limit=2)
    pending = take(arena, limit=2)
    shutil.rmtree(memory.root)
    with pytest.raises(TierUnavailableError, match="gone"):
        arena.publish(pending, at(2), PART)
    arena.release(pending)
    assert arena.can_take(SIZE, [], 1)
    save(memory, arena, 3, limit=1)
    assert is_whole(memory, 3)
    assert arena.published() == [at(3)]


def test_parts_that_somebody_deleted_do_not_count(memory: MemoryTier, arena: Arena) -> None:
    for step in (1, 2):
        save(memory, arena, step, limit=2)
    part_of(memory, 1).unlink()
    save(memory, arena, 3, limit=2)
    assert arena.published() == [at(2), at(3)]


# ---- ahead of time


def test_prepared_files_are_mapped_before_they_are_taken(memory: MemoryTier, arena: Arena) -> None:
    arena.prepare(SIZE, 3)
    assert arena.wait(20)
    assert len(hidden(memory)) == 3
    slots = [take(arena, limit=3) for _ in range(3)]
    assert arena.take(SIZE, [], 3) is None
    assert len({id(slot) for slot in slots}) == 3
    assert page_faults(slots[0]) < 8


def page_faults(slot: Slot) -> int:
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for offset in range(0, slot.size, mmap.PAGESIZE):
        slot.buffer[offset] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_take_waits_for_what_is_being_prepared(memory: MemoryTier, arena: Arena) -> None:
    size = 64 * 1024 * 1024
    arena.prepare(size, 1)
    slot = take(arena, size, limit=1)
    assert arena.allocated_bytes == size
    assert page_faults(slot) < 100


def test_files_of_an_earlier_process_are_prepared_too(memory: MemoryTier) -> None:
    first = Arena(memory, rank=0)
    save(memory, first, 1)
    first.release(take(first))
    first.close()
    arena = Arena(memory, rank=0)
    arena.adopt()
    arena.prepare(SIZE, 3)
    assert arena.wait(20)
    assert arena.allocated_bytes == 3 * SIZE
    assert is_whole(memory, 1)
    slot = take(arena, releasable=(1,), limit=1)
    assert page_faults(slot) < 8
    arena.close()


def test_preparing_more_than_there_is_room_for_prepares_what_fits(small: MemoryTier) -> None:
    arena = Arena(small, rank=0)
    arena.prepare(1024 * 1024, 9)
    assert arena.wait(20)
    assert 3 * 1024 * 1024 <= arena.allocated_bytes <= 4 * 1024 * 1024
    fill(take(arena, 1024 * 1024), 1)
    arena.close()


def test_closing_while_preparing_ends_soon(memory: MemoryTier) -> None:
    arena = Arena(memory, rank=0)
    arena.prepare(256 * 1024 * 1024, 4)
    began = time.monotonic()
    arena.close()
    assert time.monotonic() - began < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "sm_tiered-prepare"]


def test_saves_go_on_while_other_files_are_prepared(memory: MemoryTier, arena: Arena) -> None:
    arena.prepare(SIZE, 4)
    arena.prepare(4 * SIZE, 4)
    for step in range(1, 30):
        releasable = tuple(range(1, step - 1))
        save(memory, arena, step, releasable, limit=4)
        slot = take(arena, 4 * SIZE, releasable, 4)
        fill(slot, step)
        arena.publish(slot, at(step), "__0_2.distcp")
        assert is_whole(memory, step)
    assert arena.wait(20)
    assert arena.allocated_bytes <= 4 * 5 * SIZE


def test_a_mapping_is_told_of_and_taken_back(memory: MemoryTier) -> None:
    log: list[tuple[str, int]] = []

    def on_map(view: memoryview) -> Callable[[], None]:
        size = len(view)
        log.append(("pin", size))
        return lambda: log.append(("unpin", size))

    arena = Arena(memory, rank=0, on_map=on_map)
    save(memory, arena, 1, limit=1)
    save(memory, arena, 2, releasable=(1,), limit=1)
    assert log == [("pin", SIZE)]
    save(memory, arena, 3, releasable=(2,), size=SIZE + 100, limit=1)
    assert log == [("pin", SIZE), ("unpin", SIZE), ("pin", SIZE + 100)]
    arena.close()
    assert log[3:] == [("unpin", SIZE + 100)]


def test_a_failure_in_the_background_is_told_by_the_next_take(memory: MemoryTier) -> None:
    failures = [RuntimeError("no device")]

    def on_map(_view: memoryview) -> Callable[[], None]:
        if failures:
            raise failures.pop()
        return lambda: None

    arena = Arena(memory, rank=0, on_map=on_map)
    arena.prepare(SIZE, 2)
    assert arena.wait(20)
    with pytest.raises(RuntimeError, match="no device"):
        arena.take(SIZE, [], 2)
    take(arena)
    arena.close()


# ---- housekeeping


def test_hundreds_of_saves_leave_descriptors_files_and_mappings_where_they_were(
    memory: MemoryTier, arena: Arena
) -> None:
    def held() -> tuple[int, int, int, int]:
        gc.collect()
        mapped = sum(str(memory.root) in line for line in Path("/proc/self/maps").read_text().splitlines())
        files = sum(len(names) for _, _, names in os.walk(memory.root))
        return len(os.listdir("/proc/self/fd")), files, mapped, threading.active_count()

    def cycle(step: int) -> None:
        save(memory, arena, step, releasable=tuple(range(max(0, step - 9), step - 1)), size=SIZE + step % 3)

    for step in range(1, 9):
        cycle(step)
    before = held()
    for step in range(9, 310):
        cycle(step)
    assert held() == before
    arena.close()
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if str(memory.root) in line]


def test_a_view_that_outlives_the_arena_is_still_mapped(memory: MemoryTier) -> None:
    arena = Arena(memory, rank=0)
    slot = save(memory, arena, 1)
    view = slot.buffer[10:20]
    arena.close()
    assert bytes(view) == bytes([1]) * 10
    with pytest.raises(TierError, match="closed"):
        arena.take(SIZE, [], 1)
    assert is_whole(memory, 1)


def test_dead_writers_files_are_swept_when_the_next_process_adopts(memory: MemoryTier, arena: Arena) -> None:
    save(memory, arena, 1)
    dead = part_of(memory, 1).parent / ".tmp-00000000"
    dead.write_bytes(b"half")
    arena.close()
    second = Arena(memory, rank=0)
    second.adopt()
    assert not dead.exists()
    assert is_whole(memory, 1)
    second.close()


def test_threads_may_share_an_arena(memory: MemoryTier, arena: Arena) -> None:
    failures: list[BaseException] = []

    def work(base: int) -> None:
        try:
            for step in range(base, base + 40):
                slot = arena.take(SIZE, [], 9)
                if slot is None:
                    continue
                fill(slot, step % 251)
                arena.publish(slot, at(step), PART)
                if not is_whole(memory, step):
                    failures.append(AssertionError(step))
                arena.drop([at(step)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(base,)) for base in (0, 1000, 2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
