# cython: language_level=3, boundscheck=False, wraparound=False
"""The link to an NVIDIA GPU: asynchronous copies on its own streams.

The CUDA driver (libcuda) is loaded when the first link is opened: building and importing do not
need it. The GPU's primary context is also torch's, so that addresses, streams and errors are
shared with torch.
"""

cimport cython
from cpython.pycapsule cimport PyCapsule_New
from libc.errno cimport EIO, ENODEV, ENOMEM, ENOSYS
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, realloc

from backend cimport skv_now_ns
from libcuda cimport (
    CU_EVENT_DISABLE_TIMING, CU_MEMHOSTREGISTER_PORTABLE, CU_STREAM_CAPTURE_MODE_RELAXED,
    CU_STREAM_NON_BLOCKING, CUDA_ERROR_NOT_READY, CUDA_SUCCESS, CUcontext, CUdevice, CUdeviceptr,
    CUevent, CUresult, CUstream, Cuda,
)
from gpu_link cimport (
    SKV_FROM_DEVICE, SKV_LINK_CAPSULE, SKV_LINK_STATUS, SKV_TO_DEVICE, skv_copy, skv_link,
)
from pthreads cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t,
    pthread_mutex_unlock,
)

cdef extern from "<dlfcn.h>" nogil:
    void *dlopen(const char *path, int flags)
    void *dlsym(void *library, const char *name)
    char *dlerror()
    int RTLD_NOW

cdef extern from "<unistd.h>" nogil:
    int getpid()

# Sizes of the two copies that measure the speed, and how often each runs in a row.
DEF LARGE = 4 << 20
DEF SMALL = 64 << 10
DEF TIMES = 8


cdef struct State:
    skv_link link
    Cuda cuda
    CUcontext context
    CUstream streams[2]      # one per direction: a GPU copies both ways at once
    pthread_mutex_t mutex    # guards what follows
    CUevent *events          # free for use
    uint32_t events_count
    uint32_t events_room
    uint64_t copies
    uint64_t nbytes[2]


# What `_enter` changed of the calling thread.
cdef struct Entered:
    bint pushed
    bint relaxed
    int mode


cdef CUresult _enter(State *s, Entered *entered) noexcept nogil:
    """Makes the link's context current. Any waiting thread may run the loop, also one that uses
    another GPU: `_leave` restores its state."""
    cdef CUcontext current = NULL
    cdef CUresult rc = s.cuda.CtxGetCurrent(&current)
    entered.pushed = entered.relaxed = False
    if rc == CUDA_SUCCESS and current != s.context:
        rc = s.cuda.CtxPushCurrent(s.context)
        entered.pushed = rc == CUDA_SUCCESS
    if rc == CUDA_SUCCESS:
        # While a CUDA graph is captured, even a query of an event of another stream would
        # invalidate the capture, unless the thread is in relaxed mode.
        entered.mode = CU_STREAM_CAPTURE_MODE_RELAXED
        entered.relaxed = s.cuda.ThreadExchangeStreamCaptureMode(&entered.mode) == CUDA_SUCCESS
    return rc


cdef void _leave(State *s, Entered *entered) noexcept nogil:
    cdef CUcontext ignored
    if entered.relaxed:
        s.cuda.ThreadExchangeStreamCaptureMode(&entered.mode)
    if entered.pushed:
        s.cuda.CtxPopCurrent(&ignored)


cdef inline int _status(CUresult rc) noexcept nogil:
    return -(SKV_LINK_STATUS + rc) if rc else 0


cdef CUresult _take_event(State *s, CUevent *event) noexcept nogil:
    """Takes a free event or creates one. In the link's context."""
    pthread_mutex_lock(&s.mutex)
    event[0] = NULL
    if s.events_count:
        s.events_count -= 1
        event[0] = s.events[s.events_count]
    pthread_mutex_unlock(&s.mutex)
    if event[0] != NULL:
        return CUDA_SUCCESS
    return s.cuda.EventCreate(event, CU_EVENT_DISABLE_TIMING)


cdef void _release(void *self, void *event) noexcept nogil:
    # Waits already queued refer to the earlier record, so the event may be recorded again.
    cdef State *s = <State *>self
    cdef CUevent *grown
    cdef bint kept = True
    pthread_mutex_lock(&s.mutex)
    if s.events_count == s.events_room:
        grown = <CUevent *>realloc(s.events, (2 * s.events_room + 64) * sizeof(CUevent))
        kept = grown != NULL
        if kept:
            s.events = grown
            s.events_room = 2 * s.events_room + 64
    if kept:
        s.events[s.events_count] = event
        s.events_count += 1
    pthread_mutex_unlock(&s.mutex)
    if not kept:
        s.cuda.EventDestroy(event)


