# cython: language_level=3, boundscheck=False, wraparound=False
"""The thread-pool engine: preadv2 and pwrite, if io_uring is missing or forbidden.

The descriptor is buffered (the page cache) or opened with O_DIRECT. The threads never run Python
code.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_DISCARD, SKV_FLUSH, SKV_READ, SKV_WRITE, iovec, skv_backend, skv_io,
    skv_now_ns,
)
from crc32c cimport skv_crc32c
from pthreads cimport (
    clockid_t, cpu_clock_ns, init_cond, own_cpu_clock, pthread_cond_broadcast, pthread_cond_signal, pthread_cond_t,
    pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t, start_thread,
    wait_until,
)

cdef extern from "<unistd.h>" nogil:
    ssize_t pwrite(int fd, const void *buffer, size_t nbytes, long offset)
    int fdatasync(int fd)
    int getpid()

cdef extern from "<sys/uio.h>" nogil:
    int RWF_NOWAIT
    ssize_t preadv2(int fd, const iovec *parts, int count, long offset, int flags)
    ssize_t pwritev(int fd, const iovec *parts, int count, long offset)

cdef extern from "<errno.h>" nogil:
    int ECANCELED

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE
    int fallocate(int fd, int mode, long offset, long nbytes)


# Copied out of the page cache, then summed: source and destination fit into a core's L2 cache.
DEF SLICE_NBYTES = 131072
# Places of one command; the kernel takes four times as many.
DEF MOST_PLACES = 256


cdef struct ThreadPool:
    skv_backend backend
    int fd
    pthread_mutex_t mutex
    pthread_cond_t work
    pthread_cond_t finished
    pthread_cond_t released
    skv_io *todo
    skv_io *todo_tail
    skv_io *done
    skv_io *done_tail
    bint woken
    bint waiting
    bint stopping
    bint buffered
    int mapped_fd
    pthread_t *threads
    clockid_t *clocks  # of the CPU time of those that have started
    int started
    uint64_t *claims  # per thread: the block that it is filling, or NO_BLOCK
    int count


# Included because it works on this pool's structure and no other engine uses it.
include "pool_fill.pxi"


cdef inline ssize_t _read_at(int fd, skv_io *io, uint32_t first, uint32_t nbytes,
                             int flags) noexcept nogil:
    cdef iovec part
    part.iov_base = <char *>io.addr + first
    part.iov_len = nbytes
    return preadv2(fd, &part, 1, <long>(io.offset + first), flags)


cdef void _sum(skv_io *io, uint32_t first, uint32_t last) noexcept nogil:
    """Sums the bytes [first, last) of a read. Calls come in order; `first` starts a chunk."""
    cdef const unsigned char *at = <const unsigned char *>io.addr
    cdef uint32_t take
    if io.chunk_nbytes == 0:
        io.crcs[0] = skv_crc32c(io.crcs[0] if first else 0, at + first, last - first)
        return
    while first < last:
        take = min(io.chunk_nbytes, last - first)
        io.crcs[first // io.chunk_nbytes] = skv_crc32c(0, at + first, take)
        first += take


cdef uint32_t _read_cached(ThreadPool *p, skv_io *io, uint32_t *summed) noexcept nogil:
    """Reads the cached start of the range, and sums it up to `summed` while it is in this core's
    cache; returns the bytes read."""
    cdef uint32_t at = 0, take
    cdef uint32_t slice_nbytes = io.nbytes if io.crcs == NULL else max(
        SLICE_NBYTES, io.chunk_nbytes)
    cdef ssize_t rc
    while at < io.nbytes:
        take = min(slice_nbytes, io.nbytes - at)
        rc = _read_at(p.fd, io, at, take, RWF_NOWAIT)
        if rc < <ssize_t>take:
            # Also if not supported or interrupted: the rest is then read as cold.
            return at + <uint32_t>max(rc, 0)
        if io.crcs != NULL:
            _sum(io, at, at + take)
            summed[0] = at + take
        at += take
    return at


cdef int _read(ThreadPool *p, skv_io *io) noexcept nogil:
    """The command's result: bytes read, or -errno."""
    cdef uint32_t summed = 0, warm = 0
    cdef ssize_t rc = 0
    cdef int64_t cold = 0
    if p.buffered:
        cold = _fill(p, io)
        warm = _read_cached(p, io, &summed)
    while warm < io.nbytes:
        rc = _read_at(p.fd, io, warm, io.nbytes - warm, 0)
        if rc >= 0:
            break
        if errno != EINTR:
            return -errno
    if p.buffered:
        # If the kernel cannot say: the bytes that could not be read without waiting.
        io.cold_nbytes = <uint32_t>(rc if cold < 0 else cold)
    if io.crcs != NULL and warm + rc >= io.sum_nbytes:
        _sum(io, summed, io.sum_nbytes)
        io.summed = 1
    return <int>(warm + rc)


