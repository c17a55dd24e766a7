/*
 * The loops that compilers turn into vector instructions by themselves. Each kind of processor
 * includes this file once, with SKV_TARGET saying what it may use. Sums are kept in eight lanes and
 * joined in one order, and the extension is compiled without contraction to fused multiply-add, so
 * that the results do not depend on the width of a register.
 */
#include "kernels.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define LANES 8u

/* The uniform quantiser of four levels that has the least mean square error for a Gaussian has steps
 * of this many standard deviations (Max, "Quantizing for minimum distortion", 1960, table II). */
#define GAUSSIAN_STEP 0.9957f

/* Unnormalised. x [dim][LANES]: every lane is a token. */
SKV_TARGET static void transform(float *x, size_t dim, size_t block)
{
    for (size_t half = LANES; half < block * LANES; half *= 2)
        for (size_t start = 0; start < dim * LANES; start += 2 * half) {
            float *restrict low = x + start, *restrict high = x + start + half;
            for (size_t i = 0; i < half; i++) {
                float sum = low[i] + high[i], difference = low[i] - high[i];
                low[i] = sum;
                high[i] = difference;
            }
        }
}

/* The step of each lane's quantiser; 0 where the lane cannot be quantised. */
SKV_TARGET static void find_steps(const float *x, size_t dim, float *steps)
{
    float squares[LANES] = {0};
    for (size_t d = 0; d < dim; d++)
        for (size_t t = 0; t < LANES; t++)
            squares[t] += x[d * LANES + t] * x[d * LANES + t];
    for (size_t t = 0; t < LANES; t++) {
        int is_scorable = squares[t] > 0 && squares[t] <= FLT_MAX; /* false for NaN */
        steps[t] = is_scorable ? GAUSSIAN_STEP * sqrtf(squares[t] / (float)dim) : 0;
    }
}

/* Quantises by `steps`; codes [dim][LANES]. Returns in `scales` those that fit the levels best. */
SKV_TARGET static void quantise(const float *x, size_t dim, const float *steps, int32_t *codes,
                                float *scales)
{
    float along[LANES] = {0}, squares[LANES] = {0};
    for (size_t d = 0; d < dim; d++)
        for (size_t t = 0; t < LANES; t++) {
            float value = x[d * LANES + t], step = steps[t];
            int32_t code = (value >= -step) + (value >= 0) + (value >= step);
            float level = (float)code - 1.5f;
            along[t] += value * level;
            squares[t] += level * level;
            codes[d * LANES + t] = step > 0 ? code : 0;
        }
    for (size_t t = 0; t < LANES; t++)
        scales[t] = steps[t] > 0 ? along[t] / squares[t] : 0;
}

SKV_TARGET static void encode(const float *keys, const float *mean, const float *signs, size_t n,
                              size_t dim, size_t block, uint8_t *codes, float *scales)
{
    float x[SKV_MAX_DIM * LANES], steps[LANES], fitted[LANES];
    int32_t quantised[SKV_MAX_DIM * LANES];
    float norm = 1 / sqrtf((float)block);
    memset(x, 0, dim * LANES * sizeof(float));
    for (size_t first = 0; first < n; first += LANES) {
        size_t tokens = n - first < LANES ? n - first : LANES;
        for (size_t t = 0; t < tokens; t++)
            for (size_t d = 0; d < dim; d++)
                x[d * LANES + t] = (keys[(first + t) * dim + d] - mean[d]) * signs[d];
        transform(x, dim, block);
        find_steps(x, dim, steps);
        quantise(x, dim, steps, quantised, fitted);
        for (size_t t = 0; t < tokens; t++)
            scales[first + t] = fitted[t] * norm;
        for (size_t j = 0; j < dim / 4; j++) {
            const int32_t *four = quantised + 4 * j * LANES;
            for (size_t t = 0; t < tokens; t++)
                codes[(first + t) * (dim / 4) + j] =
                    (uint8_t)(four[t] | four[LANES + t] << 2 | four[2 * LANES + t] << 4 |
                              four[3 * LANES + t] << 6);
        }
    }
}

