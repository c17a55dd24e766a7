# cython: language_level=3
"""What no interrupt can lose: a lock held for a while, bytes counted while they are in use, memory
that somebody exports, and what is to be done when memory goes.

Python runs signal handlers between its own bytecodes, never within these methods. A context
manager in Python may be interrupted after it has taken a lock and before the block begins, or
before it has given the lock back; a counter between a change and the note of who made it; a
``__del__`` or a finalizer before its first step, and the exception is swallowed.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer
from cpython.ref cimport Py_INCREF


cdef class Held:
    """``with Held(lock, timeout_s, late):`` is ``with lock:``, but waits ``timeout_s`` seconds at
    most, and then raises what ``late()`` returns."""
    cdef object _lock
    cdef double _timeout_s
    cdef object _late

    def __init__(self, lock, double timeout_s, late):
        self._lock = lock
        self._timeout_s = timeout_s
        self._late = late

    def __enter__(self):
        if not self._lock.acquire(True, self._timeout_s):
            raise self._late()

    def __exit__(self, kind, error, trace):
        self._lock.release()


cdef class Account:
    """``nbytes``: of all that :meth:`hold` returned and that still exist."""
    cdef readonly size_t nbytes

    def hold(self, size_t nbytes):
        """Counts ``nbytes`` for as long as the object that it returns is referred to."""
        cdef Hold hold = Hold.__new__(Hold)
        hold.nbytes = nbytes
        hold._account = self
        self.nbytes += nbytes
        return hold


@cython.no_gc_clear
cdef class Hold:
    """See :meth:`Account.hold`."""
    cdef readonly size_t nbytes
    cdef Account _account

    def __dealloc__(self):
        if self._account is not None:
            self._account.nbytes -= self.nbytes


@cython.no_gc_clear
cdef class Registered:
    """The memory of ``region``, registered with somebody until its last reference goes: a writable
    buffer.

    ``region``, with ``address`` and ``nbytes``, is released after that; never where the memory
    could not be unregistered, since others may still reach it.
    """
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef object _region
    cdef list _undo

    def __cinit__(self, region):
        self.address = region.address
        self.nbytes = region.nbytes
        self._region = region
        self._undo = []

    def add(self, register, unregister, *more):
        """Calls ``register(address, nbytes, *more)``, and ``unregister(address)`` in the end.

        Both are to be native functions. Returns what the first does; if that is neither None nor
        0, nothing was registered.
        """
        result = register(self.address, self.nbytes, *more)
        if result is None or int(result) == 0:
            self._undo.append(unregister)
        return result

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, <void *>self.address, self.nbytes, 0, flags)

    def __dealloc__(self):
        for unregister in self._undo:
            try:
                unregister(self.address)
            except BaseException:
                Py_INCREF(self._region)  # never freed
                raise  # which is reported, as an exception of __del__ is


@cython.no_gc_clear
cdef class AtEnd:
    """Calls ``call(argument)`` when its last reference goes; ``call`` is to be a native function."""
    cdef object _call
    cdef object _argument

    def __cinit__(self, call, argument):
        self._call = call
        self._argument = argument

    def __dealloc__(self):
        self._call(self._argument)


@cython.no_gc_clear
cdef class Export:
    """The memory of ``thing``, a buffer in C order, which is neither moved nor freed as long as this
    lives: numpy refuses to resize its array. BufferError."""
    cdef readonly size_t address
    cdef readonly size_t nbytes
    cdef Py_buffer _buffer
    cdef bint _is_held

    def __cinit__(self, thing):
        PyObject_GetBuffer(thing, &self._buffer, PyBUF_SIMPLE)
        self._is_held = True
        self.address = <size_t>self._buffer.buf
        self.nbytes = self._buffer.len

    def __dealloc__(self):
        if self._is_held:
            PyBuffer_Release(&self._buffer)
