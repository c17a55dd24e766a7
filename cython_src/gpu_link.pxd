from libc.stdint cimport int32_t, uint32_t, uint64_t

cdef extern from "gpu_link.h" nogil:
    const char *SKV_LINK_CAPSULE
    enum:
        SKV_LINK_STATUS
        SKV_TO_DEVICE
        SKV_FROM_DEVICE

    ctypedef struct skv_copy:
        void *host
        uint64_t device
        uint32_t nbytes
        int32_t direction
        int32_t hold
        int32_t result
        void *event
        uint64_t due_ns

    ctypedef struct skv_link:
        void *self
        double ns_per_byte[2]
        uint64_t latency_ns[2]
        int (*copy)(void *self, skv_copy *copy) noexcept nogil
        int (*done)(void *self, skv_copy *copy) noexcept nogil
        int (*mark)(void *self, void *stream, void **event) noexcept nogil
        int (*after)(void *self, int direction, void *event) noexcept nogil
        int (*follow)(void *self, void *stream, void *event) noexcept nogil
        void (*release)(void *self, void *event) noexcept nogil
