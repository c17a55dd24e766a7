# The part of liburing that the engines use; declarations only.
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t

from backend cimport iovec

cdef extern from "<liburing.h>" nogil:
    struct io_uring_sqe:
        uint8_t opcode
        uint8_t flags
        int32_t fd
        uint32_t cmd_op
        # 80 bytes of the command's own, in a ring with IORING_SETUP_SQE128.
        uint8_t *cmd
    struct io_uring_cqe:
        uint64_t user_data
        int res
    struct io_uring:
        int ring_fd
    struct io_uring_params:
        uint32_t flags
        uint32_t features
    struct __kernel_timespec:
        long long tv_sec
        long long tv_nsec

    unsigned IORING_SETUP_CLAMP
    unsigned IORING_SETUP_R_DISABLED
    unsigned IORING_SETUP_SQE128
    unsigned IORING_SETUP_CQE32
    uint8_t IORING_OP_URING_CMD
    unsigned IORING_FEAT_EXT_ARG
    unsigned IORING_FSYNC_DATASYNC
    unsigned IOSQE_FIXED_FILE

    int io_uring_queue_init_params(unsigned entries, io_uring *ring, io_uring_params *params)
    void io_uring_queue_exit(io_uring *ring)
    int io_uring_register_ring_fd(io_uring *ring)
    int io_uring_unregister_ring_fd(io_uring *ring)
    io_uring_sqe *io_uring_get_sqe(io_uring *ring)
    int io_uring_submit(io_uring *ring)
    unsigned io_uring_sq_ready(const io_uring *ring)
    int io_uring_submit_and_wait_timeout(io_uring *ring, io_uring_cqe **cqe, unsigned wait_nr,
                                         __kernel_timespec *ts, void *sigmask)
    unsigned io_uring_peek_batch_cqe(io_uring *ring, io_uring_cqe **cqes, unsigned count)
    void io_uring_cq_advance(io_uring *ring, unsigned count)
    void io_uring_sqe_set_data64(io_uring_sqe *sqe, uint64_t data)
    void io_uring_prep_read(io_uring_sqe *, int fd, void *, unsigned nbytes, uint64_t offset)
    void io_uring_prep_write(io_uring_sqe *, int fd, const void *, unsigned nbytes, uint64_t offset)
    void io_uring_prep_read_fixed(io_uring_sqe *, int fd, void *, unsigned nbytes, uint64_t offset,
                                  int index)
    void io_uring_prep_write_fixed(io_uring_sqe *, int fd, const void *, unsigned nbytes,
                                   uint64_t offset, int index)
    void io_uring_prep_readv(io_uring_sqe *, int fd, const iovec *, unsigned count, uint64_t offset)
    void io_uring_prep_writev(io_uring_sqe *, int fd, const iovec *, unsigned count, uint64_t offset)
    void io_uring_prep_fsync(io_uring_sqe *, int fd, unsigned flags)
    void io_uring_prep_fallocate(io_uring_sqe *, int fd, int mode, uint64_t offset, uint64_t nbytes)
    void io_uring_prep_cancel64(io_uring_sqe *, uint64_t user_data, int flags)
    int io_uring_register_files(io_uring *ring, const int *files, unsigned count)
    int io_uring_unregister_files(io_uring *ring)
    int io_uring_unregister_buffers(io_uring *ring)
    int io_uring_register_buffers_sparse(io_uring *ring, unsigned count)
    int io_uring_register_buffers_update_tag(io_uring *ring, unsigned offset, const iovec *iovecs,
                                             const unsigned long long *tags, unsigned count)
