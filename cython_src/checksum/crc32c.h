/* CRC32C (Castagnoli, as in RFC 3720 and ext4). */
#ifndef SPDK_KV_CRC32C_H
#define SPDK_KV_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Continues `crc` (0 at the start) over `nbytes` of `data`. Thread-safe. */
uint32_t skv_crc32c(uint32_t crc, const void *data, size_t nbytes);

/* CRC of A||B from the CRCs of A and of B, and B's length. */
uint32_t skv_crc32c_combine(uint32_t crc_a, uint32_t crc_b, uint64_t nbytes_b);

/* The implementation in use on this processor: "vpclmul", "fused", "sse4.2", "armv8" or "table". */
const char *skv_crc32c_name(void);

/* Computes with the named implementation. Returns 0, or -1 if it cannot run here. */
int skv_crc32c_with(const char *name, uint32_t crc, const void *data, size_t nbytes,
                    uint32_t *result);

#endif
