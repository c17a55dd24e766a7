# cython: language_level=3, boundscheck=False, wraparound=False
"""The io_uring engine: O_DIRECT reads and writes on a descriptor, with registered buffers and
file where the machine allows them, and without them where it does not."""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EAGAIN, EBADF, EINTR, ENOSPC, ENOSYS, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset, strerror

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_FLUSH, SKV_READ, SKV_WRITE, skv_backend, skv_io,
)
from liburing cimport *
from pthreads cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef extern from "<errno.h>" nogil:
    int EOPNOTSUPP

cdef extern from "<fcntl.h>" nogil:
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_KEEP_SIZE

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned initial, int flags)
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *, size_t)
    int close(int fd)
    int getpid()

# Slots in the ring's table of registered buffers; a region takes one.
DEF BUFFERS = 1024
# user_data of completions that are not commands.
DEF WAKE_TAG = 0
DEF CANCEL_TAG = 1


cdef struct Buffer:
    size_t address
    size_t nbytes


cdef struct Ring:
    skv_backend backend
    io_uring ring
    int fd
    int wake_fd
    uint64_t wake_count
    bint wake_armed
    bint fixed_file
    bint closed
    # The table of registered buffers: filled by Python threads, read by the driver.
    pthread_mutex_t mutex
    # Held over the system calls that change the table, which may last: the driver never waits
    # for it.
    pthread_mutex_t registering
    bint fixed_buffers
    Buffer buffers[BUFFERS]
    int used_buffers


cdef int _buffer_index(Ring *r, size_t address, size_t nbytes) noexcept nogil:
    cdef int i, found = -1
    pthread_mutex_lock(&r.mutex)
    for i in range(r.used_buffers):
        if (r.buffers[i].nbytes and address >= r.buffers[i].address
                and address + nbytes <= r.buffers[i].address + r.buffers[i].nbytes):
            found = i
            break
    pthread_mutex_unlock(&r.mutex)
    return found


cdef int _update(Ring *r, unsigned slot, size_t address, size_t nbytes) noexcept nogil:
    """Sets one entry of the kernel's table; 0 bytes empty it. With `registering` held."""
    cdef iovec vector
    cdef unsigned long long tag = 0
    cdef int rc
    vector.iov_base = <void *>address
    vector.iov_len = nbytes
    rc = io_uring_register_buffers_update_tag(&r.ring, slot, &vector, &tag, 1)
    return rc if rc < 0 else 0


cdef void _set_entry(Ring *r, int slot, size_t address, size_t nbytes) noexcept nogil:
    pthread_mutex_lock(&r.mutex)
    r.buffers[slot].address = address
    r.buffers[slot].nbytes = nbytes
    r.used_buffers = max(r.used_buffers, slot + 1)
    pthread_mutex_unlock(&r.mutex)


cdef int _register(Ring *r, size_t address, size_t nbytes) noexcept nogil:
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


cdef void _unregister(Ring *r, size_t address) noexcept nogil:
    cdef int slot
    pthread_mutex_lock(&r.registering)
    # A closed ring's descriptor may by now be another ring's.
    if not r.closed:
        for slot in range(r.used_buffers):
            if r.buffers[slot].nbytes and r.buffers[slot].address == address:
                _set_entry(r, slot, 0, 0)
                _update(r, slot, 0, 0)
                break
    pthread_mutex_unlock(&r.registering)


cdef void _arm_wake(Ring *r) noexcept nogil:
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
    if sqe != NULL:
        io_uring_prep_read(sqe, r.wake_fd, &r.wake_count, 8, 0)
        io_uring_sqe_set_data64(sqe, WAKE_TAG)
        r.wake_armed = True


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Ring *r = <Ring *>self
    cdef int fd = 0 if r.fixed_file else r.fd
    cdef int index = -1
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
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
    if r.fixed_file:
        sqe.flags |= <unsigned char>IOSQE_FIXED_FILE
    io_uring_sqe_set_data64(sqe, <uint64_t><size_t>io)
    return 0


cdef int _poll(void *self, skv_io **done, int most, int64_t wait_ns) noexcept nogil:
    cdef Ring *r = <Ring *>self
    cdef io_uring_cqe *cqes[64]
    cdef io_uring_cqe *first
    cdef __kernel_timespec timeout
    cdef unsigned seen, i
    cdef int n = 0, rc = 0
    cdef uint64_t tag
    if not r.wake_armed:
        _arm_wake(r)
    seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, 64))
    if seen == 0 and wait_ns:
        timeout.tv_sec = wait_ns // 1000000000
        timeout.tv_nsec = wait_ns % 1000000000
        # One system call submits and waits.
        rc = io_uring_submit_and_wait_timeout(&r.ring, &first, 1, &timeout, NULL)
        seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, 64))
    elif io_uring_sq_ready(&r.ring):
        # A busy kernel (-EBUSY, -EAGAIN) keeps the entries; they go with the next call.
        io_uring_submit(&r.ring)
        if seen == 0:
            seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, 64))
    for i in range(seen):
        tag = cqes[i].user_data
        if tag == WAKE_TAG:
            r.wake_armed = False
        elif tag != CANCEL_TAG:
            done[n] = <skv_io *><size_t>tag
            done[n].result = cqes[i].res
            n += 1
    io_uring_cq_advance(&r.ring, seen)
    if seen == 0 and rc == -EINTR:
        return -EINTR
    return n


