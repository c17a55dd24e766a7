# cython: language_level=3, boundscheck=False, wraparound=False
"""The two engines without a drive: `ram` copies from and to memory, `null` completes at once.

`null` moves no bytes: it measures the cost of everything but the drive.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EIO
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from libc.errno cimport errno

from backend cimport SKV_BACKEND_CAPSULE, SKV_DISCARD, SKV_READ, SKV_WRITE, skv_backend, skv_io

cdef extern from "<sys/mman.h>" nogil:
    int MAP_NORESERVE
    int MADV_DONTNEED
    int madvise(void *address, size_t nbytes, int advice)


cdef struct Memory:
    skv_backend backend
    unsigned char *base    # NULL: null engine
    uint64_t nbytes
    skv_io *done


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Memory *m = <Memory *>self
    cdef unsigned char *at
    io.result = <int>io.nbytes
    if m.base != NULL:
        if io.offset > m.nbytes or io.nbytes > m.nbytes - io.offset:
            io.result = -EIO
        else:
            at = m.base + io.offset
            if io.op == SKV_READ:
                memcpy(io.addr, at, io.nbytes)
            elif io.op == SKV_WRITE:
                memcpy(at, io.addr, io.nbytes)
            elif io.op == SKV_DISCARD:
                _discard(at, io.nbytes)
    io.next = m.done
    m.done = io
    return 0


cdef void _discard(unsigned char *at, size_t nbytes) noexcept nogil:
    # Whole pages return to the kernel and read as zeros; the rest is cleared.
    cdef size_t first = (<size_t>at + 4095) & ~<size_t>4095
    cdef size_t last = (<size_t>at + nbytes) & ~<size_t>4095
    if first >= last:
        memset(at, 0, nbytes)
        return
    memset(at, 0, first - <size_t>at)
    madvise(<void *>first, last - first, MADV_DONTNEED)
    memset(<void *>last, 0, <size_t>at + nbytes - last)


cdef int _poll(void *self, skv_io **done, int most, int least, int64_t wait_ns) noexcept nogil:
    # Commands complete when they are submitted, so that there is never anything to wait for.
    cdef Memory *m = <Memory *>self
    cdef int n = 0
    while m.done != NULL and n < most:
        done[n] = m.done
        m.done = m.done.next
        n += 1
    return n


cdef void _wake(void *self) noexcept nogil:
    pass


cdef void _cancel(void *self, skv_io *io) noexcept nogil:
    pass


@cython.no_gc_clear
cdef class MemoryBackend:
    """``nbytes`` of memory as a drive; 0: the null engine. ``backend`` is its capsule.

    Pages are allocated when they are first written. Raises MemoryError.
    """
    cdef Memory _m
    cdef readonly object backend

    def __cinit__(self, uint64_t nbytes):
        cdef void *at
        if nbytes:
            at = mmap(NULL, nbytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
            if at == MAP_FAILED:
                raise MemoryError(f"mmap of {nbytes} bytes: {strerror(errno).decode()}")
            self._m.base = <unsigned char *>at
            self._m.nbytes = nbytes
        self._m.backend.self = &self._m
        self._m.backend.submit = _submit
        self._m.backend.poll = _poll
        self._m.backend.wake = _wake
        self._m.backend.cancel = _cancel
        self._m.backend.most_places = 1
        self.backend = PyCapsule_New(&self._m.backend, SKV_BACKEND_CAPSULE, NULL)

    def __dealloc__(self):
        if self._m.base != NULL:
            munmap(self._m.base, self._m.nbytes)
