"""Files in memory: pages are reserved before they are mapped, so a full tmpfs is an error and never a SIGBUS.

The mapping lives as long as any view of it: nobody can hold a view of memory that is gone.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from typing import cast

__all__ = ["Mapping", "allocate"]

_libc = ctypes.CDLL(None, use_errno=True)  # unlike mmap.madvise, it lets other threads run meanwhile
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_FAILED = ctypes.c_void_p(-1).value
_PAGE = mmap.PAGESIZE
_DONTFORK, _HUGEPAGE, _DONTDUMP, _POPULATE_WRITE = 10, 14, 16, 23
_SLICE_BYTES = 64 * 1024 * 1024
"""How much is populated, or reserved, between two looks at whether to stop."""
_SLACK = 16
"""A mapping reaches this part of its size further, as addresses only: a file may grow a little in place."""


def allocate(fd: int, size: int) -> None:
    """Give the file exactly *size* bytes, each with a page behind it.

    Raises:
        OSError: ENOSPC; the file is as long as before then.
    """
    found = os.fstat(fd)
    if found.st_size > size:
        os.ftruncate(fd, size)
    if found.st_blocks * 512 >= size and found.st_size == size:
        return
    try:
        for start in range(0, size, _SLICE_BYTES):
            os.posix_fallocate(fd, start, min(_SLICE_BYTES, size - start))
    except BaseException:
        if found.st_size < size:
            os.ftruncate(fd, found.st_size)
        raise


class Mapping:
    """A file, mapped shared and writable. Forked children and core dumps don't get it."""

    def __init__(self, fd: int, size: int) -> None:
        self.capacity = _pages(max(size + size // _SLACK, 1))
        address = _libc.mmap(None, self.capacity, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address is None or address == _FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"mmap: {os.strerror(code)}")
        for advice in (_DONTFORK, _DONTDUMP, _HUGEPAGE):
            _libc.madvise(address, self.capacity, advice)  # a kernel that knows it not does without
        self.address: int = address
        # A class of its own, because plain ctypes arrays can't be watched for their end.
        kind = cast("type[ctypes.Array[ctypes.c_char]]", type("Window", (ctypes.c_char * self.capacity,), {}))
        window = kind.from_address(address)
        weakref.finalize(window, _unmap, address, self.capacity, os.getpid()).atexit = False
        self._whole = memoryview(window).cast("B")

    def view(self, size: int) -> memoryview:
        """Return the first *size* bytes, writable. Beyond the end of the file, touching them is a SIGBUS."""
        return self._whole[:size]

    def populate(self, size: int, stop: Callable[[], bool]) -> None:
        """Fetch the pages behind the first *size* bytes, which `allocate` has reserved, unless *stop* says so."""
        for start in range(0, size, _SLICE_BYTES):
            if stop():
                return
            length = min(_SLICE_BYTES, size - start)
            if not _populate(self.address + start, _pages(length)):
                # A read is enough: pages of tmpfs are mapped writable at once. It holds the GIL, so it goes in bits.
                for bit in range(start, start + length, 1024 * 1024):
                    self._whole[bit : min(bit + 1024 * 1024, start + length) : _PAGE].tobytes()


def _populate(address: int, length: int) -> bool:
    while _libc.madvise(address, length, _POPULATE_WRITE):
        if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):
            return False
    return True


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _unmap(address: int, length: int, pid: int) -> None:
    # In a forked child the addresses are not mapped, or are already something else.
    if os.getpid() == pid:
        _libc.munmap(address, length)