cdef int _copy(void *self, skv_copy *copy) noexcept nogil:
    cdef State *s = <State *>self
    cdef CUstream stream = s.streams[copy.direction]
    cdef CUevent event = NULL
    cdef Entered entered
    cdef CUresult rc = _enter(s, &entered)
    if rc == CUDA_SUCCESS:
        rc = _take_event(s, &event)
    if rc == CUDA_SUCCESS:
        if copy.direction == SKV_TO_DEVICE:
            rc = s.cuda.MemcpyHtoDAsync(copy.device, copy.host, copy.nbytes, stream)
        else:
            rc = s.cuda.MemcpyDtoHAsync(copy.host, copy.device, copy.nbytes, stream)
        if rc == CUDA_SUCCESS:
            rc = s.cuda.EventRecord(event, stream)
            if rc != CUDA_SUCCESS:
                # The copy runs without an event: the slot must not be reused before it ends.
                s.cuda.StreamSynchronize(stream)
        if rc != CUDA_SUCCESS:
            _release(self, event)
    _leave(s, &entered)
    if rc == CUDA_SUCCESS:
        copy.event = event
        pthread_mutex_lock(&s.mutex)
        s.copies += 1
        s.nbytes[copy.direction] += copy.nbytes
        pthread_mutex_unlock(&s.mutex)
    return _status(rc)


cdef int _done(void *self, skv_copy *copy) noexcept nogil:
    cdef State *s = <State *>self
    cdef Entered entered
    cdef CUresult rc = _enter(s, &entered)
    if rc == CUDA_SUCCESS:
        rc = s.cuda.EventQuery(copy.event)
    _leave(s, &entered)
    if rc == CUDA_ERROR_NOT_READY:
        return 0
    # Any other error ends the context: the GPU does nothing more in it.
    copy.result = _status(rc)
    if not copy.hold:
        _release(self, copy.event)
    return 1


cdef int _mark(void *self, void *stream, void **event) noexcept nogil:
    cdef State *s = <State *>self
    cdef CUevent taken = NULL
    cdef Entered entered
    cdef CUresult rc = _enter(s, &entered)
    event[0] = NULL
    if rc == CUDA_SUCCESS:
        rc = _take_event(s, &taken)
    if rc == CUDA_SUCCESS:
        rc = s.cuda.EventRecord(taken, stream)
        if rc == CUDA_SUCCESS:
            event[0] = taken
        else:
            _release(self, taken)
    _leave(s, &entered)
    return _status(rc)


cdef int _after(void *self, int direction, void *event) noexcept nogil:
    cdef State *s = <State *>self
    cdef Entered entered
    cdef CUresult rc = _enter(s, &entered)
    if rc == CUDA_SUCCESS:
        rc = s.cuda.StreamWaitEvent(s.streams[direction], event, 0)
    _leave(s, &entered)
    return _status(rc)


cdef int _follow(void *self, void *stream, void *event) noexcept nogil:
    cdef State *s = <State *>self
    cdef Entered entered
    cdef CUresult rc = _enter(s, &entered)
    if rc == CUDA_SUCCESS:
        rc = s.cuda.StreamWaitEvent(stream, event, 0)
    _leave(s, &entered)
    return _status(rc)


cdef _load(Cuda *cuda, bytes library):
    """Fills in `cuda`. OSError if there is no driver or it lacks a function."""
    cdef void *handle = dlopen(library, RTLD_NOW)
    cdef void **pointer = <void **>cuda
    cdef const char *why
    cdef bytes name
    if handle == NULL:
        why = dlerror()
        raise OSError(ENODEV, f"no CUDA driver: {(<bytes>why).decode(errors='replace')}")
    # In the order of the structure.
    names = [
        b"cuInit", b"cuGetErrorName", b"cuGetErrorString", b"cuDeviceGet", b"cuDeviceGetName",
        b"cuDevicePrimaryCtxRetain", b"cuDevicePrimaryCtxRelease_v2", b"cuCtxGetCurrent",
        b"cuCtxPushCurrent_v2", b"cuCtxPopCurrent_v2", b"cuThreadExchangeStreamCaptureMode",
        b"cuStreamCreate", b"cuStreamDestroy_v2", b"cuStreamSynchronize", b"cuStreamWaitEvent",
        b"cuEventCreate", b"cuEventDestroy_v2", b"cuEventRecord", b"cuEventQuery",
        b"cuMemHostRegister_v2", b"cuMemHostUnregister", b"cuMemAlloc_v2", b"cuMemFree_v2",
        b"cuMemcpyHtoDAsync_v2", b"cuMemcpyDtoHAsync_v2",
    ]
    assert len(names) * sizeof(void *) == sizeof(Cuda)
    for name in names:
        pointer[0] = dlsym(handle, name)
        if pointer[0] == NULL:
            raise OSError(ENOSYS, f"the CUDA driver is too old: it has no {name.decode()}")
        pointer += 1


