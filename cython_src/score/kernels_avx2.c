/* x86-64 with AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>

#define SKV_TARGET __attribute__((target("avx2")))
#include "kernels_loops.h"

#define ALWAYS_INLINE SKV_TARGET static inline __attribute__((always_inline))

#define TILE 16u         /* tokens at a time: two registers of a token per 32-bit lane */
#define MAX_HEADS 4u     /* at a time: as many as have registers for their sums */
#define WORD 16u         /* elements in 32 bits of a code */
#define WORDS_ADDED 8u   /* words whose sums of pairs fit 16 bits: 8 * 4 * (2 * 3 * 127) < 2^15 */

/* Words first to first + 3 of eight tokens that lie `stride` bytes apart: out[i] has word first + i
 * of all of them, in order. */
ALWAYS_INLINE void load_words(const uint8_t *codes, size_t stride, size_t first, __m256i out[4])
{
    __m256i rows[4];
    for (size_t t = 0; t < 4; t++) {
        const uint8_t *near = codes + t * stride + 4 * first, *far = near + 4 * stride;
        rows[t] = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)near)),
            _mm_loadu_si128((const __m128i *)far), 1);
    }
    __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]), b = _mm256_unpackhi_epi32(rows[0], rows[1]);
    __m256i c = _mm256_unpacklo_epi32(rows[2], rows[3]), d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    out[0] = _mm256_unpacklo_epi64(a, c);
    out[1] = _mm256_unpackhi_epi64(a, c);
    out[2] = _mm256_unpacklo_epi64(b, d);
    out[3] = _mm256_unpackhi_epi64(b, d);
}

/* Adds what a word of 2 * 8 tokens gives with the queries [4][heads]: four numbers of 32 bits each,
 * for the elements at bits 0, 2, 4 and 6 of the word's bytes. */
ALWAYS_INLINE void add_word(__m256i near, __m256i far, const int32_t *queries, size_t heads,
                            __m256i sums[MAX_HEADS][2])
{
    const __m256i mask = _mm256_set1_epi8(3);
#pragma GCC unroll 1
    for (size_t k = 0; k < 4; k++) {
        __m256i a = _mm256_and_si256(near, mask), b = _mm256_and_si256(far, mask);
#pragma GCC unroll 4
        for (size_t h = 0; h < heads; h++) {
            __m256i query = _mm256_set1_epi32(queries[k * heads + h]);
            sums[h][0] = _mm256_add_epi16(sums[h][0], _mm256_maddubs_epi16(a, query));
            sums[h][1] = _mm256_add_epi16(sums[h][1], _mm256_maddubs_epi16(b, query));
        }
        near = _mm256_srli_epi16(near, 2);
        far = _mm256_srli_epi16(far, 2);
    }
}

/* out[h * stride + t]: the scores of a tile's tokens. */
ALWAYS_INLINE void score_tile(const uint8_t *codes, const int32_t *queries, const float *factors,
                              const int32_t *query_sums, size_t heads, const float *scales,
                              size_t dim, float *out, size_t stride)
{
    const size_t nbytes = dim / 4, words = dim / WORD;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dots[MAX_HEADS][2];
    for (size_t h = 0; h < heads; h++)
        dots[h][0] = dots[h][1] = _mm256_setzero_si256();
    for (size_t first = 0; first < words; first += WORDS_ADDED) {
        __m256i sums[MAX_HEADS][2];
        for (size_t h = 0; h < heads; h++)
            sums[h][0] = sums[h][1] = _mm256_setzero_si256();
        size_t end = first + WORDS_ADDED < words ? first + WORDS_ADDED : words;
        for (size_t word = first; word < end; word += 4) {
            __m256i near[4], far[4];
            /* The last words are loaded with some before them, so that nothing behind is touched. */
            size_t loaded = word + 4 <= words ? word : words - 4;
            load_words(codes, nbytes, loaded, near);
            load_words(codes + 8 * nbytes, nbytes, loaded, far);
            for (size_t i = word - loaded; i < 4; i++)
                add_word(near[i], far[i], queries + 4 * (loaded + i) * heads, heads, sums);
        }
        for (size_t h = 0; h < heads; h++)
            for (size_t half = 0; half < 2; half++)
                dots[h][half] = _mm256_add_epi32(dots[h][half],
                                                 _mm256_madd_epi16(sums[h][half], ones));
    }
    for (size_t h = 0; h < heads; h++)
        for (size_t half = 0; half < 2; half++) {
            __m256i twice = _mm256_slli_epi32(dots[h][half], 1);
            twice = _mm256_sub_epi32(twice, _mm256_set1_epi32(3 * query_sums[h]));
            __m256 scored = _mm256_mul_ps(_mm256_cvtepi32_ps(twice), _mm256_set1_ps(factors[h]));
            scored = _mm256_mul_ps(scored, _mm256_loadu_ps(scales + 8 * half));
            _mm256_storeu_ps(out + h * stride + 8 * half, scored);
        }
}

