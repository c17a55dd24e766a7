from libc.stdint cimport uint32_t, uint64_t

cdef extern from "crc32c.h" nogil:
    uint32_t skv_crc32c(uint32_t crc, const void *data, size_t nbytes)
    uint32_t skv_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b)
    const char *skv_crc32c_name()
    int skv_crc32c_with(const char *name, uint32_t crc, const void *data, size_t nbytes,
                        uint32_t *result)
