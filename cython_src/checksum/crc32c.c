/*
 * CRC32C. In C because Cython has no processor intrinsics.
 *
 * Polynomials over GF(2) are kept bit-reflected, as the crc32 instructions have them: bit 31 of
 * a 32-bit value is the coefficient of x^0.
 */
#include "crc32c.h"

#include <pthread.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define POLY 0x82f63b78u
/* Three streams in parallel: the crc32 instruction has a latency of three cycles and a throughput
 * of one per cycle. Long streams, which are cheap to join; then short ones for the rest and for short
 * ranges: six of them are all but 16 bytes of a page. */
#define LONG_NBYTES 8192u
#define SHORT_NBYTES 680u

typedef uint32_t (*crc_fn)(uint32_t state, const uint8_t *p, size_t n);

static uint32_t table[8][256];     /* slicing by 8 */
typedef uint32_t shift_table[4][256]; /* times x^(8*length of a stream) mod P */
static shift_table shift_long, shift_short;
static uint32_t power_of_two[64];  /* x^(2^k) mod P */
static crc_fn best;
static const char *best_name;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static uint32_t multiply(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit)
            product ^= b;
        b = (b >> 1) ^ (b & 1 ? POLY : 0);
    }
    return product;
}

/* x^n mod P */
static uint32_t x_to_the(uint64_t n)
{
    uint32_t result = 1u << 31;
    for (int k = 0; n; n >>= 1, k++)
        if (n & 1)
            result = multiply(result, power_of_two[k]);
    return result;
}

static void shift_by(shift_table shift, size_t nbytes)
{
    uint32_t factor = x_to_the(8ull * nbytes);
    for (int k = 0; k < 4; k++)
        for (uint32_t i = 0; i < 256; i++)
            shift[k][i] = multiply(i << (8 * k), factor);
}

static inline uint32_t shifted(shift_table shift, uint32_t crc)
{
    return shift[0][crc & 255] ^ shift[1][(crc >> 8) & 255] ^ shift[2][(crc >> 16) & 255] ^
           shift[3][crc >> 24];
}

static uint32_t crc_table(uint32_t c, const uint8_t *p, size_t n)
{
    for (; n >= 8; n -= 8, p += 8) {
        uint32_t low, high;
        memcpy(&low, p, 4);
        memcpy(&high, p + 4, 4);
        low ^= c; /* little-endian, as every platform this builds for */
        c = table[7][low & 255] ^ table[6][(low >> 8) & 255] ^ table[5][(low >> 16) & 255] ^
            table[4][low >> 24] ^ table[3][high & 255] ^ table[2][(high >> 8) & 255] ^
            table[1][(high >> 16) & 255] ^ table[0][high >> 24];
    }
    while (n--)
        c = (c >> 8) ^ table[0][(c ^ *p++) & 255];
    return c;
}

#if defined(__x86_64__)

#define SSE42 __attribute__((target("sse4.2")))
#define CRC64(c, p) ((uint32_t)_mm_crc32_u64((c), load64(p)))
#define CRC8(c, b) _mm_crc32_u8((c), (b))

#elif defined(__aarch64__) && defined(__linux__)

#define SSE42 __attribute__((target("+crc")))
#define CRC64(c, p) __crc32cd((c), load64(p))
#define CRC8(c, b) __crc32cb((c), (b))

#endif

#ifdef SSE42

static inline uint64_t load64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, 8);
    return v;
}

SSE42 static inline uint32_t three_streams(uint32_t c, const uint8_t *p, size_t length,
                                           shift_table shift)
{
    uint32_t c1 = 0, c2 = 0;
    for (size_t i = 0; i < length; i += 8) {
        c = CRC64(c, p + i);
        c1 = CRC64(c1, p + length + i);
        c2 = CRC64(c2, p + 2 * length + i);
    }
    return shifted(shift, shifted(shift, c) ^ c1) ^ c2;
}

SSE42 static uint32_t crc_instruction(uint32_t c, const uint8_t *p, size_t n)
{
    for (; n >= 3 * LONG_NBYTES; n -= 3 * LONG_NBYTES, p += 3 * LONG_NBYTES)
        c = three_streams(c, p, LONG_NBYTES, shift_long);
    for (; n >= 3 * SHORT_NBYTES; n -= 3 * SHORT_NBYTES, p += 3 * SHORT_NBYTES)
        c = three_streams(c, p, SHORT_NBYTES, shift_short);
    for (; n >= 8; n -= 8, p += 8)
        c = CRC64(c, p);
    while (n--)
        c = CRC8(c, *p++);
    return c;
}

#endif

#if defined(__x86_64__)