cdef void _wake(void *self) noexcept nogil:
    cdef uint64_t one = 1
    write((<Ring *>self).wake_fd, &one, 8)


cdef void _cancel(void *self, skv_io *io) noexcept nogil:
    cdef Ring *r = <Ring *>self
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
    if sqe != NULL:
        io_uring_prep_cancel64(sqe, <uint64_t><size_t>io, 0)
        io_uring_sqe_set_data64(sqe, CANCEL_TAG)


@cython.no_gc_clear
cdef class UringBackend:
    """A ring of ``entries`` on the descriptor ``fd``, which stays the caller's.

    ``backend`` is the capsule for a queue. OSError where the kernel or a container's rules
    refuse a ring. ``fixed_file`` and ``fixed_buffers`` tell what could be registered.
    """
    cdef Ring _r
    cdef int _pid
    cdef readonly object backend

    def __cinit__(self, int fd, unsigned entries):
        cdef io_uring_params parameters
        cdef int rc
        pthread_mutex_init(&self._r.mutex, NULL)
        pthread_mutex_init(&self._r.registering, NULL)
        self._pid = getpid()
        self._r.closed = True
        self._r.fd = fd
        self._r.wake_fd = -1
        # Neither COOP_TASKRUN nor SINGLE_ISSUER: the driver changes, and a completion must not
        # wait until the thread that submitted the command happens to enter the kernel again.
        memset(&parameters, 0, sizeof(parameters))
        parameters.flags = IORING_SETUP_CLAMP
        rc = io_uring_queue_init_params(entries, &self._r.ring, &parameters)
        if rc < 0:
            raise OSError(-rc, f"io_uring_setup: {strerror(-rc).decode()}")
        self._r.closed = False
        if not parameters.features & IORING_FEAT_EXT_ARG:
            # Without it liburing's timed wait puts commands of its own among ours.
            raise OSError(ENOSYS, "io_uring_setup: this kernel is older than 5.11")
        self._r.wake_fd = eventfd(0, EFD_CLOEXEC)
        if self._r.wake_fd < 0:
            raise OSError(errno, f"eventfd: {strerror(errno).decode()}")
        self._r.fixed_file = io_uring_register_files(&self._r.ring, &fd, 1) == 0
        self._r.fixed_buffers = io_uring_register_buffers_sparse(&self._r.ring, BUFFERS) == 0
        self._r.backend.self = &self._r
        self._r.backend.submit = _submit
        self._r.backend.poll = _poll
        self._r.backend.wake = _wake
        self._r.backend.cancel = _cancel
        self.backend = PyCapsule_New(&self._r.backend, SKV_BACKEND_CAPSULE, NULL)

    @property
    def fixed_file(self):
        return bool(self._r.fixed_file)

    @property
    def fixed_buffers(self):
        return bool(self._r.fixed_buffers)

    @property
    def registered(self):
        """Buffers registered now."""
        cdef int i
        return sum(1 for i in range(self._r.used_buffers) if self._r.buffers[i].nbytes)

    def register(self, size_t address, size_t nbytes):
        """Registers memory, so that the kernel need not look its pages up for every command.

        Returns 0, or the errno that says why not (ENOMEM: RLIMIT_MEMLOCK); the memory can then
        be used all the same.
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
        """Takes memory out of the table again; nothing may be in flight in it."""
        # A forked child shares the ring with its parent, and must leave the parent's table alone.
        if self._r.fixed_buffers and self._pid == getpid():
            with nogil:
                _unregister(&self._r, address)

    def close(self):
        """Gives the ring back; nothing may be in flight."""
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
        if ready and self._pid == getpid():
            # The kernel takes a ring apart later, in a thread of its own; until then the device
            # would stay open, exclusively, and memory pinned.
            if self._r.fixed_file:
                io_uring_unregister_files(&self._r.ring)
            if self._r.fixed_buffers:
                io_uring_unregister_buffers(&self._r.ring)
        if ready:
            io_uring_queue_exit(&self._r.ring)
        if self._r.wake_fd >= 0:
            close(self._r.wake_fd)
            self._r.wake_fd = -1

    def __dealloc__(self):
        self.close()
        pthread_mutex_destroy(&self._r.mutex)
        pthread_mutex_destroy(&self._r.registering)
