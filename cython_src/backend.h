/*
 * The interface between the transfer loop and an engine: submit, poll, wake, cancel.
 *
 * An engine fills in one skv_backend and passes it in a capsule named SKV_BACKEND_CAPSULE.
 * Only the thread that currently drives the queue calls submit, poll and cancel; any thread may
 * call wake. With `bind` that is the queue's own thread, always.
 */
#ifndef SPDK_KV_BACKEND_H
#define SPDK_KV_BACKEND_H

#include <stdint.h>
#include <sys/uio.h>
#include <time.h>

/*
 * skv_io.result of a command that an NVMe drive failed: minus this, plus the status code type
 * and status code as the specification packs them (NVMe Base 2.0, figure 94).
 */
#define SKV_NVME_STATUS 0x10000

/* The number changes with the structures below: an engine built for another is refused. */
#define SKV_BACKEND_CAPSULE "spdk_kv.backend.8"

enum { SKV_READ = 0, SKV_WRITE = 1, SKV_FLUSH = 2, SKV_DISCARD = 3, SKV_OPS = 4 };

/* One command to the drive. The loop owns it; between submit and poll the engine does. */
typedef struct skv_io {
    uint64_t offset;     /* bytes from the start of the drive */
    void *addr;
    /* Where `places` is not 0: nbytes lie in so many places, one behind the other, and not at addr.
     * Only for an engine that says how many it takes (most_places). */
    const struct iovec *place;
    uint32_t places;
    uint32_t nbytes;
    int32_t op;
    int32_t result;      /* set on completion: bytes moved, or -errno */
    uint32_t cold_nbytes; /* bytes of a cached read that were not in the cache */
    struct skv_io *next; /* for the engine's lists */
    uint64_t submitted_ns;
    /* An engine whose threads copy a read's bytes may sum them while they are in the CPU's cache:
     * CRC32C of each chunk_nbytes (0: of all) of the first sum_nbytes bytes into crcs, unless that
     * is NULL. It then sets summed; a command that moved less than sum_nbytes is not summed. */
    uint32_t *crcs;
    uint32_t chunk_nbytes;
    uint32_t sum_nbytes;
    uint8_t summed;
    /* The caller's piece that contains this command's bytes: an engine may fill a cache with
     * more of it at once. */
    uint64_t piece_offset;
    uint64_t piece_nbytes;
    void *owner;         /* for the engine's callbacks */
} skv_io;

typedef struct skv_backend {
    void *self;
    /* 0: taken, poll will return it. -EAGAIN: full, try again after a completion. Any other
     * -errno: refused, poll will not return it. May be buffered until the next poll. */
    int (*submit)(void *self, skv_io *io);
    /* Fills in up to `max` finished commands and returns their count. Waits for the first at
     * most wait_ns (0: not at all), and returns early on wake or a signal. With `least` above 1
     * it may wait for so many of them, through a wake as well. */
    int (*poll)(void *self, skv_io **done, int max, int least, int64_t wait_ns);
    void (*wake)(void *self);
    /* Makes a submitted command end soon if possible (with -ECANCELED); poll still returns it. */
    void (*cancel)(void *self, skv_io *io);
    /* Whether the drive can reach this memory; NULL: it reaches all. Called by the thread that
     * submits a transfer. If it cannot, the loop uses a bounce slot. */
    int (*reaches)(void *self, const void *addr, uint64_t nbytes);
    /* For an engine whose commands belong to the thread that submits them; all three or none.
     * The queue's own thread calls `bind` before anything else (an -errno ends it) and `unbind`
     * after everything else. Between the two, other threads that need something of it call
     * `ask(asked)`, and it then calls `serve`. */
    int (*bind)(void *self, void (*ask)(void *asked), void *asked);
    void (*serve)(void *self);
    void (*unbind)(void *self);
    /* In how many places of memory the bytes of one command may lie. 0: in one, and segments that
     * follow each other there are commands of their own, as threads that copy and sum want them. */
    uint32_t most_places;
    /* CPU time of the engine's own threads, in nanoseconds; NULL: it has none. Any thread calls
     * it, until the queue is closed. */
    uint64_t (*cpu_ns)(void *self);
} skv_backend;

static inline uint64_t skv_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* For busy-waiting: yields the core to its other hyperthread. */
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

/* Where a bucket ends, in nanoseconds. */
static inline uint64_t skv_bucket_end_ns(int bucket)
{
    if (bucket < 16)
        return (uint64_t)bucket + 1;
    return (17ull + (uint64_t)(bucket % 16)) << (bucket / 16 - 1);
}

/* So many of them are a quarter of a doubling. */
#define SKV_QUARTER 4

#endif
