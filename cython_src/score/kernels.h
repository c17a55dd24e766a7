/*
 * The inner loops of scoring, one table of them per kind of processor. All tables give bit-identical
 * results: integers where numbers are summed over a head's dimensions, and else the same float
 * operations in the same order.
 *
 * A token's code is dim/4 bytes per KV head. Byte j holds the elements 4j to 4j+3, two bits each, from
 * the lowest bits up; a code c stands for the level c - 3/2.
 */
#ifndef SPDK_KV_SCORE_KERNELS_H
#define SPDK_KV_SCORE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/* A head has at most so many dimensions: it bounds what lies on the stack, and the integers. */
#define SKV_MAX_DIM 1024u

struct skv_kernels {
    const char *name;

    /* Centres keys [n, dim], rotates them by `signs` and a Walsh-Hadamard transform over blocks of
     * `block` elements, and writes their codes [n, dim/4] and scales [n]. */
    void (*encode)(const float *keys, const float *mean, const float *signs, size_t n, size_t dim,
                   size_t block, uint8_t *codes, float *scales);

    /* out[h * n + t] = ((float)(2 * sum(code * query) - 3 * sum(query)) * factors[h]) * scales[t],
     * for `queries` [heads, dim], none of which holds -128, and with their sums. */
    void (*dots)(const int8_t *queries, const float *factors, const int32_t *sums, size_t heads,
                 const uint8_t *codes, const float *scales, size_t n, size_t dim, float *out);

    /* The maximum of each `group` neighbours of x [n], NaN counting as -inf; returns that of all,
     * -inf where there are none. */
    float (*group_max)(const float *x, size_t n, size_t group, float *out);

    /* The sum of exp(x - max) over x [n], for a finite max that no x exceeds; NaN and -inf add
     * nothing that shows. Each term has a relative error below 5e-6. */
    double (*exp_sum)(const float *x, size_t n, float max);

    /* out[i] = max(out[i], (x[i] - max) - log_sum) */
    void (*raise_to)(const float *x, size_t n, float max, float log_sum, float *out);

    /* Integers that are ordered as x [n] is: NaN below all others, -0 equal to 0. */
    void (*order)(const float *x, size_t n, int32_t *keys, int32_t *min, int32_t *max);

    /* How many of the keys are at least `bound`. */
    size_t (*count_from)(const int32_t *keys, size_t n, int32_t bound);
};

extern const struct skv_kernels skv_kernels_portable;
#if defined(__x86_64__)
extern const struct skv_kernels skv_kernels_avx2;
#endif

/* The table of that name, or NULL if it cannot run on this processor; the fastest for NULL. */
const struct skv_kernels *skv_kernels_find(const char *name);

#endif
