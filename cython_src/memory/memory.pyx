# cython: language_level=3
"""Aligned, recycled memory: regions, and leases of them that return themselves.

A get reads straight into a lease, and the returned tensor owns that lease through the buffer
protocol: when the tensor is freed, the memory returns to its pool, faulted in and still
registered with the drive. Fresh memory would cost a page fault per page on every get.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport errno
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)

cdef extern from "<sys/mman.h>" nogil:
    int MADV_HUGEPAGE
    int madvise(void *address, size_t nbytes, int advice)

cdef size_t PAGE = 4096
cdef size_t HUGE = 2 << 20
# Small leases share regions of this size, so that one registration covers many of them.
cdef size_t SLAB = 4 << 20
cdef size_t LARGE = 1 << 20
# More than any address space has; sums of such sizes stay below 2**64.
cdef size_t MOST = <size_t>1 << 60


cdef size_t _round_up(size_t value, size_t multiple) noexcept:
    return (value + multiple - 1) // multiple * multiple


cdef size_t size_class(size_t nbytes) noexcept:
    """Rounds up to whole pages: four classes per doubling, wasting at most a fifth; above LARGE
    sixteen, wasting at most a seventeenth."""
    cdef size_t step = PAGE
    cdef size_t steps = 8 if nbytes <= LARGE else 32
    while nbytes > steps * step:
        step *= 2
    return _round_up(max(nbytes, <size_t>1), step)


cdef _check_size(size_t nbytes):
    if nbytes > MOST:
        raise MemoryError(f"no machine has {nbytes} bytes of memory")


@cython.no_gc_clear
cdef class Region:
    """Anonymous memory, page-aligned; a writable buffer of ``nbytes`` at ``address``.

    ``hugepages``: on transparent hugepages where the kernel provides them. Never on reserved ones:
    those are short by nature, and a page that cannot be had (the cgroup forbids it; a forked child
    and its parent both need the one that they share) ends the process with SIGBUS, where ordinary
    memory is made of smaller pages. Freed with its last reference. Raises MemoryError.
    """
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef size_t _mapped_at
    cdef size_t _mapped_nbytes

    def __cinit__(self, size_t nbytes, bint hugepages=True):
        cdef void *at
        _check_size(nbytes)
        hugepages = hugepages and nbytes >= HUGE
        self.nbytes = _round_up(max(nbytes, PAGE), HUGE if hugepages else PAGE)
        self._mapped_nbytes = self.nbytes + (HUGE if hugepages else 0)
        at = mmap(NULL, self._mapped_nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0)
        if at == MAP_FAILED:
            self._mapped_nbytes = 0
            raise MemoryError(f"mmap of {nbytes} bytes: {strerror(errno).decode()}")
        self._mapped_at = self.address = <size_t>at
        if hugepages:
            # Aligned to 2 MiB so that hugepages can back all of it: a 64 MiB read then takes 32
            # page faults instead of 16,384.
            self.address = _round_up(self.address, HUGE)
            madvise(<void *>self.address, self.nbytes, MADV_HUGEPAGE)

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        if self._mapped_nbytes:
            munmap(<void *>self._mapped_at, self._mapped_nbytes)


# The pool's bookkeeping is plain C: allocating a Python object may run the garbage collector, which
# may return other leases while the pool is being changed.
cdef struct Slab:
    PyObject *region       # owned
    size_t capacity        # of each lease
    size_t count           # of all leases
    size_t idle            # of leases not in use
    Slab *previous         # in its class's list of slabs with an idle lease
    Slab *following
    size_t addresses[1]    # of the idle ones; allocated with `count` elements


cdef struct SizeClass:
    size_t capacity
    size_t last_used       # the pool's clock at the last lease
    size_t whole           # slabs that are wholly idle
    size_t spare           # the lowest `whole` since the last shed()
    Slab *first            # slabs with an idle lease
    SizeClass *smaller


@cython.no_gc_clear
cdef class Lease:
    """The right to ``capacity`` bytes at ``address``, until it and all its views are freed.

    A writable buffer of ``nbytes`` bytes. ``capacity`` is a whole number of pages, so that a
    drive may write the last block in full.
    """
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef readonly size_t capacity
    cdef Slab *_slab
    cdef SizeClass *_class
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
        if self._slab != NULL:
            self._pool._return(self._class, self._slab, self.address)


@cython.no_gc_clear
cdef class Pool:
    """Leases by size class, cut from regions that ``allocate(nbytes)`` returns.

    ``allocate`` returns an object with ``address`` and ``nbytes`` that owns its memory (an
    engine's DMA memory, or :class:`Region`). Free memory beyond ``cache_nbytes`` is freed, least
    recently leased sizes first: a growing sequence stops using one size after another.
    Thread-safe under the GIL.
    """
    cdef object _allocate
    cdef SizeClass *_largest  # all classes, in falling order
    cdef size_t _clock
    cdef readonly size_t cache_nbytes
    cdef readonly size_t free_nbytes
    cdef readonly size_t leased_nbytes
    cdef readonly size_t peak_nbytes

    def __init__(self, allocate, size_t cache_nbytes):
        self._allocate = allocate
        self.cache_nbytes = cache_nbytes

    def lease(self, size_t nbytes):
        """A lease of ``nbytes`` bytes, not cleared. Raises what ``allocate`` raises."""
        _check_size(nbytes)
        cdef Lease lease = Lease.__new__(Lease)
        cdef SizeClass *kind = self._class_of(size_class(nbytes))
        cdef Slab *slab
        # A loop, because another thread may take what this one added.
        while kind.first == NULL:
            self._grow(kind)
        self._clock += 1
        kind.last_used = self._clock
        slab = kind.first
        if slab.idle == slab.count:
            kind.whole -= 1
            kind.spare = min(kind.spare, kind.whole)
        slab.idle -= 1
        lease.address = slab.addresses[slab.idle]
        lease.nbytes = nbytes
        lease.capacity = slab.capacity
        lease._slab = slab
        lease._class = kind
        lease._pool = self
        if not slab.idle:
            _unlink(kind, slab)
        self.free_nbytes -= slab.capacity
        self.leased_nbytes += slab.capacity
        return lease

    cdef SizeClass *_class_of(self, size_t capacity) except NULL:
        cdef SizeClass **at = &self._largest
        cdef SizeClass *made
        while at[0] != NULL and at[0].capacity > capacity:
            at = &at[0].smaller
        if at[0] != NULL and at[0].capacity == capacity:
            return at[0]
        made = <SizeClass *>calloc(1, sizeof(SizeClass))
        if made == NULL:
            raise MemoryError()
        made.capacity = capacity
        made.smaller = at[0]
        at[0] = made
        return made

    cdef _grow(self, SizeClass *kind):
        cdef size_t wanted = kind.capacity if 4 * kind.capacity > SLAB else SLAB
        if self.free_nbytes + wanted > self.cache_nbytes:
            # Free idle memory first, so that both together stay within the limit.
            self.trim(self.cache_nbytes - min(wanted, self.cache_nbytes))
        region = self._allocate(wanted)
        cdef size_t at = region.address
        cdef size_t count = region.nbytes // kind.capacity
        cdef size_t i
        cdef Slab *slab = <Slab *>malloc(sizeof(Slab) + count * sizeof(size_t))
        if slab == NULL:
            raise MemoryError()
        Py_INCREF(region)
        slab.region = <PyObject *>region
        slab.capacity = kind.capacity
        slab.count = slab.idle = count
        for i in range(count):
            slab.addresses[i] = at + i * kind.capacity
        _link(kind, slab)
        kind.whole += 1
        self.free_nbytes += count * kind.capacity
        self.peak_nbytes = max(self.peak_nbytes, self.leased_nbytes + self.free_nbytes)

    cdef _return(self, SizeClass *kind, Slab *slab, size_t address):
        if not slab.idle:
            _link(kind, slab)
        slab.addresses[slab.idle] = address
        slab.idle += 1
        if slab.idle == slab.count:
            kind.whole += 1
        self.free_nbytes += slab.capacity
        self.leased_nbytes -= slab.capacity
        if self.free_nbytes > self.cache_nbytes:
            self.trim(self.cache_nbytes)

    def trim(self, size_t keep_nbytes=0):
        """Frees idle regions, least recently leased sizes first, until at most ``keep_nbytes``
        are free."""
        cdef Slab *dropped = NULL
        cdef SizeClass *kind = self._least_recent()
        while kind != NULL and self.free_nbytes > keep_nbytes:
            self._take_whole(kind, &dropped)
            if not kind.whole:
                kind = self._least_recent()
        # Only now, because freeing a region may run any Python code.
        _free_slabs(dropped)

    def shed(self):
        """Frees the regions that were idle since the last call."""
        cdef SizeClass *kind = self._largest
        cdef Slab *dropped = NULL
        while kind != NULL:
            while kind.spare:
                kind.spare -= 1
                self._take_whole(kind, &dropped)
            kind.spare = kind.whole
            kind = kind.smaller
        _free_slabs(dropped)

    cdef void _take_whole(self, SizeClass *kind, Slab **taken) noexcept:
        """Moves one of the class's idle regions to ``taken``; there must be one."""
        cdef Slab *slab = kind.first
        while slab.idle < slab.count:
            slab = slab.following
        _unlink(kind, slab)
        kind.whole -= 1
        kind.spare = min(kind.spare, kind.whole)
        self.free_nbytes -= slab.count * slab.capacity
        slab.following = taken[0]
        taken[0] = slab

    cdef SizeClass *_least_recent(self) noexcept:
        """The least recently leased class with an idle region, or NULL."""
        cdef SizeClass *kind = self._largest
        cdef SizeClass *oldest = NULL
        while kind != NULL:
            if kind.whole and (oldest == NULL or kind.last_used < oldest.last_used):
                oldest = kind
            kind = kind.smaller
        return oldest

    def __dealloc__(self):
        # Leases hold their pool, so none is left.
        cdef SizeClass *kind = self._largest
        cdef SizeClass *smaller
        while kind != NULL:
            smaller = kind.smaller
            _free_slabs(kind.first)
            free(kind)
            kind = smaller


cdef void _link(SizeClass *kind, Slab *slab) noexcept:
    slab.previous = NULL
    slab.following = kind.first
    if kind.first != NULL:
        kind.first.previous = slab
    kind.first = slab


cdef void _unlink(SizeClass *kind, Slab *slab) noexcept:
    if slab.previous != NULL:
        slab.previous.following = slab.following
    else:
        kind.first = slab.following
    if slab.following != NULL:
        slab.following.previous = slab.previous


cdef _free_slabs(Slab *slab):
    cdef Slab *following
    while slab != NULL:
        following = slab.following
        Py_DECREF(<object>slab.region)
        free(slab)
        slab = following
