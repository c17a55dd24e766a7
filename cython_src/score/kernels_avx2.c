/* x86-64 with AVX2. */
#if defined(__x86_64__)
#include <immintrin.h>

#define SKV_TARGET __attribute__((target("avx2")))
#include "kernels_loops.h"

#define ALWAYS_INLINE SKV_TARGET static inline __attribute__((always_inline))

#define MAX_HEADS 4u   /* at a time: as many as have registers for their sums */
#define WORD 16u       /* elements in 32 bits of a code */
#define WORDS_ADDED 8u /* words whose sums of pairs fit 16 bits: 8 * 4 * (2 * 3 * 127) < 2^15 */
#define TILE 16u       /* tokens at a time: the same word of eight in each of two registers */
/* Tiles that are transposed before any is used: the latency of one would show. */
#define TILES 4u
#define TOKENS (TILES * TILE)
#define LINE_NBYTES 64u
/* So far ahead codes are prefetched: a page, since processors do not look past one by themselves. */
#define AHEAD_NBYTES 4096u

/* Words first to first + 3 of eight tokens that lie `stride` bytes apart: out[2 * i] has word
 * first + i of all of them, in order. */
ALWAYS_INLINE void load_words(const uint8_t *codes, size_t stride, size_t first, __m256i out[8])
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
    out[2] = _mm256_unpackhi_epi64(a, c);
    out[4] = _mm256_unpacklo_epi64(b, d);
    out[6] = _mm256_unpackhi_epi64(b, d);
}

/* The codes of TOKENS tokens as [tile][word][2] registers. */
ALWAYS_INLINE void transpose(const uint8_t *codes, size_t dim, __m256i *out)
{
    const size_t nbytes = dim / 4, words = dim / WORD;
    for (size_t i = 0; i < TOKENS * nbytes; i += LINE_NBYTES)
        _mm_prefetch((const char *)((uintptr_t)codes + AHEAD_NBYTES + i), _MM_HINT_T0);
    for (size_t tile = 0; tile < TILES; tile++, codes += TILE * nbytes, out += 2 * words)
        for (size_t word = 0; word < words; word += 4) {
            /* The last words are loaded with some before them, so that nothing behind is touched. */
            size_t first = word + 4 <= words ? word : words - 4;
            load_words(codes, nbytes, first, out + 2 * first);
            load_words(codes + 8 * nbytes, nbytes, first, out + 2 * first + 1);
        }
}

/* Adds what a word of a tile gives with the queries [4][heads]: four numbers of 32 bits each, for the
 * elements at bits 0, 2, 4 and 6 of the word's bytes. */
ALWAYS_INLINE void add_word(const __m256i *word, const int32_t *queries, size_t heads,
                            __m256i sums[MAX_HEADS][2])
{
    const __m256i mask = _mm256_set1_epi8(3);
    __m256i near = word[0], far = word[1];
#pragma GCC unroll 4
    for (size_t k = 0; k < 4; k++) {
        __m256i a = _mm256_and_si256(near, mask), b = _mm256_and_si256(far, mask);
#pragma GCC unroll 4
        for (size_t h = 0; h < heads; h++) {
            __m256i query = _mm256_set1_epi32(queries[k * heads + h]);
            sums[h][0] = _mm256_add_epi16(sums[h][0], _mm256_maddubs_epi16(a, query));
            sums[h][1] = _mm256_add_epi16(sums[h][1], _mm256_maddubs_epi16(b, query));
            /* One head after the other: the products of all would take the sums' registers. */
            __asm__ volatile("" : "+x"(sums[h][0]), "+x"(sums[h][1]));
        }
        near = _mm256_srli_epi16(near, 2);
        far = _mm256_srli_epi16(far, 2);
    }
}

