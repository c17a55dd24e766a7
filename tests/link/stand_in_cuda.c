/*
 * A stand-in for libcuda.so.1: the calls that link/cuda.pyx makes, strict about their rules, with
 * "device" memory on the host. Every stream is a thread that works through its queue in order.
 *
 * Its own calls begin with standin_: they delay, fail and count.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_CONTEXT = 201, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_READY = 600,
       LAUNCH_FAILED = 719 };

typedef struct Event { uint64_t recorded, reached; int users, destroyed; } Event;
typedef struct Op {
    int kind; /* 0 copy, 1 record, 2 wait, 3 fill */
    void *to; const void *source; size_t nbytes; int value;
    Event *event; uint64_t number;
    struct Op *next;
} Op;
typedef struct Stream {
    pthread_t thread; Op *first, *last; int stopping, busy, stood;
} Stream;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static struct { char *at; size_t nbytes; } hosts[64];
static int context_a, context_b, initialised, retained, events, streams, registered, allocated;
static int copies, refuse_at, refuse_code, query_code, record_code, delay_us, held, register_code;
static __thread void *stack[16];
static __thread int depth, mode, exchanges;
static Stream default_stream;
static int default_started;

static void lock(void) { pthread_mutex_lock(&mutex); }
static int unlock(int rc) { pthread_mutex_unlock(&mutex); return rc; }
static int current(void) { return depth && stack[depth - 1] == &context_a; }

static void *work(void *argument)
{
    Stream *s = argument;
    lock();
    for (;;) {
        Op *op = s->first;
        if (!op && s->stopping)
            break;
        if (!op || (held && op->kind != 1 && op->kind != 2)
            || (op->kind == 2 && op->event->reached < op->number)) {
            pthread_cond_wait(&changed, &mutex);
            continue;
        }
        s->busy = 1;
        unlock(0);
        if (op->kind == 0 || op->kind == 3)
            usleep(delay_us);
        if (op->kind == 0)
            memcpy(op->to, op->source, op->nbytes);
        if (op->kind == 3)
            memset(op->to, op->value, op->nbytes);
        lock();
        if (op->kind == 1 && op->event->reached < op->number)
            op->event->reached = op->number;
        s->first = op->next;
        s->busy = 0;
        free(op);
        pthread_cond_broadcast(&changed);
    }
    unlock(0);
    return NULL;
}

static Stream *stream_of(void *handle)
{
    if (handle)
        return handle;
    if (!default_started) {
        default_started = 1;
        pthread_create(&default_stream.thread, NULL, work, &default_stream);
    }
    return &default_stream;
}

static void push(void *handle, Op made)
{
    Stream *s = stream_of(handle);
    Op *op = malloc(sizeof *op);
    *op = made;
    op->next = NULL;
    if (s->first)
        s->last->next = op;
    else
        s->first = op;
    s->last = op;
    pthread_cond_broadcast(&changed);
}