ALWAYS_INLINE void score_heads(const int32_t *queries, const float *factors,
                               const int32_t *query_sums, size_t heads, const uint8_t *codes,
                               const float *scales, size_t n, size_t dim, float *out)
{
    const size_t nbytes = dim / 4, left = n % TILE, whole = n - left;
    for (size_t t = 0; t < whole; t += TILE)
        score_tile(codes + t * nbytes, queries, factors, query_sums, heads, scales + t, dim, out + t,
                   n);
    if (left) {
        uint8_t last[TILE * SKV_MAX_DIM / 4] = {0};
        float last_scales[TILE] = {0}, scored[MAX_HEADS * TILE];
        memcpy(last, codes + whole * nbytes, left * nbytes);
        memcpy(last_scales, scales + whole, left * sizeof(float));
        score_tile(last, queries, factors, query_sums, heads, last_scales, dim, scored, TILE);
        for (size_t h = 0; h < heads; h++)
            memcpy(out + h * n + whole, scored + h * TILE, left * sizeof(float));
    }
}

SKV_TARGET static void dots(const int8_t *queries, const float *factors, const int32_t *sums,
                            size_t heads, const uint8_t *codes, const float *scales, size_t n,
                            size_t dim, float *out)
{
    if (dim % WORD || dim < 4 * WORD) {
        skv_kernels_portable.dots(queries, factors, sums, heads, codes, scales, n, dim, out);
        return;
    }
    while (heads) {
        size_t some = heads < MAX_HEADS ? heads : MAX_HEADS;
        int32_t words[MAX_HEADS * SKV_MAX_DIM / 4];
        int8_t *bytes = (int8_t *)words;
        /* Element 4j + k of a query goes where bits 2k of byte j of a code meet it. */
        for (size_t h = 0; h < some; h++)
            for (size_t j = 0; j < dim / 4; j++)
                for (size_t k = 0; k < 4; k++)
                    bytes[((j / 4 * 4 + k) * some + h) * 4 + j % 4] = queries[h * dim + 4 * j + k];
        switch (some) {
        case 1: score_heads(words, factors, sums, 1, codes, scales, n, dim, out); break;
        case 2: score_heads(words, factors, sums, 2, codes, scales, n, dim, out); break;
        case 3: score_heads(words, factors, sums, 3, codes, scales, n, dim, out); break;
        default: score_heads(words, factors, sums, 4, codes, scales, n, dim, out); break;
        }
        heads -= some;
        queries += some * dim;
        factors += some;
        sums += some;
        out += some * n;
    }
}

/* In each half of a register: the maxima of a's two pairs of neighbours, then those of b's. */
ALWAYS_INLINE __m256 max_of_pairs(__m256 a, __m256 b)
{
    return _mm256_max_ps(_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd));
}

SKV_TARGET static float group_max(const float *x, size_t n, size_t group, float *out)
{
    if (group != 4 && group % 8)
        return skv_kernels_portable.group_max(x, n, group, out);
    const __m256 lowest = _mm256_set1_ps(-INFINITY);
    size_t groups = n / group, i = 0;
    for (; i + 8 <= groups; i += 8) {
        __m256 v[8];
        if (group == 4) {
            /* Loaded so that the shuffles below, which stay within 128 bits, leave the order. */
            for (size_t k = 0; k < 4; k++) {
                const float *at = x + 4 * i + 4 * k;
                v[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)),
                                            _mm_loadu_ps(at + 16), 1);
                v[k] = _mm256_max_ps(v[k], lowest);
            }
        } else {
            for (size_t k = 0; k < 8; k++) {
                const float *at = x + (i + k) * group;
                v[k] = lowest;
                for (size_t t = 0; t < group; t += 8)
                    v[k] = _mm256_max_ps(_mm256_loadu_ps(at + t), v[k]);
            }
            for (size_t k = 0; k < 4; k++)
                v[k] = _mm256_max_ps(_mm256_permute2f128_ps(v[k], v[k + 4], 0x20),
                                     _mm256_permute2f128_ps(v[k], v[k + 4], 0x31));
        }
        v[0] = max_of_pairs(max_of_pairs(v[0], v[1]), max_of_pairs(v[2], v[3]));
        _mm256_storeu_ps(out + i, v[0]);
    }
    skv_kernels_portable.group_max(x + i * group, n - i * group, group, out + i);
    return max_of(out, (n + group - 1) / group);
}

const struct skv_kernels skv_kernels_avx2 = {
    "avx2", encode, dots, group_max, exp_sum, raise_to, order, count_from,
};
#endif