/* out[h * stride + t]: the scores of a tile's tokens. */
ALWAYS_INLINE void score_tile(const __m256i *tile, const int32_t *queries, const float *factors,
                              const int32_t *query_sums, size_t heads, const float *scales,
                              size_t words, float *out, size_t stride)
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dots[MAX_HEADS][2];
    for (size_t h = 0; h < heads; h++)
        dots[h][0] = dots[h][1] = _mm256_setzero_si256();
    for (size_t first = 0; first < words; first += WORDS_ADDED) {
        size_t end = first + WORDS_ADDED < words ? first + WORDS_ADDED : words;
        __m256i sums[MAX_HEADS][2];
        for (size_t h = 0; h < heads; h++)
            sums[h][0] = sums[h][1] = _mm256_setzero_si256();
        for (size_t word = first; word < end; word++)
            add_word(tile + 2 * word, queries + 4 * word * heads, heads, sums);
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

ALWAYS_INLINE void score_tiles(const int32_t *queries, const float *factors,
                               const int32_t *query_sums, size_t heads, const uint8_t *codes,
                               const float *scales, size_t dim, float *out, size_t stride)
{
    __m256i transposed[TILES * 2 * SKV_MAX_DIM / WORD];
    transpose(codes, dim, transposed);
    for (size_t tile = 0; tile < TILES; tile++)
        score_tile(transposed + tile * 2 * (dim / WORD), queries, factors, query_sums, heads,
                   scales + tile * TILE, dim / WORD, out + tile * TILE, stride);
}

ALWAYS_INLINE void score_heads(const int32_t *queries, const float *factors,
                               const int32_t *query_sums, size_t heads, const uint8_t *codes,
                               const float *scales, size_t n, size_t dim, float *out)
{
    const size_t nbytes = dim / 4, left = n % TOKENS, whole = n - left;
    for (size_t t = 0; t < whole; t += TOKENS)
        score_tiles(queries, factors, query_sums, heads, codes + t * nbytes, scales + t, dim, out + t,
                    n);
    if (left) {
        uint8_t last[TOKENS * SKV_MAX_DIM / 4];
        float last_scales[TOKENS] = {0}, scored[MAX_HEADS * TOKENS];
        memcpy(last, codes + whole * nbytes, left * nbytes);
        memset(last + left * nbytes, 0, (TOKENS - left) * nbytes);
        memcpy(last_scales, scales + whole, left * sizeof(float));
        score_tiles(queries, factors, query_sums, heads, last, last_scales, dim, scored, TOKENS);
        for (size_t h = 0; h < heads; h++)
            memcpy(out + h * n + whole, scored + h * TOKENS, left * sizeof(float));
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
    __m256 most = lowest;
    size_t groups = n / group, i = 0;
    for (; i + 8 <= groups; i += 8) {
        __m256 v[8];
        if (group == 4) {
            /* Loaded so that the shuffles below, which stay within 128 bits, leave the order. */
            for (size_t k = 0; k < 4; k++) {
                const float *at = x + 4 * i + 4 * k;
                v[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at)),
                                            _mm_loadu_ps(at + 16), 1);
                v[k] = _mm256_max_ps(v[k], lowest); /* the second one for NaN */
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
        most = _mm256_max_ps(most, v[0]);
        _mm256_storeu_ps(out + i, v[0]);
    }
    float lanes[LANES], last;
    last = skv_kernels_portable.group_max(x + i * group, n - i * group, group, out + i);
    _mm256_storeu_ps(lanes, most);
    for (size_t t = 0; t < LANES; t++)
        last = greater(lanes[t], last);
    return last;
}

#define CHAINS 4u /* registers that go through a polynomial at once: its latency is that of ten of them */

/* As `exp2_of`: the same operations in the same order. */
ALWAYS_INLINE void exp2_lanes(__m256 x[CHAINS])
{
    const __m256 magic = _mm256_set1_ps(EXP2_MAGIC), least = _mm256_set1_ps(EXP2_LEAST);
    __m256 rounded[CHAINS], low[CHAINS], high[CHAINS], square[CHAINS];
    for (size_t i = 0; i < CHAINS; i++) {
        x[i] = _mm256_max_ps(x[i], least); /* the second one for NaN */
        rounded[i] = _mm256_add_ps(x[i], magic);
        x[i] = _mm256_sub_ps(x[i], _mm256_sub_ps(rounded[i], magic));
    }
    for (size_t i = 0; i < CHAINS; i++) {
        square[i] = _mm256_mul_ps(x[i], x[i]);
        low[i] = _mm256_add_ps(_mm256_mul_ps(x[i], _mm256_set1_ps(EXP2_1)), _mm256_set1_ps(EXP2_0));
        high[i] = _mm256_add_ps(_mm256_mul_ps(x[i], _mm256_set1_ps(EXP2_3)), _mm256_set1_ps(EXP2_2));
    }
    for (size_t i = 0; i < CHAINS; i++) {
        high[i] = _mm256_add_ps(high[i], _mm256_mul_ps(square[i], _mm256_set1_ps(EXP2_4)));
        low[i] = _mm256_add_ps(low[i], _mm256_mul_ps(square[i], high[i]));
    }
    for (size_t i = 0; i < CHAINS; i++) {
        __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(rounded[i]), 23);
        x[i] = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(low[i]), exponent));
    }
}

SKV_TARGET static double exp_sum_lanes(const float *x, size_t n, float max)
{
    const __m256 shift = _mm256_set1_ps(max), log2_e = _mm256_set1_ps(LOG2_E);
    double sum = 0;
    for (; n >= TERMS; n -= TERMS, x += TERMS) {
        float lanes[LANES];
        __m256 terms[CHAINS], added = _mm256_setzero_ps();
        for (size_t i = 0; i < TERMS; i += CHAINS * LANES) {
            for (size_t k = 0; k < CHAINS; k++) {
                terms[k] = _mm256_sub_ps(_mm256_loadu_ps(x + i + k * LANES), shift);
                terms[k] = _mm256_mul_ps(terms[k], log2_e);
            }
            exp2_lanes(terms);
            for (size_t k = 0; k < CHAINS; k++)
                added = _mm256_add_ps(added, terms[k]);
        }
        _mm256_storeu_ps(lanes, added);
        sum += join(lanes);
    }
    return sum + exp_sum(x, n, max);
}

const struct skv_kernels skv_kernels_avx2 = {
    "avx2", encode, dots, group_max, exp_sum_lanes, raise_to, order, count_from,
};
#endif
