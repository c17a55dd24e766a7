/*
 * What the transfer loop asks of an engine: submit, poll, wake, cancel.
 *
 * An engine fills in one skv_backend and hands it over in a capsule named SKV_BACKEND_CAPSULE.
 * submit, poll and cancel are only ever called by the one thread that drives the queue at that
 * moment; wake may be called by any thread.
 */
#ifndef SPDK_KV_BACKEND_H
#define SPDK_KV_BACKEND_H

#include <stdint.h>
#include <time.h>

/*
 * skv_io.result of a command that an NVMe device failed: minus this, plus the status code type
 * and status code as the specification packs them (NVMe Base 2.0, figure 94).
 */
#define SKV_NVME_STATUS 0x10000

/* The number changes with the structures below: an engine built against others is refused. */
#define SKV_BACKEND_CAPSULE "spdk_kv.backend.4"

enum { SKV_READ = 0, SKV_WRITE = 1, SKV_FLUSH = 2, SKV_DISCARD = 3 };

/* One command to the device. The loop owns it; between submit and poll the engine does. */
typedef struct skv_io {
    uint64_t offset;     /* bytes from the start of the device */
    void *addr;
    uint32_t nbytes;
    int32_t op;
    int32_t result;      /* set on completion: bytes moved, or -errno */
    uint32_t cold_nbytes; /* of a read through a cache: bytes that were not in it */
    struct skv_io *next; /* for lists of the engine's own */
    uint64_t submitted_ns;
    /* An engine whose own threads copy the bytes of a read may sum them while they are in its
     * cache: CRC32C of each chunk_nbytes (0: of all) of the first sum_nbytes bytes to crcs, unless
     * that is NULL. It then sets summed; a command that moved less than sum_nbytes is not summed. */
    uint32_t *crcs;
    uint32_t chunk_nbytes;
    uint32_t sum_nbytes;
    uint8_t summed;
    /* What the caller asked for in one piece, this command's bytes among them: an engine may
     * bring more of it into a cache at once. */
    uint64_t piece_offset;
    uint64_t piece_nbytes;
    void *owner;         /* for the engine: what its callbacks need to find */
} skv_io;

typedef struct skv_backend {
    void *self;
    /* 0: taken, will come out of poll. -EAGAIN: full, try again after a completion. Any other
     * -errno: refused, will not come out of poll. May be buffered until the next poll. */
    int (*submit)(void *self, skv_io *io);
    /* Fills in up to `max` finished commands and returns their count. Waits for the first at
     * most wait_ns (0: not at all), and returns early on wake or a signal. */
    int (*poll)(void *self, skv_io **done, int max, int64_t wait_ns);
    void (*wake)(void *self);
    /* Asks that a submitted command end soon (with -ECANCELED); it still comes out of poll. */
    void (*cancel)(void *self, skv_io *io);
    /* Whether the device can move these bytes itself; NULL: any memory will do. Called by the
     * thread that submits a transfer. Where it cannot, the loop goes through a bounce slot. */
    int (*reaches)(void *self, const void *addr, uint64_t nbytes);
} skv_backend;

static inline uint64_t skv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Between two looks at what another thread writes: leaves this core to its other hyperthread. */
static inline void skv_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Latency histogram: 16 buckets to each doubling, so a bucket is at most 6.25 % wide. */
#define SKV_BUCKETS 640

static inline int skv_bucket(uint64_t ns)
{
    if (ns < 16)
        return (int)ns;
    int exponent = 63 - __builtin_clzll(ns);
    int bucket = (exponent - 3) * 16 + (int)((ns >> (exponent - 4)) & 15);
    return bucket < SKV_BUCKETS ? bucket : SKV_BUCKETS - 1;
}

/* The middle of a bucket, in nanoseconds. */
static inline uint64_t skv_bucket_ns(int bucket)
{
    if (bucket < 16)
        return (uint64_t)bucket;
    int exponent = bucket / 16 + 3;
    uint64_t low = (16ull + (uint64_t)(bucket % 16)) << (exponent - 4);
    return low + ((1ull << (exponent - 4)) >> 1);
}

#endif
