# cython: language_level=3
"""Aligned, recycled memory: regions, and leases of them that give themselves back.

A get reads straight into a lease, and the returned tensor owns that lease through the buffer
protocol: when the tensor goes, the memory returns to its pool, warm and still registered with
the device. Fresh memory would cost a page fault per page on every get.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from libc.errno cimport errno
from libc.stdint cimport uintptr_t
from libc.string cimport memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

cdef extern from "<sys/mman.h>" nogil:
    int MAP_HUGETLB
    int MADV_HUGEPAGE
    int madvise(void *address, size_t nbytes, int advice)

cdef size_t PAGE = 4096
cdef size_t HUGE = 2 << 20
# Small leases are carved out of regions of this size: one registration serves many of them.
cdef size_t SLAB = 4 << 20


cdef size_t _round_up(size_t value, size_t multiple) noexcept:
    return (value + multiple - 1) // multiple * multiple


cdef size_t size_class(size_t nbytes) noexcept:
    """Four classes to each doubling, whole pages: at most a fifth is wasted."""
    cdef size_t step = PAGE
    while nbytes > 8 * step:
        step *= 2
    return _round_up(max(nbytes, <size_t>1), step)


@cython.no_gc_clear
cdef class Region:
    """Anonymous memory, page-aligned, on hugepages where there are some; a writable buffer.

    ``address`` and ``nbytes``; ``huge`` tells whether it lies on reserved hugepages. Freed when
    the last reference goes. Raises MemoryError.
    """
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef readonly bint huge
    cdef size_t _mapped_at
    cdef size_t _mapped_nbytes

    def __cinit__(self, size_t nbytes, bint hugepages=True):
        cdef void *at = MAP_FAILED
        cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS
        cdef int protection = PROT_READ | PROT_WRITE
        if nbytes >= HUGE:
            self.nbytes = _round_up(nbytes, HUGE)
            if hugepages:
                at = mmap(NULL, self.nbytes, protection, flags | MAP_HUGETLB, -1, 0)
            self.huge = at != MAP_FAILED
            self._mapped_nbytes = self.nbytes if self.huge else self.nbytes + HUGE
        else:
            self.nbytes = self._mapped_nbytes = _round_up(max(nbytes, PAGE), PAGE)
        if at == MAP_FAILED:
            at = mmap(NULL, self._mapped_nbytes, protection, flags, -1, 0)
            if at == MAP_FAILED:
                self._mapped_nbytes = 0
                raise MemoryError(f"mmap of {nbytes} bytes: {strerror(errno).decode()}")
        self._mapped_at = self.address = <size_t>at
        if self._mapped_nbytes > self.nbytes:
            # Aligned to 2 MiB so that transparent hugepages can back all of it: a 64 MiB read
            # then faults 32 times instead of 16,384.
            self.address = _round_up(self.address, HUGE)
            madvise(<void *>self.address, self.nbytes, MADV_HUGEPAGE)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        if self._mapped_nbytes:
            munmap(<void *>self._mapped_at, self._mapped_nbytes)


@cython.no_gc_clear
cdef class Lease:
    """The right to ``capacity`` bytes at ``address``, until it and all views of it are gone.

    A writable buffer of ``nbytes`` bytes. ``capacity`` is a whole number of pages, so a device
    may write the last block in full.
    """
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef readonly size_t capacity
    cdef object _region
    cdef Pool _pool

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __len__(self):
        return self.nbytes

    def zero(self, size_t start=0):
        """Clears the bytes from ``start`` to the end of the capacity."""
        if start < self.capacity:
            memset(<void *>(self.address + start), 0, self.capacity - start)

    def __dealloc__(self):
        if self._pool is not None:
            self._pool._give_back(self._region, self.address, self.capacity)


@cython.no_gc_clear
cdef class Pool:
    """Leases by size class, carved from regions that ``allocate(nbytes)`` makes.

    ``allocate`` returns an object with ``address`` and ``nbytes`` whose end of life frees the
    memory (an engine's own DMA memory, or :class:`Region`). Free memory beyond ``cache_nbytes``
    is given up. Thread-safe under the GIL.
    """
    cdef object _allocate
    cdef dict _free          # size class -> [(region, address), ...]
    cdef dict _live          # id(region) -> [region, leases out, capacity, leases in all]
    cdef readonly size_t cache_nbytes
    cdef readonly size_t free_nbytes
    cdef readonly size_t leased_nbytes
    cdef readonly size_t peak_nbytes

    def __init__(self, allocate, size_t cache_nbytes):
        self._allocate = allocate
        self.cache_nbytes = cache_nbytes
        self._free = {}
        self._live = {}

    def lease(self, size_t nbytes):
        """A lease of ``nbytes`` bytes (whatever was there before is still in it)."""
        cdef size_t capacity = size_class(nbytes)
        cdef list free = self._free.get(capacity)
        if not free:
            self._grow(capacity)
            free = self._free[capacity]
        region, address = free.pop()
        cdef Lease lease = Lease.__new__(Lease)
        lease._region = region
        lease.address = address
        lease.nbytes = nbytes
        lease.capacity = capacity
        self.free_nbytes -= capacity
        self.leased_nbytes += capacity
        self.peak_nbytes = max(self.peak_nbytes, self.leased_nbytes + self.free_nbytes)
        (<list>self._live[id(region)])[1] += 1
        lease._pool = self
        return lease

    cdef _grow(self, size_t capacity):
        region = self._allocate(capacity if 4 * capacity > SLAB else SLAB)
        cdef size_t count = region.nbytes // capacity
        cdef list free = self._free.setdefault(capacity, [])
        cdef size_t i
        self._live[id(region)] = [region, 0, capacity, count]
        for i in range(count):
            free.append((region, region.address + i * capacity))
        self.free_nbytes += count * capacity

    cdef _give_back(self, region, size_t address, size_t capacity):
        (<list>self._live[id(region)])[1] -= 1
        (<list>self._free[capacity]).append((region, address))
        self.free_nbytes += capacity
        self.leased_nbytes -= capacity
        if self.free_nbytes > self.cache_nbytes:
            self.trim(self.cache_nbytes)

    def trim(self, size_t keep_nbytes=0):
        """Gives up idle regions, those of the largest leases first, until at most
        ``keep_nbytes`` are free."""
        cdef size_t capacity, count
        idle = sorted((entry for entry in self._live.values() if not entry[1]),
                      key=lambda entry: -entry[2])
        for region, _, capacity, count in idle:
            if self.free_nbytes <= keep_nbytes:
                return
            self._free[capacity] = [
                pair for pair in self._free[capacity] if pair[0] is not region
            ]
            self.free_nbytes -= capacity * count
            del self._live[id(region)]