/*
 * Carry-less folding, four registers of 64 bytes at a time. A register of 128 bits read from
 * memory stands for L*x^64 + H (L: its low half). Carrying it D bits onward multiplies by x^D:
 * L by x^(64+D), H by x^D. The product of two reflected 64-bit values comes out one bit short
 * of the register's convention, hence the -1 in the exponents.
 */
static uint64_t fold_2048[2], fold_1024[2], fold_512[2], fold_256[2], fold_128[2];

static void fold_constants(uint64_t k[2], unsigned bits)
{
    k[0] = (uint64_t)x_to_the(64 + bits - 1) << 32;
    k[1] = (uint64_t)x_to_the(bits - 1) << 32;
}

/* Shared by the functions below: code with AVX-512 must not get into those without. */
#define FOLD128 __attribute__((target("sse4.2,pclmul")))
#define VPCLMUL __attribute__((target("sse4.2,pclmul,avx512f,avx512vl,vpclmulqdq")))

VPCLMUL static inline __m512i fold512(__m512i acc, __m512i next, __m512i k)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(acc, k, 0x00),
                                     _mm512_clmulepi64_epi128(acc, k, 0x11), next, 0x96);
}

FOLD128 static inline __m128i fold128(__m128i acc, __m128i next, __m128i k)
{
    return _mm_xor_si128(
        _mm_xor_si128(_mm_clmulepi64_si128(acc, k, 0x00), _mm_clmulepi64_si128(acc, k, 0x11)),
        next);
}

VPCLMUL static uint32_t crc_vpclmul(uint32_t c, const uint8_t *p, size_t n)
{
    if (n < 512)
        return crc_instruction(c, p, n);
    __m512i k = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)fold_2048));
    __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    __m512i d = _mm512_loadu_si512(p + 128), e = _mm512_loadu_si512(p + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)c)));
    for (p += 256, n -= 256; n >= 256; p += 256, n -= 256) {
        a = fold512(a, _mm512_loadu_si512(p), k);
        b = fold512(b, _mm512_loadu_si512(p + 64), k);
        d = fold512(d, _mm512_loadu_si512(p + 128), k);
        e = fold512(e, _mm512_loadu_si512(p + 192), k);
    }
    k = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)fold_512));
    e = fold512(fold512(fold512(a, b, k), d, k), e, k);
    __m128i k1 = _mm_loadu_si128((const __m128i *)fold_128);
    __m128i r = _mm512_castsi512_si128(e);
    r = fold128(r, _mm512_extracti32x4_epi32(e, 1), k1);
    r = fold128(r, _mm512_extracti32x4_epi32(e, 2), k1);
    r = fold128(r, _mm512_extracti32x4_epi32(e, 3), k1);
    uint64_t crc = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(r));
    crc = _mm_crc32_u64(crc, (uint64_t)_mm_extract_epi64(r, 1));
    return crc_instruction((uint32_t)crc, p, n);
}

/*
 * Without 64-byte registers: the carry-less multiplier has the throughput of the crc32 instruction
 * and its own execution unit. One part of a block is folded while the instruction runs over three
 * streams behind it: 128 bytes, and 40 of each stream, per iteration.
 */
#define LONG_TURNS 64u
#define SHORT_TURNS 8u
#define TURN_NBYTES (128u + 3 * 40u)
static shift_table shift_long_turns, shift_short_turns;

#define FUSED __attribute__((target("sse4.2,pclmul,avx2,vpclmulqdq")))

FUSED static inline __m256i fold256(__m256i acc, __m256i next, __m256i k)
{
    return _mm256_xor_si256(_mm256_xor_si256(_mm256_clmulepi64_epi128(acc, k, 0x00),
                                             _mm256_clmulepi64_epi128(acc, k, 0x11)),
                            next);
}

FUSED static inline __m256i load256(const uint8_t *p)
{
    return _mm256_loadu_si256((const __m256i *)p);
}

FUSED static inline __m256i both_lanes(const uint64_t k[2])
{
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)k));
}

