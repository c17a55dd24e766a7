# A ring on one descriptor, with a wake-up: shared by the io_uring engines, whose structs start with
# a Ring. All inline, so that each engine has its own copy and no call goes through a pointer.

from libc.errno cimport EINTR, EINVAL, ENOSYS, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset, strerror

from backend cimport skv_io
from liburing cimport *

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned initial, int flags)
    int EFD_CLOEXEC

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *, size_t)
    int close(int fd)
    int getpid()
    long syscall(long number, ...)

# user_data of completions that are not commands; a command's is its address.
cdef enum:
    WAKE_TAG = 0
    CANCEL_TAG = 1

# Completions taken at once: as many as the transfer loop takes (BATCH in transfer/types.pxd).
cdef enum:
    MOST_CQES = 64

# Not in the headers of liburing 2.2. The flags came with Linux 5.19, 6.0 and 6.1.
DEF COOP_TASKRUN = 1 << 8
DEF TASKRUN_FLAG = 1 << 9
DEF SINGLE_ISSUER = 1 << 12
DEF DEFER_TASKRUN = 1 << 13
# io_uring_enable_rings is missing in the library of liburing 2.3, though declared. The system
# call's number is that of every architecture but alpha.
DEF IO_URING_REGISTER = 427
DEF REGISTER_ENABLE_RINGS = 12

cdef struct Ring:
    io_uring ring
    bint single     # only the thread that enables it may use it (SINGLE_ISSUER)
    int fd
    int wake_fd
    uint64_t wake_count
    bint wake_armed
    bint fixed_file


# Sets a command's result from its completion's `res`, whose meaning differs by engine.
ctypedef void (*complete_fn)(Ring *, skv_io *, int) noexcept nogil


cdef inline void release_file(Ring *r) noexcept nogil:
    # The kernel frees a ring later, in its own thread; until then the drive would stay open
    # exclusively.
    if r.fixed_file:
        io_uring_unregister_files(&r.ring)
        r.fixed_file = False


cdef inline int bind_ring(Ring *r) noexcept nogil:
    """Makes the calling thread the one that uses the ring; 0 or -errno."""
    if r.single:
        if syscall(IO_URING_REGISTER, r.ring.ring_fd, REGISTER_ENABLE_RINGS, NULL, 0) < 0:
            return -errno
    # Saves looking up the descriptor in every call. It may fail: older than Linux 5.18.
    io_uring_register_ring_fd(&r.ring)
    return 0


cdef inline void unbind_ring(Ring *r) noexcept nogil:
    """Undoes what only the thread that uses the ring can undo."""
    release_file(r)
    io_uring_unregister_ring_fd(&r.ring)


cdef inline void close_ring(Ring *r, bint owner) noexcept nogil:
    """Closes the ring. `owner`: false in a forked child, which must not change the parent's."""
    if owner:
        release_file(r)
    io_uring_queue_exit(&r.ring)
    if r.wake_fd >= 0:
        close(r.wake_fd)
        r.wake_fd = -1


cdef inline open_ring(Ring *r, int fd, unsigned entries, unsigned flags, bint bound):
    """Sets up the ring; OSError if the kernel or a container's rules refuse it. `bound`: one thread
    alone will use it, after `bind_ring`."""
    cdef io_uring_params parameters
    # What the kernel does for completions it then does when that thread asks for them, instead of
    # interrupting it; the best that it offers. Not where threads take turns: a completion would
    # wait until the thread that submitted the command enters the kernel again.
    cdef unsigned how[3]
    cdef int i, rc = -EINVAL
    how[0] = SINGLE_ISSUER | DEFER_TASKRUN | TASKRUN_FLAG | IORING_SETUP_R_DISABLED
    how[1] = COOP_TASKRUN | TASKRUN_FLAG
    how[2] = 0
    r.fd = fd
    r.wake_fd = -1
    for i in range(0 if bound else 2, 3):
        memset(&parameters, 0, sizeof(parameters))
        parameters.flags = IORING_SETUP_CLAMP | flags | how[i]
        rc = io_uring_queue_init_params(entries, &r.ring, &parameters)
        r.single = i == 0
        if rc != -EINVAL:
            break
    if rc < 0:
        raise OSError(-rc, f"io_uring_setup: {strerror(-rc).decode()}")
    r.wake_fd = eventfd(0, EFD_CLOEXEC)
    rc = errno
    if r.wake_fd >= 0 and parameters.features & IORING_FEAT_EXT_ARG:
        r.fixed_file = io_uring_register_files(&r.ring, &fd, 1) == 0
        return
    close_ring(r, True)
    if parameters.features & IORING_FEAT_EXT_ARG:
        raise OSError(rc, f"eventfd: {strerror(rc).decode()}")
    # Without it liburing's timed wait submits commands of its own to this ring.
    raise OSError(ENOSYS, "io_uring_setup: no wait with a timeout (IORING_FEAT_EXT_ARG)")


cdef inline void arm_wake(Ring *r) noexcept nogil:
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
    if sqe != NULL:
        io_uring_prep_read(sqe, r.wake_fd, &r.wake_count, 8, 0)
        io_uring_sqe_set_data64(sqe, WAKE_TAG)
        r.wake_armed = True


cdef inline int poll_ring(void *self, skv_io **done, int most, int least, int64_t wait_ns,
                          complete_fn complete) noexcept nogil:
    cdef Ring *r = <Ring *>self
    cdef io_uring_cqe *cqes[MOST_CQES]
    cdef io_uring_cqe *first
    cdef __kernel_timespec timeout
    cdef unsigned seen, i
    cdef int n = 0, rc = 0
    cdef uint64_t tag
    if not r.wake_armed:
        arm_wake(r)
    seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, MOST_CQES))
    if seen < least and wait_ns:
        timeout.tv_sec = wait_ns // 1000000000
        timeout.tv_nsec = wait_ns % 1000000000
        # One system call submits and waits.
        rc = io_uring_submit_and_wait_timeout(&r.ring, &first, <unsigned>least, &timeout, NULL)
        seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, MOST_CQES))
    elif io_uring_sq_ready(&r.ring):
        # If the kernel is busy (-EBUSY, -EAGAIN), the next call submits the entries.
        io_uring_submit(&r.ring)
        if seen == 0:
            seen = io_uring_peek_batch_cqe(&r.ring, cqes, <unsigned>min(most, MOST_CQES))
    for i in range(seen):
        tag = cqes[i].user_data
        if tag == WAKE_TAG:
            r.wake_armed = False
        elif tag != CANCEL_TAG:
            done[n] = <skv_io *><size_t>tag
            complete(r, done[n], cqes[i].res)
            n += 1
    io_uring_cq_advance(&r.ring, seen)
    if seen == 0 and rc == -EINTR:
        return -EINTR
    return n


cdef inline void wake_ring(void *self) noexcept nogil:
    cdef uint64_t one = 1
    write((<Ring *>self).wake_fd, &one, 8)


cdef inline void cancel_in_ring(void *self, skv_io *io) noexcept nogil:
    cdef Ring *r = <Ring *>self
    cdef io_uring_sqe *sqe = io_uring_get_sqe(&r.ring)
    if sqe != NULL:
        io_uring_prep_cancel64(sqe, <uint64_t><size_t>io, 0)
        io_uring_sqe_set_data64(sqe, CANCEL_TAG)
