from libc.stdint cimport int8_t, int32_t, uint8_t

cdef extern from "kernels.h" nogil:
    enum:
        SKV_MAX_DIM

    struct skv_kernels:
        const char *name
        void (*encode)(const float *keys, const float *mean, const float *signs, size_t n,
                       size_t dim, size_t block, uint8_t *codes, float *scales) noexcept nogil
        void (*dots)(const int8_t *queries, const float *factors, const int32_t *sums,
                     size_t heads, const uint8_t *codes, const float *scales, size_t n,
                     size_t dim, float *out) noexcept nogil
        float (*group_max)(const float *x, size_t n, size_t group, float *out) noexcept nogil
        double (*exp_sum)(const float *x, size_t n, float max) noexcept nogil
        void (*raise_to)(const float *x, size_t n, float max, float log_sum,
                         float *out) noexcept nogil
        void (*order)(const float *x, size_t n, int32_t *keys, int32_t *min,
                      int32_t *max) noexcept nogil
        size_t (*count_from)(const int32_t *keys, size_t n, int32_t bound) noexcept nogil

    const skv_kernels *skv_kernels_find(const char *name)