FUSED static inline uint32_t fused_block(uint32_t c, const uint8_t *p, size_t turns,
                                         shift_table shift)
{
    const uint8_t *q = p + 128 * turns;
    const size_t length = 40 * turns;
    __m256i k = both_lanes(fold_1024);
    __m256i a = load256(p), b = load256(p + 32), d = load256(p + 64), e = load256(p + 96);
    a = _mm256_xor_si256(a, _mm256_zextsi128_si256(_mm_cvtsi32_si128((int)c)));
    uint32_t c0 = 0, c1 = 0, c2 = 0;
    for (;;) {
        for (size_t i = 0; i < 40; i += 8) {
            c0 = CRC64(c0, q + i);
            c1 = CRC64(c1, q + length + i);
            c2 = CRC64(c2, q + 2 * length + i);
        }
        if (!--turns)
            break;
        q += 40;
        p += 128;
        a = fold256(a, load256(p), k);
        b = fold256(b, load256(p + 32), k);
        d = fold256(d, load256(p + 64), k);
        e = fold256(e, load256(p + 96), k);
    }
    k = both_lanes(fold_256);
    e = fold256(fold256(fold256(a, b, k), d, k), e, k);
    __m128i r = fold128(_mm256_castsi256_si128(e), _mm256_extracti128_si256(e, 1),
                        _mm_loadu_si128((const __m128i *)fold_128));
    uint64_t folded = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(r));
    folded = _mm_crc32_u64(folded, (uint64_t)_mm_extract_epi64(r, 1));
    c0 ^= shifted(shift, (uint32_t)folded);
    c1 ^= shifted(shift, c0);
    return c2 ^ shifted(shift, c1);
}

FUSED static uint32_t crc_fused(uint32_t c, const uint8_t *p, size_t n)
{
    for (; n >= LONG_TURNS * TURN_NBYTES; n -= LONG_TURNS * TURN_NBYTES) {
        c = fused_block(c, p, LONG_TURNS, shift_long_turns);
        p += LONG_TURNS * TURN_NBYTES;
    }
    for (; n >= SHORT_TURNS * TURN_NBYTES; n -= SHORT_TURNS * TURN_NBYTES) {
        c = fused_block(c, p, SHORT_TURNS, shift_short_turns);
        p += SHORT_TURNS * TURN_NBYTES;
    }
    return crc_instruction(c, p, n);
}

static int has_sse42(void) { return __builtin_cpu_supports("sse4.2"); }

static int has_vpclmul(void)
{
    return has_sse42() && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("vpclmulqdq");
}

static int has_fused(void)
{
    return has_sse42() && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("vpclmulqdq");
}

#endif

static crc_fn find(const char *name)
{
    if (!strcmp(name, "table"))
        return crc_table;
#if defined(__x86_64__)
    if (!strcmp(name, "vpclmul") && has_vpclmul())
        return crc_vpclmul;
    if (!strcmp(name, "fused") && has_fused())
        return crc_fused;
    if (!strcmp(name, "sse4.2") && has_sse42())
        return crc_instruction;
#elif defined(SSE42)
    if (!strcmp(name, "armv8") && (getauxval(AT_HWCAP) & HWCAP_CRC32))
        return crc_instruction;
#endif
    return NULL;
}

static void set_up(void)
{
    static const char *const by_speed[] = {"vpclmul", "fused", "sse4.2", "armv8", "table"};
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = (c >> 1) ^ (c & 1 ? POLY : 0);
        table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int k = 1; k < 8; k++)
            table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 255];
    power_of_two[0] = 1u << 30;
    for (int k = 1; k < 64; k++)
        power_of_two[k] = multiply(power_of_two[k - 1], power_of_two[k - 1]);
    shift_by(shift_long, LONG_NBYTES);
    shift_by(shift_short, SHORT_NBYTES);
#if defined(__x86_64__)
    fold_constants(fold_2048, 2048);
    fold_constants(fold_1024, 1024);
    fold_constants(fold_512, 512);
    fold_constants(fold_256, 256);
    fold_constants(fold_128, 128);
    shift_by(shift_long_turns, 40 * LONG_TURNS);
    shift_by(shift_short_turns, 40 * SHORT_TURNS);
#endif
    for (size_t i = 0; !best; i++) {
        best_name = by_speed[i];
        best = find(best_name);
    }
}

uint32_t skv_crc32c(uint32_t crc, const void *data, size_t nbytes)
{
    pthread_once(&once, set_up);
    return ~best(~crc, data, nbytes);
}

int skv_crc32c_with(const char *name, uint32_t crc, const void *data, size_t nbytes,
                    uint32_t *result)
{
    pthread_once(&once, set_up);
    crc_fn fn = find(name);
    if (!fn)
        return -1;
    *result = ~fn(~crc, data, nbytes);
    return 0;
}

uint32_t skv_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b)
{
    pthread_once(&once, set_up);
    /* Lengths repeat (equal segments), but 64 squarings at most are cheap enough as they are.
     * 8*nbytes would overflow only past 2^61 bytes, more than any drive holds. */
    return multiply(x_to_the(8 * nbytes_b), crc_a) ^ crc_b;
}

const char *skv_crc32c_name(void)
{
    pthread_once(&once, set_up);
    return best_name;
}