@cython.no_gc_clear
cdef class _Registered:
    """Host memory registered with the GPU while this lives; holds the memory and the link."""
    cdef CudaLink _link
    cdef object _memory
    cdef size_t _address

    def __dealloc__(self):
        cdef State *s
        cdef Entered entered
        if self._address and self._link._pid == getpid():
            s = &self._link._s
            with nogil:
                if _enter(s, &entered) == CUDA_SUCCESS:
                    s.cuda.MemHostUnregister(<void *>self._address)
                _leave(s, &entered)


@cython.no_gc_clear
cdef class CudaLink:
    """The link to the GPU ``ordinal``, in the driver's numbering.

    ``capsule`` is for transfers, whose ``stream`` is a CUstream's handle, such as
    ``torch.cuda.current_stream().cuda_stream``. Creating a link retains the GPU's primary context
    and blocks without the GIL. Raises OSError if there is no such GPU.
    """
    cdef State _s
    cdef object __weakref__
    cdef readonly object capsule
    cdef readonly str name
    cdef readonly str device_name
    cdef readonly int ordinal
    cdef CUdevice _device
    cdef int _pid
    cdef bint _retained

    def __cinit__(self, int ordinal=0, *, str library="libcuda.so.1"):
        cdef State *s = &self._s
        cdef Entered entered
        cdef CUresult rc
        cdef char device_name[128]
        cdef int direction
        self._pid = getpid()
        self.name = "cuda"
        self.ordinal = ordinal
        pthread_mutex_init(&s.mutex, NULL)
        _load(&s.cuda, library.encode())
        with nogil:
            rc = s.cuda.Init(0)
            if rc == CUDA_SUCCESS:
                rc = s.cuda.DeviceGet(&self._device, ordinal)
            if rc == CUDA_SUCCESS:
                rc = s.cuda.DeviceGetName(device_name, sizeof(device_name), self._device)
            if rc == CUDA_SUCCESS:
                rc = s.cuda.DevicePrimaryCtxRetain(&s.context, self._device)
        if rc != CUDA_SUCCESS:
            raise OSError(ENODEV, f"no GPU {ordinal}: {self.explain(rc)}")
        self._retained = True
        self.device_name = (<bytes>device_name).decode(errors="replace")
        with nogil:
            rc = _enter(s, &entered)
            for direction in range(2):
                if rc == CUDA_SUCCESS:
                    # Non-blocking: a caller's default stream does not wait for it.
                    rc = s.cuda.StreamCreate(&s.streams[direction], CU_STREAM_NON_BLOCKING)
            _leave(s, &entered)
        if rc != CUDA_SUCCESS:
            raise OSError(EIO, f"no stream on GPU {ordinal}: {self.explain(rc)}")
        s.link.self = s
        s.link.copy = _copy
        s.link.done = _done
        s.link.mark = _mark
        s.link.after = _after
        s.link.follow = _follow
        s.link.release = _release
        self.capsule = PyCapsule_New(&s.link, SKV_LINK_CAPSULE, NULL)

    def register(self, memory):
        """Registers host memory (``address``, ``nbytes``) with the GPU while the returned object
        lives, which keeps the memory. Raises OSError (ENOMEM).
        """
        cdef State *s = &self._s
        cdef _Registered registered = _Registered.__new__(_Registered)
        cdef Entered entered
        cdef size_t address = memory.address, nbytes = memory.nbytes
        cdef CUresult rc
        with nogil:
            rc = _enter(s, &entered)
            if rc == CUDA_SUCCESS:
                rc = s.cuda.MemHostRegister(<void *>address, nbytes, CU_MEMHOSTREGISTER_PORTABLE)
            _leave(s, &entered)
        if rc != CUDA_SUCCESS:
            raise OSError(
                ENOMEM, f"{nbytes} bytes could not be registered with the GPU: {self.explain(rc)}")
        registered._link = self
        registered._memory = memory
        registered._address = address
        return registered

    def explain(self, int code):
        """The driver's name and description of an error."""
        cdef const char *name = NULL
        cdef const char *text = NULL
        self._s.cuda.GetErrorName(code, &name)
        self._s.cuda.GetErrorString(code, &text)
        if name == NULL or text == NULL:
            return f"CUDA error {code}"
        return f"{(<bytes>name).decode()} ({(<bytes>text).decode()})"

    def measure(self, memory):
        """Measures and stores the cost of copies between ``memory`` (registered, at least 4 MiB)
        and the GPU. Blocks for some milliseconds, without the GIL. Raises OSError."""
        cdef State *s = &self._s
        cdef Entered entered
        cdef size_t address = memory.address, nbytes = memory.nbytes
        cdef CUdeviceptr device = 0
        cdef uint64_t took[2][2]
        cdef int direction
        cdef double slope
        cdef CUresult rc
        if nbytes < LARGE:
            raise ValueError(f"measuring needs {LARGE} bytes, not {nbytes}")
        with nogil:
            rc = _enter(s, &entered)
            if rc == CUDA_SUCCESS:
                rc = s.cuda.MemAlloc(&device, LARGE)
            if rc == CUDA_SUCCESS:
                for direction in range(2):
                    if rc == CUDA_SUCCESS:
                        rc = _time(s, direction, address, device, SMALL, &took[direction][0])
                    if rc == CUDA_SUCCESS:
                        rc = _time(s, direction, address, device, LARGE, &took[direction][1])
                s.cuda.MemFree(device)
            _leave(s, &entered)
        if rc != CUDA_SUCCESS:
            raise OSError(EIO, f"copies to and from GPU {self.ordinal} failed: {self.explain(rc)}")
        for direction in range(2):
            slope = (<double>took[direction][1] - <double>took[direction][0]) / (LARGE - SMALL)
            if slope <= 0:  # noise on a busy machine: count all of it as bandwidth
                slope = <double>took[direction][1] / LARGE
            s.link.ns_per_byte[direction] = slope
            s.link.latency_ns[direction] = <uint64_t>max(
                0.0, <double>took[direction][0] - slope * SMALL)

    def copy_time_s(self, size_t nbytes, bint to_device=True):
        """Seconds that a copy of ``nbytes`` takes among others; 0.0 before :meth:`measure`."""
        cdef int direction = SKV_TO_DEVICE if to_device else SKV_FROM_DEVICE
        return (self._s.link.latency_ns[direction]
                + nbytes * self._s.link.ns_per_byte[direction]) / 1e9

    def stats(self):
        """``copies`` started, ``to_device_nbytes`` and ``from_device_nbytes``."""
        return {
            "copies": self._s.copies,
            "to_device_nbytes": self._s.nbytes[SKV_TO_DEVICE],
            "from_device_nbytes": self._s.nbytes[SKV_FROM_DEVICE],
        }

    def __dealloc__(self):
        cdef State *s = &self._s
        cdef Entered entered
        cdef uint32_t i
        if not self._retained or self._pid != getpid():
            return
        # Transfers and engines hold their link: no copy is running.
        with nogil:
            if _enter(s, &entered) == CUDA_SUCCESS:
                for i in range(s.events_count):
                    s.cuda.EventDestroy(s.events[i])
                for i in range(2):
                    if s.streams[i] != NULL:
                        s.cuda.StreamDestroy(s.streams[i])
            _leave(s, &entered)
            s.cuda.DevicePrimaryCtxRelease(self._device)
        free(s.events)
        pthread_mutex_destroy(&s.mutex)


cdef CUresult _time(State *s, int direction, size_t host, CUdeviceptr device, size_t nbytes,
                    uint64_t *took_ns) noexcept nogil:
    """Nanoseconds per copy of TIMES in a row, at best."""
    cdef CUstream stream = s.streams[direction]
    cdef CUresult rc = CUDA_SUCCESS
    cdef uint64_t began, best = 0
    cdef int row, i
    for row in range(4):
        began = skv_now_ns()
        for i in range(TIMES):
            if direction == SKV_TO_DEVICE:
                rc = s.cuda.MemcpyHtoDAsync(device, <void *>host, nbytes, stream)
            else:
                rc = s.cuda.MemcpyDtoHAsync(<void *>host, device, nbytes, stream)
            if rc != CUDA_SUCCESS:
                return rc
        rc = s.cuda.StreamSynchronize(stream)
        if rc != CUDA_SUCCESS:
            return rc
        began = (skv_now_ns() - began) // TIMES
        # The first row includes the driver's one-time work.
        if row and (best == 0 or began < best):
            best = began
    took_ns[0] = best
    return CUDA_SUCCESS