cdef int _execute(int fd, skv_io *io) noexcept nogil:
    """The result of any other command, or of one for several places: bytes moved, or -errno."""
    cdef ssize_t rc
    while True:
        if io.places and io.op == SKV_READ:
            rc = preadv2(fd, io.place, <int>io.places, <long>io.offset, 0)
        elif io.places:
            rc = pwritev(fd, io.place, <int>io.places, <long>io.offset)
        elif io.op == SKV_WRITE:
            rc = pwrite(fd, io.addr, io.nbytes, <long>io.offset)
        elif io.op == SKV_FLUSH:
            rc = fdatasync(fd)
        else:
            rc = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                           <long>io.offset, <long>io.nbytes)
        if rc >= 0:
            return <int>rc
        if errno != EINTR:
            return -errno


cdef void *_thread_main(void *argument) noexcept nogil:
    cdef ThreadPool *p = <ThreadPool *>argument
    cdef skv_io *io
    pthread_mutex_lock(&p.mutex)
    p.clocks[p.started] = own_cpu_clock()
    p.started += 1
    while True:
        io = p.todo
        if io == NULL:
            if p.stopping:
                break
            pthread_cond_wait(&p.work, &p.mutex)
            continue
        p.todo = io.next
        pthread_mutex_unlock(&p.mutex)
        if io.op == SKV_READ and not io.places:
            io.result = _read(p, io)
        else:
            io.result = _execute(p.fd, io)
        pthread_mutex_lock(&p.mutex)
        _finished(p, io)
    pthread_mutex_unlock(&p.mutex)
    return NULL


cdef void _finished(ThreadPool *p, skv_io *io) noexcept nogil:
    """Queues a finished command for poll. With the mutex held."""
    io.next = NULL
    if p.done == NULL:
        p.done = io
    else:
        p.done_tail.next = io
    p.done_tail = io
    if p.waiting:
        pthread_cond_signal(&p.finished)


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef ThreadPool *p = <ThreadPool *>self
    io.next = NULL
    pthread_mutex_lock(&p.mutex)
    if p.todo == NULL:
        p.todo = io
    else:
        p.todo_tail.next = io
    p.todo_tail = io
    pthread_cond_signal(&p.work)
    pthread_mutex_unlock(&p.mutex)
    return 0


cdef int _poll(void *self, skv_io **done, int most, int least, int64_t wait_ns) noexcept nogil:
    cdef ThreadPool *p = <ThreadPool *>self
    cdef int n = 0
    cdef uint64_t until_ns
    pthread_mutex_lock(&p.mutex)
    if wait_ns and p.done == NULL and not p.woken:
        until_ns = skv_now_ns() + <uint64_t>wait_ns
        p.waiting = True
        while p.done == NULL and not p.woken:
            if wait_until(&p.finished, &p.mutex, until_ns):
                break
        p.waiting = False
    p.woken = False
    while p.done != NULL and n < most:
        done[n] = p.done
        p.done = p.done.next
        n += 1
    pthread_mutex_unlock(&p.mutex)
    return n


cdef void _wake(void *self) noexcept nogil:
    cdef ThreadPool *p = <ThreadPool *>self
    pthread_mutex_lock(&p.mutex)
    p.woken = True
    pthread_cond_signal(&p.finished)
    pthread_mutex_unlock(&p.mutex)