int cuInit(unsigned flags) { initialised = 1; return flags ? INVALID_VALUE : OK; }
int cuGetErrorName(int error, const char **name)
{
    *name = error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED"
          : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
          : error == INVALID_DEVICE ? "CUDA_ERROR_INVALID_DEVICE"
          : error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : NULL;
    return *name ? OK : INVALID_VALUE;
}
int cuGetErrorString(int error, const char **text)
{
    *text = "words about it";
    return error ? OK : INVALID_VALUE;
}
int cuDeviceGet(int *device, int ordinal)
{
    *device = ordinal + 40;
    return !initialised ? NO_DEVICE : ordinal ? INVALID_DEVICE : OK;
}
int cuDeviceGetName(char *name, int nbytes, int device)
{
    strncpy(name, "Stand-in", nbytes);
    return device == 40 ? OK : INVALID_DEVICE;
}
int cuDevicePrimaryCtxRetain(void **context, int device)
{
    retained += 1;
    *context = &context_a;
    return device == 40 ? OK : INVALID_DEVICE;
}
int cuDevicePrimaryCtxRelease_v2(int device)
{
    retained -= 1;
    return device == 40 ? OK : INVALID_DEVICE;
}
int cuCtxGetCurrent(void **context) { *context = depth ? stack[depth - 1] : NULL; return OK; }
int cuCtxPushCurrent_v2(void *context) { stack[depth++] = context; return OK; }
int cuCtxPopCurrent_v2(void **context)
{
    if (!depth)
        return INVALID_CONTEXT;
    *context = stack[--depth];
    return OK;
}
int cuThreadExchangeStreamCaptureMode(int *wanted)
{
    int before = mode;
    mode = *wanted;
    *wanted = before;
    exchanges += 1;
    return OK;
}
int cuStreamCreate(void **stream, unsigned flags)
{
    Stream *s = calloc(1, sizeof *s);
    if (!current() || flags != 1)
        return INVALID_CONTEXT;
    lock();
    streams += 1;
    pthread_create(&s->thread, NULL, work, s);
    *stream = s;
    return unlock(OK);
}
int cuStreamDestroy_v2(void *stream)
{
    Stream *s = stream;
    lock();
    streams -= 1;
    s->stopping = 1;
    pthread_cond_broadcast(&changed);
    unlock(0);
    pthread_join(s->thread, NULL);
    free(s);
    return OK;
}
int cuStreamSynchronize(void *stream)
{
    Stream *s = stream;
    lock();
    while (s->first)
        pthread_cond_wait(&changed, &mutex);
    return unlock(OK);
}
int cuStreamWaitEvent(void *stream, void *event, unsigned flags)
{
    Event *e = event;
    if (!current() || flags)
        return INVALID_CONTEXT;
    lock();
    push(stream, (Op){.kind = 2, .event = e, .number = e->recorded});
    return unlock(OK);
}
int cuEventCreate(void **event, unsigned flags)
{
    if (!current() || flags != 2)
        return INVALID_CONTEXT;
    lock();
    events += 1;
    *event = calloc(1, sizeof(Event));
    return unlock(OK);
}
int cuEventDestroy_v2(void *event) /* leaks it: an Op may still point to it */
{
    lock();
    events -= 1;
    return unlock(event ? OK : INVALID_VALUE);
}
int cuEventRecord(void *event, void *stream)
{
    Event *e = event;
    if (!current())
        return INVALID_CONTEXT;
    lock();
    if (record_code)
        return unlock(record_code);
    e->recorded += 1;
    push(stream, (Op){.kind = 1, .event = e, .number = e->recorded});
    return unlock(OK);
}
int cuEventQuery(void *event)
{
    Event *e = event;
    if (!current() || mode != 2)
        return INVALID_CONTEXT;
    lock();
    if (query_code)
        return unlock(query_code);
    return unlock(e->reached >= e->recorded ? OK : NOT_READY);
}
int cuMemHostRegister_v2(void *host, size_t nbytes, unsigned flags)
{
    if (!current() || (uintptr_t)host % 4096 || flags != 1)
        return INVALID_VALUE;
    lock();
    if (register_code)
        return unlock(register_code);
    for (int i = 0; i < 64; i++)
        if (hosts[i].at == host)
            return unlock(ALREADY_REGISTERED);
    for (int i = 0; i < 64; i++)
        if (!hosts[i].at) {
            hosts[i].at = host;
            hosts[i].nbytes = nbytes;
            registered += 1;
            return unlock(OK);
        }
    return unlock(OUT_OF_MEMORY);
}
int cuMemHostUnregister(void *host)
{
    lock();
    for (int i = 0; i < 64; i++)
        if (hosts[i].at == host) {
            hosts[i].at = NULL;
            registered -= 1;
            return unlock(OK);
        }
    return unlock(NOT_REGISTERED);
}
int cuMemAlloc_v2(uint64_t *device, size_t nbytes)
{
    if (!current())
        return INVALID_CONTEXT;
    *device = (uintptr_t)malloc(nbytes);
    allocated += 1;
    return OK;
}
int cuMemFree_v2(uint64_t device)
{
    if (device)
        allocated -= 1;
    free((void *)(uintptr_t)device);
    return OK;
}
static int copy(char *to, const char *source, const char *host, size_t nbytes, void *stream)
{
    int known = 0;
    if (!current())
        return INVALID_CONTEXT;
    lock();
    for (int i = 0; i < 64; i++)
        known |= hosts[i].at && hosts[i].at <= host
              && host + nbytes <= hosts[i].at + hosts[i].nbytes;
    if (!known) /* the real one would copy, and block */
        return unlock(NOT_REGISTERED);
    copies += 1;
    if (copies == refuse_at)
        return unlock(refuse_code);
    push(stream, (Op){.kind = 0, .to = to, .source = source, .nbytes = nbytes});
    return unlock(OK);
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *source, size_t nbytes, void *stream)
{
    return copy((char *)(uintptr_t)to, source, source, nbytes, stream);
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t source, size_t nbytes, void *stream)
{
    return copy(to, (char *)(uintptr_t)source, to, nbytes, stream);
}

/* A kernel on a stream that fills memory; it waits as long as copies are held, too. */
void standin_fill(void *stream, void *to, int value, size_t nbytes)
{
    lock();
    push(stream, (Op){.kind = 3, .to = to, .value = value, .nbytes = nbytes});
    unlock(0);
}
/* A kernel that copies from device memory to device memory. */
void standin_use(void *stream, void *to, const void *source, size_t nbytes)
{
    lock();
    push(stream, (Op){.kind = 0, .to = to, .source = source, .nbytes = nbytes});
    unlock(0);
}
void standin_hold(int on) { lock(); held = on; pthread_cond_broadcast(&changed); unlock(0); }
void standin_delay(int us) { delay_us = us; }
void standin_refuse(int number, int code) { lock(); refuse_at = copies + number;
                                            refuse_code = code; unlock(0); }
void standin_query(int code) { query_code = code; }
void standin_record(int code) { record_code = code; }
void standin_register(int code) { register_code = code; }
int standin_copies(void) { return copies; }
/* This thread's current context: 0 none, 1 the link's, 2 another. */
int standin_current(void) { return !depth ? 0 : stack[depth - 1] == &context_a ? 1 : 2; }
int standin_mode(void) { return mode; }
void standin_become_another(void) { stack[depth++] = &context_b; }
/* What is held now: contexts, streams, events, registrations, allocations. */
void standin_alive(int *found)
{
    int now[5] = {retained, streams, events, registered, allocated};
    memcpy(found, now, sizeof now);
}
