"""Locks are the kernel's: they die with the holder, and a fork neither shares nor loses them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sm_tiered.locks import FileLock, Holder, probe


def in_child(action: Callable[[], object]) -> int:
    """Run *action* in a forked child and return how that ended: 0, 1 for an exception, or minus a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_a_second_holder_is_refused_until_the_first_lets_go(path: Path) -> None:
    first, second = FileLock(path), FileLock(path)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert second.held
    assert not first.held


def test_shared_holders_share_and_keep_exclusive_ones_out(path: Path) -> None:
    one, two, writer = FileLock(path), FileLock(path), FileLock(path)
    assert one.acquire(exclusive=False)
    assert two.acquire(exclusive=False)
    assert not writer.acquire()
    assert probe(path) is None
    one.release()
    two.release()
    assert writer.acquire()


def test_probe_tells_pid_and_text_of_the_holder(path: Path) -> None:
    assert probe(path) is None
    lock = FileLock(path)
    assert lock.acquire(text=f"{os.getpid()} on here, rank 3")
    assert probe(path) == Holder(pid=os.getpid(), text=f"{os.getpid()} on here, rank 3")
    lock.release()
    assert probe(path) is None


def test_a_shorter_text_leaves_nothing_of_the_longer_one_before_it(path: Path) -> None:
    with FileLock(path) as lock:
        lock.acquire(text="1234567 and much more")
    with FileLock(path) as lock:
        lock.acquire(text="12")
        assert probe(path) == Holder(pid=12, text="12")


def test_a_lock_dies_with_its_holder(path: Path) -> None:
    def hold_and_die() -> None:
        FileLock(path).acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(hold_and_die) == -signal.SIGKILL
    assert probe(path) is None
    assert FileLock(path).acquire()


def test_a_forked_child_does_not_release_the_lock_of_its_parent(path: Path) -> None:
    lock = FileLock(path)
    assert lock.acquire()
    assert in_child(lock.release) == 0
    assert probe(path) is not None


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lock(path: Path) -> None:
    read_end, write_end = os.pipe()

    def fork_and_die() -> None:
        lock = FileLock(path)
        lock.acquire()
        ready_read, ready_write = os.pipe()
        if os.fork() == 0:
            os.close(write_end)
            os.write(ready_write, b"x")
            os.read(read_end, 1)  # until the test ends
            os._exit(0)
        os.read(ready_read, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        assert in_child(fork_and_die) == -signal.SIGKILL
        assert probe(path) is None
    finally:
        os.close(write_end)
        os.close(read_end)


def test_waiting_ends_when_the_holder_goes(path: Path) -> None:
    ready = multiprocessing.get_context("fork").Event()
    pid = os.fork()
    if pid == 0:
        lock = FileLock(path)
        lock.acquire()
        ready.set()
        time.sleep(0.1)
        os._exit(0)
    assert ready.wait(10)
    assert FileLock(path).acquire(timeout_secs=10)
    os.waitpid(pid, 0)


def test_waiting_has_a_deadline(path: Path) -> None:
    holder = FileLock(path)
    assert holder.acquire()
    began = time.monotonic()
    assert not FileLock(path).acquire(timeout_secs=0.1)
    assert 0.09 < time.monotonic() - began < 5


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_no_lock(path: Path) -> None:
    old = FileLock(path)
    assert old.acquire()
    assert old.stands()
    old.remove()
    assert not path.exists()
    new, third = FileLock(path), FileLock(path)
    assert new.acquire()
    assert not third.acquire()


def test_the_holder_of_a_lock_learns_that_its_file_was_deleted_or_replaced(path: Path) -> None:
    with FileLock(path) as lock, FileLock(path) as other:
        assert lock.acquire()
        path.unlink()
        assert not lock.stands()
        assert other.acquire()
        assert not lock.stands()
        assert other.stands()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_lock_file_is_private_whatever_the_umask(path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        with FileLock(path) as lock:
            assert lock.acquire()
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_planted_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(OSError, match="symbolic"):
        FileLock(path).acquire()
    assert victim.read_text() == "precious"


def test_locks_leave_no_descriptor_behind(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        FileLock(path).acquire()  # released when it is collected
        FileLock(path).acquire(timeout_secs=0)
        probe(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_that_is_deleted_between_open_and_lock_is_not_locked_in_vain(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real = fcntl.flock

    def meanwhile(fd: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(fd, kind)

    monkeypatch.setattr(fcntl, "flock", meanwhile)
    lock = FileLock(path)
    assert lock.acquire(timeout_secs=5)
    assert path.exists()
    assert not FileLock(path).acquire()