cdef void _cancel(void *self, skv_io *io) noexcept nogil:
    """Cancels only commands that no thread has started; a system call cannot be cancelled."""
    cdef ThreadPool *p = <ThreadPool *>self
    cdef skv_io *previous = NULL
    cdef skv_io *at
    pthread_mutex_lock(&p.mutex)
    at = p.todo
    while at != NULL and at != io:
        previous = at
        at = at.next
    if at != NULL:
        if previous == NULL:
            p.todo = at.next
        else:
            previous.next = at.next
        if p.todo_tail == at:
            p.todo_tail = previous
        at.result = -ECANCELED
        _finished(p, at)
    pthread_mutex_unlock(&p.mutex)


cdef uint64_t _cpu_ns(void *self) noexcept nogil:
    cdef ThreadPool *p = <ThreadPool *>self
    cdef uint64_t ns = 0
    cdef int i
    pthread_mutex_lock(&p.mutex)
    for i in range(p.started):
        ns += cpu_clock_ns(p.clocks[i])
    pthread_mutex_unlock(&p.mutex)
    return ns


@cython.no_gc_clear
cdef class PoolBackend:
    """``threads`` native threads over the descriptor ``fd``, which the caller closes.

    ``buffered``: ``fd`` uses the page cache, and bytes that reads do not find there are counted
    (``Transfer.cold_nbytes``). ``mapped_fd``: another descriptor of the same file (-1: none), used
    to fill uncached 2 MiB blocks through a mapping, in one folio each: the kernel copies faster
    from large folios than from single pages. The thread that reads also sums.
    ``backend`` is the capsule for a queue. Close this after the queue; that waits for threads in
    system calls. Raises ValueError and MemoryError.
    """
    cdef ThreadPool _p
    cdef readonly object backend
    cdef int _pid

    def __cinit__(self, int fd, int threads, *, bint buffered=False, int mapped_fd=-1):
        self._p.fd = fd
        self._p.buffered = buffered
        self._p.mapped_fd = mapped_fd
        self._pid = getpid()
        if not 1 <= threads <= 1024:
            raise ValueError(f"threads must be 1 to 1024, not {threads}")
        pthread_mutex_init(&self._p.mutex, NULL)
        init_cond(&self._p.work)
        init_cond(&self._p.finished)
        init_cond(&self._p.released)
        self._p.claims = <uint64_t *>malloc(threads * sizeof(uint64_t))
        self._p.clocks = <clockid_t *>malloc(threads * sizeof(clockid_t))
        self._p.threads = <pthread_t *>calloc(threads, sizeof(pthread_t))
        if self._p.threads == NULL or self._p.claims == NULL or self._p.clocks == NULL:
            free(self._p.threads)
            self._p.threads = NULL
            raise MemoryError()
        memset(self._p.claims, 0xff, threads * sizeof(uint64_t))
        while self._p.count < threads:
            if start_thread(&self._p.threads[self._p.count], _thread_main, &self._p):
                break
            self._p.count += 1
        if not self._p.count:
            raise MemoryError("no thread could be started")
        self._p.backend.self = &self._p
        self._p.backend.submit = _submit
        self._p.backend.poll = _poll
        self._p.backend.wake = _wake
        self._p.backend.cancel = _cancel
        self._p.backend.most_places = 0 if buffered else MOST_PLACES
        self._p.backend.cpu_ns = _cpu_ns
        self.backend = PyCapsule_New(&self._p.backend, SKV_BACKEND_CAPSULE, NULL)

    @property
    def threads(self):
        """The number of threads that could be started."""
        return self._p.count

    def close(self):
        """Ends the threads; blocks until they have ended."""
        cdef int i
        if self._p.threads == NULL or self._pid != getpid():
            return
        with nogil:
            pthread_mutex_lock(&self._p.mutex)
            self._p.stopping = True
            pthread_cond_broadcast(&self._p.work)
            pthread_mutex_unlock(&self._p.mutex)
            for i in range(self._p.count):
                pthread_join(self._p.threads[i], NULL)
        free(self._p.threads)
        self._p.threads = NULL

    def __dealloc__(self):
        if self._pid == getpid():
            self.close()
        free(self._p.claims)
        free(self._p.clocks)
