"""Pages are reserved before they are mapped, and a mapping lives as long as its views and no longer."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sm_tiered.tiers import mapping
from sm_tiered.tiers.mapping import Mapping, allocate
from tests.unit.children import in_child

PAGE = mmap.PAGESIZE
MIB = 1024 * 1024


@pytest.fixture
def fd(memory_dir: Path) -> Iterator[int]:
    fd = os.open(memory_dir / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture
def small_fd(make_tmpfs: Callable[[str, int], Path]) -> Iterator[int]:
    """A file on a tmpfs of 4 MiB."""
    fd = os.open(make_tmpfs("small", 4) / "file", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(int(line.split("-")[0], 16) == address for line in lines)


def test_a_reserved_file_has_its_size_and_its_pages(fd: int) -> None:
    for size in (10 * PAGE + 1, 3, 20 * PAGE, 0):
        allocate(fd, size)
        assert os.fstat(fd).st_size == size
        assert os.fstat(fd).st_blocks * 512 >= size


def test_holes_are_filled(fd: int) -> None:
    os.ftruncate(fd, 64 * PAGE)
    assert os.fstat(fd).st_blocks == 0
    allocate(fd, 64 * PAGE)
    assert os.fstat(fd).st_blocks * 512 >= 64 * PAGE


def test_what_can_not_be_reserved_leaves_the_file_as_it_was(small_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_SLICE_BYTES", 256 * 1024)
    allocate(small_fd, MIB)
    os.pwrite(small_fd, b"precious", 0)
    with pytest.raises(OSError, match="No space") as caught:
        allocate(small_fd, 8 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert os.fstat(small_fd).st_size == MIB
    assert os.fstat(small_fd).st_blocks * 512 == MIB
    assert os.pread(small_fd, 8, 0) == b"precious"


def test_what_is_written_into_the_mapping_stands_in_the_file(fd: int) -> None:
    allocate(fd, 3 * PAGE)
    view = Mapping(fd, 3 * PAGE).view(3 * PAGE)
    view[PAGE - 1 : PAGE + 2] = b"abc"
    assert os.pread(fd, 3, PAGE - 1) == b"abc"


def test_a_mapping_ends_with_its_last_view(fd: int) -> None:
    allocate(fd, PAGE)
    mapped = Mapping(fd, PAGE)
    address, view = mapped.address, mapped.view(PAGE)[5:9]
    del mapped
    gc.collect()
    assert is_mapped(address)
    view[:] = b"1234"
    del view
    gc.collect()
    assert not is_mapped(address)


def test_a_mapping_has_room_to_grow_in_place(fd: int) -> None:
    size = 64 * PAGE
    allocate(fd, size)
    mapped = Mapping(fd, size)
    assert mapped.capacity >= size + size // 16
    allocate(fd, size + 2 * PAGE)
    mapped.view(size + 2 * PAGE)[-1] = 7
    assert os.pread(fd, 1, size + 2 * PAGE - 1) == b"\x07"


@pytest.mark.parametrize("advised", [True, False])
def test_populated_pages_fault_no_more_and_keep_their_bytes(
    fd: int, monkeypatch: pytest.MonkeyPatch, advised: bool
) -> None:
    import resource

    if not advised:  # an older kernel
        monkeypatch.setattr(mapping, "_POPULATE_WRITE", 9999)
    size = 200 * PAGE + 17
    allocate(fd, size)
    os.pwrite(fd, b"kept", size - 4)
    mapped = Mapping(fd, size)
    mapped.populate(size, lambda: False)
    view = mapped.view(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for offset in range(0, size - PAGE, PAGE):
        view[offset] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20
    assert bytes(view[-4:]) == b"kept"


def test_populating_stops_when_asked(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapping, "_SLICE_BYTES", 4 * PAGE)
    allocate(fd, 40 * PAGE)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 3

    Mapping(fd, 40 * PAGE).populate(40 * PAGE, stop)
    assert len(asked) == 4


def test_a_forked_child_has_no_such_mapping(fd: int) -> None:
    allocate(fd, PAGE)
    view = Mapping(fd, PAGE).view(PAGE)

    def child() -> None:
        faulthandler.disable()  # dying is what is expected
        view[0]

    assert in_child(child) == -signal.SIGSEGV


def test_a_forked_child_unmaps_nothing_of_its_own(fd: int) -> None:
    allocate(fd, PAGE)
    kept = [Mapping(fd, PAGE)]
    address, capacity = kept[0].address, kept[0].capacity

    def child() -> None:
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000
        assert libc.mmap(address, capacity, mmap.PROT_READ | mmap.PROT_WRITE, fixed, -1, 0) == address
        kept.clear()
        gc.collect()
        ctypes.memset(address, 1, capacity)

    assert in_child(child) == 0
