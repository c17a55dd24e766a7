from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void *iov_base
        size_t iov_len

cdef extern from "backend.h" nogil:
    const char *SKV_BACKEND_CAPSULE
    enum:
        SKV_NVME_STATUS
        SKV_READ
        SKV_WRITE
        SKV_FLUSH
        SKV_DISCARD
        SKV_OPS
        SKV_BUCKETS
        SKV_QUARTER

    ctypedef struct skv_io:
        uint64_t offset
        void *addr
        const iovec *place
        uint32_t places
        uint32_t nbytes
        int32_t op
        int32_t result
        uint32_t cold_nbytes
        skv_io *next
        uint64_t submitted_ns
        uint32_t *crcs
        uint32_t chunk_nbytes
        uint32_t sum_nbytes
        uint8_t summed
        uint64_t piece_offset
        uint64_t piece_nbytes
        void *owner

    ctypedef struct skv_backend:
        void *self
        int (*submit)(void *self, skv_io *io) noexcept nogil
        int (*poll)(void *self, skv_io **done, int max, int least, int64_t wait_ns) noexcept nogil
        void (*wake)(void *self) noexcept nogil
        void (*cancel)(void *self, skv_io *io) noexcept nogil
        int (*reaches)(void *self, const void *addr, uint64_t nbytes) noexcept nogil
        int (*bind)(void *self, void (*ask)(void *) noexcept nogil, void *asked) noexcept nogil
        void (*serve)(void *self) noexcept nogil
        void (*unbind)(void *self) noexcept nogil
        uint32_t most_places
        uint64_t (*cpu_ns)(void *self) noexcept nogil

    uint64_t skv_now_ns()
    void skv_relax()
    int skv_bucket(uint64_t ns)
    uint64_t skv_bucket_ns(int bucket)
    uint64_t skv_bucket_end_ns(int bucket)