/* b where a is NaN */
SKV_TARGET static inline float greater(float a, float b) { return a > b ? a : b; }

#define LOG2_E 0x1.715476p0f
/* The minimax polynomial of 2^f for |f| <= 1/2; its relative error is 2.6e-6. */
#define EXP2_0 0x1.ffffe8p-1f
#define EXP2_1 0x1.62e0dcp-1f
#define EXP2_2 0x1.ec06dap-3f
#define EXP2_3 0x1.ca1444p-5f
#define EXP2_4 0x1.3997dap-7f
/* Adding it rounds to an integer, which the low bits then hold. */
#define EXP2_MAGIC 0x1.8p23f
/* Smaller exponents count as this one: the result stays a normal number. */
#define EXP2_LEAST -125.0f

/* 2^x for x <= 0, and 2^-125 for NaN */
SKV_TARGET static inline float exp2_of(float x)
{
    float clamped = x > EXP2_LEAST ? x : EXP2_LEAST;
    float rounded = clamped + EXP2_MAGIC;
    float f = clamped - (rounded - EXP2_MAGIC);
    /* Two halves, since what limits it is how long one operation waits for the other. */
    float low = f * EXP2_1 + EXP2_0, high = f * EXP2_3 + EXP2_2 + f * f * EXP2_4;
    float p = low + f * f * high;
    uint32_t bits, exponent;
    memcpy(&bits, &p, sizeof(bits));
    memcpy(&exponent, &rounded, sizeof(exponent));
    bits += exponent << 23;
    memcpy(&p, &bits, sizeof(p));
    return p;
}

/* Terms that are summed in floats before doubles take over: their rounding stays below that of a
 * term's own error. */
#define TERMS 512u

SKV_TARGET static inline double join(const float *lanes)
{
    double sum = 0;
    for (size_t t = 0; t < LANES; t++)
        sum += lanes[t];
    return sum;
}

SKV_TARGET static double exp_sum(const float *x, size_t n, float max)
{
    double sum = 0;
    for (size_t first = 0; first < n; first += TERMS) {
        size_t count = n - first < TERMS ? n - first : TERMS, i = 0;
        float terms[TERMS], lanes[LANES] = {0};
        for (size_t j = 0; j < count; j++)
            terms[j] = exp2_of((x[first + j] - max) * LOG2_E);
        for (; i + LANES <= count; i += LANES)
            for (size_t t = 0; t < LANES; t++)
                lanes[t] += terms[i + t];
        for (; i < count; i++)
            lanes[0] += terms[i];
        sum += join(lanes);
    }
    return sum;
}

SKV_TARGET static void raise_to(const float *x, size_t n, float max, float log_sum,
                                float *out)
{
    for (size_t i = 0; i < n; i++)
        out[i] = greater(x[i] - max - log_sum + 0.0f, out[i]); /* never -0 */
}

SKV_TARGET static void order(const float *restrict x, size_t n, int32_t *restrict keys, int32_t *min,
                             int32_t *max)
{
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (size_t i = 0; i < n; i++) {
        float value = x[i] + 0.0f; /* 0 for -0 */
        int32_t bits;
        memcpy(&bits, &value, sizeof(bits));
        /* Negative floats are ordered backwards as integers. */
        bits ^= (bits >> 31) & INT32_MAX;
        keys[i] = value == value ? bits : INT32_MIN;
    }
    for (size_t i = 0; i < n; i++) {
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    *min = least;
    *max = most;
}

SKV_TARGET static size_t count_from(const int32_t *keys, size_t n, int32_t bound)
{
    size_t total = 0;
    for (size_t first = 0; first < n; first += TERMS) {
        size_t end = n - first < TERMS ? n : first + TERMS;
        int32_t count = 0;
        for (size_t i = first; i < end; i++)
            count += keys[i] >= bound;
        total += (size_t)count;
    }
    return total;
}
