"""How much of a file's range the kernel has in its page cache: cachestat(2), else mincore(2)."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from functools import cache

from spdk_kv.units import GIB, align_down, align_up

# cachestat (Linux 6.5) has this number on every architecture with the common syscall table.
_CACHESTAT = 451
_PROT_READ, _MAP_SHARED = 1, 1
_MAP_FAILED = ctypes.c_void_p(-1).value
_MINCORE_NBYTES = GIB  # per mapping, so that mincore's vector takes 256 KiB


class _Range(ctypes.Structure):
    """struct cachestat_range (linux/mman.h)."""

    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Cachestat(ctypes.Structure):
    """struct cachestat (linux/mman.h); counts of pages."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("nr_cache", "nr_dirty", "nr_writeback", "nr_evicted", "nr_recently_evicted")
    )


def cached_nbytes(fd: int, offset: int, nbytes: int) -> int | None:
    """Counts the bytes of a file's range that are in the page cache, and brings nothing in.

    Walks the cached pages. For 64 MiB in single pages it took 0.4 ms by cachestat and 1 ms by
    mincore.

    Args:
        fd: an open file or block device.
        offset: where the range begins, in bytes.
        nbytes: length of the range.

    Returns:
        Bytes in whole pages; None where the kernel does not say.

    Raises:
        ValueError: for a negative range.
        OSError: ``fd`` is not open.
    """
    if offset < 0 or nbytes < 0:
        raise ValueError(f"offset and nbytes are not negative: {offset}, {nbytes}")
    os.fstat(fd)
    if nbytes == 0:
        return 0
    counted = by_cachestat(fd, offset, nbytes)
    return by_mincore(fd, offset, nbytes) if counted is None else counted


def by_cachestat(fd: int, offset: int, nbytes: int) -> int | None:
    """`cached_nbytes` by cachestat(2); None before Linux 6.5 and where it is not allowed."""
    where, found = _Range(offset, nbytes), _Cachestat()
    status = _libc().syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_uint(fd),
        ctypes.byref(where),
        ctypes.byref(found),
        ctypes.c_uint(0),
    )
    return None if status else min(nbytes, int(found.nr_cache) * mmap.PAGESIZE)


def by_mincore(fd: int, offset: int, nbytes: int) -> int | None:
    """`cached_nbytes` by mincore(2) over a mapping of the range that is not touched."""
    # To those who may not write a file the kernel shows every page as present.
    if not _may_ask(fd):
        return None
    start = align_down(offset, mmap.PAGESIZE)
    end = align_up(offset + nbytes, mmap.PAGESIZE)
    pages = 0
    for place in range(start, end, _MINCORE_NBYTES):
        found = _mincore(fd, place, min(_MINCORE_NBYTES, end - place))
        if found is None:
            return None
        pages += found
    return min(nbytes, pages * mmap.PAGESIZE)


def _mincore(fd: int, offset: int, nbytes: int) -> int | None:
    libc = _libc()
    # mmap.mmap() refuses ranges beyond the end of the file, and hides its address.
    address = libc.mmap(None, nbytes, _PROT_READ, _MAP_SHARED, fd, offset)
    if address == _MAP_FAILED:
        return None
    try:
        vector = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
        if libc.mincore(address, nbytes, vector):
            return None
        # Only the lowest bit of each byte has a meaning.
        return sum(count for value, count in _histogram(bytes(vector)) if value & 1)
    finally:
        libc.munmap(address, nbytes)


def _histogram(vector: bytes) -> list[tuple[int, int]]:
    return [(value, vector.count(value)) for value in set(vector)]


def _may_ask(fd: int) -> bool:
    if os.geteuid() in (0, os.fstat(fd).st_uid):
        return True
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
        return True
    with contextlib.suppress(OSError):
        return os.access(f"/proc/self/fd/{fd}", os.W_OK, effective_ids=True)
    return False


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
