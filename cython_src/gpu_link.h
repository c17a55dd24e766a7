/*
 * What the transfer loop asks of a link: the way between host memory and a device's (a GPU's).
 *
 * A link fills in one skv_link and hands it over in a capsule named SKV_LINK_CAPSULE. Several
 * queues, and any thread, may call it at once. Nothing may block. Copies of one direction end in
 * the order in which they were begun.
 */
#ifndef SPDK_KV_LINK_H
#define SPDK_KV_LINK_H

#include <stdint.h>

/* A failed copy's result is minus this, plus the link's own code; NVMe statuses lie below. */
#define SKV_LINK_STATUS 0x20000

#define SKV_LINK_CAPSULE "spdk_kv.link"

enum { SKV_TO_DEVICE = 0, SKV_FROM_DEVICE = 1 };

/* One copy. The loop owns it; from copy until done says so the link does. */
typedef struct skv_copy {
    void *host;         /* in memory that was registered with the link */
    uint64_t device;
    uint32_t nbytes;
    int32_t direction;
    int32_t hold;       /* its event stays valid until `release` */
    int32_t result;     /* set when it is done: 0, or a negative status */
    void *event;        /* the link's own; set by copy */
    uint64_t due_ns;    /* for the loop: when to expect its end; 0: not known */
} skv_copy;

typedef struct skv_link {
    void *self;
    /* What a copy takes, by direction; 0 where it was not measured. */
    double ns_per_byte[2];
    uint64_t latency_ns[2];
    /* Begins a copy. 0, or a negative status: nothing was begun. */
    int (*copy)(void *self, skv_copy *copy);
    /* Whether it is over, one way or the other; not asked again once it is. */
    int (*done)(void *self, skv_copy *copy);
    /* An event for what is queued on a stream of the caller's by now. NULL, as are the three that
     * follow: the link knows no streams. */
    int (*mark)(void *self, void *stream, void **event);
    /* Copies begun from now on wait for that event. */
    int (*after)(void *self, int direction, void *event);
    /* A stream of the caller's waits for an event. */
    int (*follow)(void *self, void *stream, void *event);
    /* Gives back an event of mark, or one that was held. */
    void (*release)(void *self, void *event);
} skv_link;

#endif
