"""The memory tier: private, on tmpfs, and aware of who is alive in it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sm_tiered.errors import (
    ConfigError,
    CorruptPartError,
    KeyNotFoundError,
    NamespaceInUseError,
    TierFullError,
    TierRefusedError,
)
from sm_tiered.policies.keep import Latest
from sm_tiered.settings import MemorySettings
from sm_tiered.testing.contract import TierContract
from sm_tiered.tiers.base import Tier
from sm_tiered.tiers.memory import MemoryTier

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts and foreign owners")


def open_memory(path: Path, namespace: str = "run", *, allow_disk: bool = True) -> MemoryTier:
    settings = MemorySettings(
        name="memory", save=None, keep=Latest(n=2), path=str(path), budget_bytes=None, allow_disk=allow_disk
    )
    return MemoryTier(settings, namespace)


@pytest.fixture
def memory(memory_dir: Path) -> MemoryTier:
    return open_memory(memory_dir)


@pytest.fixture
def small(make_tmpfs: Callable[[str, int], Path]) -> MemoryTier:
    """A tier on a tmpfs of 1 MiB."""
    return open_memory(make_tmpfs("small", 1) / "private", allow_disk=False)


class TestMemoryContract(TierContract):
    @pytest.fixture
    def tier(self, memory_dir: Path) -> MemoryTier:
        return open_memory(memory_dir)

    def raw_read(self, tier: Tier, key: str) -> bytes | None:
        assert isinstance(tier, MemoryTier)
        path = tier.root / key
        return path.read_bytes() if path.exists() else None

    def raw_keys(self, tier: Tier) -> list[str]:
        assert isinstance(tier, MemoryTier)
        found = [p for p in tier.root.rglob("*") if p.is_file() and p.name != ".replace"]
        return sorted(str(p.relative_to(tier.root)) for p in found)

    def raw_write(self, tier: Tier, key: str, data: bytes) -> None:
        assert isinstance(tier, MemoryTier)
        path = tier.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


# ---- the directory


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_directory_is_made_private_whatever_the_umask(memory_dir: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        memory = open_memory(memory_dir / "made")
        memory.put("d/k", b"x")
    finally:
        os.umask(old)
    made = [memory.root.parent, memory.root, *(p for p in memory.root.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o700}
    assert {p.name for p in memory.root.iterdir()} >= {".arena", ".queue", ".locks", "events", "attempts"}


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o750, 0o701])
def test_a_directory_that_others_can_enter_is_refused(memory_dir: Path, mode: int) -> None:
    memory_dir.chmod(mode)
    with pytest.raises(TierRefusedError, match=rf"{mode:04o}") as caught:
        open_memory(memory_dir)
    assert str(memory_dir) in str(caught.value)
    assert caught.value.hint


def test_a_namespace_that_others_can_enter_is_refused(memory_dir: Path) -> None:
    open_memory(memory_dir).root.chmod(0o755)
    with pytest.raises(TierRefusedError, match="0755"):
        open_memory(memory_dir)


@needs_root
def test_a_directory_of_another_user_is_refused_and_named(memory_dir: Path) -> None:
    os.chown(memory_dir, 65534, 65534)
    with pytest.raises(TierRefusedError, match="uid 65534"):
        open_memory(memory_dir)


def test_a_link_or_a_file_in_the_place_of_the_directory_is_refused(memory_dir: Path) -> None:
    (memory_dir / "real").mkdir(mode=0o700)
    (memory_dir / "link").symlink_to(memory_dir / "real")
    (memory_dir / "file").touch()
    for name in ("link", "file", "file/below"):
        with pytest.raises(TierRefusedError):
            open_memory(memory_dir / name)
    assert list((memory_dir / "real").iterdir()) == []


def test_a_disk_is_no_memory_unless_it_is_allowed(tmp_path: Path) -> None:
    probe = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True)
    if probe.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("the temporary directory is in memory")
    (tmp_path / "m").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="no tmpfs"):
        open_memory(tmp_path / "m", allow_disk=False)
    open_memory(tmp_path / "m", allow_disk=True).probe()


@needs_root
def test_a_full_tmpfs_is_an_error_with_the_old_state_intact(small: MemoryTier) -> None:
    small.put("d/k", b"old")
    with pytest.raises(TierFullError):
        small.put("d/k", bytes(2 * 1024 * 1024))
    with pytest.raises(TierFullError):
        small.put_part("d/part", lambda: iter([memoryview(bytes(2 * 1024 * 1024))]), 2 * 1024 * 1024)
    assert small.get("d/k").data == b"old"
    assert [p.name for p in (small.root / "d").iterdir()] == ["k"]


def test_a_directory_that_was_wiped_is_made_again_by_the_next_write(memory: MemoryTier) -> None:
    import shutil

    memory.put("d/k", b"x")
    shutil.rmtree(memory.root)
    with pytest.raises(KeyNotFoundError):
        memory.get("d/k")
    memory.put("d/k", b"y")
    assert memory.get("d/k").data == b"y"


def test_two_directories_are_two_nodes_and_one_is_one(memory_dir: Path) -> None:
    one, two = open_memory(memory_dir / "one"), open_memory(memory_dir / "two")
    assert one.node_key() == open_memory(memory_dir / "one").node_key()
    assert one.node_key() != two.node_key()


# ---- reading parts


def test_an_open_part_is_read_at_any_offset_and_tells_its_size(memory: MemoryTier) -> None:
    data = bytes(range(256)) * 100
    memory.put("d/part", data)
    with memory.open_part("d/part") as part:
        assert part.size == len(data)
        buffer = bytearray(1000)
        part.pread_into(777, memoryview(buffer))
        assert buffer == data[777:1777]
        with pytest.raises(CorruptPartError):
            part.pread_into(len(data) - 999, memoryview(buffer))
        memory.delete(["d/part"])
        part.pread_into(0, memoryview(buffer))
        assert buffer == data[:1000]
    with pytest.raises(KeyNotFoundError):
        memory.open_part("d/part")


def test_short_reads_are_completed(memory: MemoryTier, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.put("d/part", b"abcdefgh")
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    buffer = bytearray(7)
    with memory.open_part("d/part") as part:
        part.pread_into(1, memoryview(buffer))
    assert bytes(buffer) == b"bcdefgh"


def test_an_open_part_keeps_others_from_an_exclusive_lock(memory: MemoryTier) -> None:
    import fcntl

    memory.put("d/part", b"x")
    with open(memory.root / "d" / "part", "rb") as file:
        with memory.open_part("d/part"), pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(KeyNotFoundError, match="recycled"):
            memory.open_part("d/part")


def test_a_part_that_is_replaced_between_open_and_lock_is_found_again(
    memory: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    memory.put("d/part", b"old")
    real, moved = fcntl.flock, threading.Event()

    def meanwhile(fd: int, kind: int) -> None:
        if not moved.is_set():
            moved.set()
            os.rename(memory.root / "d" / "part", memory.root / ".arena" / "0-00000000")
            memory.put("d/part", b"newer")
        real(fd, kind)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    with memory.open_part("d/part") as part:
        assert part.size == 5


# ---- who is alive


def test_trainers_of_other_launches_are_seen_while_they_live(memory: MemoryTier) -> None:
    mine = memory.trainer_lock("mine", 0)
    read_end, write_end = os.pipe()
    ready_read, ready_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_end)
        lock = memory.trainer_lock("other", 7)
        os.write(ready_write, b"x" if lock.held else b"")
        os.read(read_end, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    os.read(ready_read, 1)
    assert [found for found, _ in memory.live_trainers("mine")] == [pid]
    assert "rank 7 of launch other" in memory.live_trainers("mine")[0][1]
    assert [found for found, _ in memory.live_trainers("other")] == [os.getpid()]
    assert sorted(found for found, _ in memory.live_trainers("third")) == sorted([pid, os.getpid()])
    os.close(write_end)
    os.waitpid(pid, 0)
    assert memory.live_trainers("mine") == []
    mine.release()
    assert memory.live_trainers("third") == []
    assert list((memory.root / ".locks").iterdir()) == []
    for end in (read_end, ready_read, ready_write):
        os.close(end)


def test_a_rank_that_is_alive_twice_is_refused_with_its_pid(
    memory: MemoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sm_tiered.tiers.memory._TRAINER_LOCK_SECS", 0.05)
    lock = memory.trainer_lock("launch", 3)
    with pytest.raises(NamespaceInUseError) as caught:
        memory.trainer_lock("launch", 3)
    assert caught.value.pids == (os.getpid(),)
    lock.release()
    memory.trainer_lock("launch", 3).release()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 201])
def test_a_lock_name_builds_no_path(memory: MemoryTier, name: str) -> None:
    with pytest.raises(ConfigError):
        memory.lock_path(name)
    with pytest.raises(ConfigError):
        memory.trainer_lock(name or "/", 0)
