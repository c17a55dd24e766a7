# cython: language_level=3, boundscheck=False, wraparound=False
"""The io_uring engine: O_DIRECT reads and writes on a descriptor, with a registered file and
buffers if the machine allows them."""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EAGAIN, EBADF, ENOSPC
from libc.stdint cimport int64_t, uint64_t

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_FLUSH, SKV_READ, SKV_WRITE, skv_backend, skv_io,
)
from engines.ring cimport (
    Ring, bind_ring, cancel_in_ring, close_ring, open_ring, poll_ring, unbind_ring, wake_ring,
)
from liburing cimport *
from pthreads cimport (
    init_cond, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_t, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef extern from "<errno.h>" nogil:
    int EOPNOTSUPP

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef extern from "<sys/mman.h>" nogil:
    int madvise(void *at, size_t nbytes, int advice)

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE


# In mman.h from glibc 2.35 on; in the kernel since 5.14.
DEF MADV_POPULATE_WRITE = 23
# Entries in the ring's table of registered buffers; a region takes one.
DEF BUFFERS = 1024
# Places of one command: the kernel takes four times as many, but copies the list for each command.
DEF MOST_PLACES = 256


cdef struct Buffer:
    size_t address
    size_t nbytes


# What a Python thread wants done to the table of registered buffers.
cdef struct Request:
    size_t address
    size_t nbytes          # 0: to be unregistered
    bint done
    int result             # 0 or -errno
    Request *next


cdef struct Direct:
    Ring common
    skv_backend backend
    bint closed
    bint fixed_buffers
    # The table of registered buffers. Once the ring is bound only its thread uses it, without the
    # mutex: a look-up per command would take it as often.
    Buffer buffers[BUFFERS]
    int used_buffers
    int last_found
    # Guards all below, and the table until the ring is bound.
    pthread_mutex_t mutex
    pthread_cond_t served
    void (*ask)(void *) noexcept nogil  # NULL: not bound
    void *asked
    Request *requests


cdef inline bint _holds(const Buffer *buffer, size_t address, size_t nbytes) noexcept nogil:
    return (address >= buffer.address and nbytes <= buffer.nbytes
            and address - buffer.address <= buffer.nbytes - nbytes)


cdef inline int _buffer_index(Direct *r, size_t address, size_t nbytes) noexcept nogil:
    cdef int i
    if _holds(&r.buffers[r.last_found], address, nbytes):
        return r.last_found
    for i in range(r.used_buffers):
        if _holds(&r.buffers[i], address, nbytes):
            r.last_found = i
            return i
    return -1


cdef int _update(Direct *r, int slot, size_t address, size_t nbytes) noexcept nogil:
    """Sets one entry of the kernel's table and of ours; 0 bytes empty it."""
    cdef iovec vector
    cdef unsigned long long tag = 0
    cdef int rc
    vector.iov_base = <void *>address
    vector.iov_len = nbytes
    rc = io_uring_register_buffers_update_tag(&r.common.ring, <unsigned>slot, &vector, &tag, 1)
    if rc < 0 and nbytes:
        return rc
    r.buffers[slot].address = address
    r.buffers[slot].nbytes = nbytes
    r.used_buffers = max(r.used_buffers, slot + 1)
    return 0


cdef int _perform(Direct *r, Request *request) noexcept nogil:
    cdef int slot
    if request.nbytes == 0:
        for slot in range(r.used_buffers):
            if r.buffers[slot].nbytes and r.buffers[slot].address == request.address:
                return _update(r, slot, 0, 0)
        return 0
    for slot in range(BUFFERS):
        if r.buffers[slot].nbytes == 0:
            return _update(r, slot, request.address, request.nbytes)
    return -ENOSPC


cdef int _change(Direct *r, size_t address, size_t nbytes) noexcept nogil:
    """Changes the table, by way of the ring's thread if there is one: the kernel refuses others."""
    cdef Request request
    request.address = address
    request.nbytes = nbytes
    request.done = False
    pthread_mutex_lock(&r.mutex)
    if r.closed:
        request.result = -EBADF  # its descriptor may be another's by now
    elif r.ask == NULL:
        request.result = _perform(r, &request)
    else:
        request.next = r.requests
        r.requests = &request
        # With the mutex held: `_unbind` takes it, so that the queue still exists.
        r.ask(r.asked)
        while not request.done:
            pthread_cond_wait(&r.served, &r.mutex)
    pthread_mutex_unlock(&r.mutex)
    return request.result


cdef void _serve(void *self) noexcept nogil:
    cdef Direct *r = <Direct *>self
    cdef Request *request
    pthread_mutex_lock(&r.mutex)
    while r.requests != NULL:
        request = r.requests
        r.requests = request.next
        request.result = _perform(r, request)
        request.done = True
    pthread_cond_broadcast(&r.served)
    pthread_mutex_unlock(&r.mutex)


cdef int _bind(void *self, void (*ask)(void *) noexcept nogil, void *asked) noexcept nogil:
    cdef Direct *r = <Direct *>self
    cdef int rc
    pthread_mutex_lock(&r.mutex)
    rc = bind_ring(&r.common)
    if rc == 0:
        r.ask = ask
        r.asked = asked
    pthread_mutex_unlock(&r.mutex)
    return rc


cdef void _unbind(void *self) noexcept nogil:
    cdef Direct *r = <Direct *>self
    pthread_mutex_lock(&r.mutex)
    r.closed = True
    r.ask = NULL
    while r.requests != NULL:
        r.requests.result = -EBADF
        r.requests.done = True
        r.requests = r.requests.next
    pthread_cond_broadcast(&r.served)
    if r.fixed_buffers:
        # Otherwise memory would stay pinned until the kernel frees the ring, later.
        io_uring_unregister_buffers(&r.common.ring)
    unbind_ring(&r.common)
    pthread_mutex_unlock(&r.mutex)


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Direct *r = <Direct *>self
    cdef int fd = 0 if r.common.fixed_file else r.common.fd
    cdef int index = -1
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.common.ring)
    if sqe == NULL:
        return -EAGAIN
    if r.fixed_buffers and io.op <= SKV_WRITE and not io.places:
        index = _buffer_index(r, <size_t>io.addr, io.nbytes)
    if io.places:
        if io.op == SKV_READ:
            io_uring_prep_readv(sqe, fd, io.place, io.places, io.offset)
        else:
            io_uring_prep_writev(sqe, fd, io.place, io.places, io.offset)
    elif io.op == SKV_READ:
        if index >= 0:
            io_uring_prep_read_fixed(sqe, fd, io.addr, io.nbytes, io.offset, index)
        else:
            io_uring_prep_read(sqe, fd, io.addr, io.nbytes, io.offset)
    elif io.op == SKV_WRITE:
        if index >= 0:
            io_uring_prep_write_fixed(sqe, fd, io.addr, io.nbytes, io.offset, index)
        else:
            io_uring_prep_write(sqe, fd, io.addr, io.nbytes, io.offset)
    elif io.op == SKV_FLUSH:
        io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC)
    else:
        io_uring_prep_fallocate(sqe, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, io.offset,
                                io.nbytes)
    if r.common.fixed_file:
        sqe.flags |= <unsigned char>IOSQE_FIXED_FILE
    io_uring_sqe_set_data64(sqe, <uint64_t><size_t>io)
    return 0


