/* What every processor can run. */
#define SKV_TARGET
#include "kernels_loops.h"

static void dots(const int8_t *queries, const float *factors, const int32_t *sums, size_t heads,
                 const uint8_t *codes, const float *scales, size_t n, size_t dim, float *out)
{
    for (size_t t = 0; t < n; t++) {
        int8_t elements[SKV_MAX_DIM];
        const uint8_t *code = codes + t * (dim / 4);
        for (size_t j = 0; j < dim / 4; j++)
            for (size_t k = 0; k < 4; k++)
                elements[4 * j + k] = (int8_t)(code[j] >> (2 * k) & 3);
        for (size_t h = 0; h < heads; h++) {
            int32_t dot = 0;
            for (size_t d = 0; d < dim; d++)
                dot += elements[d] * queries[h * dim + d];
            out[h * n + t] = (float)(2 * dot - 3 * sums[h]) * factors[h] * scales[t];
        }
    }
}

static float group_max(const float *x, size_t n, size_t group, float *out)
{
    float all = -INFINITY;
    for (size_t first = 0; first < n; first += group) {
        float most = -INFINITY;
        for (size_t t = first; t < n && t < first + group; t++)
            most = greater(x[t], most);
        all = greater(most, all);
        *out++ = most;
    }
    return all;
}

const struct skv_kernels skv_kernels_portable = {
    "portable", encode, dots, group_max, exp_sum, raise_to, order, count_from,
};
