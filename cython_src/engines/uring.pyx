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
from engines.ring cimport Ring, cancel_in_ring, close_ring, open_ring, poll_ring, wake_ring
from liburing cimport *
from pthreads cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef extern from "<errno.h>" nogil:
    int EOPNOTSUPP

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE


# Entries in the ring's table of registered buffers; a region takes one.
DEF BUFFERS = 1024


cdef struct Buffer:
    size_t address
    size_t nbytes


cdef struct Direct:
    Ring common
    skv_backend backend
    bint closed
    # The table of registered buffers: filled by Python threads, read by the driver.
    pthread_mutex_t mutex
    # Held over the system calls that change the table, which may be slow: the driver never takes
    # it.
    pthread_mutex_t registering
    bint fixed_buffers
    Buffer buffers[BUFFERS]
    int used_buffers


cdef int _buffer_index(Direct *r, size_t address, size_t nbytes) noexcept nogil:
    cdef int i, found = -1
    pthread_mutex_lock(&r.mutex)
    for i in range(r.used_buffers):
        if (r.buffers[i].nbytes and address >= r.buffers[i].address
                and address + nbytes <= r.buffers[i].address + r.buffers[i].nbytes):
            found = i
            break
    pthread_mutex_unlock(&r.mutex)
    return found


cdef int _update(Direct *r, unsigned slot, size_t address, size_t nbytes) noexcept nogil:
    """Sets one entry of the kernel's table; 0 bytes empty it. With `registering` held."""
    cdef iovec vector
    cdef unsigned long long tag = 0
    cdef int rc
    vector.iov_base = <void *>address
    vector.iov_len = nbytes
    rc = io_uring_register_buffers_update_tag(&r.common.ring, slot, &vector, &tag, 1)
    return rc if rc < 0 else 0


cdef void _set_entry(Direct *r, int slot, size_t address, size_t nbytes) noexcept nogil:
    pthread_mutex_lock(&r.mutex)
    r.buffers[slot].address = address
    r.buffers[slot].nbytes = nbytes
    r.used_buffers = max(r.used_buffers, slot + 1)
    pthread_mutex_unlock(&r.mutex)


cdef int _register(Direct *r, size_t address, size_t nbytes) noexcept nogil:
    cdef int slot, rc = -ENOSPC
    pthread_mutex_lock(&r.registering)
    if r.closed:
        rc = -EBADF
    else:
        for slot in range(BUFFERS):
            if r.buffers[slot].nbytes == 0:
                rc = _update(r, slot, address, nbytes)
                if rc == 0:
                    _set_entry(r, slot, address, nbytes)
                break
    pthread_mutex_unlock(&r.registering)
    return rc


cdef void _unregister(Direct *r, size_t address) noexcept nogil:
    cdef int slot
    pthread_mutex_lock(&r.registering)
    # A closed ring's descriptor may be reused by now.
    if not r.closed:
        for slot in range(r.used_buffers):
            if r.buffers[slot].nbytes and r.buffers[slot].address == address:
                _set_entry(r, slot, 0, 0)
                _update(r, slot, 0, 0)
                break
    pthread_mutex_unlock(&r.registering)


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Direct *r = <Direct *>self
    cdef int fd = 0 if r.common.fixed_file else r.common.fd
    cdef int index = -1
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.common.ring)
    if sqe == NULL:
        return -EAGAIN
    if r.fixed_buffers and (io.op == SKV_READ or io.op == SKV_WRITE):
        index = _buffer_index(r, <size_t>io.addr, io.nbytes)
    if io.op == SKV_READ:
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


cdef int _poll(void *self, skv_io **done, int most, int64_t wait_ns) noexcept nogil:
    return poll_ring(self, done, most, wait_ns, _complete)


@cython.no_gc_clear
cdef class UringBackend:
    """A ring of ``entries`` on the descriptor ``fd``, which the caller closes.

    ``backend`` is the capsule for a queue; ``fixed_file`` and ``fixed_buffers``: what could be
    registered. Raises OSError if the kernel or a container's rules refuse a ring.
    """
    cdef Direct _r
    cdef int _pid
    cdef readonly object backend

    def __cinit__(self, int fd, unsigned entries):
        pthread_mutex_init(&self._r.mutex, NULL)
        pthread_mutex_init(&self._r.registering, NULL)
        self._pid = getpid()
        self._r.closed = True
        open_ring(&self._r.common, fd, entries, 0)
        self._r.closed = False
        self._r.fixed_buffers = io_uring_register_buffers_sparse(&self._r.common.ring, BUFFERS) == 0
        self._r.backend.self = &self._r
        self._r.backend.submit = _submit
        self._r.backend.poll = _poll
        self._r.backend.wake = wake_ring
        self._r.backend.cancel = cancel_in_ring
        self.backend = PyCapsule_New(&self._r.backend, SKV_BACKEND_CAPSULE, NULL)

    @property
    def fixed_file(self):
        return bool(self._r.common.fixed_file)

    @property
    def fixed_buffers(self):
        return bool(self._r.fixed_buffers)

    @property
    def registered(self):
        """The number of buffers that are registered now."""
        cdef int i
        return sum(1 for i in range(self._r.used_buffers) if self._r.buffers[i].nbytes)

    def register(self, size_t address, size_t nbytes):
        """Registers memory, so that the kernel need not pin its pages for every command.

        Returns 0 or an errno (ENOMEM: RLIMIT_MEMLOCK); the memory can be used in either case.
        """
        cdef int rc
        if not self._r.fixed_buffers:
            return EOPNOTSUPP
        if self._pid != getpid():
            return EBADF
        with nogil:
            rc = _register(&self._r, address, nbytes)
        return -rc

    def unregister(self, size_t address):
        """Removes memory from the table; nothing may be in flight in it."""
        # A forked child shares the ring with its parent, and must not change its table.
        if self._r.fixed_buffers and self._pid == getpid():
            with nogil:
                _unregister(&self._r, address)

    def close(self):
        """Closes the ring; nothing may be in flight."""
        cdef bint ready
        if self._pid == getpid():
            with nogil:
                pthread_mutex_lock(&self._r.registering)
                ready = not self._r.closed
                self._r.closed = True
                pthread_mutex_unlock(&self._r.registering)
        else:
            ready = not self._r.closed
            self._r.closed = True
        if ready:
            if self._r.fixed_buffers and self._pid == getpid():
                # Otherwise memory would stay pinned until the kernel frees the ring, later.
                io_uring_unregister_buffers(&self._r.common.ring)
            close_ring(&self._r.common, self._pid == getpid())

    def __dealloc__(self):
        self.close()
        pthread_mutex_destroy(&self._r.mutex)
        pthread_mutex_destroy(&self._r.registering)