cdef void _complete(Ring *r, skv_io *io, int res) noexcept nogil:
    io.result = res


cdef int _poll(void *self, skv_io **done, int most, int least, int64_t wait_ns) noexcept nogil:
    return poll_ring(self, done, most, least, wait_ns, _complete)


@cython.no_gc_clear
cdef class UringBackend:
    """A ring of ``entries`` on the descriptor ``fd``, which the caller closes.

    ``lone``: for a queue's ``lone``, whose callers take turns; otherwise the queue's own thread
    alone uses the ring. ``backend`` is the capsule for one queue; ``fixed_file`` and
    ``fixed_buffers``: what could be registered. Raises OSError if the kernel or a container's rules
    refuse a ring.
    """
    cdef Direct _r
    cdef int _pid    # 0: closed, or never opened
    cdef readonly object backend

    def __cinit__(self, int fd, unsigned entries, bint lone=False):
        pthread_mutex_init(&self._r.mutex, NULL)
        init_cond(&self._r.served)
        self._r.closed = True
        open_ring(&self._r.common, fd, entries, 0, not lone)
        self._pid = getpid()
        self._r.closed = False
        if not lone:
            # Its transfers are small: pinning their pages costs less than a second table would.
            self._r.fixed_buffers = io_uring_register_buffers_sparse(
                &self._r.common.ring, BUFFERS) == 0
            self._r.backend.bind = _bind
            self._r.backend.serve = _serve
            self._r.backend.unbind = _unbind
        self._r.backend.self = &self._r
        self._r.backend.submit = _submit
        self._r.backend.poll = _poll
        self._r.backend.wake = wake_ring
        self._r.backend.cancel = cancel_in_ring
        self._r.backend.most_places = MOST_PLACES
        self.backend = PyCapsule_New(&self._r.backend, SKV_BACKEND_CAPSULE, NULL)

    @property
    def fixed_file(self):
        return bool(self._r.common.fixed_file)

    @property
    def fixed_buffers(self):
        return bool(self._r.fixed_buffers)

    @property
    def deferred(self):
        """Whether the kernel works on completions only when they are asked for."""
        return bool(self._r.common.single)

    @property
    def registered(self):
        """The number of buffers that are registered now."""
        cdef int i
        return sum(1 for i in range(self._r.used_buffers) if self._r.buffers[i].nbytes)

    def register(self, size_t address, size_t nbytes):
        """Registers memory, so that the kernel need not pin its pages for every command.

        Returns 0 or an errno (ENOMEM: RLIMIT_MEMLOCK); the memory can be used in either case.
        Blocks without the GIL.
        """
        cdef int rc
        if not self._r.fixed_buffers:
            return EOPNOTSUPP
        if self._pid != getpid():
            return EBADF
        with nogil:
            # Here, not in the thread that everybody's commands wait for. It may fail: older than
            # Linux 5.14.
            madvise(<void *>address, nbytes, MADV_POPULATE_WRITE)
            rc = _change(&self._r, address, nbytes)
        return -rc

    def unregister(self, size_t address):
        """Removes memory from the table; nothing may be in flight in it. Blocks without the GIL."""
        # A forked child shares the ring with its parent, and must not change its table.
        if self._r.fixed_buffers and self._pid == getpid():
            with nogil:
                _change(&self._r, address, 0)

    def close(self):
        """Closes the ring, after its queue; nothing may be in flight."""
        cdef bint owner = self._pid == getpid(), registered
        if not self._pid:
            return
        self._pid = 0
        if owner:
            with nogil:
                pthread_mutex_lock(&self._r.mutex)
                registered = self._r.fixed_buffers and not self._r.closed
                self._r.closed = True
                if registered:
                    io_uring_unregister_buffers(&self._r.common.ring)
                pthread_mutex_unlock(&self._r.mutex)
        close_ring(&self._r.common, owner)

    def __dealloc__(self):
        self.close()
        pthread_mutex_destroy(&self._r.mutex)
        pthread_cond_destroy(&self._r.served)
