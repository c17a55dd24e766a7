# cython: language_level=3, boundscheck=False, wraparound=False
"""The passthrough engine: NVMe commands by io_uring to a namespace's generic node."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EAGAIN, EINTR, EINVAL, EIO, errno
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset, strerror

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_DISCARD, SKV_FLUSH, SKV_NVME_STATUS, SKV_READ, SKV_WRITE,
    skv_backend, skv_io,
)
from engines.ring cimport (
    Ring, bind_ring, cancel_in_ring, close_ring, open_ring, poll_ring, unbind_ring, wake_ring,
)
from liburing cimport *
from nvme_ioctl cimport *

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)


# NVM Command Set 1.0, figure 22; NVMe Base 2.0, figure 138.
DEF OP_FLUSH = 0x00
DEF OP_WRITE = 0x01
DEF OP_READ = 0x02
DEF OP_DATASET_MANAGEMENT = 0x09
DEF ADMIN_IDENTIFY = 0x06
DEF IDENTIFY_NBYTES = 4096
# Dataset management, command dword 11: the ranges are deallocated.
DEF DEALLOCATE = 1 << 2
# Type and code of a status field, without the retry bits (NVMe Base 2.0, figure 94).
DEF STATUS_MASK = 0x7FF
# The kernel's status for commands that it aborted: Command Aborted By Host.
DEF ABORTED_BY_HOST = 0x371
# A command has the number of its blocks in 16 bits, counted from 0 (NVM Command Set 1.0, figure 47).
DEF MOST_BLOCKS = 1 << 16


# One range of dataset management (NVM Command Set 1.0, figure 44).
cdef struct Range:
    uint32_t attributes
    uint32_t nblocks
    uint64_t lba


cdef struct Passthrough:
    Ring common
    skv_backend backend
    bint closed
    uint32_t nsid
    uint32_t block_nbytes
    # The drive reads the ranges of discards in flight from here. Used only by the driver thread.
    Range *ranges
    unsigned range_count
    skv_io **range_of


cdef Range *_take_range(Passthrough *p, skv_io *io) noexcept nogil:
    cdef unsigned i
    for i in range(p.range_count):
        if p.range_of[i] == NULL:
            p.range_of[i] = io
            return &p.ranges[i]
    return NULL


cdef void _give_range(Passthrough *p, skv_io *io) noexcept nogil:
    cdef unsigned i
    for i in range(p.range_count):
        if p.range_of[i] == io:
            p.range_of[i] = NULL


cdef int _submit(void *self, skv_io *io) noexcept nogil:
    cdef Passthrough *p = <Passthrough *>self
    cdef uint64_t lba = io.offset // p.block_nbytes
    cdef uint32_t count = io.nbytes // p.block_nbytes
    cdef nvme_uring_cmd *command
    cdef Range *area = NULL
    cdef io_uring_sqe *sqe
    if (io.op == SKV_READ or io.op == SKV_WRITE) and not 1 <= count <= MOST_BLOCKS:
        return -EINVAL
    if io.op == SKV_DISCARD:
        area = _take_range(p, io)
        if area == NULL:
            return -EAGAIN
    sqe = io_uring_get_sqe(&p.common.ring)
    if sqe == NULL:
        if area != NULL:
            _give_range(p, io)
        return -EAGAIN
    # An entry of twice the size; liburing clears none of it.
    memset(sqe, 0, 128)
    sqe.opcode = IORING_OP_URING_CMD
    sqe.fd = 0 if p.common.fixed_file else p.common.fd
    if p.common.fixed_file:
        sqe.flags = <unsigned char>IOSQE_FIXED_FILE
    sqe.cmd_op = NVME_URING_CMD_IO
    command = <nvme_uring_cmd *>sqe.cmd
    command.nsid = p.nsid
    if io.op == SKV_FLUSH:
        command.opcode = OP_FLUSH
    elif io.op == SKV_DISCARD:
        area.attributes = 0
        area.nblocks = count
        area.lba = lba
        command.opcode = OP_DATASET_MANAGEMENT
        command.addr = <uint64_t><size_t>area
        command.data_len = sizeof(Range)
        command.cdw11 = DEALLOCATE
    else:
        command.opcode = OP_READ if io.op == SKV_READ else OP_WRITE
        command.addr = <uint64_t><size_t>io.addr
        command.data_len = io.nbytes
        command.cdw10 = <uint32_t>lba
        command.cdw11 = <uint32_t>(lba >> 32)
        command.cdw12 = <uint16_t>(count - 1)  # zero-based
    io_uring_sqe_set_data64(sqe, <uint64_t><size_t>io)
    return 0


cdef void _complete(Ring *r, skv_io *io, int res) noexcept nogil:
    # 0, the drive's status field, or -errno; a command that succeeded moved all of its bytes.
    if res == 0:
        io.result = <int>io.nbytes
    elif res > 0:
        io.result = -(SKV_NVME_STATUS | (res & STATUS_MASK))
    elif res == -EINTR:
        io.result = -(SKV_NVME_STATUS | ABORTED_BY_HOST)
    else:
        io.result = res
    if io.op == SKV_DISCARD:
        _give_range(<Passthrough *>r, io)


def namespace_id(int fd):
    """The number of the namespace behind a generic node. Raises OSError."""
    cdef int rc
    with nogil:
        rc = ioctl(fd, NVME_IOCTL_ID)
    if rc < 0:
        raise OSError(errno, f"NVME_IOCTL_ID: {strerror(errno).decode()}")
    return rc


def identify(int fd, uint32_t nsid, uint32_t cns):
    """The 4096 bytes of an Identify command (``cns``: which structure). Blocks without the GIL.

    Raises OSError; EIO if the drive answers with an NVMe status, which is in the message.
    """
    cdef nvme_passthru_cmd command
    cdef char *answer = <char *>calloc(1, IDENTIFY_NBYTES)
    cdef int rc, failed
    if answer == NULL:
        raise MemoryError()
    try:
        memset(&command, 0, sizeof(command))
        command.opcode = ADMIN_IDENTIFY
        command.nsid = nsid
        command.addr = <uint64_t><size_t>answer
        command.data_len = IDENTIFY_NBYTES
        command.cdw10 = cns
        with nogil:
            rc = ioctl(fd, NVME_IOCTL_ADMIN_CMD, &command)
            failed = errno
        if rc < 0:
            raise OSError(failed, f"Identify (CNS {cns}): {strerror(failed).decode()}")
        if rc > 0:
            raise OSError(EIO, f"Identify (CNS {cns}): the drive answers with status {rc:#x}")
        return PyBytes_FromStringAndSize(answer, IDENTIFY_NBYTES)
    finally:
        free(answer)


cdef int _poll(void *self, skv_io **done, int most, int least, int64_t wait_ns) noexcept nogil:
    return poll_ring(self, done, most, least, wait_ns, _complete)


cdef int _bind(void *self, void (*ask)(void *) noexcept nogil, void *asked) noexcept nogil:
    return bind_ring(<Ring *>self)


cdef void _serve(void *self) noexcept nogil:
    pass


cdef void _unbind(void *self) noexcept nogil:
    unbind_ring(<Ring *>self)


@cython.no_gc_clear
cdef class NgBackend:
    """A ring of ``entries`` on ``fd``, a namespace's generic node, which the caller closes.

    ``nsid`` and ``block_nbytes``: the namespace's number and block size. ``lone``: for a queue's
    ``lone``, whose callers take turns; otherwise the queue's own thread alone uses the ring.
    ``backend`` is the capsule for one queue. Raises OSError if the kernel or a container's rules refuse such a ring (EINVAL: a
    kernel older than 5.19).
    """
    cdef Passthrough _p
    cdef int _pid
    cdef readonly object backend

    def __cinit__(self, int fd, unsigned entries, uint32_t nsid, uint32_t block_nbytes,
                  bint lone=False):
        cdef Passthrough *p = &self._p
        self._pid = getpid()
        p.closed = True
        if block_nbytes == 0:
            raise ValueError("block_nbytes must be a block size, not 0")
        p.nsid = nsid
        p.block_nbytes = block_nbytes
        p.range_count = entries
        p.ranges = <Range *>calloc(entries, sizeof(Range))
        p.range_of = <skv_io **>calloc(entries, sizeof(skv_io *))
        if p.ranges == NULL or p.range_of == NULL:
            raise MemoryError()
        open_ring(&p.common, fd, entries, IORING_SETUP_SQE128 | IORING_SETUP_CQE32, not lone)
        p.closed = False
        if not lone:
            p.backend.bind = _bind
            p.backend.serve = _serve
            p.backend.unbind = _unbind
        p.backend.self = p
        p.backend.submit = _submit
        p.backend.poll = _poll
        p.backend.wake = wake_ring
        p.backend.cancel = cancel_in_ring
        p.backend.most_places = 1
        self.backend = PyCapsule_New(&p.backend, SKV_BACKEND_CAPSULE, NULL)

    @property
    def fixed_file(self):
        return bool(self._p.common.fixed_file)

    def close(self):
        """Closes the ring; nothing may be in flight."""
        if not self._p.closed:
            self._p.closed = True
            close_ring(&self._p.common, self._pid == getpid())

    def __dealloc__(self):
        self.close()
        free(self._p.ranges)
        free(self._p.range_of)
