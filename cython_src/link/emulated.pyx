# cython: language_level=3, boundscheck=False, wraparound=False
"""A link without a GPU: host memory stands for GPU memory, and copies take a given time.

For measurements and tests on machines without a GPU. A native thread moves the bytes; a copy ends
once they are moved, but not before a link of the given speed would have moved them.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.time cimport timespec

from backend cimport skv_now_ns
from gpu_link cimport (
    SKV_FROM_DEVICE, SKV_LINK_CAPSULE, SKV_LINK_STATUS, SKV_TO_DEVICE, skv_copy, skv_link,
)
from pthreads cimport (
    init_cond, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal, pthread_cond_t,
    pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, pthread_t, start_thread,
)

cdef extern from "<unistd.h>" nogil:
    int getpid()

cdef extern from "<time.h>" nogil:
    int nanosleep(const timespec *request, timespec *remaining)

# This link's statuses.
DEF REFUSED = 1
DEF FAILED = 2
# How long `copy` sleeps between two polls.
DEF LOOK_NS = 50_000


# One copy; for the loop, its event.
cdef struct Item:
    unsigned char *to
    const unsigned char *source
    size_t nbytes
    uint64_t due_ns    # when a link of this speed would be done
    uint8_t moved
    int result
    Item *next


cdef struct Emulated:
    skv_link link
    pthread_mutex_t mutex
    pthread_cond_t work
    pthread_t thread
    Item *todo
    Item *todo_tail
    uint64_t free_ns[2]    # when each direction is free again
    uint64_t copies
    uint64_t nbytes[2]
    uint64_t refuse_at     # number of the copy that is refused or fails; 0: none
    uint64_t fail_at
    bint moves
    bint paused
    bint stopping


cdef int _copy(void *self, skv_copy *copy) noexcept nogil:
    cdef Emulated *e = <Emulated *>self
    cdef Item *item = <Item *>calloc(1, sizeof(Item))
    cdef int direction = copy.direction
    cdef uint64_t now
    if item == NULL:
        return -ENOMEM
    item.nbytes = copy.nbytes
    item.to = <unsigned char *>copy.host
    item.source = <const unsigned char *><size_t>copy.device
    if direction == SKV_TO_DEVICE:
        item.to = <unsigned char *><size_t>copy.device
        item.source = <const unsigned char *>copy.host
    pthread_mutex_lock(&e.mutex)
    e.copies += 1
    if e.copies == e.refuse_at:
        pthread_mutex_unlock(&e.mutex)
        free(item)
        return -(SKV_LINK_STATUS + REFUSED)
    if e.copies == e.fail_at:
        item.result = -(SKV_LINK_STATUS + FAILED)
    now = skv_now_ns()
    item.due_ns = max(now, e.free_ns[direction]) + e.link.latency_ns[direction] + <uint64_t>(
        <double>copy.nbytes * e.link.ns_per_byte[direction])
    e.free_ns[direction] = item.due_ns
    e.nbytes[direction] += copy.nbytes
    if not e.moves:
        item.moved = 1
    else:
        if e.todo == NULL:
            e.todo = item
        else:
            e.todo_tail.next = item
        e.todo_tail = item
        pthread_cond_signal(&e.work)
    pthread_mutex_unlock(&e.mutex)
    copy.event = item
    return 0


cdef int _done(void *self, skv_copy *copy) noexcept nogil:
    cdef Emulated *e = <Emulated *>self
    cdef Item *item = <Item *>copy.event
    cdef bint over
    pthread_mutex_lock(&e.mutex)
    over = item.moved and not e.paused and skv_now_ns() >= item.due_ns
    if over:
        copy.result = item.result
    pthread_mutex_unlock(&e.mutex)
    if over:
        free(item)
    return over


cdef void *_thread_main(void *argument) noexcept nogil:
    cdef Emulated *e = <Emulated *>argument
    cdef Item *item
    pthread_mutex_lock(&e.mutex)
    while True:
        item = e.todo
        # Nothing moves while the link is paused.
        if item == NULL or (e.paused and not e.stopping):
            if e.stopping:
                break
            pthread_cond_wait(&e.work, &e.mutex)
            continue
        e.todo = item.next
        pthread_mutex_unlock(&e.mutex)
        if not item.result:
            memcpy(item.to, item.source, item.nbytes)
        pthread_mutex_lock(&e.mutex)
        item.moved = 1
    pthread_mutex_unlock(&e.mutex)
    return NULL


@cython.no_gc_clear
cdef class EmulatedLink:
    """A link of ``bytes_per_s`` in each direction, plus ``latency_s`` per copy.

    ``moves=False``: copies take their time and move nothing, since copies by hardware cost no CPU
    time; "GPU" memory then does not hold the data. ``capsule`` is for transfers, which keep the
    link alive. Raises ValueError for an impossible speed.
    """
    cdef Emulated _e
    cdef object __weakref__
    cdef readonly object capsule
    cdef readonly str name
    cdef readonly double bytes_per_s
    cdef readonly double latency_s
    cdef int _pid
    cdef bint _started

    def __cinit__(self, double bytes_per_s, double latency_s=0.0, *, bint moves=True):
        cdef int direction
        if not 0 < bytes_per_s < 1e15 or not 0 <= latency_s < 1:
            raise ValueError(
                f"a link of {bytes_per_s:g} bytes/s with {latency_s:g} s per copy is impossible")
        self.name = "emulated"
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._pid = getpid()
        self._e.moves = moves
        for direction in (SKV_TO_DEVICE, SKV_FROM_DEVICE):
            self._e.link.ns_per_byte[direction] = 1e9 / bytes_per_s
            self._e.link.latency_ns[direction] = <uint64_t>(latency_s * 1e9)
        pthread_mutex_init(&self._e.mutex, NULL)
        init_cond(&self._e.work)
        self._e.link.self = &self._e
        self._e.link.copy = _copy
        self._e.link.done = _done
        if start_thread(&self._e.thread, _thread_main, &self._e):
            raise MemoryError("the emulated link's thread could not be started")
        self._started = True
        self.capsule = PyCapsule_New(&self._e.link, SKV_LINK_CAPSULE, NULL)

    def register(self, memory):
        """An object that keeps ``memory`` registered: here, ``memory`` itself."""
        return memory

    def explain(self, int code):
        """The description of a failed copy's code."""
        return {REFUSED: "the link refused the copy", FAILED: "the copy failed on its way"}.get(
            code, f"code {code}")

    def copy_time_s(self, size_t nbytes, bint to_device=True):
        """Seconds that a lone copy of ``nbytes`` takes."""
        return self.latency_s + nbytes / self.bytes_per_s

    def copy(self, size_t to, size_t source, size_t nbytes, *, bint to_device=True):
        """Copies at most 4 GiB - 1 between host and "GPU" memory. Blocks without the GIL. Raises
        OSError and ValueError."""
        cdef skv_copy one
        cdef timespec nap
        cdef int rc
        if nbytes > 0xffffffff:
            raise ValueError(f"a copy is at most 4 GiB - 1, not {nbytes} bytes")
        one.host = <void *>(source if to_device else to)
        one.device = to if to_device else source
        one.nbytes = <unsigned int>nbytes
        one.direction = SKV_TO_DEVICE if to_device else SKV_FROM_DEVICE
        nap.tv_sec = 0
        nap.tv_nsec = LOOK_NS
        with nogil:
            rc = _copy(&self._e, &one)
            if rc == 0:
                while not _done(&self._e, &one):
                    nanosleep(&nap, NULL)
                rc = one.result
        if rc:
            raise OSError(-rc, self.explain(-rc - SKV_LINK_STATUS))

    def fail(self, uint64_t number=1, *, bint at_once=False):
        """Makes the ``number``-th copy from now on fail; ``at_once``: it is refused."""
        pthread_mutex_lock(&self._e.mutex)
        if at_once:
            self._e.refuse_at = self._e.copies + number
        else:
            self._e.fail_at = self._e.copies + number
        pthread_mutex_unlock(&self._e.mutex)

    def pause(self):
        """Makes copies hang from now on, including those that have started."""
        pthread_mutex_lock(&self._e.mutex)
        self._e.paused = True
        pthread_mutex_unlock(&self._e.mutex)

    def resume(self):
        """Undoes :meth:`pause`."""
        pthread_mutex_lock(&self._e.mutex)
        self._e.paused = False
        pthread_cond_signal(&self._e.work)
        pthread_mutex_unlock(&self._e.mutex)

    def stats(self):
        """``copies`` started, ``to_device_nbytes`` and ``from_device_nbytes``."""
        return {
            "copies": self._e.copies,
            "to_device_nbytes": self._e.nbytes[SKV_TO_DEVICE],
            "from_device_nbytes": self._e.nbytes[SKV_FROM_DEVICE],
        }

    def __dealloc__(self):
        if not self._started or self._pid != getpid():
            return
        # Transfers hold their link: no copy is running.
        with nogil:
            pthread_mutex_lock(&self._e.mutex)
            self._e.stopping = True
            pthread_cond_broadcast(&self._e.work)
            pthread_mutex_unlock(&self._e.mutex)
            pthread_join(self._e.thread, NULL)
        pthread_mutex_destroy(&self._e.mutex)
        pthread_cond_destroy(&self._e.work)
