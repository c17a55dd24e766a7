# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The transfer loop: many segments, one completion.

A :class:`Queue` drives one engine queue. A :class:`Transfer` is a list of pieces (a drive range
and a memory range each); the queue cuts them into segments, keeps its target depth of them in
flight, finishes each one (checksum, copy out of a bounce slot), and wakes the waiters once, at
the end. All of that runs without the GIL.

Segments of a transfer that follow each other on the drive are moved by one command, up to the
segment size: through one slot, or to and from where each lies if the engine can do that. Unless such
a command moves everything, each is moved by itself, so that failures are told of the right one.

A transfer may carry a link (``gpu_link.h``): then the callers' memory is a GPU's. Every segment
goes through a slot, and its copy to or from the GPU overlaps with the drive's work on others.

The driver: at any moment at most one thread drives the queue, and it alone calls the engine.
A thread that waits for a transfer becomes the driver if there is none, so that a lone `get`
costs no thread switch; otherwise the queue's own thread drives. The mutex guards only the lists
and flags that threads share; it is never held over a wait or a copy.

io_uring hands a command's completion to the thread that submitted it, when that next runs: were
it asleep in a page fault, everybody's commands would wait. So there the queue's own thread always
drives, and a small transfer that finds the queue idle takes another, with a ring of its own, for
one transfer at a time: its caller drives that, and submits nobody else's commands.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.errno cimport EAGAIN, EINTR, EIO
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from backend cimport (
    SKV_BACKEND_CAPSULE, SKV_BUCKETS, SKV_DISCARD, SKV_FLUSH, SKV_OPS, SKV_QUARTER, SKV_READ,
    SKV_WRITE, iovec, skv_backend, skv_bucket, skv_bucket_end_ns, skv_bucket_ns, skv_io, skv_now_ns,
)
from crc32c cimport skv_crc32c, skv_crc32c_combine
from gpu_link cimport (
    SKV_FROM_DEVICE, SKV_LINK_CAPSULE, SKV_LINK_STATUS, SKV_TO_DEVICE, skv_copy, skv_link,
)
from transfer.types cimport *
from pthreads cimport (
    cpu_clock_ns, init_cond, own_cpu_clock, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_cond_t,
    pthread_cond_wait, pthread_detach, pthread_join, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t, start_thread,
    wait_until,
)

from spdk_kv.errors import ClosedError, DeviceError

cdef extern from *:
    """
    /* A thread that sees the flag also sees what was written before it was set. */
    static inline int skv_is_set(const unsigned char *flag)
    {
        return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
    }
    static inline void skv_set(unsigned char *flag)
    {
        __atomic_store_n(flag, 1, __ATOMIC_RELEASE);
    }
    /* For what the mutex guards and some look at without it: they find a value that may be a moment
       old. Who holds the mutex and changes it stores it whole. */
    #define skv_peek(at) __atomic_load_n((at), __ATOMIC_RELAXED)
    #define skv_put(at, value) __atomic_store_n((at), (value), __ATOMIC_RELAXED)
    /* Prefetches memory; the addresses need not be valid. */
    static inline void skv_prefetch(const unsigned char *at, uint32_t nbytes, int to_write)
    {
        for (uint32_t i = 0; i < nbytes; i += 64)
            if (to_write)
                __builtin_prefetch(at + i, 1);
            else
                __builtin_prefetch(at + i, 0);
    }
    """
    bint skv_is_set(const unsigned char *flag) nogil
    void skv_set(unsigned char *flag) nogil
    uint64_t skv_peek(const uint64_t *word) nogil
    void skv_put(uint64_t *word, uint64_t value) nogil
    unsigned char skv_peek_byte "skv_peek"(const unsigned char *byte) nogil
    void skv_put_byte "skv_put"(unsigned char *byte, unsigned char value) nogil
    Transfer_ *skv_peek_transfer "skv_peek"(Transfer_ **at) nogil
    void skv_put_transfer "skv_put"(Transfer_ **at, Transfer_ *t) nogil
    void skv_prefetch(const unsigned char *at, uint32_t nbytes, int to_write) nogil

cdef extern from "<errno.h>" nogil:
    int EBUSY
    int ECANCELED
    int ENODATA
    int ESHUTDOWN
    int ETIMEDOUT

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/prctl.h>" nogil:
    int prctl(int option, unsigned long argument)
    int PR_GET_TIMERSLACK
    int PR_SET_TIMERSLACK

cdef extern from *:
    """
    #include <pthread.h>
    #include <unistd.h>

    /* Cached: a small transfer needs it four times, and each call would take 5 % of its time. */
    static int skv_pid;
    static void skv_note_pid(void) { skv_pid = (int)getpid(); }
    static int skv_follow_forks(void)
    {
        skv_note_pid();
        return pthread_atfork(NULL, NULL, skv_note_pid);
    }
    static inline int skv_getpid(void) { return skv_pid; }
    """
    int _getpid "skv_getpid"() nogil
    int skv_follow_forks()

if skv_follow_forks():
    raise MemoryError("the fork handler could not be registered")

READ = SKV_READ
WRITE = SKV_WRITE
FLUSH = SKV_FLUSH
DISCARD = SKV_DISCARD

DEMAND = 0
PREFETCH = 1

# Included rather than compiled separately: segments, copies and loop call each other for every
# segment, and the classes call the loop; calls between extensions are never inlined.
include "segments.pxi"
include "copies.pxi"
include "loop.pxi"
include "queue.pxi"
include "cut.pxi"
include "api.pxi"
