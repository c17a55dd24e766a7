# cython: language_level=3
"""What no interrupt can lose: a lock held for a while, and bytes counted while they are in use.

Python runs signal handlers between its own bytecodes, never within these methods. A context
manager in Python may be interrupted after it has taken a lock and before the block begins, or
before it has given the lock back; a counter between a change and the note of who made it.
"""

cimport cython


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
