/*
 * The interface between the transfer loop and a link between host memory and a GPU's memory.
 *
 * A link fills in one skv_link and passes it in a capsule named SKV_LINK_CAPSULE. Several queues
 * and threads may call it at once. Nothing may block. Copies of one direction end in the order in
 * which they were started. DEVICE in the names is CUDA's word for the GPU.
 */
#ifndef SPDK_KV_LINK_H
#define SPDK_KV_LINK_H

#include <stdint.h>

/* A failed copy's result is minus this, plus the link's own code; NVMe statuses are smaller. */
#define SKV_LINK_STATUS 0x20000

#define SKV_LINK_CAPSULE "spdk_kv.link"

enum { SKV_TO_DEVICE = 0, SKV_FROM_DEVICE = 1 };

/* One copy. The loop owns it; from copy until done returns 1 the link does. */
typedef struct skv_copy {
    void *host;         /* in memory that is registered with the link */
    uint64_t device;
    uint32_t nbytes;
    int32_t direction;
    int32_t hold;       /* the event stays valid until `release` */
    int32_t result;     /* set when it is done: 0, or a negative status */
    void *event;        /* the link's own; set by copy */
    uint64_t due_ns;    /* for the loop: expected end; 0: unknown */
} skv_copy;

typedef struct skv_link {
    void *self;
    /* A copy's cost, by direction; 0 if not measured. */
    double ns_per_byte[2];
    uint64_t latency_ns[2];
    /* Starts a copy. 0, or a negative status: nothing was started. */
    int (*copy)(void *self, skv_copy *copy);
    /* Whether it ended, also by failing; not called again after that. */
    int (*done)(void *self, skv_copy *copy);
    /* Records an event after what a stream of the caller's holds now. A link without streams has
     * NULL here and in the next three. */
    int (*mark)(void *self, void *stream, void **event);
    /* Copies started from now on wait for that event. */
    int (*after)(void *self, int direction, void *event);
    /* Makes a stream of the caller's wait for an event. */
    int (*follow)(void *self, void *stream, void *event);
    /* Returns an event of mark, or one that was held. */
    void (*release)(void *self, void *event);
} skv_link;

#endif
